"Every layout on a miniature of its folders; what is refused, and what it says."
import os
from pathlib import Path

import pandas as pd
import pytest

from foundir_v2.core import FoundIRError
from foundir_v2.layouts import LAYOUTS, DataSet, compile_pattern, hold_out, read_dataset
from foundir_v2.tasks import FOUNDIR, SUBTASKS

# [layout], then a GT per line, each followed by its inputs (<); what belongs to nothing (-)
TEXT = """
[splits]
train/rain/GT/a.png
< train/rain/LQ/a.jpg
test/haze/GT/b.png
< test/haze/LQ/b.png
[pairs]
rain/GT/x/a.png
< rain/LQ/x/a.jpg
GT/b.png
< LQ/b.png
- mask/a.png
[foundir_v2]
HQ_folder/Task1/s/a.png
< LQ_folder/Task1/s/a.png
HQ_folder/Task5/b.png
< LQ_folder/Task5/b.jpg
[reside]
ITS/clear/1.png
< ITS/hazy/1_1_0.90.png
< ITS/hazy/1_2_0.74.png
OTS/clear/0025.jpg
< OTS/hazy/0025_0.8_0.1.jpg
SOTS/indoor/gt/1400.png
< SOTS/indoor/hazy/1400_1.png
SOTS/outdoor/clear/0001.png
< SOTS/outdoor/hazy/0001_0.8_0.2.jpg
- ITS/trans/1_1.png
[haze4k]
train/clear/1.png
< train/hazy/1_0.89_1.56.png
test/clear/7.png
< test/hazy/7_0.9_1.6.png
- train/trans/1.png
[lol]
our485/high/2.png
< our485/low/2.png
eval15/high/1.png
< eval15/low/1.png
[lol_v2]
LOL-v2/Real_captured/Train/Normal/normal00001.png
< LOL-v2/Real_captured/Train/Low/low00001.png
LOL-v2/Synthetic/Test/Normal/r01.png
< LOL-v2/Synthetic/Test/Low/r01.png
[sidd]
Data/0001_001_S6_00100_00060_3200_L/0001_GT_SRGB_010.PNG
< Data/0001_001_S6_00100_00060_3200_L/0001_NOISY_SRGB_010.PNG
Data/0001_001_S6_00100_00060_3200_L/0001_GT_SRGB_011.PNG
< Data/0001_001_S6_00100_00060_3200_L/0001_NOISY_SRGB_011.PNG
[gopro]
train/GOPR0372_07_00/sharp/000047.png
< train/GOPR0372_07_00/blur/000047.png
GOPRO_Large/test/GOPR0384_11_00/sharp/000001.png
< GOPRO_Large/test/GOPR0384_11_00/blur/000001.png
- train/GOPR0372_07_00/blur_gamma/000047.png
[rain13k]
train/Rain13K/target/1.jpg
< train/Rain13K/input/1.jpg
test/Rain100H/target/1.png
< test/Rain100H/input/1.png
[snow100k]
train/gt/a.jpg
< train/synthetic/a.jpg
test/Snow100K-L/gt/b.jpg
< test/Snow100K-L/synthetic/b.jpg
- train/mask/a.jpg
[input_target]
train/SIDD/target/1.png
< train/SIDD/input/1.png
val/target/2.png
< val/input/2.png
[div2k_x2]
DIV2K_train_HR/0001.png
< DIV2K_train_LR_bicubic/X2/0001x2.png
- DIV2K_train_LR_bicubic/X4/0001x4.png
[div2k_x4]
DIV2K_train_HR/0001.png
< DIV2K_train_LR_bicubic/X4/0001x4.png
DIV2K_valid_HR/0801.png
< DIV2K_valid_LR_bicubic/X4/0801x4.png
- DIV2K_train_LR_bicubic/X2/0001x2.png
[foundir]
08Haze/GT/0551.png
< 08Haze/LQ/0551.jpg
Train/lowlight+noise/GT/a/2.png
< Train/lowlight+noise/LQ/a/2.png
- meta/1.png
[fourkrd]
train/001/sharp/1.png
< train/001/blur/1.png
test/002/sharp/1.png
< test/002/blur/1.png
[lsd]
LSD/train/sharp/1.jpg
< LSD/train/blur/1.jpg
test/sharp/2.jpg
< test/blur/2.jpg
[polyu]
CroppedImages/Canon5D2_5_160_3200_chair_16_mean.JPG
< CroppedImages/Canon5D2_5_160_3200_chair_16_real.JPG
[dense_haze]
Dense_Haze_NTIRE19/GT/01_GT.png
< Dense_Haze_NTIRE19/hazy/01_hazy.png
[nh_haze]
01_GT.png
< 01_hazy.png
02_GT.png
< 02_hazy.png
[rs_cloud]
RICE1/label/0.png
< RICE1/cloud/0.png
- RICE2/mask/0.png
[hq_nightrain]
RS/train/target/1.png
< RS/train/input/1.png
RS/test/target/2.png
< RS/test/input/2.png
[uav_rain1k]
train/target/1.png
< train/input/1.png
test/target/2.png
< test/input/2.png
[weatherbench]
train/rain/target/1.png
< train/rain/input/1.png
test/snow/target/2.png
< test/snow/input/2.png
[uhd_ll]
training_set/gt/4_UHD_LL.JPG
< training_set/input/4_UHD_LL.JPG
testing_set/gt/1.JPG
< testing_set/input/1.JPG
[div2k]
DIV2K_train_HR/0001.png
DIV2K_valid_HR/0801.png
- DIV2K_train_LR_bicubic/X4/0001x4.png
[div8k]
train_HR/0001.png
- train_LR/X4/0001.png
[flickr2k]
Flickr2K/Flickr2K_HR/000001.png
- Flickr2K/Flickr2K_LR_bicubic/X4/000001x4.png
[lsdir]
HR/train/0001000/0000001.png
val1/HR/val/0000001.png
- X4/train/0001000/0000001x4.png
[ffhq]
images1024x1024/00000/00000.png
images1024x1024/01000/01000.png
- thumbnails128x128/00000/00000.png
[photographs]
a.png
Sommer 2024/Füße im Sand.jpg
"""


def miniatures():
    "layout -> (rows of a GT and its inputs, the rest)."
    found = {}
    for line in TEXT.strip().splitlines():
        if line[0] == "[": rows, rest = found.setdefault(line[1:-1], ([], []))
        elif line[:2] == "< ": rows[-1] += (line[2:],)
        elif line[:2] == "- ": rest.append(line[2:])
        else: rows.append((line,))
    return found


MINIATURES = miniatures()
GIVEN = {"foundir_v2": dict(task=dict(Task1="motion_blur", Task5="sr_x4")), "pairs": dict(task="rain"),
         "input_target": dict(task="rain"), "rs_cloud": dict(task="haze")}
UNPAIRED = ("realphoto60", "realdeg")


def make(root, files):
    for name in files:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def files_of(layout):
    rows, rest = MINIATURES[layout]
    return [p for row in rows for p in row] + rest


def data_set(layout, root, **changes):
    pattern = LAYOUTS[layout].gt
    split = None if "{split}" in pattern else "train"
    return DataSet(**(dict(name="x", root=str(root), layout=layout, split=split) | GIVEN.get(layout, {}) | changes))


def found(root, entries):
    relative = lambda p: Path(p).relative_to(root).as_posix()
    gts = {}
    for e in entries: gts.setdefault(relative(e.path), []).extend([relative(e.lq)] if e.lq else [])
    return {gt: sorted(lqs) for gt, lqs in gts.items()}


def test_every_layout_has_a_miniature():
    assert set(LAYOUTS) == {*MINIATURES, *UNPAIRED, "table", "foundir_meta"}


@pytest.mark.parametrize("layout", MINIATURES)
def test_miniature(tmp_path, layout):
    rows, rest = MINIATURES[layout]
    make(tmp_path, files_of(layout))
    entries, ignored = read_dataset(data_set(layout, tmp_path))
    assert not [e for e in entries if e.reason]
    assert found(tmp_path, entries) == {gt: sorted(lqs) for gt, *lqs in rows}
    assert sum(ignored.values()) == len(rest)
    assert len({e.photo for e in entries}) == len(entries)
    for e in entries:
        assert bool(e.task) == bool(e.lq) and (not e.task or e.task in SUBTASKS), e
        tested = ("test/", "testing_set/", "eval15/", "SOTS/", "_valid_", "/val/", "Test/")
        test = any(w in Path(e.path).relative_to(tmp_path).as_posix() for w in tested)
        assert e.split == ("test" if test else "reference" if "val/target" in e.path else "train"), e


@pytest.mark.parametrize("layout", [n for n in MINIATURES if n not in ("splits", "table")])
def test_one_input_and_one_ground_truth_too_many(tmp_path, layout):
    rows, _ = MINIATURES[layout]
    if len(rows[0]) == 1: pytest.skip("photographs have no partners")
    make(tmp_path, files_of(layout))
    (tmp_path / rows[0][0]).unlink()
    if len(rows) > 1: (tmp_path / rows[1][1]).unlink()
    if len(rows) == 1:
        with pytest.raises(FoundIRError, match="does not lie as"): read_dataset(data_set(layout, tmp_path))
        return
    try: entries = read_dataset(data_set(layout, tmp_path)).entries
    except FoundIRError as e:  # nothing was left that is a pair
        assert "does not lie as" in str(e)
        return
    reasons = [e.reason for e in entries if e.reason]
    assert len(reasons) == len(rows[0]) and all(r.startswith("no partner: ") for r in reasons)


@pytest.mark.parametrize("layout", [n for n in MINIATURES if len(MINIATURES[n][0][0]) > 1])
def test_inputs_never_become_photographs(tmp_path, layout):
    "Every paired set, read as a folder of photographs or as the project's own splits, is refused by its names."
    make(tmp_path / "set/train", files_of(layout))
    for data in [DataSet(name="x", root=str(tmp_path / "set"), layout="photographs", split="train"),
                 DataSet(name="x", root=str(tmp_path / "set"))]:
        if layout in ("splits", "pairs", "foundir") and data.layout == "splits": continue  # there they are pairs
        with pytest.raises(FoundIRError, match="egraded"): read_dataset(data)


def test_what_is_refused_says_what_to_write(tmp_path):
    make(tmp_path / "r", files_of("reside"))
    make(tmp_path / "ab", ["A/1.png", "B/1.png"])
    for data, words in [
            (dict(root="r", layout="lol"), ["ITS/clear/ (1)", "it fits layout: reside"]),
            (dict(root="r", layout="photographs", split="train"), ["hazy", "it fits layout: reside"]),
            (dict(root="ab", layout="reside"), ["A/ (1)", "layout: pairs with gt: and lq:"]),
            (dict(root="r", layout="reside", split="reference"), ["in the split reference"]),
            (dict(root="ab", layout="photographs"), ["write split: train"]),
            (dict(root="ab", layout="pairs", split="train", gt="A/{key}", lq="B/{key}"), ["which sub-task"]),
            (dict(root="ab", layout="pairs", split="train", gt="A/x", lq="B/{key}"), ["must hold {key}"]),
            (dict(root="ab", layout="pairs", split="train", gt="{key}/{key}", lq="B/{key}"), ["can't be used"]),
            (dict(root="ab", layout="resid"), ["unknown layout 'resid'", "reside"]),
            (dict(root="moved", layout="reside"), ["nothing at moved", "was it moved"]),
            (dict(root="ab", layout="realdeg", split="test"), ["no ground truths", "foundir-v2 restore"]),
            (dict(root="ab", layout="photographs", split=dict(reference=2)), ["2 to be held out of 2"]),
            (dict(root="ab", layout="photographs", split=dict(train=1)), ["train can't be held out"]),
            (dict(root="ab", layout="photographs", split=dict(test=-1)), ["numbers from 0 on", "-1"]),
            (dict(root="ab", layout="photographs", split="train", task="haze"), ["photographs", "leave out task:"]),
            (dict(root="ab", layout="splits", gt="A/{key}"), ["reads no patterns", "layout: pairs"]),
            (dict(root="~/r", layout="reside"), ["nothing at ~/r", "whole path"]),
            (dict(root="r/ITS/clear/1.png", layout="reside"), ["is a file, expected a folder"]),
            (dict(root="r", layout="table"), ["is a folder", "layout: table reads a file"]),
            (dict(root="r", layout="foundir_meta"), ["is a folder", "layout: foundir_meta reads a file"]),
            (dict(root=".", layout="reside"), ["write root: ./r"]),
            (dict(root="r", layout="reside", task=dict(ITS="haze")), ["write task: NAME in place of a mapping"]),
            (dict(root="ab", layout="pairs", split="train", task="rain", gt="A/{key}.png", lq="B/{key}"),
             ["no suffix", "write gt: 'A/{key}'"]),
            (dict(root="ab", layout="pairs", split="train", task="rain", gt="A/{key}", lq="./B/{key}"),
             ["write lq: 'B/{key}'"])]:
        with pytest.raises((FoundIRError, FileNotFoundError)) as e: read_dataset(DataSet(name="x", **data), tmp_path)
        assert all(w in str(e.value) for w in words) and "\n" not in str(e.value), (data, str(e.value))
    make(tmp_path / "f", files_of("foundir_v2"))
    with pytest.raises(FoundIRError, match="'Task5' is none of Task1"):
        read_dataset(DataSet(name="x", root="f", layout="foundir_v2", split="train", task=dict(Task1="rain")), tmp_path)


def test_a_part_of_a_set(tmp_path):
    make(tmp_path, files_of("reside"))
    for split, n in [("train", 3), ("test", 2), (None, 5)]:
        entries = read_dataset(data_set("reside", tmp_path, split=split)).entries
        assert len(entries) == n and split in (None, *{e.split for e in entries})


def test_scenes_are_held_out_whole(tmp_path):
    make(tmp_path, [f"train/S{s}/{side}/{i}.png" for s in range(6) for side in ("sharp", "blur") for i in range(4)])
    entries = read_dataset(data_set("gopro", tmp_path, split=dict(reference=2, test=1))).entries
    scenes = {}
    for e in entries: scenes.setdefault(e.path.split("/")[-3], set()).add(e.split)
    assert all(len(s) == 1 for s in scenes.values()) and len(entries) == 24
    assert sorted(s for x in scenes.values() for s in x) == ["reference"] * 2 + ["test"] + ["train"] * 3


def test_holding_out_hardly_changes_with_more_pictures():
    units = [f"p{i}" for i in range(1000)]
    few, more = hold_out(units, dict(reference=50), "s"), hold_out([*units, "new"], dict(reference=50), "s")
    assert len(few) == len(more) == 50 and len(few.keys() & more.keys()) >= 49
    assert hold_out(reversed(units), dict(reference=50), "s") == few != hold_out(units, dict(reference=50), "t")


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table(tmp_path, suffix):
    table = pd.DataFrame(dict(path=["gt/a.png", "gt/b.png", "", "gt/a.png"],
                              lq=["lq/a.png", None, "lq/c.png", "lq/a2.png"],
                              task=["rain", None, "rain", "haze"], split=["train", "reference", None, "test"]))
    table.to_csv(tmp_path / "t.csv", index=False); table.to_parquet(tmp_path / "t.parquet")
    entries = read_dataset(DataSet(name="t", root=f"t{suffix}", layout="table"), tmp_path).entries
    assert [(e.task, e.split, bool(e.lq)) for e in entries] == [
        ("rain", "train", True), ("", "reference", False), ("rain", "train", True), ("haze", "test", True)]
    assert entries[0].path == str(tmp_path / "gt/a.png") and entries[2].reason.startswith("no partner: ")
    for bad, match in [(dict(pth=["a"]), "lacks the column path"), (dict(path=["a"], split=["valid"]), "splits valid")]:
        pd.DataFrame(bad).to_csv(tmp_path / "bad.csv", index=False)
        with pytest.raises(FoundIRError, match=match):
            read_dataset(DataSet(name="t", root="bad.csv", layout="table"), tmp_path)
    (tmp_path / "none.parquet").write_text("x")
    with pytest.raises(FoundIRError, match="can't read none.parquet"):
        read_dataset(DataSet(name="t", root="none.parquet", layout="table"), tmp_path)


def test_hidden_files_and_loops(tmp_path):
    make(tmp_path, [*files_of("photographs"), "._a.png", ".trash/b.png", "notes.txt", "@eaDir.png.txt"])
    os.symlink(tmp_path, tmp_path / "loop")
    entries = read_dataset(data_set("photographs", tmp_path)).entries
    assert [e.photo for e in entries if not e.reason] == ["Sommer 2024/Füße im Sand", "a"]
    assert [e.reason.partition(":")[0] for e in entries if e.reason] == ["link"]


@pytest.mark.parametrize("pattern", ["{key", "clear/*", "", "{name}"])
def test_patterns_without_a_key(pattern):
    with pytest.raises(FoundIRError, match="must hold"): compile_pattern(pattern)


@pytest.mark.parametrize("pattern", ["{key}_{1}", "{key}_{no 1}", "{key}}", "{key}/{x"])
def test_patterns_with_a_stray_brace(pattern):
    with pytest.raises(FoundIRError, match="brace stands alone"): compile_pattern(pattern)


# as in Testset_meta_info.txt of github.com/House-Leo/FoundIR
FOUNDIR_FOLDERS = """01Blur 02Blur_Noise 03Blur_JPEG 04Blur_Noise_JPEG 05Noise 06JPEG 07Noise_JPEG 08Haze
09Lowlight_Haze 10Rain 11Raindrop 12NightRain 13Rain_Haze 14Lowlight 15Lowlight_Blur 16Lowlight_Noise 17Lowlight_JPEG
18Lowlight_Blur_Noise 19Lowlight_Blur_JPEG 20Lowlight_Noise_JPEG""".split()


def test_every_folder_of_foundir_is_one_of_its_sub_tasks(tmp_path):
    make(tmp_path, [f"{folder}/{side}/{i:04d}.png" for i, folder in enumerate(FOUNDIR_FOLDERS)
                    for side in ("GT", "LQ")])
    lines = [f"{folder}/GT/{i:04d}.png, {folder}/LQ/{i:04d}.png" for i, folder in enumerate(FOUNDIR_FOLDERS)]
    (tmp_path / "Testset_meta_info.txt").write_text("\n".join(lines))
    by_folder = read_dataset(DataSet(name="f", root=".", layout="foundir", split="test"), tmp_path).entries
    by_file = read_dataset(DataSet(name="f", root="Testset_meta_info.txt", layout="foundir_meta"), tmp_path).entries
    tasks = [e.task for e in by_file]
    assert sorted(tasks) == sorted(FOUNDIR) and tasks[:2] == ["motion_blur", "blur_noise"]
    assert tasks[13:16] == ["low_light", "low_light_blur", "low_light_noise"]
    facts = lambda entries: sorted((e.photo, e.path, e.lq, e.task, e.split) for e in entries)
    assert facts(by_folder) == facts(by_file) and by_file[0].split == "test"


def test_a_meta_file_chooses_pairs(tmp_path):
    (tmp_path / "Million_train_meta_info.txt").write_text(
        "Single/Blur/GT/a/1.png, Single/Blur/LQ/a/1.jpg\r\n\nFog/GT/2.png, Fog/LQ/2.png\n")
    read = lambda **more: read_dataset(
        DataSet(name="f", root="Million_train_meta_info.txt", layout="foundir_meta", **more), tmp_path).entries
    entries = read()
    assert [(e.photo, e.task, e.split) for e in entries] == [
        ("Single/Blur/LQ/a/1", "motion_blur", "train"), ("Fog/LQ/2", "Fog", "train")]
    assert [e.task for e in read(task={"Blur": "defocus_blur", "Fog": "haze"})] == ["defocus_blur", "haze"]
    assert entries[0].lq == str(tmp_path / "Single/Blur/LQ/a/1.jpg")
    assert {e.split for e in read(task="rain", split="reference")} == {"reference"}
    assert sum(e.split == "test" for e in read(task="rain", split=dict(test=1))) == 1
    for text, words in (("a/GT/1.png\n", "line 1: expected a ground truth and an input"),
                        ("a/GT/1.png, b.png\nx, y, z\n", "line 2"), ("a/GT/1.png,\n", "line 1"),
                        ("GT/3.png, LQ/3.png", "Write task: NAME"),
                        (b"\xff\xfe\x00", "can't read Million_train_meta_info.txt as text")):
        (tmp_path / "Million_train_meta_info.txt").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(FoundIRError, match=words) as e: read()
        assert "\n" not in str(e.value)
