"A run survives a kill at any moment; equal names mean equal runs; one writer at a time."
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import pytest, torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

from foundir_v2 import checkpoint as ck
from foundir_v2.core import FoundIRError


def start(seed):
    AcceleratorState._reset_state(True)
    torch.manual_seed(seed)
    accelerator = Accelerator(cpu=True)
    model = nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    ema = ck.make_ema(model.parameters(), .9)
    model, optimizer = accelerator.prepare(model, optimizer)
    return accelerator, model, optimizer, ema


def steps(run, first, last):
    accelerator, model, optimizer, ema = run
    for k in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
        accelerator.backward((model(x) - x).abs().mean())
        optimizer.step(); optimizer.zero_grad(); ema.step(model.parameters())


def save(folder, run, step, log=None): return folder.save(run[0], step, run[3], dict(seen=step), log)


def restore(folder, run): return folder.restore(run[0], run[3])


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_resume_is_bit_exact(tmp_path, cut):
    straight = start(0); steps(straight, 0, 8)
    (tmp_path / "log").write_text("one\n")
    first = start(0); steps(first, 0, cut); save(ck.Checkpoints(tmp_path), first, cut, tmp_path / "log")
    second = start(9); found = restore(ck.Checkpoints(tmp_path), second)
    assert (found.step, found.state, found.log.read_text()) == (cut, dict(seen=cut), "one\n")
    steps(second, cut, 8)
    assert torch.equal(straight[1].weight, second[1].weight)
    assert torch.equal(straight[3].shadow_params[0], second[3].shadow_params[0])
    assert second[3].optimization_step == 8 and second[3].decay == .9


def test_keeps_the_newest_and_ignores_partial_ones(tmp_path):
    run, folder = start(0), ck.Checkpoints(tmp_path / "run", keep=2)
    assert restore(folder, run) is None
    for k in (10, 20, 100): save(folder, run, k)
    assert folder.steps() == [20, 100]
    (tmp_path / "run/.partial-000000200").mkdir()  # what a kill during a save leaves
    # not ours
    for name in ("step-abc", "step-7", "step-000000300.old", ".partial-mine"): (tmp_path / "run" / name).mkdir()
    (tmp_path / "run/step-000000400").write_text("a file")
    assert restore(folder, run).step == 100
    assert [p.name for p in (tmp_path / "run").glob(".partial*")] == [".partial-mine"]
    assert (tmp_path / "run/step-abc").is_dir()


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run, folder = start(0), ck.Checkpoints(tmp_path)
    save(folder, run, 1)
    monkeypatch.setattr(run[0], "save_state",
                        lambda *a, **k: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(FoundIRError,
                       match=r"can't write the checkpoint of step 2 to .*No space left on device; \d+ MiB free"):
        save(folder, run, 2)
    assert folder.steps() == [1] and restore(folder, start(1)).step == 1 and not list(tmp_path.glob(".partial*"))


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="a small file system of its own needs root")
@pytest.mark.parametrize("room", range(8, 48, 8))
def test_full_disk_is_named_and_the_run_goes_on_from_the_checkpoint_before(tmp_path, room):
    "One checkpoint of this model is about 30 KiB: the second one breaks off in another file each time."
    disk = tmp_path / "disk"; disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run, folder = start(0), ck.Checkpoints(disk / "run")
        steps(run, 0, 1); save(folder, run, 1)
        (disk / "filler").write_bytes(bytes(shutil.disk_usage(disk).free - room * 1024))
        try: save(folder, run, 2)
        except FoundIRError as e:
            assert "step 2" in str(e) and str(disk) in str(e) and "free on that disk" in str(e) and "\n" not in str(e)
        else: assert room >= 24, "the disk was to be full"
        (disk / "filler").unlink()
        assert restore(folder, start(1)).step in (1, 2) and not list((disk / "run").glob(".partial*"))
        save(folder, run, 2); assert folder.steps() == [1, 2]
    finally: subprocess.run(["umount", disk], check=True)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_neither_saved_nor_used(tmp_path, value):
    run, folder = start(0), ck.Checkpoints(tmp_path)
    steps(run, 0, 1); save(folder, run, 1)
    with torch.no_grad(): run[1].weight[0, 0] = value
    run[3].step(run[1].parameters())
    with pytest.raises(FoundIRError, match="not finite after step 2"): save(folder, run, 2)
    with pytest.raises(FoundIRError, match="not finite"):
        with ck.averaged(run[3], run[1].parameters()): raise AssertionError("used")
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(FoundIRError, match="keep=0"): ck.Checkpoints(tmp_path, keep=0)


def test_average_is_updated_at_every_step_and_forgets_its_start():
    p = nn.Parameter(torch.zeros(1))
    ema = ck.make_ema([p], .9999)
    with torch.no_grad(): p.fill_(1.)
    for _ in range(100): ema.step([p])
    assert ema.shadow_params[0].item() == pytest.approx(1, abs=1e-6)  # without warm-up it would be 0.01
    with ck.averaged(ema, [p]): assert p.item() == ema.shadow_params[0].item()
    assert p.item() == 1
    with pytest.raises(FoundIRError, match="ema_decay"): ck.make_ema([p], 1.0)


def test_average_gives_the_trained_weights_back_after_an_error():
    p = nn.Parameter(torch.zeros(1)); ema = ck.make_ema([p], .9); ema.step([p])
    with torch.no_grad(): p.fill_(5.)
    with pytest.raises(KeyError):
        with ck.averaged(ema, [p]):
            assert p.item() == 0
            raise KeyError
    assert p.item() == 5


def test_run_name_depends_on_parameters_code_and_inputs(tmp_path):
    (tmp_path / "in").mkdir(); (tmp_path / "in/a").write_text("1")
    name = lambda **p: ck.run_name(p, "foundir_v2.core", [tmp_path / "in"])
    first = name(lr=1., steps=2)
    assert first == name(steps=2, lr=1.) and first != name(lr=1., steps=3)
    assert first != ck.run_name(dict(lr=1., steps=2), "foundir_v2.config", [tmp_path / "in"])
    (tmp_path / "in/a").write_text("2"); assert first != name(lr=1., steps=2)
    with pytest.raises(FileNotFoundError): ck.run_name({}, "foundir_v2.core", [tmp_path / "missing"])


def test_code_of_a_module_is_found_in_its_package(tmp_path, monkeypatch):
    assert {"core.py", "checkpoint.py"} <= {p.name for p in ck.code_files("foundir_v2.checkpoint")}
    with pytest.raises(FoundIRError, match="absent"): ck.code_files("foundir_v2.absent")


def write(path, name, text="", force=False):
    with ck.atomic_folder(path, "foundir_v2.test", force) as f: (f / name).write_text(text)


def names(folder): return sorted(p.name for p in folder.iterdir())


def test_atomic_folder_replaces_or_leaves(tmp_path):
    out = tmp_path / "out"
    write(out, "x", "old")
    with pytest.raises(RuntimeError):
        with ck.atomic_folder(out, "foundir_v2.test") as f: (f / "x").write_text("half"); raise RuntimeError
    assert (out / "x").read_text() == "old"
    write(out, "y", "new")
    assert names(out) == [ck.SEAL, "y"] and names(tmp_path) == ["out"] and ck.broken_seal(out) == ""
    assert subprocess.run(["sha256sum", "--quiet", "-c", ck.SEAL], cwd=out).returncode == 0


@pytest.mark.parametrize("harm", ["foreign", "added", "added below", "edited", "removed", "seal", "old seal"])
def test_a_folder_that_is_not_as_we_left_it_is_refused_before_the_work(tmp_path, harm):
    out = tmp_path / "out"
    if harm == "foreign": out.mkdir(); (out / "photo.png").write_text("mine")
    else:
        with ck.atomic_folder(out, "foundir_v2.test") as f:
            (f / "unet").mkdir()
            (f / "unet/w").write_text("w")
            (f / "log").write_text("l")
    if harm == "added": (out / "notes.txt").write_text("mine")
    if harm == "added below": (out / "unet/photos").mkdir(); (out / "unet/photos/notes.txt").write_text("mine")
    if harm == "edited": (out / "log").write_text("mine")
    if harm == "removed": (out / "log").unlink()
    if harm == "seal": (out / ck.SEAL).unlink()
    # a seal, but of others
    if harm == "old seal": (out / ck.SEAL).write_text((out / ck.SEAL).read_text().replace("foundir_v2", "somebody"))
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(FoundIRError, match="holds what we did not make"):
        with ck.atomic_folder(out, "foundir_v2.test"): pytest.fail("begun")
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before and names(tmp_path) == ["out"]
    write(out, "z", force=True)
    assert names(out) == [ck.SEAL, "z"]


def test_a_folder_that_fills_during_the_work_is_not_replaced(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(FoundIRError, match="holds what we did not make"):
        with ck.atomic_folder(out, "foundir_v2.test") as f: (f / "x").touch(); out.mkdir(); (out / "mine").touch()
    assert names(out) == ["mine"] and names(tmp_path) == ["out"]


def test_an_empty_folder_and_a_missing_parent_are_fine(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", "x"); write(tmp_path / "a/b/c", "x")
    assert names(tmp_path / "empty") == names(tmp_path / "a/b/c") == [ck.SEAL, "x"]


def test_places_that_can_not_be_a_folder_of_ours(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("mine"); (tmp_path / "here/below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here/below")
    for place in ("", ".", "..", "/", tmp_path, tmp_path / "here", "/dev/null", "/dev/null/x", tmp_path / "file",
                  tmp_path / "file/x", "/proc/x/y"):
        with pytest.raises(FoundIRError, match="give the name of a folder|choose a folder"):
            with ck.atomic_folder(place, "foundir_v2.test", force=True): pytest.fail("begun")
    assert names(tmp_path) == ["file", "here"] and names(tmp_path / "here") == ["below"]


def test_long_names(tmp_path):
    for name in ("\u6f22" * 80, "x" * 255):  # 240 and 255 bytes
        write(tmp_path / name, "x"); write(tmp_path / name, "y")
        assert names(tmp_path / name) == [ck.SEAL, "y"]
    assert len(names(tmp_path)) == 2


def test_only_left_overs_of_dead_writers_of_the_same_folder_go(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""]); dead.wait()
    gone = [f".run.{dead.pid}-0123abcd.partial", f".run.{os.getpid()}-0123abcd.partial"]  # process ids come again
    stay = [f".run.b.{dead.pid}-0123abcd.partial", f".run.b.{dead.pid}-0123abcd.old.partial", ".run.1-0123abcd.partial",
            ".run.x.partial", ".run.old.partial", "run.b"]
    for name in gone + stay: (tmp_path / name).mkdir(); (tmp_path / name / "f").touch()
    write(tmp_path / "run", "x")
    assert names(tmp_path) == sorted([*stay, "run"]) and names(tmp_path / "run") == [ck.SEAL, "x"]


def test_two_writers_of_neighbours_and_of_one_folder(tmp_path):
    with ck.atomic_folder(tmp_path / "run.b", "foundir_v2.test") as f:
        (f / "x").write_text("b")
        write(tmp_path / "run", "x")
        with pytest.raises(FoundIRError, match=rf"is being written by process {os.getpid()}"):
            write(tmp_path / "run.b", "x")
        assert (f / "x").read_text() == "b"
    assert names(tmp_path) == ["run", "run.b"]


HOLD = ("from foundir_v2.checkpoint import only_writer; import time, sys\n"
        "with only_writer(sys.argv[1]): print('in', flush=True); time.sleep(60)")


def test_second_writer_is_refused_by_name_and_enters_after_kill_9(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "in"
        with pytest.raises(FoundIRError, match=rf"process {other.pid} \("):
            with ck.only_writer(tmp_path / "run"): pass
    finally: other.send_signal(signal.SIGKILL)
    with ck.only_writer(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.owner").read_text())["pid"] == os.getpid()
    other.wait()
    assert not list(tmp_path.iterdir())  # lock and note go with the owner


@pytest.mark.parametrize("note", [
    "[]", "null", "{}", '"x"', "17", '{"pid": 1}', '{"pid": "1", "started": 0, "command": ""}',
    '{"pid": -1, "started": 0, "command": ""}', '{"pid": 99999999999999999999, "started": 0, "command": ""}',
    '{"pid": 1, "started": "x", "command": ""}', "\x00\xff", "[" * 100000])
def test_a_note_that_makes_no_sense_is_overwritten(tmp_path, note):
    (tmp_path / ".run.owner").write_text(note)
    with ck.only_writer(tmp_path / "run"):
        assert json.loads((tmp_path / ".run.owner").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("name", [".run.owner", ".run.lock"])
def test_a_folder_where_the_lock_should_be_is_one_line(tmp_path, name):
    (tmp_path / name).mkdir()
    with pytest.raises(FoundIRError, match="can't write .*choose a folder"):
        with ck.only_writer(tmp_path / "run"): pytest.fail("entered")
    assert (tmp_path / name).is_dir()


FORK = """
import os, sys, time
from foundir_v2.checkpoint import only_writer
with only_writer(sys.argv[1]):
    if os.fork() == 0: time.sleep(3); os._exit(0)   # a data worker that outlives its parent
    print('in', flush=True); time.sleep(60)
"""


def test_workers_of_a_killed_writer_are_waited_for(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", FORK, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline().strip() == "in"
    other.kill(); other.wait(); began = time.monotonic()
    with ck.only_writer(tmp_path / "run"): assert time.monotonic() - began < 15


def test_half_removed_folders_never_look_whole(tmp_path, monkeypatch):
    "Killed while an old checkpoint or an old result is removed."
    run, folder = start(0), ck.Checkpoints(tmp_path / "run", keep=1)
    save(folder, run, 1)
    write(tmp_path / "out", "a", "old")
    def die(path, *args, **kwargs):
        if Path(path).exists():
            next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink()
            raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(ck.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt): save(folder, run, 2)
        with pytest.raises(KeyboardInterrupt): write(tmp_path / "out", "a", "new")
    assert folder.steps() == [2] and restore(folder, start(1)).step == 2
    assert (tmp_path / "out/a").read_text() == "new"


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    "The old folder comes back."
    write(tmp_path / "out", "a", "old")
    rename = ck.os.replace
    def die(a, b):
        if Path(b) == tmp_path / "out": os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
    if (child := os.fork()) == 0:
        ck.os.replace = die
        write(tmp_path / "out", "a", "new")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError):
        with ck.atomic_folder(tmp_path / "out", "foundir_v2.test"): 1 / 0
    assert (tmp_path / "out/a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_is_no_folder_to_write(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("link", "dangling"):
        with pytest.raises(FoundIRError, match="give the name of a folder"): write(tmp_path / name, "x")
