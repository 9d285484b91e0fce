"Several data sets as one pool: what is in it, what is refused, and what training gets of it."
import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch

from foundir_v2.clean import Statistics, clean, make_thresholds
from foundir_v2.config import ConfigError
from foundir_v2.core import FoundIRError, generator, save_image
from foundir_v2.data import RestorationDataset, reference_items
from foundir_v2.degrade import degrade
from foundir_v2.index import (ACCEPTED, COLUMNS, REJECTED, add_captions, leaks, load_manifest, refuse_leaks,
                              refuse_unusable, save_manifest, select)
from foundir_v2.memo import Memo
from foundir_v2.pool import (POOL_COLUMNS, build_pool, check_tracked, counts, data_roots, lacking, read_config,
                             refuse_lacking, rejections, scene_name)


def picture(seed, h=160, w=192):
    "Blobs of colour with texture."
    small = torch.rand(1, 3, h // 8, w // 8, generator=generator("pool", seed))
    return torch.nn.functional.interpolate(small, (h, w), mode="bicubic")[0].clamp(0, 1)


@pytest.fixture
def disks(tmp_path):
    "A repository, and a disk beside it."
    repo, disk = tmp_path / "repo", tmp_path / "disk mit Ümlaut"
    for i in range(4):
        part = disk / "RESIDE" / ("ITS" if i < 3 else "SOTS/outdoor")
        save_image(picture(i), part / f"clear/{i}.png")
        for k in (1, 2, 3): save_image(degrade(picture(i), "haze", k), part / f"hazy/{i}_{k}_0.9.png")
    for i in range(10, 13):
        gt = picture(i, 163, 195)
        save_image(gt, repo / f"sets/DIV2K/DIV2K_train_HR/{i:04}.png")
        lq = degrade(gt[:, :160, :192], "sr_x4", i)
        save_image(lq, repo / f"sets/DIV2K/DIV2K_train_LR_bicubic/X4/{i:04}x4.png")
    for i in range(20, 26): save_image(picture(i), repo / f"sets/mine/{i}.png")
    (repo / "sets/mine/20.txt").write_text("a caption")
    return repo, disk


def sets(disk):
    return [dict(name="reside", root=str(disk / "RESIDE"), layout="reside"),
            dict(name="div2k", root="sets/DIV2K", layout="div2k_x4", split=dict(reference=1)),
            dict(name="mine", root="sets/mine", layout="photographs", split=dict(reference=2, test=1), weight=3)]


def test_three_data_sets_from_folders_to_samples(disks):
    repo, disk = disks
    index, ignored = build_pool("data", sets(disk), repo, min_side=64)
    assert tuple(index.columns) == COLUMNS + POOL_COLUMNS and ignored.empty and (index.verdict == ACCEPTED).all()
    refuse_leaks(leaks(index)); refuse_unusable(index)
    judges = [Statistics()]
    judged = clean(index, judges, make_thresholds(dict(short_side=[100, 50]), judges), repo)
    kept = add_captions(select(judged), lambda path: path.stem, repo)
    manifest = load_manifest(save_manifest(kept, repo / "artifacts/manifest.parquet"))
    assert set(zip(manifest.dataset, manifest.task, manifest.split)) == {
        ("reside", "haze", "train"), ("reside", "haze", "test"), ("div2k", "sr_x4", "train"),
        ("div2k", "sr_x4", "reference"), ("mine", "", "train"), ("mine", "", "reference"), ("mine", "", "test")}
    assert manifest.path[0] == str(disk / "RESIDE/ITS/clear/0.png") and manifest.path.iloc[-1] == "sets/mine/25.png"
    tasks = dict(weather=["haze", "rain"], sr=["sr_x4"])
    data = RestorationDataset(manifest, "train", tasks, crop=64, root=repo)
    photographs = manifest[(manifest.dataset == "mine") & (manifest.split == "train")]
    assert data.lengths == dict(weather=9 + 3 * len(photographs), sr=2 + 3 * len(photographs))
    drawn = Counter()
    for task, n in data.lengths.items():
        for i in range(n):
            sample = data[(task, i, i)]
            assert sample["lq"].shape == sample["gt"].shape == (3, 64, 64)
            drawn[task, sample["caption"]] += 1
    assert all(drawn["weather", str(i)] == 3 for i in (0, 1, 2))
    assert sum(drawn["sr", f"{i:04}"] for i in (10, 11, 12)) == 2
    assert all(drawn["sr", Path(p).stem] == 3 for p in photographs.path)
    items = reference_items(manifest, "reference", ["sr_x4", "rain"], 2, 64, 0, repo)
    assert [i.photo.split("/")[0] for i in items] == ["div2k", "div2k", "mine", "mine"]
    assert items[0].lq.shape == (3, 16, 16) and (items[0].input - items[0].gt).abs().mean() < 0.1


def test_a_cropped_pair_is_aligned_to_its_last_pixel(disks):
    "GT 163x195 with LQ 40x48: crops at the far rim must still show the same place."
    repo, disk = disks
    manifest = build_pool("data", sets(disk)[1:2], repo).manifest
    assert set(zip(manifest.width, manifest.height)) == {(192, 160)}
    data = RestorationDataset(manifest, "train", dict(sr=["sr_x4"]), crop=128, root=repo)
    errors = [float((s["lq"] - s["gt"]).abs().mean()) for s in (data["sr", i % 2, i] for i in range(30))]
    assert max(errors) < 0.1


def test_the_report_counts_everything(disks):
    repo, disk = disks
    its = disk / "RESIDE/ITS"
    (its / "hazy/0_1_0.9.png").write_bytes((its / "hazy/0_1_0.9.png").read_bytes()[:300])  # truncated
    save_image(picture(9), its / "hazy/99_1_0.9.png")  # an orphan
    (its / "hazy/1_1_0.9.png").write_text("no picture")
    save_image(picture(1)[:, :100], its / "hazy/1_2_0.9.png")  # another size
    save_image(picture(2)[:, 14:, 14:], its / "hazy/2_1_0.9.png")  # cut on one side only
    save_image(picture(2).roll((12, 12), (1, 2)), its / "hazy/2_2_0.9.png")  # off
    save_image(picture(30, 40, 300), repo / "sets/mine/thin.png")
    (its / "trans").mkdir(); save_image(picture(0), its / "trans/0.png")
    index, ignored = build_pool("data", sets(disk), repo, min_side=64)
    found = rejections(index)
    assert {k: int(n) for k, n in found.rows.items()} == {
        ("reside", "unreadable"): 2, ("reside", "no partner"): 1, ("reside", "sizes"): 2, ("reside", "misaligned"): 1,
        ("mine", "small"): 1}
    assert ignored.values.tolist() == [["reside", "ITS/trans", 1]]
    table = counts(index)
    assert table.loc[("reside", "haze", "train")].tolist() == [10, 10, 4, 6]
    assert table.rows.sum() == len(index) and table.rejected.sum() == 7
    bad = index[index.verdict == REJECTED]
    assert (bad.width == 0).all() and (bad.sha256 == "").all() and not bad.reason.str.contains("\n").any()


def test_a_duplicate_between_train_and_test_is_refused(disks):
    repo, disk = disks
    save_image(picture(20) * 0.8, disk / "RESIDE/SOTS/outdoor/clear/77.png")
    save_image(degrade(picture(20), "haze", 0), disk / "RESIDE/SOTS/outdoor/hazy/77_1.png")
    whole = [s | dict(split="train") if s["name"] == "mine" else s for s in sets(disk)]
    index = build_pool("data", whole, repo).manifest
    found = leaks(index)
    assert found[["photo", "other"]].values.tolist() == [["mine/20", "reside/SOTS/outdoor/hazy/77_1"]]
    with pytest.raises(FoundIRError, match=r"mine/20 \(train\) looks like reside/.*77_1 \(test\).*one split only"):
        refuse_leaks(found)


def test_an_unusable_test_picture_is_told_before_cleaning(disks):
    repo, disk = disks
    for k in (1, 2): (disk / f"RESIDE/SOTS/outdoor/hazy/3_{k}_0.9.png").write_text("x")
    with pytest.raises(FoundIRError, match=r"3_1_0.9 \(test\) can't be used.*and 1 more"):
        refuse_unusable(build_pool("data", sets(disk), repo).manifest)


def test_versions_of_a_scene_are_no_photographs(disks):
    "Two folders of one's own whose names say nothing."
    repo, disk = disks
    for i in range(3):
        save_image(picture(i), repo / f"ab/A/{i}.png")
        save_image(degrade(picture(i), "low_light", i), repo / f"ab/B/{i}.png")
        save_image(picture(50 + i), repo / f"ab/C/{i}.png")  # another scene of that name
    ab = [dict(name="ab", root="ab", layout="photographs", split="train")]
    with pytest.raises(FoundIRError, match=r"may be degraded pictures: ab/A/0 looks like.*ab/B/0"):
        build_pool("data", ab, repo)
    for p in (repo / "ab/B").iterdir(): p.unlink()
    assert len(build_pool("data", ab, repo).manifest) == 6


def test_an_input_is_no_ground_truth_of_another_set(disks):
    repo, disk = disks
    mine = repo / "sets/mine/foggy day.png"
    mine.write_bytes((disk / "RESIDE/ITS/hazy/0_2_0.9.png").read_bytes())
    with pytest.raises(FoundIRError, match="mine/foggy day is the input of reside/ITS/hazy/0_2_0.9"):
        build_pool("data", sets(disk), repo)


def test_versions_in_one_folder_of_the_projects_own_layout(tmp_path):
    for name, gain in [("a", 1), ("a_lq", 0.5)]: save_image(picture(0) * gain, tmp_path / f"data/train/{name}.png")
    with pytest.raises(FoundIRError, match="train/a looks like"): build_pool("data", None, tmp_path)


@pytest.mark.parametrize("path, name", [
    ("a/0001.png", "0001"), ("0001x4.png", "0001"), ("12_hazy.jpg", "12"), ("12_GT.jpg", "12"),
    ("IMG 3.noisy.png", "img_3"), ("hazy.png", "hazy"), ("rainbow_2.png", "rainbow_2"), ("box4.png", "box4")])
def test_scene_names(path, name): assert scene_name(path) == name


def test_a_scale_that_is_not_the_tasks(disks):
    repo, disk = disks
    index = build_pool("data", [sets(disk)[1] | dict(task="sr_x2", split="train")], repo).manifest
    assert index.reason.str.startswith("sizes: the LQ is 4 times smaller, its task expects 2").all()
    assert (index.width == 0).all() and (index.sha256 == "").all()


def test_all_that_is_wrong_with_the_list(disks):
    repo, disk = disks
    a, b, c = sets(disk)
    wrong = [a, a, b | dict(layout="div"), c | dict(name="x/y"), c | dict(weight=0), 7]
    with pytest.raises(ConfigError) as e: read_config(wrong)
    assert all(w in str(e.value) for w in ("called reside", "[2].layout", "'div'", "[3].name", "[4].weight", "[5]"))
    with pytest.raises(FoundIRError) as e: build_pool("data", [a | dict(root="gone"), b | dict(layout="lol"), c], repo)
    assert "data set reside: nothing at gone" in str(e.value) and "data set div2k" in str(e.value)


def test_a_folder_listed_twice_is_refused(disks):
    repo, disk = disks
    a, b, _ = sets(disk)
    inside = dict(name="its", root=str(disk / "RESIDE/ITS"), layout="pairs", gt="clear/{key}", lq="hazy/{key}_*",
                  task="haze", split="train")
    for other, told in [(a | dict(name="again"), "and again list .*: 12"), (inside, "and its list .*: 9")]:
        with pytest.raises(FoundIRError, match=told): build_pool("data", [a, other], repo)
    halves = [a | dict(split="train"), a | dict(name="sots", split="test")]
    assert len(build_pool("data", halves, repo).manifest) == 12
    photographs = b | dict(name="photographs", layout="div2k")  # the same files in another role
    assert len(build_pool("data", [b, photographs], repo).manifest) == 6


@pytest.mark.parametrize("values", [[], {"name": "a"}, "reside"])
def test_what_is_no_list_of_data_sets(values):
    with pytest.raises(ConfigError, match="expected a list of mappings"): read_config(values)


@pytest.mark.parametrize("split", [{"reference": -2}, {"reference": 1.5}, {"val": 1}, {"train": 1}])
def test_numbers_to_hold_out(split):
    with pytest.raises(ConfigError, match=r"datasets\[0\].split"):
        read_config([dict(name="a", root="a", layout="reside", split=split)])


def test_dvc_sees_the_roots(disks, tmp_path):
    repo, disk = disks
    roots = data_roots("data", [*sets(disk), dict(name="t", root="lists/a.csv", layout="table")])
    assert roots == sorted(["lists", "sets/DIV2K", "sets/mine", str(disk / "RESIDE")])
    text = "stages:\n  ingest:\n    deps:\n" + "".join(f"    - {r}\n" for r in roots)
    (tmp_path / "dvc.yaml").write_text(text)
    check_tracked(roots, tmp_path / "dvc.yaml")
    with pytest.raises(FoundIRError, match="/more is no dependency.*make export"):
        check_tracked([*roots, "/more"], tmp_path / "dvc.yaml")


def test_only_new_pictures_are_measured(disks, monkeypatch):
    from foundir_v2 import index as module
    repo, disk = disks
    first = build_pool("data", sets(disk), repo, memo=Memo(repo / ".cache/rows.sqlite")).manifest
    seen = []
    measure = module.measure
    monkeypatch.setattr(module, "measure", lambda entry, *a: seen.append(entry.photo) or measure(entry, *a))
    save_image(picture(40), repo / "sets/mine/40.png")
    os.utime(repo / "sets/mine/21.png", ns=(1, 1))
    again = build_pool("data", sets(disk), repo, memo=Memo(repo / ".cache/rows.sqlite")).manifest
    assert sorted(seen) == ["mine/21", "mine/40"]
    common = again[again.photo.isin(first.photo)].reset_index(drop=True)
    pd.testing.assert_frame_equal(common.drop(columns="split"), first.drop(columns="split"))
    build_pool("data", [s | dict(name="other_" + s["name"]) for s in sets(disk)], repo,
               memo=Memo(repo / ".cache/rows.sqlite"))
    assert len(seen) == 2


def test_what_a_split_has_nothing_for_is_told_at_once(disks):
    repo, disk = disks
    index, _ = build_pool("data", sets(disk), repo)
    assert lacking(index, {"weather": ["haze"], "sr": ["sr_x4"]}, ["haze", "sr_x4"]) == {}
    tasks, asked = {"weather": ["rain"], "fog": [], "haze": []}, ["haze", "murky"]
    found = lacking(index, tasks, asked)
    assert found == {"train": ["fog"], "reference": ["fog", "haze", "murky"], "test": ["murky"]}
    words = "train has nothing for fog; reference .*haze, murky; test .*murky: add"
    with pytest.raises(FoundIRError, match=words) as e: refuse_lacking(found)
    assert "\n" not in str(e.value)
    refuse_lacking({})
    # pairs of the task, of a sub-task, and photographs for what has a recipe
    alone = index[index.dataset == "reside"]
    assert lacking(alone, {"weather": ["haze", "rain"]}, []) == {"reference": ["haze", "rain"]}
    assert lacking(alone, {"haze": []}, ["haze"]) == {"reference": ["haze"]}
    assert lacking(alone[alone.split != "train"], {"weather": ["haze"]}, [])["train"] == ["weather"]
    rejected = index.assign(verdict=index.verdict.mask(index.split == "test", REJECTED))
    assert lacking(rejected, {}, ["haze"]) == {"test": ["haze"]}
