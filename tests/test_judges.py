"Judges by name, and what the offline ones with strict limits do to a pool that is partly rotten."
import pandas as pd
import pytest
import torch

from foundir_v2.clean import Statistics, clean, make_thresholds
from foundir_v2.core import FoundIRError, hash_seed, load_image, repo_root, save_image
from foundir_v2.daclip import DaCLIPJudge
from foundir_v2.degrade import degrade, upsample_lq
from foundir_v2.fetch import read_sources
from foundir_v2.identify import Traces
from foundir_v2.index import REJECTED
from foundir_v2.judges import JUDGES, STRICT_LIMITS, judge_kind, make_judges
from foundir_v2.tasks import Integers, Step, SubTask, Uniform
from foundir_v2.vlmjudge import VLMJudge


def test_every_row_says_what_its_judge_measures():
    for spec, judge in (("statistics", Statistics()), ("traces", Traces()), ("vlm:x", VLMJudge("x", "cpu"))):
        assert judge_kind(spec)[0].measures == tuple(judge.measures)
        assert type(make_judges([spec], device="cpu")[0]) is type(judge)
    assert judge_kind("daclip:a:b.pt") == (JUDGES["daclip"], "a:b.pt")
    assert JUDGES["daclip"].measures == DaCLIPJudge.measures
    made = make_judges(["traces", "statistics"], ["piqe"])
    assert [j.name.split()[0] for j in made] == ["traces", "statistics", "quality"]


@pytest.mark.parametrize("spec", ["", "clip", "daclip", "daclip:", "vlm", "statistics:", "traces:x", None])
def test_an_unknown_judge_names_the_choices(spec):
    with pytest.raises(FoundIRError, match="statistics, traces, daclip:FILE, vlm:MODEL"): make_judges([spec])


def test_weights_that_are_not_there_are_told_at_once(tmp_path):
    with pytest.raises(FoundIRError, match="no DA-CLIP weights"): make_judges([f"daclip:{tmp_path}/none.pt"])


MILD = {"blur": ("defocus_blur", {"radius": Uniform(1.5, 2.2)}), "noise": ("gaussian_noise", {"sigma": Uniform(8, 15)}),
        "jpeg": ("jpeg", {"quality": Integers(32, 40)}), "low light": ("low_light", {"stops": Uniform(1.5, 2)}),
        "haze": ("haze", {"beta": Uniform(.6, .85), "airlight": Uniform(.7, 1), "tint": Uniform(-.04, .04)})}
SEVERE = ("motion_blur", "camera_noise", "noise_jpeg", "dense_haze", "low_light", "blur_jpeg", "low_light_noise",
          "sr_x4")


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    "Photographs that had no say in the limits, and damaged copies: 30 % of the pool."
    folder, rows = tmp_path_factory.mktemp("pool"), []
    unseen = [s.file for s in read_sources(repo_root()/"data")
              if s.split and not (s.split == "train" and hash_seed(s.file) % 2)][::2]
    kinds = [SubTask(n, "denoise", (Step(*step),)) for n, step in MILD.items()] + list(SEVERE)
    def add(name, image):
        save_image(image, folder/f"{len(rows)}.png")
        rows.append(dict(photo=name, path=f"{len(rows)}.png", verdict="", reason=""))
    for f in unseen: add(f"clean {f}", load_image(repo_root()/"data"/f)[:, :320, :320])
    for i in range(round(len(unseen) * 3 / 7)):
        gt = load_image(repo_root()/"data"/unseen[2 * i])[:, :320, :320]
        gt = gt[:, :gt.shape[1] // 4 * 4, :gt.shape[2] // 4 * 4]
        add(f"damaged {i}", upsample_lq(degrade(gt, kinds[i % len(kinds)], i), gt.shape[-2:]))
    return folder, pd.DataFrame(rows)


def test_strict_limits_drop_the_rotten_part_and_little_else(pool):
    folder, index = pool
    judges = make_judges(["statistics", "traces"])
    table = clean(index, judges, make_thresholds(STRICT_LIMITS, judges), folder)
    rotten, dropped = table.photo.str.startswith("damaged"), table.verdict == REJECTED
    assert .28 < rotten.mean() < .32
    assert dropped[rotten].mean() >= .9, table[rotten & ~dropped][["photo", "reason"]]
    assert dropped[~rotten].mean() <= .1, table[~rotten & dropped][["photo", "reason"]]


def test_workers_and_a_memo_change_nothing(pool, tmp_path):
    from foundir_v2.memo import Memo
    folder, index = pool
    judges, index = make_judges(["statistics", "traces"]), index[:6]
    alone = clean(index, judges, [], folder)
    memo = Memo(tmp_path/"memo")
    pd.testing.assert_frame_equal(clean(index, judges, [], folder, num_workers=2, memo=memo), alone)
    class Never(Statistics):
        def __call__(self, image): raise AssertionError("asked again")
    looked = clean(index, judges, [], folder, memo=memo)
    pd.testing.assert_frame_equal(looked, alone)
    with pytest.raises(AssertionError): clean(index, [Never()], [], folder, memo=memo)  # other code, another name


def test_a_changed_picture_is_measured_again(tmp_path):
    from foundir_v2.memo import Memo
    memo, index = Memo(tmp_path/"memo"), pd.DataFrame([dict(photo="a", path="a.png", verdict="", reason="")])
    found = []
    for level in (.2, .8):
        save_image(torch.full((3, 64, 64), level), tmp_path/"a.png")
        found.append(clean(index, [Statistics()], [], tmp_path, memo=memo).brightness[0])
    assert found == pytest.approx([.2, .8], abs=.01)
