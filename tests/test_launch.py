"""Training on several processes: the same samples and nearly the same numbers as on one, from the same call, ending
with the process that asked for it. And a run that was started by hand isn't trained again."""
import copy, json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

import psutil, pytest, torch

from foundir_v2 import launch, train as tr
from foundir_v2.checkpoint import Checkpoints, broken_seal
from foundir_v2.config import load_params, overlay
from foundir_v2.core import FoundIRError
from foundir_v2.kept import RESULT
from foundir_v2.launch import child_error, hand_over, launch_command, launch_environment, run_processes, run_training
from foundir_v2.params import keys_read
from foundir_v2.settings import PARTS, TrainConfig, parameters, read_config
from foundir_v2.trainlog import read_log
from small_training import FORKS, config, equal, free_port, held_in_a_step, weights

ROOT = Path(__file__).resolve().parents[1]


class Killed(Exception): pass


def die_after(monkeypatch, step):
    class Dying(Checkpoints):
        def save(self, accelerator, k, *state):
            super().save(accelerator, k, *state)
            if k == step: raise Killed
    monkeypatch.setattr(tr, "Checkpoints", Dying)


# --- one, two, and one again ------------------------------------------------------------------------------------------

def fifty(bench, out, **changes):
    """Fifty steps of eight samples, with an update of the mixture every ten. The learning rate is four times the
    paper's: ten times as much makes 1e-4 of the 1e-7 by which sums differ."""
    common = dict(stage=2, steps=50, update_every=10, batch_size=8, checkpoint_every=10, learning_rate=2e-4)
    return config(bench, out, **(common | changes))


@pytest.fixture(scope="module")
def alone(bench, tmp_path_factory): return tr.train(fifty(bench, tmp_path_factory.mktemp("alone")))


def assert_alike(a, b):
    "The same samples; losses and proportions that only the order of sums has touched."
    assert [(r["kind"], r["step"]) for r in a.log] == [(r["kind"], r["step"]) for r in b.log]
    assert [r["samples"] for r in a.steps] == [r["samples"] for r in b.steps]
    assert max(abs(x["loss"] - y["loss"]) for x, y in zip(a.steps, b.steps)) < 2e-5
    moved = [r["weights"] for r in a.log if r["kind"] == "mixture"]
    for x, y in zip(moved, (r["weights"] for r in b.log if r["kind"] == "mixture")):
        assert max(abs(x[t] - y[t]) for t in x) < 1e-5
    assert moved[-1] != moved[0]


@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_of_four_are_one_of_eight(bench, tmp_path, alone, fsdp):
    c = fifty(bench, tmp_path, processes=2, fsdp=fsdp, channels_last=fsdp, keep_best=fsdp, tensorboard=fsdp)
    two = run_training(c)
    assert (two.output / "best/unet").is_dir() == fsdp
    assert_alike(alone, two)
    assert not broken_seal(two.output) and two.resumed_from is None
    a, b = weights(alone.output), weights(two.output)
    assert a.keys() == b.keys() and max(float((a[k] - b[k]).abs().max()) for k in a) < 1e-4
    shutil.rmtree(two.output)
    assert run_training(c).log == two.log  # kept, not trained again


PARENT = "import json, sys; from foundir_v2.launch import run_training; from foundir_v2.settings import TrainConfig\n" \
         "run_training(TrainConfig(**json.load(open(sys.argv[1]))))"


@pytest.mark.parametrize("fsdp", [False, True])
def test_the_number_of_processes_may_change_and_all_end_with_their_parent(bench, tmp_path, alone, monkeypatch, fsdp):
    """One process dies at step 10, two go on, sharing out the model or not, until their parent is killed, which they
    notice, write a checkpoint and leave, and one comes to the end."""
    c = fifty(bench, tmp_path)
    with monkeypatch.context() as m:
        die_after(m, 10)
        with pytest.raises(Killed): tr.train(c)
    (tmp_path / "c.json").write_text(json.dumps(vars(c) | dict(inference=vars(c.inference), processes=2,
                                                               fsdp=fsdp, reference_options={})))
    checkpoints = Checkpoints(tr.run_folder(c))
    assert checkpoints.steps()[-1] == 10
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(tmp_path / "c.json")], cwd=ROOT,
                              stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while checkpoints.steps()[-1] == 10 and time.monotonic() < deadline and parent.poll() is None: time.sleep(.02)
    family = psutil.Process(parent.pid).children(recursive=True)
    parent.kill()
    parent.wait()
    assert len(family) >= 3, "a launcher and two workers"
    assert not psutil.wait_procs(family, timeout=60)[1]
    assert not Path(c.output).exists()
    last = tr.train(c)
    assert 20 <= last.resumed_from < 50
    assert_alike(alone, last)


def test_what_is_shared_out_is_held_by_halves(bench, tmp_path):
    c, port, answers = fifty(bench, tmp_path, fsdp=True), free_port(), FORKS.Queue()
    two = [FORKS.Process(target=held_in_a_step, args=(dict(c.__dict__), rank, port, answers)) for rank in range(2)]
    for p in two: p.start()
    first, second = (answers.get(timeout=240) for _ in two)
    for p in two: p.join()
    assert first["all"] == second["all"] > 100_000
    for kind in ("weights", "gradients", "moments", "average"):
        assert max(first[kind], second[kind]) < .52 * first["all"], kind
        assert first[kind] + second[kind] == first["weights"] + second["weights"] == first["all"], kind


def test_what_cant_be_shared_out_is_refused(bench, tmp_path):
    for changes, words in ((dict(optimizer="muon"), "fsdp: muon has no shared form"),
                           (dict(mixed_precision="fp16"), "fsdp: no gradient scaler"),
                           (dict(architecture="promptir"), "fsdp: promptir fits a device")):
        with pytest.raises(FoundIRError, match=words): fifty(bench, tmp_path, fsdp=True, **changes)


# --- the processes and their parent -----------------------------------------------------------------------------------

def test_ctrl_c_and_sigterm_reach_the_child_which_may_tidy_up():
    child = ("import time\ntry:\n  print('began', flush=True)\n  time.sleep(60)\n"
             "except KeyboardInterrupt: print('tidied up')")
    code = f"from foundir_v2.launch import run_processes; import sys; run_processes([sys.executable, '-c', {child!r}])"
    for number, code_then in ((signal.SIGINT, -signal.SIGINT), (signal.SIGTERM, 128 + signal.SIGTERM)):
        parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.PIPE, text=True)
        assert parent.stderr.readline() == "began\n"
        parent.send_signal(number)
        said = parent.communicate(timeout=60)[1]
        assert said.startswith("tidied up") and parent.returncode == code_then


def test_a_child_that_does_not_listen_is_killed():
    child = ("import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
             "print('began', flush=True); time.sleep(60)")
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, start_new_session=True)
    process.stdout.readline()
    launch.stop(process, patience=.2)
    assert process.returncode == -signal.SIGKILL


def test_progress_reaches_the_terminal_as_it_comes(capsys):
    child = "import sys; sys.stderr.write('\\r50%'); sys.stderr.flush(); sys.stdout.write('\\r100% \\u2588\\n')"
    run_processes([sys.executable, "-c", child], os.environ | dict(PYTHONIOENCODING="utf-8"))
    assert capsys.readouterr().err == "\r50%\r100% █\n"


@pytest.mark.parametrize("said, code, words", [
    ("3%|\rfoundir_v2.train: no room (disk)\nfoundir_v2.train: no room (disk)\nE1130 exitcode: 2", 2, "no room (disk)"),
    ("Traceback:\n  x\ntorch.OutOfMemoryError: CUDA out of memory\n", 1, "torch.OutOfMemoryError: CUDA out of memory"),
    ("", 137, "ended by SIGKILL; start again"), ("", -9, "ended by SIGKILL"), ("hm", 7, "exit code 7")])
def test_what_went_wrong_is_one_line(said, code, words):
    assert child_error(said, code).startswith(words) and "\n" not in child_error(said, code)


def test_a_refusal_of_the_worker_is_the_callers(bench, tmp_path):
    "Here accelerate starts a single one, without torchrun."
    (bench / "one.yaml").write_text("distributed_type: 'NO'\nuse_cpu: true\n")
    with pytest.raises(FoundIRError, match="^noise_offset=0.1 with a zero-terminal-SNR noise schedule") as e:
        run_training(config(bench, tmp_path, noise_offset=.1, accelerate_config="one.yaml"))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_what_cannot_be_launched_is_refused_before(bench, tmp_path, monkeypatch):
    with pytest.raises(FoundIRError, match="batch_size=4 can't be split into 3 parts"):
        config(bench, tmp_path, processes=3)
    c = config(bench, tmp_path, accelerate_config="two.yaml")
    with pytest.raises(FoundIRError, match="train.accelerate_config: there is no file .*two.yaml"): run_training(c)
    monkeypatch.setattr(launch, "pick_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    with pytest.raises(FoundIRError, match="train.processes=2: this machine has 1 device;"):
        launch_environment(config(bench, tmp_path, processes=2))


def test_accelerates_own_file_decides(bench, tmp_path):
    "Its path is relative to `root`; a number of processes above 1 goes before its own."
    (bench / "mine.yaml").write_text("distributed_type: 'NO'\n")
    c = config(bench, tmp_path, accelerate_config="mine.yaml")
    one, two = launch_command(c, tmp_path), launch_command(config(bench, tmp_path, processes=2,
                                                                  accelerate_config="mine.yaml"), tmp_path)
    assert str(bench / "mine.yaml") in one and "--num_processes" not in one
    assert two[two.index("--num_processes") + 1] == "2"


def test_who_was_launched_launches_nobody(bench, tmp_path, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setattr(launch, "run_processes", lambda *a: pytest.fail("launched"))
    monkeypatch.setattr(tr, "train", lambda *a, **k: "here")
    assert run_training(config(bench, tmp_path, processes=2)) == "here"


# --- by hand, and then by the pipeline --------------------------------------------------------------------------------

@pytest.mark.parametrize("profile", [None, "smoke", "sdxl"])
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_notebook_and_the_command_line_mean_the_same_run(tmp_path, profile, stage):
    text = (ROOT / "params.yaml").read_text()
    if profile: text = overlay(text, (ROOT / f"profiles/{profile}.yaml").read_text())
    (tmp_path / "params.yaml").write_text(text)
    params, own = load_params(tmp_path / "params.yaml"), f"train_stage{stage}"
    read = keys_read([*PARTS, own], params)
    given = {s: {k: params[s][k] for k in read[s]} for s in PARTS}  # as the runner hands it to the notebook
    notebook = TrainConfig.from_sections(stage, params[own], {}, **given)
    by_hand = read_config(tmp_path / "params.yaml", stage, ["processes=2", "accelerate_config=two.yaml", "output=x"])
    assert parameters(notebook) == parameters(by_hand)


def files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_finished_run_is_taken_over(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, steps=2, update_every=1)
    (tmp_path / "c.json").write_text(json.dumps(vars(c) | dict(inference=vars(c.inference), reference_options={},
                                                               output=str(tmp_path / "by_hand"))))
    assert tr.main(["--config", str(tmp_path / "c.json")]) == 0
    found, run = files(tmp_path / "by_hand"), tr.run_folder(c)
    assert [p.name for p in run.iterdir()] == [RESULT]
    monkeypatch.setattr(tr, "Learner", lambda *a: pytest.fail("trained again"))
    shutil.rmtree(tmp_path / "by_hand")
    for _ in range(2):  # a report that fails in between
        shutil.rmtree(c.output, ignore_errors=True)
        result = run_training(c)
        assert files(result.output) == found and result.resumed_from == 2 and len(result.steps) == 2
    hand_over(c)
    hand_over(c)
    assert not run.exists() and files(result.output) == found


def test_an_interrupted_run_is_gone_on_with(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, steps=4)
    want = tr.train(copy.copy(c))
    with monkeypatch.context() as m:
        die_after(m, 2)
        with pytest.raises(Killed): tr.train(c)
    result = run_training(c)
    assert result.resumed_from == 2 and result.log == want.log and equal(weights(want.output), weights(result.output))


def test_a_kept_result_that_has_changed_is_refused(bench, tmp_path):
    c = config(bench, tmp_path, steps=1)
    tr.train(c, keep=True)
    log = tr.run_folder(c) / RESULT / "log.jsonl"
    assert log.samefile(tmp_path / "out/log.jsonl"), "no copy"
    log.write_text("edited")
    with pytest.raises(FoundIRError, match="log.jsonl has changed.*move .* away to train again") as e: run_training(c)
    assert "\n" not in str(e.value)


def test_results_that_take_room_are_kept_once_per_stage(bench, tmp_path):
    run = lambda seed: config(bench, tmp_path, steps=1, seed=seed, output=str(tmp_path / f"o{seed}"))
    one, two, three = (run(s) for s in (1, 2, 3))
    for c in (one, two): tr.train(c, keep=True)
    assert tr.run_folder(one).exists(), "its output is there: no room is lost"
    shutil.rmtree(one.output)
    tr.train(three, keep=True)
    assert [tr.run_folder(c).exists() for c in (one, two, three)] == [False, True, True]


def test_killed_before_the_result_is_kept(bench, tmp_path, monkeypatch):
    "The checkpoint of the last step is still there."
    c = config(bench, tmp_path, steps=2)
    def die(*a): raise Killed
    with monkeypatch.context() as m:
        m.setattr(tr, "keep_result", die)
        with pytest.raises(Killed): tr.train(c, keep=True)
    want = files(Path(c.output))
    shutil.rmtree(c.output)
    assert run_training(c).resumed_from == 2 and files(Path(c.output)) == want
    assert read_log(tr.run_folder(c) / RESULT / "log.jsonl")
