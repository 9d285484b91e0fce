"The paper's test sets: their protocols, its numbers, and runs that fail in parts and go on."
import os
import subprocess
import sys
from dataclasses import replace

import pandas as pd
import pytest
import torch

from foundir_v2 import cli
from foundir_v2.benchmark import BENCHMARKS, benchmark, protocols, published, rank_table, ranks, results_table
from foundir_v2.classical import Bicubic
from foundir_v2.core import FoundIRError, generator, load_image, save_image
from foundir_v2.iqa import METRICS, score
from foundir_v2.layouts import LAYOUTS
from foundir_v2.memo import Memo
from foundir_v2.restorers import SIMPLE, PipelineRestorer
from foundir_v2.tasks import SUBTASKS
from foundir_v2.trials import (_special, method_id, protocol_id, questions, read_cases, run_trials, set_folders,
                               trial_summary, write_trials)

SETS = {  # as they are unpacked: folder -> pictures; those that no test set has are behind a "-"
    "4KRD": ["test/002/blur/1.png", "test/002/sharp/1.png", "-train/001/blur/1.png", "-train/001/sharp/1.png"],
    "LSD": ["LSD/test/blur/2.png", "LSD/test/sharp/2.png"],
    "PolyU": ["CroppedImages/Canon_chair_16_real.png", "-CroppedImages/Canon_chair_16_mean.png"],
    "Dense-HAZE": ["Dense_Haze_NTIRE19/hazy/01_hazy.png", "Dense_Haze_NTIRE19/GT/01_GT.png"],
    "nh_haze": ["01_hazy.png", "01_GT.png", "02_hazy.png", "02_GT.png"],
    "RS-Cloud": ["RICE1/cloud/0.png", "RICE1/label/0.png"],
    "HQ-NightRain": ["RS/test/input/2.png", "RS/test/target/2.png", "-RS/train/input/1.png", "-RS/train/target/1.png"],
    "uavrain1k": ["input/2.png", "target/2.png"],  # the test part alone
    "WeatherBench": ["test/snow/input/2.png", "test/snow/target/2.png", "-test/rain/input/3.png",
                     "-test/rain/target/3.png"],
    "UHD-LL": ["testing_set/input/1.png", "testing_set/gt/1.png"],
    "FoundIR": ["low_light/LQ/2.png", "low_light/GT/2.png", "16Lowlight_Noise/LQ/3.png", "16Lowlight_Noise/GT/3.png",
                "-haze/LQ/4.png", "-haze/GT/4.png"],
    "RealPhoto60": ["a.png", "sub/b.png"],
    "RealDeg": ["old/c.png", "Face/d.png"]}
INPUTS = {
    "fourkrd": ["test/002/blur/1.png"], "lsd": ["LSD/test/blur/2.png"],
    "polyu": ["CroppedImages/Canon_chair_16_real.png"], "dense_haze": ["Dense_Haze_NTIRE19/hazy/01_hazy.png"],
    "nh_haze": ["01_hazy.png", "02_hazy.png"], "rs_cloud": ["RICE1/cloud/0.png"],
    "hq_nightrain": ["RS/test/input/2.png"], "uav_rain1k": ["input/2.png"], "weatherbench": ["test/snow/input/2.png"],
    "uhd_ll": ["testing_set/input/1.png"], "foundir_l": ["low_light/LQ/2.png"],
    "foundir_ln": ["16Lowlight_Noise/LQ/3.png"], "realphoto60": ["a.png", "sub/b.png"], "realdeg_old": ["old/c.png"],
    "realdeg_face": ["Face/d.png"]}


def make_sets(root, sets=SETS):
    for name, files in sets.items():
        for i, file in enumerate(f.removeprefix("-") for f in files):
            save_image(picture(name, i), root / name / file)
    return root


def picture(*seed):
    coarse = torch.rand(1, 3, 6, 6, generator=generator(*seed))
    return torch.nn.functional.interpolate(coarse, size=(48, 48), mode="bicubic")[0].clamp(0, 1)


@pytest.fixture(scope="module")
def sets(tmp_path_factory): return make_sets(tmp_path_factory.mktemp("sets"))


def test_the_papers_count():
    first = rank_table().iloc[0]
    assert first.name == "FoundIR-v2" and (first.best, first.second, first.comparisons) == (51, 10, 75)
    assert round(first.share, 3) == 0.813


def test_ranks_follow_the_metrics_direction_and_share_places():
    rows = [("a", m, k, v) for k, values in dict(psnr=(3, 2, 2, 1), piqe=(3, 2, 2, 1)).items()
            for m, v in zip("wxyz", values)] + [("a", "v", "psnr", float("nan"))]
    table = pd.DataFrame(rows, columns=["dataset", "method", "metric", "value"])
    found = ranks(table).pivot(index="method", columns="metric", values="rank")
    assert found.psnr[list("wxyz")].tolist() == [1, 2, 2, 4] and found.piqe[list("wxyz")].tolist() == [4, 2, 2, 1]
    assert found.psnr.isna()["v"] and "v" not in rank_table(table).index
    with pytest.raises(FoundIRError, match="no values"): rank_table(table[:0])
    text = results_table(table)
    assert "**3.00**" in text and "<u>2.00</u>" in text and "PSNR ↑" in text and "PIQE ↓" in text
    assert r" \textbf{3.00} " in results_table(table, "latex") and results_table(table[-1:]) == "no values"
    assert "**" not in results_table(table[:1]), "without a rival"
    with pytest.raises(FoundIRError, match="markdown, latex, html"): results_table(table, "word")


def test_every_protocol_can_be_followed():
    titles = set(published().dataset)
    for name, b in BENCHMARKS.items():
        assert b.title in titles and b.subtask in SUBTASKS and all(m in METRICS for m in b.judged_by), name
        assert LAYOUTS[b.layout].lq and bool(LAYOUTS[b.layout].gt) >= b.paired, name
        assert ("{task}" in LAYOUTS[b.layout].lq) <= bool(b.folder), name
    assert list(protocols().index) == list(BENCHMARKS)
    with pytest.raises(FoundIRError, match="unknown test set 'x'"): benchmark("x")


def test_all_fifteen_sets_from_one_folder(sets, tmp_path, capsys):
    "One command; what has no weights here says so, and the rest is measured."
    line = ["benchmark", "--datasets", str(sets), "--methods", "input=bicubic", "--out", str(tmp_path)]
    assert cli.main([*line, "--metrics", "psnr,piqe"]) == 0
    said = capsys.readouterr().out
    results = pd.read_parquet(tmp_path / "results.parquet")
    assert set(results.dataset) == set(BENCHMARKS) and (results.reason == "").all() and results.value.notna().all()
    assert results.groupby("dataset").image.unique().map(list).to_dict() == INPUTS
    for key, b in BENCHMARKS.items():
        assert set(results[results.dataset == key].metric) == ({"psnr", "piqe"} if b.paired else {"piqe"}), key
        assert b.title in said
    assert pd.read_csv(tmp_path / "protocols.csv").key.tolist() == list(BENCHMARKS)
    assert (pd.read_csv(tmp_path / "summary.csv").query("dataset == 'NH-HAZE'").of == 2).all()
    assert cli.main([*line, "--sets", "dense_haze"]) == 0, "the paper's metrics, of which some need weights"
    rows = pd.read_csv(tmp_path / "results.csv", keep_default_na=False)
    assert (rows.reason == "")[rows.metric.isin(["psnr", "ssim"])].all()
    if (rows.reason != "").any(): assert "lpips needs" in capsys.readouterr().out


def test_a_training_part_alone_is_not_taken_for_the_test_part(tmp_path):
    make_sets(tmp_path, {"4KRD": ["train/001/blur/1.png", "train/001/sharp/1.png"]})
    with pytest.raises(FoundIRError, match="in the split test"): read_cases("fourkrd", tmp_path / "4KRD")


def test_sets_that_are_not_there_are_named(sets, tmp_path):
    with pytest.raises(FoundIRError, match="no test set lsd below"): set_folders(tmp_path, ["lsd"])
    with pytest.raises(FoundIRError, match="unknown test set 'foo'"): set_folders(sets, ["foo"])
    with pytest.raises(FoundIRError, match="no test set below"): set_folders(tmp_path)
    with pytest.raises(FoundIRError, match="no folder"): set_folders(tmp_path / "none")
    make_sets(tmp_path, {"FoundIR": ["haze/LQ/4.png", "haze/GT/4.png"]})
    with pytest.raises(FoundIRError, match="no folder called 14Lowlight; there are haze"):
        read_cases("foundir_l", tmp_path / "FoundIR")


class Counting:
    "Keeps count; fails where it is told to."
    name, calls, bad, broken = "counting", 0, 0, False

    def __init__(self):
        if Counting.broken: raise RuntimeError("no memory for it")

    def __call__(self, lq, *, subtask=None, seed=0, caption=""):
        Counting.calls += 1
        if Counting.calls == Counting.bad: raise RuntimeError("fell over\nand over")
        return Bicubic()(lq, subtask=subtask)


@pytest.fixture
def counting(monkeypatch):
    Counting.calls = Counting.bad = 0
    Counting.broken = False
    monkeypatch.setitem(SIMPLE, "counting", Counting)


def test_what_was_measured_stays_measured(sets, tmp_path, counting):
    folders = set_folders(sets, ["nh_haze", "dense_haze"])
    memo, methods, run = Memo(tmp_path / "m.sqlite"), {"c": "counting"}, lambda *a: run_trials(folders, *a)
    Counting.bad = 2
    first = run(methods, memo, ["psnr"])
    assert Counting.calls == 3 and (first.reason != "").tolist() == [False, True, False]
    assert "\n" not in first.reason[1] and "fell over" in first.reason[1] and first.value.notna().sum() == 2
    summary = trial_summary(first).set_index("dataset")
    assert (summary.images["NH-HAZE"], summary.of["NH-HAZE"]) == (1, 2) or summary.images["Dense-HAZE"] == 0
    second = run(methods, memo, ["psnr"])
    assert Counting.calls == 4 and (second.reason == "").all(), "the one that failed, and no other"
    assert run(methods, memo, ["psnr"]).equals(second) and Counting.calls == 4
    run(methods, memo, ["psnr", "ssim"])
    assert Counting.calls == 7, "another metric needs the pictures again"
    Counting.broken = True
    both = run({"c": "counting", "b": "bicubic"}, memo, ["psnr", "piqe"])
    assert set(both[(both.method == "c") & (both.metric == "piqe")].reason) == {"can't be loaded: no memory for it"}
    assert both[both.method == "b"].value.notna().all() and both[both.metric == "psnr"].value.notna().all()


def test_bad_files_cost_their_own_rows(tmp_path, counting):
    make_sets(tmp_path, {"NH-HAZE": SETS["nh_haze"]})
    folder = tmp_path / "NH-HAZE"
    (folder / "02_hazy.png").write_bytes(b"no picture")
    (folder / "01_GT.png").rename(folder / "03_GT.png")
    save_image(picture(1)[:, :20], folder / "04_hazy.png")
    save_image(picture(2), folder / "04_GT.png")
    rows = run_trials(set_folders(tmp_path), {"c": "counting"}, Memo(tmp_path / "m.sqlite"), ["psnr"])
    told = dict(zip(rows.image, rows.reason))
    assert rows.value.isna().all() and Counting.calls == 0
    assert "no ground truth" in told["01_hazy.png"] and "can't read" in told["02_hazy.png"]
    assert "no input" in told["03_GT.png"] and "has 48 x 48 pixels, expected 48 x 20" in told["04_hazy.png"]
    assert len(write_trials(tmp_path / "out", rows, {"c": "counting"})) == 8


def test_kept_pictures_are_shown(sets, tmp_path):
    line = ["benchmark", "--datasets", str(sets), "--sets", "nh_haze", "realphoto60", "--methods", "../b=identity",
            "mine=levels", "--metrics", "piqe,psnr", "--keep", "--out", str(tmp_path)]
    assert cli.main(line) == 0
    page = (tmp_path / "pictures/nh_haze.html").read_text()
    assert page.count("<section>") == 2 and page.count('data-name="ground truth"') == 2 and "worst" in page
    assert page.count('data-name="../b"') == 2 and page.count("<option selected>mine") == 2
    assert not (tmp_path / "pictures/b").exists(), "a name is no way out of the folder"
    assert (tmp_path / "pictures/realphoto60.html").read_text().count("<section>") == 2


def test_names_of_methods_and_protocols(tmp_path):
    from foundir_v2.base import load_base, save_base
    folder = tmp_path / "base"
    save_base(load_base("base"), folder)
    before = method_id(f"vae:{folder}")
    file = next(folder.glob("vae/*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    assert len({before, method_id(f"vae:{folder}"), method_id("vae:base"), method_id("bicubic")}) == 4
    assert protocol_id("dense_haze", "psnr") != protocol_id("nh_haze", "psnr") != protocol_id("nh_haze", "ssim")
    with pytest.raises(FoundIRError, match="unknown restorer"): method_id("nonsense")


def test_captions_reach_the_method_and_name_the_value(sets, tmp_path, monkeypatch):
    heard = []
    class Listening:
        name = "listening"
        def __call__(self, lq, *, subtask=None, seed=0, caption=""):
            heard.append((subtask.name, subtask.scale, tuple(lq.shape[-2:]), caption))
            return Bicubic()(lq, subtask=subtask)
    monkeypatch.setitem(SIMPLE, "listening", Listening)
    run = lambda text: run_trials(set_folders(sets, ["realphoto60"]), {"l": "listening"}, Memo(tmp_path / "m.sqlite"),
                                  ["piqe"], lambda path: f"{text} {path.stem}")
    run("a photo of"), run("a photo of"), run("another of")
    assert heard == [("sr_x2", 2, (48, 48), f"{t} {n}") for t in ("a photo of", "another of") for n in "ab"]


def test_a_protocol_may_leave_out_a_border_and_name_a_colour_fix(sets, tmp_path, monkeypatch):
    "Rows from outside: what they say decides about the number, and about its name in the memo."
    plain = BENCHMARKS["dense_haze"]
    monkeypatch.setitem(BENCHMARKS, "bordered", replace(plain, border=10))
    monkeypatch.setitem(BENCHMARKS, "wavelet", replace(plain, color_fix="wavelet"))
    folder, memo = set_folders(sets, ["dense_haze"])["dense_haze"], Memo(tmp_path / "m.sqlite")
    folders = {name: folder for name in ("dense_haze", "bordered", "wavelet")}
    assert len({protocol_id(name, "psnr") for name in folders}) == 3
    rows = run_trials(folders, {"input": "bicubic"}, memo, ["psnr"]).set_index("dataset").value
    case = read_cases("bordered", folder)[0]
    inner = [load_image(p)[:, 10:-10, 10:-10] for p in (case.lq, case.gt)]
    assert rows["bordered"] == pytest.approx(score("psnr", *inner)) != rows["dense_haze"] == rows["wavelet"]
    pipe, fixed = PipelineRestorer(None), PipelineRestorer(None, color_fix="none")
    assert _special(pipe, "wavelet").options == {"color_fix": "wavelet"} and not pipe.options
    assert _special(fixed, "wavelet") is fixed and _special(pipe, None) is pipe


def test_a_metric_with_nothing_to_say_and_a_file_that_went_away_have_a_reason(tmp_path, counting):
    save_image(torch.full((3, 48, 48), 0.5), tmp_path / "RealPhoto60/blank.png")
    save_image(picture(3), tmp_path / "RealPhoto60/fine.png")
    folders, memo = set_folders(tmp_path), Memo(tmp_path / "m.sqlite")
    for _ in range(2):
        rows = run_trials(folders, {"c": "counting"}, memo, ["niqe"])
        assert rows.value.isna().all() and set(rows.reason) == {"the metric has nothing to say about this picture"}
    assert Counting.calls == 2, "that is an answer, too"
    gone = read_cases("realphoto60", folders["realphoto60"])[0]._replace(lq=str(tmp_path / "gone.png"))
    (asked,) = questions([gone], ["piqe"])
    assert not asked.keys and "gone.png" in asked.case.problem
    def silent(path): raise FoundIRError(f"nobody has described {path.name}")
    rows = run_trials(folders, {"c": "counting"}, memo, ["piqe"], silent)
    assert set(rows.reason) == {"nobody has described blank.png", "nobody has described fine.png"}


def test_two_processes_share_the_work(sets, tmp_path):
    line = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1",
            "--mixed_precision", "no", "--dynamo_backend", "no", "-m", "foundir_v2.cli", "benchmark", "--datasets",
            str(sets), "--sets", "nh_haze", "polyu", "--methods", "bicubic", "--metrics", "psnr,piqe", "--out",
            str(tmp_path / "two")]
    env = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone = run_trials(set_folders(sets, ["nh_haze", "polyu"]), {"bicubic": "bicubic"}, Memo(tmp_path / "m.sqlite"),
                       ["psnr", "piqe"])
    assert pd.read_parquet(tmp_path / "two/results.parquet").equals(alone) and len(alone) == 5


@pytest.mark.parametrize("line, words", [
    ("", "--list shows"), ("--datasets . --methods nonsense", "unknown restorer"),
    ("--datasets . --methods a=bicubic a=levels", "two methods are called"),
    ("--datasets nowhere --methods bicubic", "nowhere"), ("--list --sets x", "unknown test set"),
    ("--datasets . --methods bicubic --metrics pnsr", "unknown metric")])
def test_mistakes_are_one_line(line, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["benchmark", *line.split()]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and words in error and not list(tmp_path.iterdir())
