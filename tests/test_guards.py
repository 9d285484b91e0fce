"""What may happen to a run without ending it, or ends it in good order: steps that are not finite, signals, pictures
that break, disks that are full."""
import csv, json, os, shutil, signal, subprocess, sys, time
from dataclasses import asdict, replace
from pathlib import Path

import pytest, torch

from foundir_v2 import checkpoint as ck, learner as learning, train as tr
from foundir_v2.checkpoint import Checkpoints, make_ema, recent_share
from foundir_v2.core import FoundIRError
from foundir_v2.data import RestorationDataset
from foundir_v2.index import load_manifest
from foundir_v2.inference import read_recipe
from foundir_v2.learner import Feed, Learner, make_accelerator
from foundir_v2.process import Stopped
from foundir_v2.trainlog import read_log
from small_training import TASKS, config, equal, start, start_two, weights

ROOT = Path(__file__).resolve().parents[1]


def join(processes):
    for process in processes: process.join()
    return [process.exitcode for process in processes]


def step_of(learner): return learner.lr_scheduler.scheduler.last_epoch + 1


class Infinite(torch.autograd.Function):
    "Hands its input through; its gradient is infinite."
    @staticmethod
    def forward(ctx, x): return x.clone()

    @staticmethod
    def backward(ctx, g): return g * float("inf")


@pytest.fixture
def spoil(monkeypatch):
    "Make the loss or the gradient of some steps not finite."
    losses = Learner.losses
    def spoil(steps, kind="loss"):
        def spoilt(self, batch):
            values = losses(self, batch)
            if step_of(self) not in steps: return values
            return Infinite.apply(values) if kind == "gradient" else values * float("nan")
        monkeypatch.setattr(Learner, "losses", spoilt)
    return spoil


def die_after(monkeypatch, step):
    class Dying(Checkpoints):
        def save(self, accelerator, k, *state):
            super().save(accelerator, k, *state)
            if k == step: raise InterruptedError
    monkeypatch.setattr(tr, "Checkpoints", Dying)


# --- steps that are not finite ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind, stage", [("gradient", 0), ("gradient", 2), ("loss", 0), ("loss", 1)])
def test_a_step_that_is_not_finite_changes_nothing_but_the_count(bench, tmp_path, spoil, kind, stage):
    c = config(bench, tmp_path, stage=stage, steps=6, gradient_accumulation=2, output=str(tmp_path / "straight"))
    straight = tr.train(c)
    seen, step = [], Learner.step
    def watch(self, *args):
        state = lambda: [p.clone() for p in (*self.parameters, *self.ema.shadow_params)] + [
            v.clone() for s in self.optimizer.state.values() for v in s.values()]
        before, at, updates = state(), step_of(self), self.ema.optimization_step
        record = step(self, *args)
        same = len(before) == len(now := state()) and all(torch.equal(a, b) for a, b in zip(before, now))
        seen.append((at, same, self.ema.optimization_step - updates))
        return record
    spoil({4}, kind)
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Learner, "step", watch)
        result = tr.train(replace(c, output=str(tmp_path / "out")))
    assert [(same, moved) for at, same, moved in seen if at == 4] == [(True, 0)]
    assert all((same, moved) == (False, 1) for at, same, moved in seen if at not in (1, 4))  # the first has rate 0
    assert [r["lr"] for r in result.steps] == [r["lr"] for r in straight.steps]
    assert [r["samples"] for r in result.steps] == [r["samples"] for r in straight.steps]
    assert [r["loss"] is None for r in result.steps] == [False] * 3 + [True] + [False] * 2
    assert result.steps[:3] == straight.steps[:3] and result.steps[4] != straight.steps[4]
    (told,) = [r for r in result.log if r["kind"] == "skipped"]
    batches = [b for _, b in zip(range(4), Feed(c).loader)]
    assert told["step"] == 4 and [s["seed"] for s in told["samples"]] == batches[3]["seed"].tolist()
    assert [(s["task"], s["photo"]) for s in told["samples"]] == list(zip(batches[3]["task"], batches[3]["photo"]))
    with open(result.output / "incidents.csv") as f: rows = list(csv.DictReader(f))
    assert [(r["step"], r["incident"], r["photo"]) for r in rows] == [("4", "skipped", p) for p in batches[3]["photo"]]
    assert ("loss nan" in rows[0]["why"]) == (kind == "loss") and "norm of the gradient nan" in rows[0]["why"]
    assert result.last_loss == result.steps[-1]["loss"]


def test_too_many_end_the_run_and_a_higher_limit_goes_on(bench, tmp_path, spoil, monkeypatch):
    "The count is part of the state: one step is skipped before the kill, one after it."
    spoil({2, 5})
    c = config(bench, tmp_path, steps=7, checkpoint_every=3, dvclive=True)
    straight = tr.train(replace(c, output=str(tmp_path / "straight")))
    strict = replace(c, max_skipped=1)
    with monkeypatch.context() as m:
        die_after(m, 3)
        with pytest.raises(InterruptedError): tr.train(strict)
    for _ in range(2):
        with pytest.raises(FoundIRError, match="step 5 is not finite: 2 skipped steps, at most max_skipped=1") as e:
            tr.train(strict)
        assert "\n" not in str(e.value) and not Path(c.output).exists()
    with open(tr.run_folder(c) / "incidents.csv") as f: rows = list(csv.DictReader(f))
    assert [r["step"] for r in rows] == ["2"] * 4 + ["5"] * 4 and str(tr.run_folder(c)) in str(e.value)
    again = tr.train(c)
    assert again.resumed_from == 3 and again.log == straight.log
    assert equal(weights(straight.output), weights(again.output))
    with pytest.raises(FoundIRError, match="step 2 .* at most max_skipped=0"): tr.train(replace(c, max_skipped=0))


def test_all_processes_skip_together(bench, tmp_path):
    "The loss of one rank is NaN; the gradient is everybody's."
    c = config(bench, tmp_path, steps=4)
    assert join(start_two(c, nan=(3, 1))) == [0, 0]
    log = read_log(Path(c.output) / "log.jsonl")
    (told,) = [r for r in log if r["kind"] == "skipped"]
    assert told["step"] == 3 and len(told["samples"]) == 4  # of both ranks
    assert ["loss nan" in s["why"] for s in told["samples"]] == [False, False, True, True]
    assert [r["loss"] is None for r in log if r["kind"] == "step"] == [False, False, True, False]
    assert all(w.isfinite().all() for w in weights(c.output).values())


def test_a_loss_that_is_none_in_fp16(bench, tmp_path, spoil):
    "The gradient scaler must be told, or it would refuse to unscale the next step."
    c = config(bench, tmp_path)
    learner = Learner(c, make_accelerator(c))
    class Scaler:
        updates = 0
        def scale(self, loss): return loss
        def update(self): self.updates += 1
    learner.accelerator.scaler = Scaler()
    spoil({1})
    before, batch = [p.clone() for p in learner.parameters], next(iter(Feed(c).loader))
    assert learner.step(batch, list(TASKS))["loss"] is None and learner.accelerator.scaler.updates == 1
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters))


# --- what is kept -----------------------------------------------------------------------------------------------------

def test_the_best_weights_stay(bench, tmp_path, monkeypatch):
    "The best score comes at a step that has no checkpoint of its own; newer ones don't remove it, a kill neither."
    c = config(bench, tmp_path, stage=2, steps=10, update_every=3, checkpoint_every=4, keep_checkpoints=1,
               keep_best=True)
    scored, kept, now = {0: 50., 3: 20., 6: 30., 9: 25.}, {}, Feed.rebalance
    def rebalance(self, restore):
        monkeypatch.setattr(learning, "score_items", lambda *a, **k: {t: [scored[self.step]] * 2 for t in TASKS})
        kept[self.step] = {k: v.clone() for k, v in restore.__self__.trainee.network.state_dict().items()}
        return now(self, restore)
    monkeypatch.setattr(Feed, "rebalance", rebalance)
    with monkeypatch.context() as m:
        die_after(m, 8)
        with pytest.raises(InterruptedError): tr.train(c)
    assert Checkpoints(tr.run_folder(c)).steps() == [6, 8]
    harmed = Checkpoints(tr.run_folder(c)).path(6) / "ema.safetensors"
    sound = harmed.read_bytes()
    harmed.write_bytes(sound[:-1] + bytes([sound[-1] ^ 1]))
    with pytest.raises(FoundIRError, match="step 6, the best one, is damaged .ema.safetensors has changed"): tr.train(c)
    harmed.write_bytes(sound)
    result = tr.train(c)
    assert result.resumed_from == 10
    assert equal(weights(result.output / "best"), kept[6]) and not equal(weights(result.output), kept[6])
    assert read_recipe(result.output / "best") == read_recipe(result.output)
    assert not [p for p in tr.Path(c.checkpoints).glob("stage*") if p.is_dir()], "finished runs leave no checkpoints"
    assert tr.run_folder(c) == tr.run_folder(replace(c, keep_best=False))


def test_more_checkpoints_stay_if_wanted(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, steps=8, keep_checkpoints=3)
    die_after(monkeypatch, 8)
    with pytest.raises(InterruptedError): tr.train(c)
    assert Checkpoints(tr.run_folder(c)).steps() == [4, 6, 8]
    assert tr.run_folder(c) == tr.run_folder(replace(c, keep_checkpoints=1, max_skipped=0))


def test_the_average_is_in_float32_and_says_how_far_it_looks_back():
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    ema = make_ema([p], .9999)
    for k in range(1, 20001):
        with torch.no_grad(): p.fill_(float(k > 18000))
        ema.step([p])
    assert ema.shadow_params[0].dtype == torch.float32  # bfloat16 would have lost steps of 1e-4
    assert ema.shadow_params[0].item() == pytest.approx(recent_share(.9999, 20000), rel=1e-3)
    assert recent_share(0, 10) == 1 and recent_share(.5, 40, 1) == 1
    assert recent_share(.9999, 10**6) == pytest.approx(1 - .9999**10**5, rel=1e-3)
    with ck.averaged(ema, [p]): assert p.dtype == torch.bfloat16 and p.item() == pytest.approx(.6, abs=.1)


# --- signals ----------------------------------------------------------------------------------------------------------

def wait_for_steps(c, count, alive):
    "Until the log tells of so many steps."
    log, deadline = tr.run_folder(c) / "log.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline and alive():
        if log.is_file() and log.read_text().count('"kind": "step"') >= count: return
        time.sleep(.02)
    raise AssertionError("no steps")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_writes_a_checkpoint_and_leaves(bench, tmp_path, number):
    c = config(bench, tmp_path, stage=2, steps=500, update_every=0, checkpoint_every=1000, num_workers=1)
    process = start(c)
    wait_for_steps(c, 3, process.is_alive)
    os.kill(process.pid, number)
    assert join([process]) == [128 + number]
    (step,) = Checkpoints(tr.run_folder(c)).steps()
    told = [r["step"] for r in read_log(tr.run_folder(c) / "log.jsonl")]
    assert told == list(range(1, step + 1)), "nothing is lost"
    assert not [p for p in tmp_path.rglob("*") if ".partial" in p.name]


def test_a_run_that_was_told_to_leave_goes_on_as_if_it_had_not_been(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, stage=2, steps=7, update_every=4, output=str(tmp_path / "straight"))
    straight, step = tr.train(c), Learner.step
    def signalled(self, *args):
        if step_of(self) == 3: signal.raise_signal(signal.SIGTERM)
        return step(self, *args)
    cut = replace(c, output=str(tmp_path / "cut"))
    with monkeypatch.context() as m:
        m.setattr(Learner, "step", signalled)
        with pytest.raises(Stopped, match="SIGTERM: step [34] is saved; start again to go on") as e: tr.train(cut)
    assert e.value.number == signal.SIGTERM
    resumed = tr.train(cut)
    assert resumed.resumed_from in (3, 4) and resumed.log == straight.log
    assert equal(weights(straight.output), weights(resumed.output))


def test_a_second_signal_leaves_at_once(bench, tmp_path, monkeypatch):
    "One that comes in the first two seconds is an echo: a launcher hands on what its workers have got already."
    c = config(bench, tmp_path)
    def signalled(self, *args):
        signal.raise_signal(signal.SIGINT); signal.raise_signal(signal.SIGINT)
        time.sleep(2.1)
        signal.raise_signal(signal.SIGTERM)
        pytest.fail("still here")
    monkeypatch.setattr(Learner, "step", signalled)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="at once") as e: tr.train(c)
    assert e.value.number == signal.SIGTERM and signal.getsignal(signal.SIGTERM) == before
    assert not Checkpoints(tr.run_folder(c)).steps()


@pytest.mark.parametrize("whom, number", [("launcher", signal.SIGINT), ("one worker", signal.SIGTERM)])
def test_two_processes_leave_together(bench, tmp_path, whom, number):
    "A launcher hands on what it gets (`accelerate launch` is torch's launcher where there are several processes)."
    import psutil
    c = config(bench, tmp_path, stage=2, steps=500, update_every=0, checkpoint_every=1000)
    file = tmp_path / "config.json"; file.write_text(json.dumps(asdict(c)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               "--shutdown-timeout", "200", "-m", "foundir_v2.train", "--config", str(file)]
    launcher = subprocess.Popen(command, cwd=ROOT, env=os.environ | dict(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"),
                                stderr=subprocess.PIPE, text=True)
    try:
        wait_for_steps(c, 3, lambda: launcher.poll() is None)
        workers = [p for p in psutil.Process(launcher.pid).children(recursive=True) if str(file) in p.cmdline()]
        assert len(workers) == 2
        (launcher if whom == "launcher" else workers[1]).send_signal(number)
        said = launcher.communicate(timeout=240)[1]
    finally: launcher.kill()  # its workers end with it
    assert launcher.returncode != 0
    (step,) = Checkpoints(tr.run_folder(c)).steps()
    assert f"{number.name}: step {step} is saved; start again to go on" in said, said[-2000:]
    told = [r["step"] for r in read_log(tr.run_folder(c) / "log.jsonl")]
    assert told == list(range(1, step + 1)), "nothing is lost"
    assert not psutil.wait_procs(workers, timeout=20)[1] and not list(tr.run_folder(c).glob(".partial*"))


# --- disks ------------------------------------------------------------------------------------------------------------

def test_room_is_looked_at_before_the_first_step(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, stage=2, steps=6)
    learner = Learner(c, make_accelerator(c))
    checkpoint, result = tr.bytes_needed(c, learner)
    with monkeypatch.context() as m:
        die_after(m, 4)
        with pytest.raises(InterruptedError): tr.train(c)
    size = lambda folder: sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert size(Checkpoints(tr.run_folder(c)).path(4)) == pytest.approx(checkpoint, rel=.1)
    usage, there = shutil.disk_usage, size(tr.run_folder(c))
    needed = 3 * checkpoint - there + result
    for free, enough in ((needed - 1, False), (needed, True)):
        fake = lambda path, free=free: usage(path)._replace(free=free)
        with monkeypatch.context() as m:
            m.setattr(ck.shutil, "disk_usage", fake)
            if not enough:
                m.setattr(Learner, "step", lambda *a: pytest.fail("a step was made"))
                with pytest.raises(FoundIRError, match="not enough room: .* MiB are free there: make room") as e:
                    tr.train(c)
                assert "\n" not in str(e.value) and not Path(c.output).exists()
            else: tr.train(c)
    assert size(Path(c.output) / "unet") == pytest.approx(result, rel=.1)


@pytest.mark.parametrize("field", ["output", "checkpoints"])
def test_a_folder_that_cannot_be_written_is_told_before_anything_is_loaded(bench, tmp_path, monkeypatch, field):
    monkeypatch.setattr(tr, "Learner", lambda *a: pytest.fail("the model was loaded"))
    (tmp_path / "file").write_text("")
    for place in ("/proc/here", str(tmp_path / "file" / "x")):
        with pytest.raises(FoundIRError, match="can't write|file or a link") as e:
            tr.train(config(bench, tmp_path, **{field: place}))
        assert "\n" not in str(e.value)


def test_a_disk_that_fills_up_ends_the_run_in_one_line_and_nothing_is_lost(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, steps=6, output=str(tmp_path / "straight"))
    straight, save = tr.train(c), ck.save_file
    full = replace(c, output=str(tmp_path / "full"))
    def fails(tensors, path):
        if "000000004" in str(path): raise OSError(28, "No space left on device")
        save(tensors, path)
    with monkeypatch.context() as m:
        m.setattr(ck, "save_file", fails)
        with pytest.raises(FoundIRError, match="checkpoint of step 4 .*No space left on device.*make room") as e:
            tr.train(full)
        assert "\n" not in str(e.value)
    again = tr.train(full)
    assert again.resumed_from == 2 and again.log == straight.log and equal(weights(c.output), weights(full.output))


# --- pictures that break ----------------------------------------------------------------------------------------------

@pytest.fixture
def broken(bench, tmp_path):
    "The bench with one of its three training photographs cut short, one byte each."
    folder = tmp_path / "bench"
    shutil.copytree(bench, folder)
    (folder / "photos/train/train1.png").write_bytes(b"\x89")
    return folder


def test_a_broken_picture_is_replaced_by_the_next_of_its_task(bench, broken):
    whole, damaged = (RestorationDataset(load_manifest(folder / "manifest.parquet"), "train", TASKS, 32, root=folder,
                                         scale_range=(1., 1.), cache=0) for folder in (bench, broken))
    for task in TASKS:
        for index in range(3):
            sample, stand_in = damaged[task, index, 5], whole[task, 2 if index == 1 else index, 5]
            assert sample["photo"] == f"train/train{2 if index == 1 else index}"
            assert torch.equal(sample["lq"], stand_in["lq"]) and sample["subtask"] == stand_in["subtask"]
            assert list(sample["quarantined"]) == (["train/train1"] if index == 1 else [])
    (broken / "photos/train/train2.png").unlink()
    assert damaged["sr", 1, 5]["photo"] == "train/train0" and len(damaged["sr", 1, 5]["quarantined"]) == 2


def test_training_goes_on_without_a_broken_picture(broken, tmp_path, monkeypatch, capsys):
    c = config(broken, tmp_path, steps=6, output=str(tmp_path / "straight"))
    straight = tr.train(c)
    told = [dict(s, step=r["step"]) for r in straight.log if r["kind"] == "quarantined" for s in r["samples"]]
    assert told and {(s["photo"], s["instead"]) for s in told} == {("train/train1", "train/train2")}
    assert all("train1.png as an image" in s["why"] for s in told)
    with open(straight.output / "incidents.csv") as f: rows = list(csv.DictReader(f))
    assert [(int(r["step"]), int(r["seed"])) for r in rows] == [(s["step"], s["seed"]) for s in told]
    assert capsys.readouterr().err.count("train/train1 is replaced") == 1
    with monkeypatch.context() as m:
        die_after(m, 4)
        with pytest.raises(InterruptedError): tr.train(replace(c, output=str(tmp_path / "cut")))
    resumed = tr.train(replace(c, output=str(tmp_path / "cut"), num_workers=1, cache_gb=0))
    assert resumed.resumed_from == 4 and resumed.log == straight.log
    assert equal(weights(straight.output), weights(resumed.output))
    assert join(start_two(replace(c, output=str(tmp_path / "two")))) == [0, 0]
    two = [r for r in read_log(tmp_path / "two/log.jsonl") if r["kind"] == "quarantined"]
    assert two == [r for r in straight.log if r["kind"] == "quarantined"]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_task_without_a_picture_that_can_be_read_ends_the_run(broken, tmp_path, workers):
    for photo in (broken / "photos/train").iterdir(): photo.write_bytes(b"\x89")
    with pytest.raises(FoundIRError, match="none of the 3 pictures of task .* can be used"):
        tr.train(config(broken, tmp_path, num_workers=workers))


def test_a_run_without_incidents_has_no_table_of_them(bench, tmp_path):
    result = tr.train(config(bench, tmp_path, steps=2))
    assert not (result.output / "incidents.csv").exists() and {r["kind"] for r in result.log} == {"step"}
