"A run survives a kill at any moment; equal names mean equal runs; one writer at a time."
import json, os, signal, subprocess, sys, time
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
    accelerator.register_for_checkpointing(ema)
    return accelerator, model, optimizer, ema


def steps(run, first, last):
    accelerator, model, optimizer, ema = run
    for k in range(first, last):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(k))
        accelerator.backward((model(x) - x).abs().mean())
        optimizer.step(); optimizer.zero_grad(); ema.step(model.parameters())


@pytest.mark.parametrize("cut", [1, 4, 7])
def test_resume_is_bit_exact(tmp_path, cut):
    straight = start(0); steps(straight, 0, 8)
    first = start(0); steps(first, 0, cut); ck.Checkpoints(tmp_path).save(first[0], cut)
    second = start(9); assert ck.Checkpoints(tmp_path).restore(second[0]) == cut
    steps(second, cut, 8)
    assert torch.equal(straight[1].weight, second[1].weight)
    assert torch.equal(straight[3].shadow_params[0], second[3].shadow_params[0])
    assert second[3].optimization_step == 8 and second[3].decay == .9


def test_keeps_the_newest_and_ignores_partial_ones(tmp_path):
    run, folder = start(0), ck.Checkpoints(tmp_path / "run", keep=2)
    assert folder.restore(run[0]) is None
    for k in (10, 20, 100): folder.save(run[0], k)
    assert folder.steps() == [20, 100]
    (tmp_path / "run/.partial-000000200").mkdir()  # what a kill during a save leaves
    assert folder.restore(run[0]) == 100
    assert not list((tmp_path / "run").glob(".partial*"))


def test_failed_save_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    run, folder = start(0), ck.Checkpoints(tmp_path)
    folder.save(run[0], 1)
    monkeypatch.setattr(run[0], "save_state", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError): folder.save(run[0], 2)
    assert folder.steps() == [1] and folder.restore(start(1)[0]) == 1


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


def test_atomic_folder_replaces_or_leaves(tmp_path):
    out = tmp_path / "out"
    with ck.atomic_folder(out) as f: (f / "x").write_text("old")
    with pytest.raises(RuntimeError):
        with ck.atomic_folder(out) as f: (f / "x").write_text("half"); raise RuntimeError
    assert (out / "x").read_text() == "old"
    with ck.atomic_folder(out) as f: (f / "y").write_text("new")
    assert [p.name for p in out.iterdir()] == ["y"] and [p.name for p in tmp_path.iterdir()] == ["out"]


HOLD = "from foundir_v2.checkpoint import only_writer; import time, sys\nwith only_writer(sys.argv[1]): print('in', flush=True); time.sleep(60)"


def test_second_writer_is_refused_by_name_and_enters_after_kill_9(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline().strip() == "in"
        with pytest.raises(FoundIRError, match=rf"process {other.pid} \("):
            with ck.only_writer(tmp_path / "run"): pass
    finally: other.send_signal(signal.SIGKILL)
    with ck.only_writer(tmp_path / "run"): assert json.loads((tmp_path / "run.owner").read_text())["pid"] == os.getpid()
    other.wait()


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
    folder.save(run[0], 1)
    with ck.atomic_folder(tmp_path / "out") as tmp: (tmp / "a").write_text("old")
    def die(path, *args, **kwargs):
        if Path(path).exists(): next(p for p in sorted(Path(path).rglob("*")) if p.is_file()).unlink(); raise KeyboardInterrupt
    with monkeypatch.context() as m:
        m.setattr(ck.shutil, "rmtree", die)
        with pytest.raises(KeyboardInterrupt): folder.save(run[0], 2)
        with pytest.raises(KeyboardInterrupt):
            with ck.atomic_folder(tmp_path / "out") as tmp: (tmp / "a").write_text("new")
    assert folder.steps() == [2] and folder.restore(start(1)[0]) == 2
    assert (tmp_path / "out/a").read_text() == "new"


def test_killed_between_the_two_renames(tmp_path, monkeypatch):
    "The old folder comes back."
    with ck.atomic_folder(tmp_path / "out") as tmp: (tmp / "a").write_text("old")
    rename = ck.os.replace
    def die(a, b):
        if Path(b) == tmp_path / "out": os.kill(os.getpid(), signal.SIGKILL)
        rename(a, b)
    if (child := os.fork()) == 0:
        ck.os.replace = die
        with ck.atomic_folder(tmp_path / "out") as tmp: (tmp / "a").write_text("new")
        os._exit(0)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) and not (tmp_path / "out").exists()
    with pytest.raises(ZeroDivisionError):
        with ck.atomic_folder(tmp_path / "out"): 1 / 0
    assert (tmp_path / "out/a").read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_or_a_file_is_no_folder_to_write(tmp_path):
    (tmp_path / "real").mkdir(); (tmp_path / "link").symlink_to(tmp_path / "real"); (tmp_path / "file").write_text("")
    for name in ("link", "file"):
        with pytest.raises(FoundIRError, match="give a folder"):
            with ck.atomic_folder(tmp_path / name): pass
