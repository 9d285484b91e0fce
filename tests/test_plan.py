"The plan of a training: arithmetic, trials without numbers, the choice of a switch, profiles, the command line."
import subprocess, sys
from dataclasses import replace
from pathlib import Path

import pytest, torch
from torch import nn

from foundir_v2 import cli, plan
from foundir_v2.base import load_base
from foundir_v2.core import FoundIRError
from foundir_v2.diffusion import build_unet
from foundir_v2.optim import OPTIMIZERS, make_optimizer
from foundir_v2.settings import TrainConfig, profile_configs

ROOT = Path(__file__).resolve().parents[1]
GB = 10**9
SMALL = dict(stage=2, steps=100, moe_layers=1, moe_heads=2, lq_norm_groups=0, crop=32, batch_size=4, noise_offset=0.,
             mixed_precision="no")


def config(**changes): return TrainConfig(**(SMALL | changes))


@pytest.fixture(scope="module")
def small(): return plan.plan_stage(config())


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_parameters_are_those_of_the_model(stage):
    c = config(stage=stage)
    base, unet = load_base(c.base), build_unet(c, load_base(c.base))
    numbers = plan.plan_stage(c).parameters
    frozen = sum(p.numel() for m in (base.vae, base.text_encoder, base.text_encoder_2) for p in m.parameters())
    assert numbers["trained"] == sum(p.numel() for p in unet.parameters() if p.requires_grad)
    assert sum(numbers.values()) == sum(p.numel() for p in unet.parameters()) + frozen


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_an_optimizer_is_asked(kind):
    if kind == "adamw8bit": pytest.importorskip("bitsandbytes")
    shapes = [(512, 300), (512, 300), (700, 200), (96, 64, 3, 3), (64, 1, 3, 3), (300,), (), (9000,)]
    weights = [nn.Parameter(torch.randn(s)) for s in shapes]
    for p in weights: p.grad = torch.randn_like(p)
    optimizer = make_optimizer(kind, [dict(params=weights, lr=1e-3)])
    optimizer.step()
    held = {t.data_ptr(): t.nbytes for p in weights for t in optimizer.state[p].values() if isinstance(t, torch.Tensor)}
    assert plan.optimizer_bytes(kind, shapes) == pytest.approx(sum(held.values()), rel=0.02)


def test_operations_are_counted():
    "Against numbers on paper; a grouped convolution's backward pass is twice its forward pass."
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    full, grouped, linear = nn.Conv2d(8, 4, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Linear(6, 5)
    for module, forward in ((full, 2 * 2 * 36 * 4 * 8 * 9), (grouped, 2 * 2 * 36 * 8 * 9), (linear, 2 * 96 * 6 * 5)):
        with plan.StepMeter("cuda", [module]) as meter:
            y = module(x)
            assert meter.flops == forward
            y.sum().backward()
        assert meter.flops == 3 * forward
    q = torch.randn(1, 2, 16, 4, requires_grad=True)
    with plan.StepMeter("cuda") as meter: nn.functional.scaled_dot_product_attention(q, q, q)
    assert meter.flops == 2 * 2 * 2 * 16 * 16 * 4


def test_a_trial_is_a_real_step():
    "The same loop with numbers holds the same bytes: layers that keep their input, counted by hand."
    c, skeleton = config(), plan.training_skeleton(config())
    held, flops = plan.trial_step(c, skeleton, 2, "cuda", kept=True)
    unet, kept = build_unet(c, load_base(c.base)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        plan._loss(c, unet, load_base(c.base).vae, 2, None)
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    real = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in kept}
    saved = sum(size for where, size in real.items() if where not in own)
    assert 1 <= held / saved < 1.25
    assert flops > 0


def test_more_samples_take_more_and_checkpointing_less():
    c = config(crop=64)
    skeleton = plan.training_skeleton(c)
    held = {n: plan.trial_step(c, skeleton, n, "cuda", kept=True)[0] for n in (1, 2, 4)}
    assert held[4] - held[2] == pytest.approx(2 * (held[2] - held[1]), rel=0.05)
    less, more = (plan.trial_step(replace(c, gradient_checkpointing=on), skeleton, 4, "cuda", kept=True)
                  for on in (True, False))
    assert less[0] < 0.7 * more[0] and 1.15 < less[1] / more[1] < 1.45
    half = plan.trial_step(replace(c, mixed_precision="bf16"), skeleton, 4, "cuda", kept=True)
    assert half[0] < more[0]


def test_parts_and_phases(small):
    n = small.parameters["trained"]
    assert small.parts["trained"] == small.parts["gradients"] == small.parts["average"] == 4 * n
    assert small.parts["optimizer"] == pytest.approx(8 * n, rel=1e-3)
    assert small.phases["step"] == sum(small.parts.values()) and small.peak == ("step", small.phases["step"])
    host = plan.plan_stage(config(ema_device="cpu"), 1, "cuda")
    assert host.parts["average"] == 0
    two = plan.plan_stage(config(), 2, "cuda")
    assert two.micro == 2 and two.flops == small.flops
    assert two.phases["update"] > plan.plan_stage(config(batch_size=2), 1, "cuda").phases["update"]  # buckets stay


def test_a_stage_without_steps_only_loads():
    empty = plan.plan_stage(config(stage=0, steps=0))
    assert empty.peak[0] == "loading" and not empty.parts and empty.total_flops == 0


def test_scoring_counts_pictures_steps_and_guidance():
    c = config(update_every=10, reference_per_task=2, reference_size=48, policy="fixed")
    once = plan.plan_stage(c)
    assert once.updates == 11 and once.phases["scoring"] > 0
    twice = plan.plan_stage(replace(c, reference_per_task=4))
    assert twice.scoring_flops == 2 * once.scoring_flops
    guided = plan.plan_stage(replace(c, reference_options=dict(guidance_scale=3.0, num_inference_steps=4)))
    assert guided.scoring_flops > 2 * plan.plan_stage(
        replace(c, reference_options=dict(guidance_scale=1.0, num_inference_steps=3))).scoring_flops


def test_the_cheapest_switch_is_named(small):
    "Enough to fit, and no cheaper combination is."
    tight = plan.plan_stage(config(crop=64), 1, "cuda")
    for share, first in ((0.9, "gradient_accumulation"), (0.6, None)):
        room = int(share * tight.peak[1])
        changes = plan.cheapest_switches(tight, room)
        if changes is None: continue
        assert first is None or first in changes
        assert plan.plan_stage(replace(tight.config, **changes), 1, "cuda").peak[1] <= 1.05 * room
    assert plan.cheapest_switches(tight, 1000) is None
    with pytest.raises(FoundIRError, match="larger device or a smaller crop"): plan.refuse([tight], 1000)


def test_what_is_shared_out_is_divided():
    whole, shared = (plan.plan_stage(config(crop=64, fsdp=fsdp), 4, "cuda") for fsdp in (False, True))
    for part in ("trained", "gradients", "optimizer", "average"):
        assert shared.parts[part] == pytest.approx(whole.parts[part] / 4, rel=1e-3)
    assert whole.parts["gathered"] == 0 < shared.parts["gathered"]
    assert shared.parts["activations"] == whole.parts["activations"]
    one = plan.plan_stage(config(crop=64), 1, "cuda")
    for share in (0.9, 0.6): assert "fsdp" not in (plan.cheapest_switches(one, int(share * one.peak[1])) or {})


def test_samples_that_cant_be_split_are_refused():
    with pytest.raises(FoundIRError, match="batch_size=4 can't be split into 3 parts"): plan.plan_stage(config(), 3)


# --- profiles ---------------------------------------------------------------------------------------------------------

def test_the_papers_profile_fits_two_devices_of_96_gb():
    (stage2,) = [c for c in profile_configs("sdxl") if c.stage == 2]
    assert stage2.batch_size == 32
    found = plan.plan_stage(stage2, 2, "cuda")
    assert found.parameters["trained"] == 2_634_606_945 and found.micro * 2 * stage2.gradient_accumulation == 32
    assert found.peak[1] < 90 * GB


def test_the_released_profile_holds_the_released_settings():
    zero, one, two = profile_configs("released")
    assert (zero.steps, one.steps, two.steps) == (0, 6000, 150_000)
    assert two.batch_size == 16 * two.gradient_accumulation == 64 and two.mixed_precision == "fp16"
    assert (one.learning_rate, two.learning_rate, two.lq_encoder_learning_rate) == (5e-5, 5e-5, 5e-6)


@pytest.mark.parametrize("name", ["sdxl", "released"])
def test_every_value_says_where_it_comes_from(name):
    "A value, or the list or mapping it stands in, is the paper's, released, reported, or assumed with a reason."
    marks = "paper", "released", "reported", "(assumed) "
    bare, open_list = [], False
    for line in (ROOT / f"profiles/{name}.yaml").read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line.strip(): continue
        text, _, comment = line.partition("  # ")
        if text.strip().startswith("- "):
            if not open_list: bare.append(line)
        elif text.endswith(":"): open_list = comment.startswith(marks)
        elif not comment.startswith((*marks, "no steps", "the bound")): bare.append(line)
    assert not bare
    reasons = [x for x in (ROOT / f"profiles/{name}.yaml").read_text().split("(assumed)")[1:] if x[:1] == " "]
    assert len(reasons) > 10 and all(len(r.splitlines()[0]) > 6 for r in reasons)


def test_a_file_is_laid_over_the_parameters(tmp_path):
    file = tmp_path / "mine.yaml"; file.write_text("train:\n  crop: 64\n")
    assert {c.crop for c in profile_configs(file)} == {64}
    assert [c.init for c in profile_configs(file)] == [None, "artifacts/train_stage0", "artifacts/train_stage1"]
    assert {c.seed for c in profile_configs(file, ["seed=3"])} == {3}


# --- files that are handed out ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("file", sorted((ROOT / "profiles/accelerate").glob("*.yaml")), ids=lambda f: f.stem)
def test_accelerate_reads_its_configurations(file):
    "Precision is ours: what accelerate's file says would be a second place."
    from accelerate.commands.config.config_args import load_config_from_file
    found = load_config_from_file(str(file))
    assert found.mixed_precision == "no" and found.num_processes % found.num_machines == 0
    assert (found.num_processes > 1) == (found.distributed_type == "MULTI_GPU")
    assert found.use_cpu == (file.stem == "cpu")


def test_accelerate_configurations_are_those_that_are_promised():
    from accelerate.commands.config.config_args import load_config_from_file
    found = {f.stem: load_config_from_file(str(f)) for f in (ROOT / "profiles/accelerate").glob("*.yaml")}
    assert {name: c.num_processes for name, c in found.items()} == dict(cpu=1, gpu=1, gpu2=2, gpu8=8, nodes2=16)


def test_the_script_for_a_gpu_runs_at_a_tiny_size(tmp_path):
    command = [sys.executable, "bench/gpu.py"]
    run = lambda *argv: subprocess.run([*command, *argv], cwd=ROOT, capture_output=True, text=True)
    done = run("--tiny", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-2000:]
    (table,) = tmp_path.glob("gpu-*.md")
    lines = table.read_text().splitlines()
    assert sum(line.startswith("| ") and " no |" in line for line in lines) == 2 and "matrix rate" in table.read_text()
    if not torch.cuda.is_available():
        done = run()
        assert done.returncode == 0 and done.stdout.count("\n") == 1 and "no GPU here" in done.stdout


# --- the command line -------------------------------------------------------------------------------------------------

def test_the_command_prints_and_refuses(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    file = tmp_path / "mine.yaml"
    file.write_text("train:\n  crop: 64\n  batch_size: 4\ntrain_stage0:\n  steps: 0\n")
    assert cli.main(["train", "--plan", str(file), "--memory", "2", "--devices", "2", "--rate", "100"]) == 0
    said = capsys.readouterr().out
    for word in ("stage 0", "stage 1", "stage 2", "gradients (DDP's buckets)", "optimizer (muon)", "averaged weights",
                 "activations", "peak of a step", "scoring D_ref", "at 100 TFLOP/s per device"): assert word in said
    assert cli.main(["train", "--plan", str(file), "--memory", "0.01"]) == 2
    out, err = capsys.readouterr()
    assert "stage 2" in out and err.count("\n") == 1 and "on every device" in err


@pytest.mark.parametrize("argv, words", [
    ("train", "train needs --config FILE, or --plan"), ("train --plan sdlx", "released, sdxl, smoke, tiny"),
    ("train --plan tiny --memory 0", "above 0"), ("train --plan tiny --devices 0", "from 1"),
    ("train --plan tiny --set crop=100", "multiple of 8"), ("train --plan tiny --set stpes=3", "unknown key")])
def test_bad_input_is_one_line(capsys, monkeypatch, argv, words):
    monkeypatch.chdir(ROOT)
    assert cli.main(argv.split()) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1
