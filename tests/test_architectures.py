"Other models than FoundIR-v2, trained by the same trainer on the same mixture, and used like it."
import csv
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest, torch

from foundir_v2 import foundir_v1, train as tr
from foundir_v2.architectures import ARCHITECTURES
from foundir_v2.core import FoundIRError, save_image
from foundir_v2.foundir_v1 import TIMESTEPS, FoundIRv1Network, mix, residual_schedule
from foundir_v2.index import load_manifest
from foundir_v2.inference import read_recipe
from foundir_v2.learner import Learner, make_accelerator
from foundir_v2.loading import load_pipeline
from foundir_v2.memo import Memo
from foundir_v2.pixdit import SHORTEST, PixDiTNetwork
from foundir_v2.pixels import read_network, restore_pixels
from foundir_v2.plan import plan_stage
from foundir_v2.promptir import UNUSED, PromptIRNetwork, load_official, to_official
from foundir_v2.restorers import make_restorer, restorer_sources
from foundir_v2.score import reference_set
from foundir_v2.systems import load_released
from foundir_v2.trainlog import read_log
from foundir_v2.trials import run_trials
from small_training import TASKS, config, equal

SMALL = dict(width=8, blocks=[1, 1, 1, 1], refinement=1, heads=[1, 1, 2, 2], prompts=3, prompt_width=[8, 8, 16],
             prompt_size=[8, 4, 2])
SIZES = dict(promptir=SMALL, foundir_v1=dict(width=8, factors=[1, 2], groups=4, steps=2),
             pixdit=dict(heads=2, head_width=8, depth=2, patch=4, bottleneck=16, steps=2))
NETWORKS = dict(promptir=PromptIRNetwork, foundir_v1=FoundIRv1Network, pixdit=PixDiTNetwork)
every = pytest.mark.parametrize("name", SIZES)


def shapes(name):
    "What the authors' class holds: name -> shape."
    with open(Path(__file__).with_name("data") / f"{name}_keys.csv") as f:
        return {row["key"]: tuple(map(int, row["shape"].split("x"))) for row in csv.DictReader(f)}


def small(bench, out, name, **changes):
    own = dict(stage=2, architecture=name, architecture_options=SIZES[name], update_every=2)
    return config(bench, out, **(own | changes))


def promptir(bench, out, **changes): return small(bench, out, "promptir", **changes)


def network_weights(folder): return read_network(folder).state_dict()


# --- the configuration ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("changes, words", [
    (dict(stage=0), "architecture promptir trains by stage 2 alone: it has no stage 0"),
    (dict(stage=1), "it has no stage 1"),
    (dict(architecture="promtir"), "expected one of foundir_v2, promptir, foundir_v1, pixdit"),
    (dict(architecture_options=dict(depth=3)), "unknown depth; the choices are width, blocks"),
    (dict(architecture_options=dict(blocks=[1, 1])), "architecture_options.blocks: expected 4 values, got 2"),
    (dict(architecture="foundir_v2"), "architecture_options: unknown width"),
    (dict(architecture="pixdit", architecture_options=dict(head_width=6)), "and a multiple of 4, got 6"),
    (dict(architecture="pixdit", architecture_options=dict(patch=65)), "architecture_options.patch: expected"),
    (dict(architecture="pixdit", architecture_options=dict(patch=7)), "choose a multiple of 7"),
    (dict(loss="psnr"), "promptir has none: choose from l1, l2"),
    (dict(lq_encoder_learning_rate=1e-4), "lq_encoder_learning_rate is for foundir_v2: with promptir it is null"),
    (dict(conditioning_init="identity"), "with promptir it is zero"),
    (dict(reference_options=dict(num_inference_steps=1)), "reference_options.num_inference_steps is for foundir_v2")])
def test_what_an_architecture_does_not_have_is_refused_in_one_line(bench, tmp_path, changes, words):
    with pytest.raises(FoundIRError) as e: promptir(bench, tmp_path, **changes)
    assert words in str(e.value) and "\n" not in str(e.value)


def test_the_default_is_foundir_v2_and_says_so_nowhere_else(bench, tmp_path):
    c = config(bench, tmp_path)
    assert c.architecture == "foundir_v2" and asdict(c.design) == {} and c.design.stages == (0, 1, 2)
    assert "architecture" not in (tr.train(replace(c, steps=1)).output / "pipeline.json").read_text()


def test_a_plan_of_another_architecture_is_refused(bench, tmp_path):
    with pytest.raises(FoundIRError, match="--plan reckons with the parts of foundir_v2"):
        plan_stage(promptir(bench, tmp_path))


# --- training ---------------------------------------------------------------------------------------------------------

@every
def test_it_trains_with_des_and_restores_as_it_was_scored(bench, tmp_path, name):
    c = small(bench, tmp_path, name, steps=4, keep_best=True, tensorboard=True)
    result = tr.train(c)
    updates = [r for r in read_log(result.output / "log.jsonl") if r["kind"] == "mixture"]
    assert [r["step"] for r in updates] == [0, 2, 4] and all(set(r["scores"]) == set(TASKS) for r in updates)
    assert updates[0]["weights"] != updates[1]["weights"], "the mixture has moved"
    assert result.steps[-1]["lr"].keys() == {"network"}
    assert sorted(p.name for p in (result.output / "network").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors"]
    assert read_recipe(result.output).architecture == name == read_recipe(result.output / "best").architecture
    items = [some[0] for some in reference_set(load_manifest(c.manifest), TASKS, 1, 32, root=str(bench)).values()]
    learner, restorer = Learner(replace(c, init=str(result.output)), make_accelerator(c)), make_restorer(
        f"trained:{result.output}")
    assert {i.subtask.scale for i in items} == {1, 2}
    for item, scored in zip(items, learner.restore(items)):
        used = restorer(item.lq, subtask=item.subtask, seed=item.seed)
        assert used.shape == item.gt.shape
        torch.testing.assert_close(used, scored, atol=1e-5, rtol=0)
    assert result.output / "network" / "config.json" in [
        p for root in restorer_sources(f"trained:{result.output}")[0] for p in root.rglob("*")]


@every
def test_a_killed_run_ends_as_the_straight_one(bench, tmp_path, monkeypatch, name):
    c = small(bench, tmp_path, name, steps=6, output=str(tmp_path / "straight"))
    straight, save = tr.train(c), tr.Checkpoints.save
    def dying(self, accelerator, step, *state):
        path = save(self, accelerator, step, *state)
        if step == 4: raise InterruptedError
        return path
    again = replace(c, output=str(tmp_path / "again"))
    with monkeypatch.context() as m:
        m.setattr(tr.Checkpoints, "save", dying)
        with pytest.raises(InterruptedError): tr.train(again)
    resumed = tr.train(again)
    assert resumed.resumed_from == 4 and resumed.log == straight.log
    assert equal(network_weights(resumed.output), network_weights(straight.output))


def test_it_takes_part_in_the_benchmark(bench, tmp_path):
    "Beside bicubic, on whole pictures of a size that the network doesn't halve evenly, in tiles."
    c = promptir(bench, tmp_path, steps=1, update_every=0, inference=dict(tile_size=16, tile_batch=4))
    mine = f"trained:{tr.train(c).output}"
    for side in ("hazy", "GT"): save_image(torch.rand(3, 21, 30), tmp_path / f"sets/1_{side}.png")
    rows = run_trials({"nh_haze": tmp_path / "sets"}, {"mine": mine, "input": "bicubic"}, Memo(tmp_path / "m.sqlite"),
                      ["psnr"])
    assert rows.value.notna().tolist() == [True, True]


def test_promptir_learns(bench, tmp_path):
    losses = tr.train(promptir(bench, tmp_path, steps=40, update_every=0, batch_size=8, learning_rate=5e-3)).steps
    first, last = (sum(r["loss"] for r in some) / 8 for some in (losses[:8], losses[-8:]))
    assert last < 0.8 * first


def test_promptir_goes_on_from_an_earlier_result_of_its_sizes(bench, tmp_path):
    first = tr.train(promptir(bench, tmp_path, steps=2))
    c = promptir(bench, tmp_path, steps=2, init=str(first.output), output=str(tmp_path / "more"))
    start = Learner(c, make_accelerator(c)).trainee.network.state_dict()
    assert equal(start, network_weights(first.output))
    for changes, words in ((dict(architecture_options=SMALL | dict(width=16)), "width is 8 in"),
                           (dict(init=str(tmp_path / "none")), "none")):
        with pytest.raises((FoundIRError, FileNotFoundError), match=words): tr.train(replace(c, **changes))


@pytest.mark.parametrize("name", ["promptir", "pixdit"])
def test_switches_that_save_memory_change_no_result(bench, tmp_path, name):
    "Checkpointed activations are the same ones; another memory format rounds otherwise."
    plain = small(bench, tmp_path, name, steps=2, update_every=0)
    losses = []
    for changes in (dict(), dict(gradient_checkpointing=True), dict(gradient_accumulation=2, channels_last=True)):
        c = replace(plain, output=str(tmp_path / "_".join(changes) / "out"), **changes)
        losses.append([r["loss"] for r in tr.train(c).steps])
    assert losses[0] == losses[1] and losses[0] == pytest.approx(losses[2], rel=1e-4)


# --- the network and the authors' layout ------------------------------------------------------------------------------

def count(found): return sum(torch.Size(s).numel() for s in found.values())


def test_every_weight_of_promptirs_authors_has_its_partner():
    "Names and shapes as their class has them at the published size; 215,296 numbers of it are never used."
    with torch.device("meta"): ours = {k: tuple(v.shape) for k, v in to_official(PromptIRNetwork()).items()}
    theirs = shapes("promptir")
    used = {f"net.{k}": v for k, v in theirs.items() if not k.startswith(UNUSED)}
    assert ours == used and count(theirs) == 35_592_263 and count(theirs) - count(used) == 215_296


def test_every_weight_of_foundirs_authors_has_its_partner():
    with torch.device("meta"): ours = foundir_v1.to_official(FoundIRv1Network())
    assert {k: tuple(v.shape) for k, v in ours.items()} == shapes("foundir_v1")
    assert count(shapes("foundir_v1")) == 36_261_187


@every
def test_the_row_declares_the_networks_sizes(name):
    with torch.device("meta"): network = NETWORKS[name]()
    assert {k: tuple(v) if isinstance(v, (list, tuple)) else v for k, v in network.config.items()
            if not k.startswith("_")} == asdict(ARCHITECTURES[name]())
    assert ARCHITECTURES[name].network_class() is NETWORKS[name]


def checkpoint(path, network, prefix="net.", **more):
    weights = {k.replace("net.", prefix): v for k, v in to_official(network).items()}
    weights |= {f"{prefix}chnl_reduce1.weight": torch.zeros(64, 64, 1, 1)}
    torch.save({"epoch": 1, "global_step": 9, "pytorch-lightning_version": "2.0", "state_dict": weights,
                "optimizer_states": [{"state": {}}], "lr_schedulers": []} | more, path)
    return path


@pytest.mark.parametrize("prefix", ["net.", ""])
def test_a_lightning_checkpoint_of_the_authors_layout_loads(tmp_path, prefix):
    torch.manual_seed(0)
    one, two, x = PromptIRNetwork(**SMALL).eval(), PromptIRNetwork(**SMALL).eval(), torch.rand(1, 3, 16, 24)
    unused = load_official(checkpoint(tmp_path / "model.ckpt", one, prefix), two)
    assert unused == ["chnl_reduce1.weight"]
    with torch.no_grad(): assert torch.equal(one(x), two(x))


def test_weights_that_do_not_fit_change_nothing_and_nothing_is_run(tmp_path):
    network = PromptIRNetwork(**SMALL)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    other = to_official(PromptIRNetwork(**(SMALL | dict(prompts=4))))
    more = to_official(network) | {"net.more": torch.ones(1)}
    for weights, words in (({}, "missing, such as patch_embed"), (more, "1 unknown, such as more"),
                           (other, "9 of another shape, such as prompt1.prompt_param")):
        with pytest.raises(FoundIRError, match=words): load_official(weights, network)
    trap = checkpoint(tmp_path / "trap.ckpt", network, hyper_parameters=Path("anywhere"))
    with pytest.raises(FoundIRError, match="nothing of it was executed"): load_official(trap, network)
    assert equal(before, network.state_dict())


def average(path, network):
    "A checkpoint as FoundIR's training writes it."
    of = lambda prefix, scale: {prefix + k: v * scale for k, v in foundir_v1.to_official(network).items()}
    ema = of(foundir_v1.PREFIX, 1) | of("online_model.model.unet0.", 2) | {"initted": torch.tensor(True)}
    torch.save({"step": 9, "model": of("model.unet0.", 2), "ema": ema, "opt0": {}, "scaler": None}, path)
    return path


@pytest.mark.parametrize("system, name, write", [
    ("promptir", "promptir", checkpoint), ("foundir", "foundir_v1", average)])
def test_the_released_weights_are_a_system(tmp_path, monkeypatch, system, name, write):
    torch.manual_seed(0)
    make = partial(NETWORKS[name], **SIZES[name])
    monkeypatch.setattr(ARCHITECTURES[name], "network_class", staticmethod(lambda: make))
    network, x = make().eval(), torch.rand(3, 21, 30)
    path = write(tmp_path / "weights.pt", network)
    spec, options = f"system:{system}", {"paths": {"weights": str(path)}}
    restored = make_restorer(spec, options)(x, seed=3)
    assert torch.allclose(restored, restore_pixels(network, x[None], [3])[0], atol=1e-6)
    assert make_restorer(spec, options)(x, subtask="sr_x2").shape == (3, 42, 60)
    assert path in restorer_sources(spec, options)[0]
    with pytest.raises(FoundIRError, match="lacks paths.weights"): make_restorer(spec)
    with pytest.raises(FoundIRError, match="no weight file"): load_released(name, tmp_path / "none", "It")


# --- the first FoundIR's diffusion ------------------------------------------------------------------------------------

def grey_pair():
    "A degraded picture and a clean one that differ by less than the sampler's clipping lets through."
    g = torch.Generator().manual_seed(0)
    return (.25 + .5 * torch.rand(1, 3, 16, 16, generator=g) for _ in range(2))


def test_a_network_that_knows_the_residual_restores_perfectly():
    (lq, gt), noise = grey_pair(), torch.randn(1, 3, 16, 16)
    class Knows(FoundIRv1Network):
        def forward(self, mixture, lq, share): return lq - (2 * gt - 1)
    for steps in (1, 4, 7):
        assert torch.allclose(Knows(width=8, groups=4, steps=steps).restore(lq, noise), gt, atol=1e-6)


def test_a_sampler_follows_the_mixture_of_its_own_prediction():
    "With the true residual, every mixture that the sampler makes is the schedule's, but for the noise it began with."
    (lq, gt), seen = grey_pair(), []
    class Watch(FoundIRv1Network):
        def forward(self, mixture, lq, share):
            seen.append((mixture, share))
            return lq - (2 * gt - 1)
    Watch(width=8, groups=4, start_noise=0.0).restore(lq, torch.randn(1, 3, 16, 16))
    schedule, none = residual_schedule(), torch.zeros(1, 3, 16, 16)
    rest = (1 - schedule.residual[-1]) * (2 * lq - 2 * gt)  # the schedule's end is not quite the degraded picture
    for (mixture, share), t in zip(seen, (999, 749, 499, 249)):
        assert share == schedule.residual[t]
        there = mix(schedule, 2 * gt - 1, 2 * lq - 1, none, torch.tensor([t]))
        assert torch.allclose(mixture, there + rest, atol=1e-5)


def test_samples_are_functions_of_their_seeds():
    network, lq, gt = FoundIRv1Network(**SIZES["foundir_v1"]), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    (mixture, _, share), target = network.objective(lq, gt, [5, 6])
    (alone, _, other), _ = network.objective(lq[1:], gt[1:], [6])
    assert torch.equal(mixture[1:], alone) and torch.equal(share[1:], other) and share[0] != share[1]
    assert torch.allclose(target, 2 * (lq - gt), atol=1e-6)
    shares = network.objective(*[x[:1].expand(512, -1, -1, -1) for x in (lq, gt)], range(512))[0][2]
    expected = residual_schedule().residual.mean()
    assert abs(shares.mean() - expected) < 0.06 and len(residual_schedule().noise) == TIMESTEPS
    network.eval()
    with torch.no_grad():
        one, same, new = (restore_pixels(network, lq[:1], [seed]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, new)


# --- the diffusion transformer on pixels ------------------------------------------------------------------------------

def test_a_transformer_that_knows_the_clean_picture_restores_perfectly():
    (lq, gt), noise, seen = grey_pair(), torch.randn(1, 3, 16, 16), []
    class Knows(PixDiTNetwork):
        def clean(self, noisy, lq, time):
            seen.append((noisy, float(time)))
            return 2 * gt - 1
    for steps in (1, 5):
        seen.clear()
        assert torch.allclose(Knows(**SIZES["pixdit"] | dict(steps=steps)).restore(lq, noise), gt, atol=1e-6)
        assert [t for _, t in seen] == pytest.approx([1 - k / steps for k in range(steps)])
        for noisy, t in seen: assert torch.allclose(noisy, (1 - t) * (2 * gt - 1) + t * noise, atol=1e-6)


def test_an_untrained_transformer_returns_the_degraded_picture_and_learns_from_there():
    torch.manual_seed(0)
    network, (lq, gt) = PixDiTNetwork(**SIZES["pixdit"]), grey_pair()
    with torch.no_grad(): assert torch.allclose(network.restore(lq, torch.randn_like(lq)), lq, atol=1e-6)
    (noisy, told, time), velocity = network.objective(lq, gt, [7])
    expected = (2 * (gt - lq) / time.clamp(min=SHORTEST)).square().mean()
    error = network(noisy, told, time) - velocity
    assert error.square().mean().item() == pytest.approx(expected.item(), rel=1e-4)
    error.square().mean().backward()
    learns = [k for k, p in network.named_parameters() if p.grad.any()]
    assert learns == ["out.weight", "out.bias"], "zeros hold back what is before them for one step"
    with torch.no_grad(): network.out.weight.normal_(std=0.1)
    (network(noisy, told, time) - velocity).square().mean().backward()
    still = [k for k, p in network.named_parameters() if not p.grad.any()]
    assert not still, "then everything learns"


def test_a_transformers_samples_are_functions_of_their_seeds():
    network, lq, gt = PixDiTNetwork(**SIZES["pixdit"]), torch.rand(2, 3, 16, 16), torch.rand(2, 3, 16, 16)
    (noisy, _, time), velocity = network.objective(lq, gt, [5, 6])
    (alone, _, other), target = network.objective(lq[1:], gt[1:], [6])
    assert torch.equal(noisy[1:], alone) and torch.equal(time[1:], other) and torch.equal(velocity[1:], target)
    times = network.objective(*[x[:1].expand(512, -1, -1, -1) for x in (lq, gt)], range(512))[0][2]
    assert times.min() > 0 and times.max() <= 1 and abs(times.mean() - .5) < 0.05
    torch.nn.init.normal_(network.out.weight, std=0.1)
    with torch.no_grad():
        one, same, new = (restore_pixels(network, lq[:1], [seed]) for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, new)


def test_a_transformer_knows_where_a_token_is_at_any_size():
    torch.manual_seed(0)
    network, time = PixDiTNetwork(**SIZES["pixdit"]), torch.tensor([.5])
    torch.nn.init.normal_(network.out.weight, std=0.1)
    one = torch.rand(1, 3, 8, 4)
    with torch.no_grad():
        for size in ((4, 4), (12, 20), (64, 8)):
            assert network(torch.rand(1, 3, *size), torch.rand(1, 3, *size), time).shape == (1, 3, *size)
        for tiles in (0, 8): assert restore_pixels(network, torch.rand(1, 3, 9, 14), [0], tiles).shape == (1, 3, 9, 14)
        rows = network(one, one, time)  # two tokens, the second below the first, or beside it
        across = torch.cat([one[..., :4, :], one[..., 4:, :]], -1)
        columns = network(across, across, time)
        assert not torch.allclose(torch.cat([rows[..., :4, :], rows[..., 4:, :]], -1), columns, atol=1e-4)
    with pytest.raises(FoundIRError, match="8 × 6 pixels can't be cut into patches of 4"):
        network(torch.rand(1, 3, 8, 6), torch.rand(1, 3, 8, 6), time)


# --- its folder, where a pipeline is expected -------------------------------------------------------------------------

def test_a_folder_of_another_architecture_is_no_pipeline(bench, tmp_path):
    out = tr.train(promptir(bench, tmp_path, steps=1, update_every=0)).output
    with pytest.raises(FoundIRError, match="holds a promptir, which is no diffusion pipeline"): load_pipeline(out)
    with pytest.raises(FoundIRError, match="takes no option start"): make_restorer(f"trained:{out}", {"start": "lq"})
    (out / "network/diffusion_pytorch_model.safetensors").write_bytes(b"half")
    with pytest.raises(FoundIRError, match="can't load the network"): make_restorer(f"trained:{out}")
