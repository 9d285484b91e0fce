"Training: the loss follows the noise schedule, the mixture follows the scores, and nothing that happens to the process changes the result."
import csv, gc, json, os, signal, subprocess, sys, time, weakref
from dataclasses import replace
from pathlib import Path

import pytest, torch
from diffusers import DDPMScheduler
from safetensors.torch import load_file

from foundir_v2 import train as tr
from foundir_v2.base import TINY_UNET, load_base, new_base, save_base
from foundir_v2.checkpoint import Checkpoints, only_writer
from foundir_v2.core import FoundIRError, generator, save_image
from foundir_v2.index import build_manifest, save_manifest
from foundir_v2.vae import PatchAutoencoderKL

ROOT = Path(__file__).resolve().parents[1]
TASKS = {"denoise": ["gaussian_noise"], "lowlight": ["low_light"], "sr": ["sr_x2"]}


@pytest.fixture(scope="session")
def bench(tmp_path_factory):
    "A data set of noise-like pictures, its manifest, and a very small base model."
    folder = tmp_path_factory.mktemp("bench")
    for split, n in dict(train=3, reference=2).items():
        for i in range(n):
            coarse = torch.rand(1, 3, 12, 12, generator=generator(split, i))
            save_image(torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic")[0].clamp(0, 1), folder / f"photos/{split}/{split}{i}.png")
    save_manifest(build_manifest(folder / "photos", root=folder), folder / "manifest.parquet")
    torch.manual_seed(0)
    unet = dict(TINY_UNET, block_out_channels=(32, 32, 48), attention_head_dim=(2, 2, 2))
    save_base(new_base(PatchAutoencoderKL(channels=48, hidden=8, encoder_blocks=1, decoder_blocks=1), unet), folder / "base")
    return folder


def config(bench, out, **changes):
    values = dict(stage=1, steps=6, tasks=TASKS, score={t: "psnr" for t in TASKS}, policy="des", options=dict(alpha=.5, score_scale="raw"), reference_per_task=2, reference_size=32, reference_steps=1,
                  base=str(bench / "base"), lq_norm_groups=0, moe_layers=1, moe_heads=4, crop=32, batch_size=4, terminal_fraction=.5, noise_offset=0., ema_decay=.9,
                  mixed_precision="no", num_workers=0, checkpoint_every=2, warmup_steps=2, learning_rate=2e-3, manifest=str(bench / "manifest.parquet"), root=str(bench),
                  checkpoints=str(out / "runs"), output=str(out / "out"))
    return tr.TrainConfig(**(values | changes))


def weights(folder): return load_file(next(Path(folder).glob("unet/*.safetensors")))


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


class Killed(Exception): pass


def die_after(monkeypatch, step):
    "The process dies right after the checkpoint of `step`."
    class Dying(Checkpoints):
        def save(self, accelerator, k):
            super().save(accelerator, k)
            if k == step: raise Killed
    monkeypatch.setattr(tr, "Checkpoints", Dying)


# --- the loss ---------------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_target_recovers_the_picture(kind):
    ns = DDPMScheduler(prediction_type=kind, clip_sample=False)
    z, eps, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([10, 700])
    y, noisy = tr.prediction_target(ns, z, eps, t), ns.add_noise(z, eps, t)
    for i in range(2): torch.testing.assert_close(ns.step(y[i:i + 1], int(t[i]), noisy[i:i + 1]).pred_original_sample, z[i:i + 1], atol=1e-3, rtol=1e-3)


def test_unknown_prediction_type_is_refused():
    ns = DDPMScheduler(); ns.register_to_config(prediction_type="score")
    with pytest.raises(FoundIRError, match="epsilon, v_prediction or sample"): tr.prediction_target(ns, *[torch.zeros(1, 1, 1, 1)] * 2, torch.tensor([0]))


def test_psnr_loss_weighs_latents_as_the_decoder_does(bench):
    vae = load_base(str(bench / "base")).vae
    gain, zero = tr.decoder_gain(vae), torch.zeros(1, 16, 4, 4)
    assert gain.shape == (16,) and (gain > 0).all() and abs(gain.mean() - 1) < 1e-5
    with torch.no_grad():
        for c in (0, 5, 15):  # this decoder is linear: any error in one channel has the same factor
            error = zero.clone(); error[:, c] = torch.randn(4, 4, generator=generator("error", c))
            pixels = (vae.decode(error).sample - vae.decode(zero).sample).square().mean()
            mine = tr.sample_losses(error, zero, "psnr", gain)[0].exp() - 1e-3
            if c == 0: factor = pixels / mine
            torch.testing.assert_close(pixels, factor * mine, rtol=1e-3, atol=0)
    torch.testing.assert_close(tr.sample_losses(error, zero, "l2", gain), error.square().mean().reshape(1))
    torch.testing.assert_close(tr.sample_losses(error, zero, "rmse", gain).square(), tr.sample_losses(error, zero, "psnr", gain).exp())


@pytest.mark.parametrize("kind", ["l3", "PSNR", "", None])
def test_an_unknown_loss_is_refused(kind):
    with pytest.raises(FoundIRError, match="choose from l1, l2, rmse, psnr"): tr.sample_losses(torch.zeros(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), kind, torch.ones(1))


def test_identity_start_is_refused_where_it_cannot_hold(bench, tmp_path):
    "The bench's U-Net has groups of one channel in its last norm."
    with pytest.raises(FoundIRError, match="conditioning_init: zero"): tr.train(config(bench, tmp_path, conditioning_init="identity"))


def test_replay_follows_the_schedule_and_another_schedule_is_another_run(bench, tmp_path):
    from foundir_v2.mixture import write_mixture
    path = bench / "replay.csv"
    def write(last): write_mixture([dict(step=s, task=t, weight=w, score=None) for s, shares in {0: (1., 0., 0.), 2: last}.items() for t, w in zip(TASKS, shares)], path)
    write((0., 0., 1.))
    one = config(bench, tmp_path, policy="replay", options=dict(table="replay.csv"), steps=4, update_every=2)
    tasks = [max(r["samples"], key=r["samples"].get) for r in tr.train(one).steps]
    assert tasks == ["denoise"] * 2 + ["sr"] * 2
    before = tr.run_folder(one)
    write((0., 1., 0.))
    assert tr.run_folder(one) != before
    with pytest.raises(FoundIRError, match="policy replay: missing .* 'table'"): tr.train(replace(one, options={}))
    with pytest.raises(FoundIRError, match="expected denoise"): tr.build_mixture(replace(one, tasks={"denoise": ["jpeg"]}, score={"denoise": "psnr"}))


def test_identity_start_reaches_the_training(tmp_path):
    one = tr.TrainConfig(stage=1, steps=1, lq_norm_groups=0, moe_layers=1, moe_heads=2, conditioning_init="identity", noise_offset=0.)
    base = load_base("base")
    unet, plain = tr.build_unet(one, base), tr.build_unet(replace(one, conditioning_init="zero"), base)
    assert plain.moe_projection.weight.abs().max() == 0 and torch.equal(unet.moe_projection.weight[:, 48:, 0, 0], torch.eye(48))
    assert {n for n, p in unet.named_parameters() if p.requires_grad} == {n for n, p in plain.named_parameters() if p.requires_grad}


def test_noise_is_a_function_of_the_sample():
    args = ((4, 8, 8), 1000, .5, .1, .2)
    noise, t, dropped = tr.draw_noise([5, 6, 7], *args)
    for i, seed in enumerate([5, 6, 7]):
        n1, t1, d1 = tr.draw_noise([seed], *args)
        assert torch.equal(n1[0], noise[i]) and t1[0] == t[i] and d1 == [dropped[i]]
    offset = tr.draw_noise(range(300), (4, 8, 8), 1000, noise_offset=1.)[0].mean((2, 3))
    assert .9 < offset.std() < 1.1      # a constant per channel is there
    assert tr.draw_noise(range(50), (1, 2, 2), 1000, terminal_fraction=1.)[1].eq(999).all()
    assert not any(tr.draw_noise(range(50), (1, 2, 2), 1000)[2])


# --- configuration ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(noise_offset=.02), "noise_offset"), (dict(batch_size=5, gradient_accumulation=2), "batch_size=5"), (dict(init="nowhere"), "nowhere"),
    (dict(base="nobody"), "nobody"), (dict(update_every=2, score={"denoise": "psnr"}), "lowlight, sr"), (dict(tasks={"denoise": ["sharpness"]}), "sharpness"), (dict(steps=0), "steps=0"),
    (dict(update_every=2, score=dict.fromkeys(TASKS, "beauty")), "beauty"), (dict(update_every=2, reference_per_task=0), "reference_per_task"),
    (dict(manifest="gone.parquet"), "gone.parquet"), (dict(lq_encoder_learning_rate=1e-3), "is for stage 2"), (dict(proportions={"denoise": 1.}), "lowlight, sr missing"),
    (dict(max_grad_norm=-1.), "max_grad_norm"), (dict(warmup_steps=-3), "warmup_steps"), (dict(scale_range=[1.]), "scale_range"), (dict(adam_betas=[.9]), "adam_betas"), (dict(reference_steps=0), "reference_steps")])
def test_bad_configurations_are_refused_in_one_line(bench, tmp_path, changes, words):
    with pytest.raises((FoundIRError, FileNotFoundError), match=words) as e: tr.train(config(bench, tmp_path, **changes))
    assert "\n" not in str(e.value) and not (tmp_path / "out").exists()


def test_stage_two_refuses_weights_of_another_model(bench, tmp_path):
    tr.train(config(bench, tmp_path, steps=1, output=str(tmp_path / "one")))
    with pytest.raises(FoundIRError, match="moe_heads is 4"): tr.train(config(bench, tmp_path, stage=2, init=str(tmp_path / "one"), moe_heads=2))


# --- two stages -------------------------------------------------------------------------------------------------------------------------------

def test_stages_train_their_parameters_with_their_rates(bench, tmp_path):
    one = config(bench, tmp_path, steps=3, output=str(tmp_path / "one"))
    start = tr.build_unet(one, load_base(one.base)).state_dict()
    tr.train(one); first = weights(tmp_path / "one")
    new = lambda k: k.startswith(("lq_embedding.", "moe_"))
    assert all(torch.equal(start[k], first[k]) for k in first if not new(k))
    assert sum(not torch.equal(start[k], first[k]) for k in first if new(k)) > 10
    two = tr.train(config(bench, tmp_path, stage=2, steps=3, init=str(tmp_path / "one"), learning_rate=1e-3, lq_encoder_learning_rate=1e-4, warmup_steps=0))
    assert two.steps[0]["lr"] == {"lq_encoder": 1e-4, "unet": 1e-3} and two.steps[-1]["lr"]["unet"] < 1e-3
    second = weights(two.output)
    assert sum(torch.equal(first[k], second[k]) for k in first) < len(first) / 10
    assert sorted(p.name for p in two.output.iterdir()) == ["config.json", "log.jsonl", "mixture.csv", "unet"]
    assert not list((tmp_path / "runs").glob("stage*-*/step*"))  # finished runs leave no checkpoints


def test_the_priors_memory_is_free_once_the_restorer_is_built(bench, tmp_path, monkeypatch):
    priors = []
    def spy(*args, **options):
        base = load_base(*args, **options)
        priors.append(base.unet_prior and weakref.ref(base.unet_prior))
        return base
    monkeypatch.setattr(tr, "load_base", spy)
    one = config(bench, tmp_path, steps=1)
    learner = tr.Learner(one, tr.make_accelerator(one)); gc.collect()
    assert priors[0]() is None and learner.prompt("")[0].shape[0] == 1
    tr.train(one)
    two = config(bench, tmp_path, stage=2, init=one.output)
    tr.Learner(two, tr.make_accelerator(two))
    assert priors[-1] is None, "not read at all"


def test_stage_zero_teaches_the_lq_encoder_and_nothing_else(bench, tmp_path):
    zero = config(bench, tmp_path, stage=0, steps=60, noise_offset=.02, loss="rmse", lq_context_width=8, learning_rate=5e-3, update_every=30, proportions=dict(denoise=.2, lowlight=.6, sr=.2), checkpoint_every=100)
    start = tr.build_unet(zero, load_base(zero.base)).state_dict()
    result = tr.train(zero); after = weights(result.output)
    moved = {k.split(".")[0] for k in after if not torch.equal(start[k], after[k])}
    assert moved == {"lq_features", "lq_context"}
    first, last = ([r for r in result.log if r["kind"] == "mixture"][k] for k in (0, -1))
    losses = [r["loss"] for r in result.steps]
    assert sum(losses[-10:]) < .8 * sum(losses[:10])
    assert first["weights"] == last["weights"] == dict(denoise=.2, lowlight=.6, sr=.2)   # the stage's own
    one = config(bench, tmp_path, stage=1, steps=1, lq_context_width=8, init=str(result.output), output=str(tmp_path / "one"))
    tr.train(one); next_ = weights(one.output)
    assert all(torch.equal(after[k], next_[k]) for k in after if k.startswith(("lq_features", "lq_context")))


def test_the_identity_does_not_undo_a_trained_stage(bench, tmp_path):
    with pytest.raises(FoundIRError, match="would undo"): config(bench, tmp_path, stage=2, init=str(tmp_path), conditioning_init="identity")


def test_stage_zero_without_steps_builds_the_model(bench, tmp_path):
    zero = config(bench, tmp_path, stage=0, steps=0)
    result = tr.train(zero)
    assert result.table.empty and equal(weights(result.output), dict(tr.build_unet(zero, load_base(zero.base)).state_dict()))


def test_stage_zero_resumes(bench, tmp_path, monkeypatch):
    c = config(bench, tmp_path, stage=0, steps=5, loss="psnr", lq_context_width=8, output=str(tmp_path / "straight"))
    straight = tr.train(c)
    with monkeypatch.context() as m:
        die_after(m, 2)
        with pytest.raises(Killed): tr.train(replace(c, output=str(tmp_path / "cut")))
    resumed = tr.train(replace(c, output=str(tmp_path / "cut")))
    assert resumed.resumed_from == 2 and resumed.log == straight.log and equal(weights(straight.output), weights(resumed.output))


def test_learning_reduces_the_loss(bench, tmp_path):
    losses = [r["loss"] for r in tr.train(config(bench, tmp_path, stage=2, steps=40, learning_rate=5e-3, terminal_fraction=1., batch_size=4, checkpoint_every=100)).steps]
    assert sum(losses[-8:]) < .9 * sum(losses[:8])


def test_gradient_accumulation_and_workers_change_nothing(bench, tmp_path):
    plain = tr.train(config(bench, tmp_path, steps=3))
    split = tr.train(config(bench, tmp_path, steps=3, gradient_accumulation=2, num_workers=1, output=str(tmp_path / "split")))
    for a, b in zip(plain.steps, split.steps):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and a["samples"] == b["samples"]


def test_ranks_share_one_stream_of_samples(bench, tmp_path):
    c = config(bench, tmp_path, update_every=2)
    seeds = lambda rank, world: [list(b["seed"]) for b in tr.Feed(c, rank, world).loader]
    together, first, second = seeds(0, 1), seeds(0, 2), seeds(1, 2)
    assert len(together) == 2 and [a + b for a, b in zip(first, second)] == together


def test_two_processes_train_like_one(bench, tmp_path):
    c = config(bench, tmp_path, stage=2, steps=4, update_every=2)
    alone = tr.train(c)
    file = tmp_path / "config.json"; file.write_text(json.dumps(dict(c.__dict__, output=str(tmp_path / "two"))))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "foundir_v2.train", "--config", str(file)]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | dict(ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("4 steps") == 1, done.stderr[-2000:]
    records = tr.read_log(tmp_path / "two/log.jsonl")
    assert [r["kind"] for r in records] == [r["kind"] for r in alone.log]
    for a, b in zip(alone.log, records):
        if a["kind"] == "step": assert a["samples"] == b["samples"] and b["loss"] == pytest.approx(a["loss"], abs=1e-4)
        else: assert b["weights"] == pytest.approx(a["weights"], abs=1e-3)


# --- data equilibrium scheduling in the loop --------------------------------------------------------------------------------------------------

def test_mixture_changes_at_exactly_the_step_of_the_update(bench, tmp_path, monkeypatch):
    scores = iter([dict.fromkeys(TASKS, 0.), {"denoise": 900., "lowlight": 900., "sr": -900.}])
    monkeypatch.setattr(tr, "score_items", lambda *a, **k: next(scores))
    result = tr.train(config(bench, tmp_path, steps=7, update_every=4, num_workers=1, checkpoint_every=100))
    counts = [r["samples"] for r in result.steps]
    assert all(c == {"denoise": 0, "lowlight": 0, "sr": 4} for c in counts[4:])        # steps 5, 6, 7
    assert any(c["sr"] < 4 for c in counts[:4])
    assert [r["step"] for r in result.log if r["kind"] == "mixture"] == [0, 4]


def test_weights_in_the_csv_follow_from_its_scores(bench, tmp_path):
    c = config(bench, tmp_path, stage=2, steps=10, update_every=2, learning_rate=1e-2, options=dict(alpha=.5, floor=.1, max_step=10., score_scale="relative"))
    result = tr.train(c)
    rows = list(csv.DictReader(open(result.output / "mixture.csv")))
    steps = sorted({int(r["step"]) for r in rows}); assert steps == [0, 2, 4, 6, 8, 10]
    policy = tr.build_mixture(c)
    for step in steps:
        at = {r["task"]: r for r in rows if int(r["step"]) == step}
        policy.update({t: float(r["score"]) for t, r in at.items()}, step)
        assert policy.weights == {t: float(r["weight"]) for t, r in at.items()}
    assert policy.weights != dict.fromkeys(TASKS, 1 / 3)


def test_scores_come_from_the_averaged_weights(bench, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(tr, "restore_batch", lambda unet, *a: seen.append({k: v.clone() for k, v in unet.state_dict().items()}) or a[3].clamp(0, 1))
    result = tr.train(config(bench, tmp_path, steps=4, update_every=4, ema_decay=.9))
    final = weights(result.output)
    assert equal(final, {k: v for k, v in seen[-1].items()})   # what was scored last is what is delivered
    assert not equal(seen[0], seen[-1])


# --- interruptions ----------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("cut", [2, 4])  # 4: an update of the mixture and a checkpoint at one step
def test_resumed_run_equals_the_straight_one(bench, tmp_path, monkeypatch, cut):
    c = config(bench, tmp_path, stage=2, steps=7, update_every=4, dvclive=True, output=str(tmp_path / "straight"))
    straight = tr.train(c)
    with monkeypatch.context() as m:
        die_after(m, cut)
        with pytest.raises(Killed): tr.train(replace(c, output=str(tmp_path / "cut")))
    log = next((tmp_path / "runs").glob("stage2-*/log.jsonl"))
    log.write_text(log.read_text() + '{"kind": "step", "step": 99')   # half a line
    resumed = tr.train(replace(c, output=str(tmp_path / "cut"), num_workers=1))
    assert resumed.resumed_from == cut and resumed.log == straight.log
    assert equal(weights(straight.output), weights(resumed.output))
    for f in ("mixture.csv", "log.jsonl", "config.json"): assert (straight.output / f).read_bytes() == (resumed.output / f).read_bytes()
    tsv = [(p / "dvclive/plots/metrics/loss.tsv").read_text().split("\n") for p in (straight.output, resumed.output)]
    assert len(tsv[0]) == len(tsv[1]) == 7 + 2


def test_kill_9_and_again(bench, tmp_path):
    c = config(bench, tmp_path, stage=2, steps=400, update_every=0, checkpoint_every=3, seed=3)
    file = tmp_path / "config.json"; file.write_text(json.dumps(dict(c.__dict__)))   # JSON is YAML
    command = [sys.executable, "-m", "foundir_v2.train", "--config", str(file)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "runs").glob("stage2-*/step-*")) and time.monotonic() < deadline: time.sleep(.05)
    refused = None
    try:
        with only_writer(tr.run_folder(c)): pass
    except FoundIRError as e: refused = str(e)
    process.send_signal(signal.SIGKILL); process.wait()
    assert refused and f"process {process.pid}" in refused
    steps = Checkpoints(tr.run_folder(c)).steps()
    assert steps and not Path(c.output).exists()
    short = replace(c, steps=400)
    accelerator = tr.make_accelerator(short)
    learner, feed = tr.Learner(short, accelerator), tr.Feed(short)
    accelerator.register_for_checkpointing(learner.ema, feed)
    assert Checkpoints(tr.run_folder(c)).restore(accelerator) == steps[-1] == feed.step  # the newest checkpoint is whole
    assert learner.ema.optimization_step == feed.step and learner.lr_scheduler.scheduler.last_epoch == feed.step
    log = tr.TrainLog(tr.run_folder(c) / "log.jsonl", feed.step); log.close()
    assert [r["step"] for r in tr.read_log(log.path)] == list(range(1, feed.step + 1))


# --- what training must not touch -------------------------------------------------------------------------------------------------------------

AUDIT = """
import sys, json
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
from foundir_v2 import train as tr
for values in json.load(open(sys.argv[1])): tr.train(tr.TrainConfig(**values))
bad = [p for p in opened if "assets/tiny" in p.replace("\\\\", "/")]
assert any("manifest.parquet" in p or p.endswith(".png") for p in opened), "the hook saw nothing"
print(json.dumps(bad))
"""


def test_training_never_opens_the_shipped_restorer(bench, tmp_path):
    shipped = dict(base="base") if (ROOT / "foundir_v2/assets/base/vae").is_dir() else {}
    one = config(bench, tmp_path, steps=1, output=str(tmp_path / "one"), **shipped)
    two = config(bench, tmp_path, stage=2, steps=1, update_every=1, init=str(tmp_path / "one"), **shipped)
    (tmp_path / "c.json").write_text(json.dumps([c.__dict__ for c in (one, two)]))
    done = subprocess.run([sys.executable, "-c", AUDIT, str(tmp_path / "c.json")], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == []


# --- command line and parameter file ----------------------------------------------------------------------------------------------------------

def test_command_line_refuses_in_one_line(tmp_path, capsys):
    (tmp_path / "c.yaml").write_text("stage: 1\nsteps: 1\nlerning_rate: 1\n")
    assert tr.main(["--config", str(tmp_path / "c.yaml")]) == 2
    assert "lerning_rate" in capsys.readouterr().err
    for bad in (["--config", str(tmp_path / "none.yaml")], ["--config", str(tmp_path / "c.yaml"), "--set", "steps=[1"]):
        assert tr.main(bad) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_the_parameter_file_updates_the_mixture_often_enough():
    c = tr.read_config(ROOT / "params.yaml", 2)
    assert c.steps // c.update_every >= 5


def test_a_scheduled_policy_leads_the_training(bench, tmp_path):
    "Tasks join at the update that the boundary falls on."
    c = config(bench, tmp_path, policy="incremental", options=dict(boundaries=[2, 4]), steps=6, update_every=2, batch_size=8)
    seen = [{t for t, n in r["samples"].items() if n} for r in tr.train(c).steps]
    assert seen[:2] == [{"denoise"}] * 2 and set().union(*seen[2:4]) == {"denoise", "lowlight"} and set().union(*seen[4:]) == set(TASKS)


def test_killed_while_the_run_is_tidied_away(bench, tmp_path, monkeypatch):
    "The result is complete by then, and started again the run is made anew, not gone on with from what is left."
    c = config(bench, tmp_path, steps=4)
    want, remove = tr.train(c).steps, tr.shutil.rmtree
    def die(path, *args, **kwargs):
        if Path(path).exists() and Path(path).name.endswith(".done"): next(Path(path).glob("log.jsonl")).unlink(); raise Killed
        remove(path, *args, **kwargs)
    with monkeypatch.context() as m:
        m.setattr(tr.shutil, "rmtree", die)
        with pytest.raises(Killed): tr.train(c)
    assert len(tr.read_log(tmp_path / "out/log.jsonl")) == len(want)
    again = tr.train(c)
    assert again.resumed_from is None and [s["loss"] for s in again.steps] == [s["loss"] for s in want]
    assert not list((tmp_path / "runs").glob(".*.done"))
