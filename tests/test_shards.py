"A pool in tar files: the same bytes, the same samples and the same words about what is wrong as with loose files."
import http.server
import io
import json
import os
import tarfile
import threading
from pathlib import Path

import fsspec
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from foundir_v2 import shards as module
from foundir_v2.core import FoundIRError, ImageError, generator, load_image, save_image
from foundir_v2.data import RestorationDataset, collate, reference_items
from foundir_v2.degrade import degrade
from foundir_v2.index import file_stamp, inspect_all, thumbnails
from foundir_v2.layouts import DataSet, read_dataset
from foundir_v2.reading import Window, read, size_of
from foundir_v2.shards import (
    BLOCK, _fits, file_of, mapped, member, opened, plan_shards, read_member, write_shards)
from foundir_v2.targets import file_hash

TASKS = {"denoise": ["gaussian_noise"], "weather": ["rain"], "sr": ["sr_x2"], "film": []}
SIZE = 20_000  # bytes of a shard: several are needed


def picture(*name, h=70, w=90):
    coarse = torch.rand(1, 3, 7, 9, generator=generator(*name))
    return torch.nn.functional.interpolate(coarse, (h, w), mode="bicubic")[0].clamp(0, 1)


@pytest.fixture(scope="module")
def loose(tmp_path_factory):
    "Photographs in several formats, pairs with two inputs per ground truth, an SR pair; two splits."
    root, rows = tmp_path_factory.mktemp("loose"), []
    def row(photo, path, split="train", lq="", task="", caption=""):
        h, w = load_image(root / path).shape[1:]
        rows.append(dict(photo=photo, path=path, lq=lq, task=task, split=split, width=w, height=h, caption=caption,
                         sha256=file_hash(root / path), dhash="", verdict="accepted", reason=""))
    for i in range(6):
        path = f"a b/{i}.{('png', 'jpg', 'webp')[i % 3]}"
        save_image(picture("photo", i), root / path)
        row(f"sky/{i}.x", path, "reference" if i == 5 else "train", caption=f"Käfer {i}" if i % 2 else "")
    for i in range(2):
        save_image(picture("gt", i), root / f"gt/{i}.PNG".lower())
        for k in range(2):
            save_image(degrade(picture("gt", i), "rain", k), root / f"lq/{i}_{k}.jpg")
            row(f"rain/{i}_{k}", f"gt/{i}.png", lq=f"lq/{i}_{k}.jpg", task=("weather", "film")[i])
    save_image(degrade(picture("gt", 0), "sr_x2", 0), root / "lq/small.png")
    row("sr/0", "gt/0.png", lq="lq/small.png", task="sr_x2")
    return root, pd.DataFrame(rows)


@pytest.fixture(scope="module")
def packed(loose, tmp_path_factory):
    root, manifest = loose
    folder = tmp_path_factory.mktemp("packed")
    return folder, write_shards(manifest, folder, root, SIZE)[0]


def both(manifest, columns=("path", "lq")): return [p for c in columns for p in manifest[c] if p]


# ---------------------------------------------------------------- what is written

def test_shards_follow_the_convention_for_any_reader(loose, packed):
    "By tarfile alone: files of a sample share the name up to the first dot, and follow each other."
    (root, manifest), (folder, pool) = loose, packed
    samples = []
    for file in sorted(folder.glob("*.tar")):
        with tarfile.open(file) as tar:
            for info in tar:
                key, _, end = info.name.partition(".")
                if not samples or samples[-1]["key"] != key: samples.append(dict(key=key, shard=file.name))
                samples[-1][end] = tar.extractfile(info).read()
    assert len(samples) == len(manifest) == len({s["key"] for s in samples})
    assert len({s["shard"] for s in samples}) > 3
    for s in samples:
        row, facts = manifest.iloc[int(s["key"])], json.loads(s["json"])
        sides = {end.split(".")[0]: data for end, data in s.items() if end[:3] in ("gt.", "lq.")}
        assert sides["gt"] == (root / row.path).read_bytes() and bool(row.lq) == ("lq" in sides)
        if row.lq: assert sides["lq"] == (root / row.lq).read_bytes()
        assert s.get("txt", b"").decode() == row.caption and s["shard"].startswith(row.split + "-")
        assert (facts["photo"], facts["task"], facts["sha256"]) == (row.photo, row.task, row.sha256)
    other = [c for c in manifest if c not in ("path", "lq")]
    pd.testing.assert_frame_equal(pool[other], manifest[other])
    assert pool.path.nunique() == manifest.path.nunique(), "a ground truth of several inputs is one picture"


def test_shards_stay_below_their_size(loose, packed):
    for file in packed[0].glob("*.tar"):
        with tarfile.open(file) as tar: samples = {n.partition(".")[0] for n in tar.getnames()}
        assert file.stat().st_size <= SIZE + tarfile.RECORDSIZE or len(samples) == 1


def test_the_same_pool_is_the_same_bytes_by_any_number_of_processes(loose, packed, tmp_path):
    root, manifest = loose
    write_shards(manifest, tmp_path, root, SIZE, num_workers=2)
    for file in packed[0].glob("*.tar"): assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_an_interrupted_command_goes_on(loose, tmp_path):
    root, manifest = loose
    first = write_shards(manifest, tmp_path, root, SIZE)[1]
    assert all(first.values())
    lost, cut, other = sorted(tmp_path.glob("*.tar"))[:3]
    whole = {p: p.read_bytes() for p in (lost, cut, other)}
    lost.unlink()
    cut.write_bytes(whole[cut][:3000])
    info = whole[other].index(b'{"photo"')
    other.write_bytes(whole[other][:info + 10] + b"?" + whole[other][info + 11:])
    again = write_shards(manifest, tmp_path, root, SIZE)[1]
    assert {n for n, fresh in again.items() if fresh} == {lost.name, cut.name, other.name}
    assert all(p.read_bytes() == data for p, data in whole.items())
    changed = manifest.assign(caption=["another"] + list(manifest.caption[1:]))
    fresh = write_shards(changed, tmp_path, root, SIZE)[1]
    assert list(fresh.values()).count(True) == 1


def test_a_newer_picture_is_packed_anew(loose, tmp_path):
    root, manifest = loose
    write_shards(manifest, tmp_path, root, 1e9)
    assert not any(write_shards(manifest, tmp_path, root, 1e9)[1].values())
    os.utime(tmp_path / "train-000000.tar", (1, 1))
    assert write_shards(manifest, tmp_path, root, 1e9)[1] == {"train-000000.tar": True, "reference-000000.tar": False}


def test_what_cannot_be_packed_is_told_in_one_line(loose, tmp_path):
    root, manifest = loose
    with pytest.raises(FoundIRError, match="12 of 12 .* sky/0.x: name the folder") as e:
        write_shards(pd.concat([manifest, manifest.head(1)]), tmp_path, root / "nowhere")
    assert "\n" not in str(e.value)
    wrong = manifest.assign(sha256="0" * 64)
    with pytest.raises(FoundIRError, match="0.png has changed since it was indexed"):
        write_shards(wrong, tmp_path, root)
    assert not list(tmp_path.iterdir()), "half a shard stays"
    (tmp_path / "old-000009.tar").touch()
    with pytest.raises(FoundIRError, match="old-000009.tar, which is no part"): write_shards(manifest, tmp_path, root)


def test_unusable_rows_are_left_out_and_the_order_stays(loose, tmp_path):
    root, manifest = loose
    gone = manifest.head(1).assign(photo="torn", path="torn.png", width=0, height=0)
    pool = write_shards(pd.concat([gone, manifest]), tmp_path, root)[0]
    assert list(pool.photo) == list(manifest.photo)


def test_shards_can_be_packed_again(loose, packed, tmp_path):
    (root, manifest), (folder, pool) = loose, packed
    again = write_shards(pool, tmp_path, folder, 1e9)[0]
    for path, first in zip(both(again), both(manifest), strict=True):
        with opened(tmp_path / path) as file: assert file.read() == (root / first).read_bytes()


# ---------------------------------------------------------------- what is read

def test_files_are_found_wherever_a_path_is_taken(loose, packed):
    (root, manifest), (folder, pool) = loose, packed
    for path, first in zip(both(pool), both(manifest), strict=True):
        assert member(folder / path).size == (root / first).stat().st_size
        assert file_hash(folder / path) == file_hash(root / first)
        assert size_of(folder / path) == size_of(root / first)
        assert torch.equal(load_image(folder / path), load_image(root / first))
        for window, halved in ((None, 0), (Window(3, 5, 10, 12), 1), (Window(11, 0, 20, 30), 0)):
            assert torch.equal(read(folder / path, window, halved), read(root / first, window, halved))
    for a, b in zip(thumbnails(pool, folder), thumbnails(manifest, root), strict=True): assert torch.equal(a, b)


def test_a_copy_in_memory_is_private(packed):
    folder, pool = packed
    with opened(folder / pool.path[0]) as file: before = file.read()
    with mapped(folder / pool.path[0]) as data:
        assert data[:] == before
        data[:4] = b"????"
    with opened(folder / pool.path[0]) as file: assert file.read() == before


def dataset(root, rows, **options):
    return RestorationDataset(rows, "train", TASKS, crop=32, root=root, scale_range=(0, 1), **options)


DRAWS = [(task, i, 100 + i) for task, n in dict(denoise=5, weather=7, sr=6, film=2).items() for i in range(n)]


def same(a, b):
    assert a.keys() == b.keys()
    for k, x in a.items(): assert torch.equal(x, b[k]) if torch.is_tensor(x) else x == b[k], k


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("options", [{}, dict(cache=0), dict(cache=60_000, draft=True)], ids=str)
def test_samples_are_those_of_loose_files(loose, packed, options, workers):
    (root, manifest), (folder, pool) = loose, packed
    first, ours = dataset(root, manifest, **options), dataset(folder, pool, **options)
    assert first.lengths == ours.lengths
    loader = DataLoader(ours, batch_sampler=[DRAWS[i::4] for i in range(4)], collate_fn=collate, num_workers=workers)
    for i, batch in enumerate(loader): same(batch, collate([first[d] for d in DRAWS[i::4]]))


def test_reference_items_are_those_of_loose_files(loose, packed):
    (root, manifest), (folder, pool) = loose, packed
    for split, names in (("reference", ["haze", "sr_x4"]), ("train", ["sr_x2", "film"])):
        for a, b in zip(reference_items(manifest, split, names, 3, 32, 0, root),
                        reference_items(pool, split, names, 3, 32, 0, folder), strict=True):
            assert torch.equal(a.lq, b.lq) and torch.equal(a.gt, b.gt) and (a.photo, a.seed) == (b.photo, b.seed)


def test_a_pool_can_be_ingested_as_a_table(loose, packed):
    (_, manifest), (folder, pool) = loose, packed
    pool.to_parquet(folder / "manifest.parquet")
    data = DataSet(name="p", root=str(folder / "manifest.parquet"), layout="table")
    entries = read_dataset(data).entries
    assert [e.photo for e in entries] == list(manifest.photo)
    found = pd.DataFrame(inspect_all(entries, folder))
    assert list(found.sha256) == list(manifest.sha256) and (found.verdict == "accepted").all()
    assert list(found.path) == list(pool.path) and list(found.scale) == [1] * 10 + [2]
    away = pool.assign(**{c: [p and f"memory://far/{p}" for p in pool[c]] for c in ("path", "lq")})
    away.to_parquet(folder / "away.parquet")
    fsspec.filesystem("memory").put(str(folder), "/far", recursive=True)
    entries = read_dataset(DataSet(name="p", root=str(folder / "away.parquet"), layout="table")).entries
    far = pd.DataFrame(inspect_all(entries, folder))
    assert list(far.sha256) == list(manifest.sha256) and list(far.path) == list(away.path)


def test_measures_are_remembered_until_a_shard_changes(loose, tmp_path):
    root, manifest = loose
    pool = write_shards(manifest, tmp_path, root)[0]
    before = file_stamp(str(tmp_path / pool.path[0]))
    assert before != (0, 0) and before == file_stamp(str(tmp_path / pool.path[1]))
    os.utime(tmp_path / "train-000000.tar", (1, 1))
    assert file_stamp(str(tmp_path / pool.path[0])) != before


def test_captions_and_cleaning_know_pictures_in_shards(loose, packed):
    from foundir_v2.caption import CachedCaptioner, NoCaption
    from foundir_v2.clean import Statistics, clean
    (root, manifest), (folder, pool) = loose, packed
    judged = [clean(m, [Statistics()], [], r) for m, r in ((manifest, root), (pool, folder))]
    pd.testing.assert_frame_equal(*(table.drop(columns=["path", "lq"]) for table in judged))
    assert CachedCaptioner(NoCaption(), folder).describe([folder / p for p in pool.path]) == [""] * len(pool)


# ---------------------------------------------------------------- stores

@pytest.fixture
def store(packed):
    "An HTTP server that answers ranges, as object stores do; what it was asked for."
    folder, asked = packed[0], []
    class Handler(http.server.BaseHTTPRequestHandler):
        ranges, broken = True, False
        def log_message(self, *args): pass
        def do_HEAD(self): self.do_GET()
        def do_GET(self):
            file = folder / self.path.strip("/")
            if self.broken: return self.send_error(503)
            if not file.is_file(): return self.send_error(404)
            data, wanted = file.read_bytes(), self.headers.get("Range")
            part = data
            if wanted and self.ranges and self.command == "GET":
                start, end = map(int, wanted.removeprefix("bytes=").split("-"))
                asked.append((file.name, start, end + 1))
                if start >= len(data): return self.send_error(416)
                part = data[start:end + 1]
            self.send_response(206 if part is not data else 200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("Content-Length", str(len(part)))
            self.end_headers()
            if self.command == "GET": self.wfile.write(part)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    module._remote.cache_clear()
    yield f"http://127.0.0.1:{server.server_port}", asked, Handler
    server.shutdown()


def test_a_store_is_asked_for_ranges(loose, packed, store):
    (root, manifest), (_, pool), (address, asked, _) = loose, packed, store
    first, far = dataset(root, manifest), dataset(address, pool)
    for draw in DRAWS: same(far[draw], first[draw])
    sizes = {member(p)[:3] for p in both(pool)}
    assert asked and {(n, start + BLOCK, end - start - BLOCK) for n, start, end in asked} <= sizes
    asked.clear()
    far.photos._forget()
    far["film", 0, 1]
    assert len(asked) == len(set(asked)) <= 2, "a pair is fetched once for its size and its pixels"


def test_addresses_may_stand_in_the_manifest_and_workers_read_them(loose, packed, store, tmp_path):
    (root, manifest), (address, *_) = loose, store
    pool = plan_shards(manifest, root, SIZE, address)[1]
    far, first = dataset(tmp_path, pool), dataset(root, manifest)
    far[DRAWS[0]]  # before the workers start, as scoring does
    loader = DataLoader(far, batch_sampler=[DRAWS[:8], DRAWS[8:]], collate_fn=collate, num_workers=2)
    for batch, draws in zip(loader, (DRAWS[:8], DRAWS[8:]), strict=True):
        same(batch, collate([first[d] for d in draws]))


def test_a_store_that_fails_ends_the_run_and_changes_no_sample(packed, store):
    (_, pool), (address, _, handler) = packed, store
    far = dataset(address, pool)
    handler.broken = True
    with pytest.raises(FoundIRError, match="can't reach http.*try again later") as e: far["film", 0, 1]
    assert not isinstance(e.value, ImageError) and "\n" not in str(e.value)
    handler.broken, handler.ranges = False, False
    with pytest.raises(FoundIRError, match="ignores ranges"): far["film", 0, 1]


def test_what_is_missing_or_cut_in_a_store_is_that_pictures_loss(packed, store, tmp_path):
    (folder, pool), (address, *_) = packed, store
    with pytest.raises(FileNotFoundError, match="no shard .*none.tar"): load_image(f"{address}/none.tar/512+9/a.png")
    name = member(pool.path[0]).shard
    length = (folder / name).stat().st_size
    for offset in (length - 100, length + 9000):
        with pytest.raises(ImageError, match="ends before"): load_image(f"{address}/{name}/{offset}+2000/a.png")
    with pytest.raises(FoundIRError, match="can't read nowhere://x/a.tar"): load_image("nowhere://x/a.tar/512+9/b.png")


# ---------------------------------------------------------------- damage

def damage(how, folder):
    "Harm all training shards but the first."
    files = sorted(folder.glob("train-*.tar"))
    for i, file in enumerate(files[1:]):
        data = file.read_bytes()
        if how == "gone": file.unlink()
        if how == "cut": file.write_bytes(data[:1000])
        if how == "exchanged": file.write_bytes(files[0].read_bytes())
        if how == "shifted": file.write_bytes(data[BLOCK:])
        if how == "scratched":
            spoilt = bytearray(data)
            for part in tarfile.open(fileobj=io.BytesIO(data)).getmembers():
                spoilt[part.offset_data:part.offset_data + part.size // 2] = bytes(part.size // 2)
            file.write_bytes(spoilt)


@pytest.mark.parametrize("how", ["gone", "cut", "exchanged", "shifted", "scratched"])
def test_a_damaged_shard_is_told_and_other_pictures_take_the_place(loose, tmp_path, how):
    root, manifest = loose
    pool = write_shards(manifest, tmp_path, root, SIZE)[0]
    sound = {p for p in pool.path if p.startswith("train-000000")}
    damage(how, tmp_path)
    ours, first = dataset(tmp_path, pool), dataset(root, manifest)
    replaced = 0
    for seed in range(8):
        for index in range(first.lengths["denoise"]):
            sample = ours["denoise", index, seed]
            replaced += bool(sample["quarantined"])
            assert all("\n" not in why for why in sample["quarantined"].values())
            row = pool.set_index("photo").loc[sample["photo"]]
            assert row.path in sound or how == "scratched"
            k = list(first.rows.photo).index(sample["photo"])
            same(dict(sample, quarantined={}), first["denoise", list(first.items["denoise"]).index(k), seed])
    assert replaced > 0
    if how != "scratched":
        with pytest.raises(FoundIRError, match="none of the 2 pictures of task 'film'"): ours["film", 0, 1]


def test_a_pool_that_moved_says_so(loose, packed, tmp_path):
    lost = dataset(tmp_path, packed[1])
    with pytest.raises(FoundIRError, match="no shard .*was it moved\\? Then name the folder"): lost["film", 0, 1]
    with pytest.raises(FileNotFoundError, match="no shard"): file_hash(tmp_path / packed[1].path[0])


def test_paths_that_lead_nowhere_into_shards():
    for path in ("a.tar", "a.tar/b.png", "a.tar/1+2", "a.tar/x+2/b.png", "b.png", "a.tar/1+2/"):
        assert member(path) is None
    with pytest.raises(ImageError, match="is empty"): read_member(member("a.tar/512+0/b.png"))
    assert file_of("x/b.png") == Path("x/b.png")


def test_a_header_is_that_of_the_file_alone():
    info = tarfile.TarInfo("1.gt.png")
    info.size = 7
    header = info.tobuf(tarfile.USTAR_FORMAT)
    assert _fits(header, 7, "1.gt.png") and not _fits(header, 8, "1.gt.png") and not _fits(header, 7, "2.gt.png")
    assert not _fits(header[:-1] + b"x", 7, "1.gt.png") and not _fits(bytes(BLOCK), 0, "") and not _fits(b"", 0, "")
    info.type = tarfile.SYMTYPE
    assert not _fits(info.tobuf(tarfile.USTAR_FORMAT), 7, "1.gt.png")


# ---------------------------------------------------------------- from a shell, and in training

def test_from_a_shell(loose, packed, tmp_path, capsys):
    from foundir_v2.cli import main
    root, manifest = loose
    manifest.to_parquet(tmp_path / "m.parquet")
    words = ["data", "shards", str(tmp_path / "m.parquet"), str(tmp_path / "out"), "--root", str(root),
             "--shard-size", str(SIZE / 1e9), "--num-workers", "1", "--at", "s3://bucket/pool"]
    assert main(words) == 0 and main(words) == 0
    first, again = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{tmp_path / 'out'}: 11 rows of 11 in ") and again.endswith(" 0 of them written now")
    assert {p.name for p in (tmp_path / "out").glob("*.tar")} == {p.name for p in packed[0].glob("*.tar")}
    found = pd.read_parquet(tmp_path / "out/manifest.parquet")
    assert list(found.path) == [f"s3://bucket/pool/{p}" for p in packed[1].path]
    for wrong, told in ((["none.parquet", "out"], "no manifest at none.parquet"),
                        ([str(tmp_path / "out/manifest.parquet"), str(tmp_path / "out")], "is an input itself"),
                        ([str(tmp_path / "m.parquet"), str(tmp_path / "new")], "11 of 11 pictures can't be found")):
        assert main(["data", "shards", *wrong]) == 2
        err = capsys.readouterr().err
        assert told in err and err.count("\n") == 1


def test_training_on_shards_is_training_on_loose_files(tmp_path):
    from small_training import config, equal, make_bench, weights
    from foundir_v2.index import load_manifest
    from foundir_v2.train import train
    bench = make_bench(tmp_path / "bench")
    write_shards(load_manifest(bench / "manifest.parquet"), tmp_path / "pool", bench, SIZE)
    one = config(bench, tmp_path / "one")
    two = config(bench, tmp_path / "two", root=str(tmp_path / "pool"), manifest=str(tmp_path / "pool/manifest.parquet"),
                 num_workers=2)
    train(one), train(two)
    assert equal(weights(one.output), weights(two.output))
    mixture = lambda c: (Path(c.output) / "mixture.csv").read_bytes()
    assert mixture(one) == mixture(two)
    with pytest.raises(FoundIRError, match="which this run needs"):
        train(config(bench, tmp_path / "three", root=two.root, manifest=two.manifest, output=two.root), force=True)
