"What a command will write, against what it reads and what is there."
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from foundir_v2 import targets as module
from foundir_v2.targets import RestoreLog, Target, TargetError, check_targets, is_broken

ROOT = Path(__file__).resolve().parents[1]


def refused(*args, words="", **kwargs):
    with pytest.raises(TargetError, match=words) as e: check_targets(*args, **kwargs)
    assert "\n" not in str(e.value)


def test_it_needs_only_python():
    code = "import sys, foundir_v2.targets; print({'torch', 'numpy', 'PIL', 'pandas'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "set()\n"


def test_large_and_small_letters(tmp_path, monkeypatch):
    "Two files here, one where the file system folds letters."
    pair = [Target(tmp_path / "A.png", source="1"), Target(tmp_path / "a.png", source="2")]
    check_targets(pair)
    monkeypatch.setattr(module, "folds_case", lambda folder: True)
    refused(pair, words="would both become")
    refused([Target(tmp_path / "\u00e9.png"), Target(tmp_path / "e\u0301.png")], words="twice")


def test_nothing_is_made_by_the_check(tmp_path):
    check_targets([Target(tmp_path / "deep/er/a.png"), Target(tmp_path / "log", "log"),
                   Target(tmp_path / "run", "folder"), Target(tmp_path / "cache", "store")])
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_protected_folder(tmp_path):
    tmp_path.chmod(0o555)
    refused([Target(tmp_path / "new/a.png")], words="may write")


def test_a_folder_that_is_replaced(tmp_path):
    (tmp_path / "run").mkdir()
    run = Target(tmp_path / "run", "folder")
    check_targets([run])  # empty
    (tmp_path / "run/x").touch()
    refused([run], words="did not make it")
    check_targets([run], force=True)
    check_targets([Target(tmp_path / "run", "folder", state="ours")])
    for held in ("run", "run/x", "run/not/there"):
        refused([run], [tmp_path / held], force=True, words="holds the input")
    check_targets([Target(tmp_path / "run", "store")], [tmp_path / "run/x"])


def test_the_log_of_another_program(tmp_path):
    log = tmp_path / "restore.jsonl"
    for text in (b"", b'{"outp', b'{"output": "a.png", "made": {"a.png": "0"}}\n{"out',
                 b'{"output": 3}\n\xff\xfe\n[]\n{"output": "b", "made": {"b": 1}}'):
        log.write_bytes(text)
        assert RestoreLog(log).state(tmp_path / "a.png") == "foreign"
    for text in (b"\x89PNG", b"{}", b'[{"output": ', b"output"):
        log.write_bytes(text)
        with pytest.raises(TargetError, match="not a log"): RestoreLog(log)


def test_names_in_the_log_follow_its_folder(tmp_path):
    "A folder of results may be moved, linked, or seen from elsewhere."
    (tmp_path / "out/deep").mkdir(parents=True)
    made = tmp_path / "out/deep/a.txt"
    made.write_text("result")
    RestoreLog(tmp_path / "out/restore.jsonl").add(made, {made: made}, key="k")
    assert json.loads((tmp_path / "out/restore.jsonl").read_text())["output"] == "deep/a.txt"
    (tmp_path / "out").rename(tmp_path / "moved")
    (tmp_path / "link").symlink_to("moved")
    for folder in ("moved", "link", "moved/deep/.."):
        log = RestoreLog(tmp_path / folder / "restore.jsonl")
        assert log.done(tmp_path / folder / "deep/a.txt", "k") and log.state(tmp_path / "moved/deep/a.txt") == "ours"
    (tmp_path / "moved/deep/a.txt").write_text("edited")
    assert log.state(tmp_path / "moved/deep/a.txt") == "changed" and not log.done(tmp_path / "moved/deep/a.txt", "k")


@pytest.mark.parametrize("content, broken", [
    (b"", True), (b"\x89PN", True), (b"\x89PNG\r\n", True), (b"my notes", False), (b"GIF89a", False),
    (b"\x89PNG..IEND\xaeB`\x82", True)])
def test_broken_pictures(tmp_path, content, broken):
    (tmp_path / "a.png").write_bytes(content)
    (tmp_path / "a.txt").write_bytes(content)
    assert is_broken(tmp_path / "a.png") == broken and not is_broken(tmp_path / "a.txt")
