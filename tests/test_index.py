"From folders to a manifest: bad rows are kept with reasons, leaks stop everything."
import os
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from foundir_v2.core import FoundIRError, generator, repo_root, save_image, to_pil
from foundir_v2.fetch import Source, sources_csv
from foundir_v2.index import (ACCEPTED, COLUMNS, NEAR_BITS, REJECTED, Misfit, add_captions, build_manifest,
                              check_splits, dhash, fit_pair, inspect_all, leaks, load_manifest, look_alike,
                              near_copies, save_manifest, select, thumbnails)
from foundir_v2.listing import scan
from foundir_v2.memo import Memo

ROOT = repo_root(Path(__file__).parent)


def picture(seed, h=24, w=32):
    "Blobs of colour: smooth enough for JPEG, and different for every seed."
    small = torch.rand(1, 3, 6, 8, generator=generator("picture", seed))
    return torch.nn.functional.interpolate(small, (h, w), mode="bicubic")[0].clamp(0, 1)


def put(path, seed, **kw): return save_image(picture(seed, **kw), path)


def put_lq(path, seed, **kw): return save_image(picture(seed, **kw) * 0.9, path)


@pytest.fixture
def gts(tmp_path):
    for i, split in enumerate(["train", "train", "reference", "test"]): put(tmp_path / "set" / split / f"{i}.png", i)
    return tmp_path


def rejected(manifest): return dict(manifest.loc[manifest.verdict == REJECTED, ["photo", "reason"]].values)


def test_ground_truths_only(gts):
    put(gts / "set/train/deep/er/x.JPG", 9)
    (gts / "set/train/0.txt").write_text("a caption")
    (gts / "set/train/.hidden.png").touch()
    (gts / "set/notes").mkdir()
    m = build_manifest("set", root=gts)
    assert tuple(m.columns) == COLUMNS and (m.verdict == ACCEPTED).all() and (m.lq == "").all()
    assert (m.reason == "").all()
    assert list(m.photo) == ["train/0", "train/1", "train/deep/er/x", "reference/2", "test/3"]
    assert list(m.path)[2] == "set/train/deep/er/x.JPG" and set(zip(m.width, m.height)) == {(32, 24)}


def test_ingestion_sees_what_can_be_restored(gts):
    from foundir_v2.targets import READABLE
    for i, suffix in enumerate(READABLE): to_pil(picture(100 + i)).save(gts / f"set/train/all{i}{suffix}")
    m = build_manifest("set", root=gts)
    assert [Path(p).suffix for p in m.path if "/all" in p] == [
        suffix for _, suffix in sorted((f"all{i}", s) for i, s in enumerate(READABLE))]
    assert {".gif", ".avif"} <= set(READABLE) and (m.verdict == ACCEPTED).all()


def test_sources_layout(tmp_path):
    rows = [Source(f"photos/{n}.png", "p", "1", "", "", "", split) for n, split in [("a", "train"), ("b", "test")]] + [
        Source("weights/w.mat", "p", "1", "", "", "")]
    for s in rows[:2]: put(tmp_path / "data" / s.file, ord(s.file[7]))
    (tmp_path / "data/SOURCES.csv").write_bytes(sources_csv(rows))
    m = build_manifest("data", root=tmp_path)
    assert list(m.photo) == ["a", "b"] and list(m.split) == ["train", "test"]
    assert list(m.path) == ["data/photos/a.png", "data/photos/b.png"]
    (tmp_path / "data/photos/a.png").unlink()
    assert "no image at data/photos/a.png" in rejected(build_manifest("data", root=tmp_path))["a"]


def test_pairs_and_what_is_wrong_with_them(tmp_path):
    d = tmp_path / "set/train/rain"
    for i, (name, h) in enumerate([("same", 24), ("sr", 24), ("odd", 24), ("alone", 24), ("cut", 24), ("larger", 24)]):
        put(d / f"GT/{name}.png", i, h=h)
    put(d / "LQ/same.jpg", 0)
    put_lq(d / "LQ/sr.png", 1, h=6, w=8)
    put(d / "LQ/odd.png", 2, h=12, w=8)
    put(d / "LQ/orphan.png", 3)
    put(d / "LQ/larger.png", 3, h=48, w=64)
    (d / "LQ/cut.png").write_bytes((d / "LQ/same.jpg").read_bytes()[:100])
    put(tmp_path / "set/test/GT/sub/t.png", 77); put_lq(tmp_path / "set/test/LQ/sub/t.png", 77)
    m = build_manifest("set", root=tmp_path)
    good = m[m.verdict == ACCEPTED]
    assert list(good.photo) == ["train/rain/same", "train/rain/sr", "test/sub/t"]
    assert list(good.task) == ["rain", "rain", ""]
    assert list(good.lq) == ["set/train/rain/LQ/same.jpg", "set/train/rain/LQ/sr.png", "set/test/LQ/sub/t.png"]
    bad = rejected(m)
    assert set(bad) == {f"train/rain/{n}" for n in ("odd", "alone", "cut", "orphan", "larger")}
    assert "8x12" in bad["train/rain/odd"] and "64x48" in bad["train/rain/larger"]
    assert bad["train/rain/alone"] == "no partner: no input belongs to rain/GT/alone.png"
    assert bad["train/rain/orphan"] == "no partner: no ground truth belongs to rain/LQ/orphan.png"
    assert "LQ/cut.png" in bad["train/rain/cut"] and bad["train/rain/cut"].startswith("unreadable: ")
    unusable = m[m.verdict == REJECTED]
    assert (unusable.width == 0).all() and (unusable.sha256 == "").all()


def test_bad_pictures_are_rows_with_reasons(gts):
    d = gts / "set/train"
    (d / "empty.png").touch(); (d / "text.jpg").write_text("no picture"); put(d / "large.png", 5, h=100, w=100)
    (d / "cut.jpg").write_bytes(put(d / "whole.jpg", 6).read_bytes()[:200])
    m = build_manifest("set", root=gts, max_pixels=9999)
    bad = rejected(m)
    assert set(bad) == {"train/cut", "train/empty", "train/large", "train/text"}
    for photo, reason in bad.items(): assert f"set/{photo}" in reason and str(gts) not in reason and "\n" not in reason
    assert "9,999 pixels" in bad["train/large"] and (m.verdict == ACCEPTED).sum() == 5


def test_layouts_that_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder"): scan(tmp_path / "none")
    (tmp_path / "empty/train").mkdir(parents=True)
    with pytest.raises(FoundIRError, match="no pictures"): scan(tmp_path / "empty")
    put(tmp_path / "val/train/a.png", 0); put(tmp_path / "val/valid/b.png", 1)
    with pytest.raises(FoundIRError, match="valid.*reference"): scan(tmp_path / "val")


def test_pairs_and_photographs_mix_in_a_split(tmp_path):
    put(tmp_path / "set/train/rain/GT/a.png", 0); put_lq(tmp_path / "set/train/rain/LQ/a.png", 0)
    put(tmp_path / "set/train/mine/b.png", 1); put(tmp_path / "set/train/c.png", 2)
    m = build_manifest("set", root=tmp_path)
    assert list(m.photo) == ["train/rain/a", "train/c", "train/mine/b"] and list(m.lq != "") == [True, False, False]
    assert (m.verdict == ACCEPTED).all()


@pytest.mark.parametrize("inside", ["hazy", "input", "lq", "LR_bicubic/X4", "Rain/a", "synthetic", "NOISY"])
def test_a_degraded_folder_is_no_ground_truth(tmp_path, inside):
    "{hazy,clear}, {input,target}, lower-case gt/lq, and LR folders in a tree of photographs."
    put(tmp_path / "set/train/clear/a.png", 0); put_lq(tmp_path / "set/train" / inside / "a.png", 0)
    with pytest.raises(FoundIRError) as e: scan(tmp_path / "set")
    assert inside in str(e.value) and "GT/" in str(e.value) and "\n" not in str(e.value)
    (tmp_path / "set/train" / inside / "a.png").unlink()
    assert [x.photo for x in scan(tmp_path / "set")] == ["train/clear/a"]


def test_names_and_links_that_make_trouble(tmp_path):
    d = tmp_path / "set/train"
    put(d / "two words/Füße 雪.png", 0); put(d / "twice.png", 1); put(d / "twice.jpg", 2)
    (d / "round").symlink_to(tmp_path / "set/train"); (d / "gone.png").symlink_to(tmp_path / "nothing.png")
    os.mkfifo(d / "pipe.png")
    (d / "folder.png").mkdir()
    put(d / "c.png", 3).rename(os.fsdecode(os.fsencode(d) + b"/caf\xe9.png"))
    bad = rejected(m := build_manifest("set", root=tmp_path))
    assert list(m[m.verdict == ACCEPTED].photo) == ["train/twice", "train/two words/Füße 雪"]
    assert {k: v.partition(":")[0] for k, v in bad.items()} == {
        "train/twice~": "duplicate name", "train/round": "link", "train/gone": "missing", "train/pipe": "unreadable",
        "train/caf\\udce9.png": "unreadable name"}
    save_manifest(m, tmp_path / "m.parquet"); assert load_manifest(tmp_path / "m.parquet").equals(m)


def test_two_ground_truths_of_one_name_are_ambiguous(tmp_path):
    d = tmp_path / "set/train"
    put(d / "GT/a.png", 0); put(d / "GT/a.jpg", 1); put_lq(d / "LQ/a.png", 0); put(d / "b.png", 3)
    m = build_manifest("set", root=tmp_path)
    assert list(m[m.verdict == ACCEPTED].photo) == ["train/b"]
    assert "a.jpg, a.png" in rejected(m)["train/a"]


def test_sizes_that_fit_but_for_a_remainder(tmp_path):
    d = tmp_path / "set/train"
    for name, size in [("floor", (49, 74)), ("ceil", (50, 75)), ("wrong", (49, 70))]:
        put(d / f"GT/{name}.png", 5, h=199, w=298); put(d / f"LQ/{name}.png", 5, h=size[0], w=size[1])
    m = build_manifest("set", root=tmp_path).set_index("photo")
    good = m[m.verdict == ACCEPTED]
    assert set(good.index) == {"train/floor", "train/ceil"} and set(zip(good.width, good.height)) == {(296, 196)}
    assert m.reason["train/wrong"].startswith("sizes: LQ is 70x49, GT 298x199")
    assert fit_pair((24, 32), (24, 32)) == (1, 24, 32)
    for lq in [(23, 32), (24, 31), (25, 32), (0, 8)]:
        with pytest.raises((Misfit, ZeroDivisionError)): fit_pair((24, 32), lq)


def test_a_pair_that_is_off_is_left_out(tmp_path):
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 30, 40, generator=generator(1)), (240, 320), mode="bicubic")[0]
    for name, cut in [("on", 0), ("off", 12)]:
        save_image(x[:, :240 - cut, :320 - cut], tmp_path / f"set/train/GT/{name}.png")
        save_image(x[:, cut:, cut:] * 0.5, tmp_path / f"set/train/LQ/{name}.png")
    m = build_manifest("set", root=tmp_path).set_index("photo")
    assert m.verdict["train/on"] == ACCEPTED and m.reason["train/off"].startswith("misaligned: ")


def test_an_input_that_is_its_ground_truth(tmp_path):
    put(tmp_path / "set/train/GT/a.png", 0); put(tmp_path / "set/train/LQ/a.png", 0)
    assert rejected(build_manifest("set", root=tmp_path))["train/a"].startswith("same file: ")


def test_pictures_are_measured_once(gts, tmp_path):
    entries, memo = scan(gts / "set"), Memo(tmp_path / "memo/rows.sqlite")
    rows = inspect_all(entries, gts, min_side=20, memo=memo)
    (gts / "set/train/0.png").chmod(0o600)
    before = (gts / "set/train/1.png").stat()
    put(gts / "set/train/1.png", 77)
    os.utime(gts / "set/train/1.png", ns=(0, before.st_mtime_ns + 1))
    again = inspect_all(entries, gts, min_side=20, memo=Memo(tmp_path / "memo/rows.sqlite"))
    assert [a == b for a, b in zip(rows, again)] == [True, False, True, True]
    assert inspect_all(entries, gts, min_side=25, memo=memo)[0]["reason"].startswith("small: 32x24")
    (tmp_path / "bad.sqlite").write_text("no data base, but long enough to be read as one" * 30)
    with pytest.raises(FoundIRError, match="bad.sqlite.*delete it"):
        inspect_all(entries, gts, memo=Memo(tmp_path / "bad.sqlite"))


def test_several_processes_give_the_same_rows(gts):
    (gts / "set/train/bad.png").touch()
    entries = scan(gts / "set")
    assert inspect_all(entries, gts, num_workers=2) == inspect_all(entries, gts)


CHANGES = {"same bytes": lambda x: x,
           "mirrored": lambda x: x.flip(2),
           "darker": lambda x: x * 0.5,
           "washed out": lambda x: x * 0.5 + 0.4,
           "half size": lambda x: torch.nn.functional.interpolate(x[None], scale_factor=0.5, mode="area")[0],
           "noisy": lambda x: x + 0.02 * torch.randn(x.shape, generator=generator(0))}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("splits", [
    ("train", "reference"), ("train", "test"), ("reference", "test"), ("test", "train")])
def test_a_photograph_in_two_splits_is_an_error(tmp_path, change, splits):
    x = picture(0, 96, 128)
    save_image(x, tmp_path / "set" / splits[0] / "original.png")
    save_image(CHANGES[change](x), tmp_path / "set" / splits[1] / "copy.png")
    with pytest.raises(FoundIRError) as e: build_manifest("set", root=tmp_path)
    assert all(w in str(e.value) for w in (f"{splits[0]}/original", f"{splits[1]}/copy",
                                           "is" if change == "same bytes" else "looks like"))
    assert len(build_manifest("set", root=tmp_path, near_bits=-1)) == 2


def test_all_leaks_are_listed(gts):
    for i in range(3): put(gts / f"set/test/copy{i}.png", 0)
    m = build_manifest("set", root=gts, near_bits=-1)
    found = leaks(m)
    assert list(found.other) == ["test/copy0", "test/copy1", "test/copy2"] and found.same_file.all()
    with pytest.raises(FoundIRError, match=r"train/0 .*is test/copy0.*copy2.*\(3 such pairs\)"): check_splits(m)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_near_copies_finds_what_the_whole_table_shows(seed):
    r = np.random.default_rng(seed)
    a = r.integers(0, 256, (40, 32), dtype=np.uint8)
    b = np.concatenate([a[:6], r.integers(0, 256, (6, 32), dtype=np.uint8)])
    for row in b[:6]: row[r.integers(0, 32, 5)] ^= np.uint8(1 << r.integers(0, 8))
    mirrored = ~np.packbits(np.unpackbits(b, axis=1).reshape(-1, 16, 16)[:, :, ::-1].reshape(-1, 256), axis=1)
    b[3:6] = mirrored[3:6]
    a, b = [x.tobytes().hex() for x in a], [x.tobytes().hex() for x in b]
    table = look_alike(a, b)
    assert {(i, j): d for i, j, d in near_copies(a, b)} == {
        (int(i), int(j)): int(table[i, j]) for i, j in np.argwhere(table <= NEAR_BITS)}
    assert {j for _, j, _ in near_copies(a, b)} >= set(range(6))


def test_copies_within_a_split_are_no_leak(gts):
    put(gts / "set/train/again.png", 0)
    assert len(build_manifest("set", root=gts)) == 5


def test_unusable_rows_are_not_compared(tmp_path):
    for split in ("train", "test"):
        put(tmp_path / "set" / split / "a.png", split == "test")
        (tmp_path / "set" / split / "bad.png").touch()
    assert len(rejected(build_manifest("set", root=tmp_path))) == 2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_look_alike_is_a_symmetric_distance_blind_to_mirrors(a, b):
    x, y = picture(a, 64, 80), picture(b, 64, 80)
    d = look_alike([dhash(x), dhash(y)], [dhash(x), dhash(y), dhash(y.flip(2))])
    assert d[0, 0] == d[1, 1] == 0 and d[0, 1] == d[1, 0] and d[1, 2] <= 4 and abs(int(d[0, 1]) - int(d[0, 2])) <= 4
    assert a == b or d[0, 1] > NEAR_BITS


def test_dhash_counts_rising_neighbours():
    ramp = torch.linspace(0, 1, 17).expand(3, 16, 17)
    assert dhash(ramp) == "f" * 64 and dhash(ramp.flip(2)) == "0" * 64 == dhash(torch.rand(3, 1, 1))
    assert look_alike([dhash(ramp)], [dhash(ramp.flip(2))])[0, 0] == 0


def test_select_drops_for_training_and_keeps_the_benchmarks(gts):
    m = build_manifest("set", root=gts)
    m.loc[m.photo.isin(["train/0", "reference/2", "test/3"]), "verdict"] = REJECTED
    kept = select(m)
    assert list(kept.photo) == ["train/1", "reference/2", "test/3"] and list(kept.index) == [0, 1, 2] and len(m) == 4
    m.loc[m.photo == "train/1", "verdict"] = REJECTED
    with pytest.raises(FoundIRError, match="no training picture"): select(m)


@pytest.mark.parametrize("split", ["reference", "test"])
def test_an_unreadable_benchmark_picture_is_an_error(gts, split):
    (gts / "set" / split / "bad.png").touch()
    with pytest.raises(FoundIRError, match=f"{split}/bad .*0 bytes"): select(build_manifest("set", root=gts))


def test_captions(gts):
    m = build_manifest("set", root=gts)
    described = add_captions(m, lambda p: f"{p.name} of {p.stat().st_size} bytes", root=gts)
    assert list(described.caption) == [f"{Path(p).name} of {(gts / p).stat().st_size} bytes" for p in m.path]
    assert (m.caption == "").all()


def test_parquet_round_trip(gts, tmp_path):
    m = build_manifest("set", root=gts)
    path = save_manifest(m.assign(niqe=[1.0, np.nan, 2.0, 3.0]), tmp_path / "out/m.parquet")
    first = path.read_bytes()
    assert load_manifest(path)[list(COLUMNS)].equals(m)
    assert save_manifest(m.assign(niqe=[1.0, np.nan, 2.0, 3.0]), path).read_bytes() == first
    with pytest.raises(FileNotFoundError, match="dvc repro"): load_manifest(tmp_path / "none.parquet")
    (tmp_path / "bad.parquet").write_text("no table")
    with pytest.raises(FoundIRError, match="bad.parquet is not"): load_manifest(tmp_path / "bad.parquet")
    save_manifest(m.drop(columns=["split", "path"]), tmp_path / "few.parquet")
    with pytest.raises(FoundIRError, match="lacks the columns path, split"): load_manifest(tmp_path / "few.parquet")


def test_exif_rotation_counts_in_the_size(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    (tmp_path / "set/train").mkdir(parents=True)
    Image.new("RGB", (30, 20)).save(tmp_path / "set/train/a.jpg", exif=exif)
    row = build_manifest("set", root=tmp_path).iloc[0]
    assert (row.width, row.height) == (20, 30)


def test_linked_files_keep_their_names(gts):
    "DVC may link files from its cache: the manifest names the link."
    store = gts / "store/0123.png"; store.parent.mkdir()
    (gts / "set/train/0.png").rename(store); (gts / "set/train/0.png").symlink_to(store)
    m = build_manifest("set", root=gts)
    assert m.path[0] == "set/train/0.png" and m.verdict[0] == ACCEPTED


def test_thumbnails(gts):
    put(gts / "set/train/tall.png", 8, h=300, w=3); (gts / "set/train/bad.png").touch()
    small = thumbnails(build_manifest("set", root=gts), root=gts, side=40)
    assert len(small) == 5 and all(x.shape == (3, 40, 40) and 0 <= x.min() and x.max() <= 1 + 1e-5 for x in small)
    assert (small[2][:, :, 0] == 1).all() and (small[2][:, :, 19] < 1).any()


@pytest.mark.skipif(not (ROOT / "data/SOURCES.csv").exists(), reason="nothing fetched yet")
def test_the_fetched_photographs():
    m = build_manifest("data", root=ROOT)
    assert (m.verdict == ACCEPTED).all()
    assert m.split.value_counts().to_dict() == {"train": 72, "test": 8, "reference": 6}
    distances = look_alike(list(m.dhash), list(m.dhash))[np.triu_indices(86, 1)]
    assert distances.min() > 2 * NEAR_BITS
    check_splits(m, near_bits=int(distances.min()) - 1)
    with pytest.raises(FoundIRError): check_splits(pd.concat([m, m.tail(1).assign(split="test")]))


def test_what_could_not_be_read_is_tried_again(gts, tmp_path, monkeypatch):
    "A disk that was away, or a file without rights, changes neither size nor time when it is back."
    from foundir_v2 import index as module
    entries, memo, load = module.scan(gts / "set"), Memo(tmp_path / "m.sqlite"), module.load_image
    def away(path, *args): raise OSError("input/output error")
    monkeypatch.setattr(module, "load_image", away)
    rows = module.inspect_all(entries, gts, memo=memo)
    assert all(r["verdict"] == REJECTED for r in rows)
    monkeypatch.setattr(module, "load_image", load)
    assert all(r["verdict"] != REJECTED for r in module.inspect_all(entries, gts, memo=memo))
