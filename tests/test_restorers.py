"Restorers: sizes, ranges, what each one is, and what bad input leads to."
import shutil
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings, strategies as st

from foundir_v2.base import assets_path
from foundir_v2.classical import Bicubic, DarkChannel, Gamma, Identity, Levels, NonLocalMeans, Unsharp
from foundir_v2.core import FoundIRError, Restorer, save_image
from foundir_v2.degrade import degrade
from foundir_v2.restorers import (SIMPLE, FolderRestorer, PipelineRestorer, VAEBound, best_by_category, chosen_methods,
                                  described, export_inputs, make_restorer, make_restorers)
from foundir_v2.tasks import SUBTASKS, subtask


def rand(h=24, w=20, seed=0):
    return torch.rand(3, h, w, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", SIMPLE)
@settings(max_examples=8, deadline=None)
@given(h=st.integers(1, 33), w=st.integers(1, 33), task=st.sampled_from(["haze", "sr_x2", "sr_x4", None]))
def test_every_simple_restorer_returns_the_right_size_in_range(name, h, w, task):
    r, k = make_restorer(name), 1 if task is None else subtask(task).scale
    y = r(rand(h, w), subtask=task, seed=1)
    assert isinstance(r, Restorer) and y.shape == (3, h * k, w * k) and y.min() >= 0 and y.max() <= 1


def test_identity_and_bicubic_leave_pictures_of_full_size_alone():
    x = rand()
    for task in (None, "haze", SUBTASKS["jpeg"]):
        assert torch.equal(Identity()(x, subtask=task), x) and torch.equal(Bicubic()(x, subtask=task), x)


def test_identity_repeats_pixels_and_bicubic_interpolates():
    x = rand(6, 5)
    big = Identity()(x, subtask="sr_x4")
    assert torch.equal(big[:, 1::4, 2::4], x)
    ramp = torch.linspace(0.2, 0.8, 16).expand(3, 16, 16)
    smooth = Bicubic()(ramp, subtask="sr_x2")[:, 8, 8:-8].diff(dim=-1)
    assert smooth.min() > 0, "a ramp stays a strictly rising ramp"


def test_unsharp_steepens_an_edge_and_keeps_flat_areas():
    edge = torch.full((3, 32, 32), 0.3)
    edge[..., 16:] = 0.6
    y = Unsharp(sigma=1.5)(edge)
    assert y[0, 16, 15] < 0.29 and y[0, 16, 16] > 0.61 and torch.allclose(y[..., :8], edge[..., :8], atol=1e-5)
    assert torch.equal(Unsharp(amount=0)(edge), edge)


def test_levels_undoes_a_loss_of_contrast():
    x = rand(64, 64)
    y = Levels(tail=0)(x * 0.25 + 0.5)
    assert y.min() == 0 and y.max() == 1
    for c in range(3): assert torch.corrcoef(torch.stack([x[c].flatten(), y[c].flatten()]))[0, 1] > 0.9999


def smooth(h=96, w=80, seed=0):
    coarse = torch.rand(1, 3, 7, 6, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0.02, 0.98)[0]


def psnr(a, b): return -10 * (a - b).square().mean().log10().item()


@pytest.mark.parametrize("sigma", [10, 25, 50])
def test_non_local_means_follow_the_noise(sigma):
    x = smooth()
    noisy = (x + sigma / 255 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1))).clamp(0, 1)
    assert psnr(NonLocalMeans()(noisy), x) > psnr(noisy, x) + 4
    assert psnr(NonLocalMeans()(x), x) > 45, "nothing to remove"


def test_gamma_only_brightens_and_hits_its_target():
    x = smooth()
    for dark in (x**3, x / 4): assert Gamma(0.4)(dark).mean() == pytest.approx(0.4, abs=1e-3)
    bright = 0.6 + 0.3 * x
    torch.testing.assert_close(Gamma(0.4)(bright), bright)
    assert torch.equal(Gamma()(torch.zeros(3, 4, 4)), torch.zeros(3, 4, 4))


def test_the_dark_channel_takes_haze_away():
    x = smooth()
    x[:, ::6, ::6], x[:, :24] = 0.0, 0.95  # what the prior assumes: something black nearby, and a sky
    hazy = 0.4 * x + 0.6 * 0.95
    assert psnr(DarkChannel()(hazy), x) > psnr(hazy, x) + 6


def test_the_best_method_is_chosen_in_each_category_and_kept():
    gt = smooth()
    noisy = (gt + 0.1 * torch.randn(gt.shape, generator=torch.Generator().manual_seed(2))).clamp(0, 1)
    damaged = {"low_light": gt / 8, "gaussian_noise": noisy}
    items = [SimpleNamespace(lq=lq, gt=gt, subtask=t, photo="p", seed=k) for t, lq in damaged.items() for k in (1, 2)]
    best = make_restorers({"classical": "best:bicubic,levels,nlm,gamma"}, items)["classical"]
    record = {c: m.name for c, m in best.methods.items()}
    assert chosen_methods({"classical": best, "input": Bicubic()}) == {"classical": record}
    assert best.methods["denoise"].name == "nlm" and best.methods["lowlight"].name in ("levels", "gamma")
    assert torch.equal(best(noisy, subtask="jpeg"), NonLocalMeans()(noisy))
    for task in (None, "haze"): assert torch.equal(best(noisy, subtask=task), noisy), "nothing was chosen for it"
    assert best(rand(4, 4), subtask="sr_x2").shape == (3, 8, 8)
    lower = best_by_category({"bicubic": Bicubic(), "nlm": NonLocalMeans()}, items[2:], metric="stlpips")
    assert list(lower.methods) == ["denoise"], "the metric's direction counts, whatever it is"


def test_the_encoder_alone_is_what_stage_0_trains():
    from foundir_v2.diffusion import LatentReader
    from foundir_v2.loading import load_pipeline
    pipe, x = load_pipeline("tiny", "cpu"), rand(40, 36)
    alone = make_restorer("encoder:tiny")
    with torch.no_grad(): latents = LatentReader(pipe.unet, pipe.vae)(x[None] * 2 - 1) / pipe.vae.config.scaling_factor
    wanted = (pipe.vae.decode(latents).sample[0].detach() / 2 + 0.5).clamp(0, 1)
    torch.testing.assert_close(alone(x, subtask="haze"), wanted, atol=1e-5, rtol=0)
    assert alone(rand(10, 13), subtask="sr_x2").shape == (3, 20, 26) and not alone(x).requires_grad


class Rounding(torch.nn.Module):
    "A VAE that forgets how much: 4x4 averages. Interface of diffusers."
    def __init__(self):
        super().__init__()
        self.config = SimpleNamespace(block_out_channels=(1, 1, 1))
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def encode(self, x):
        assert x.shape[-1] % 4 == x.shape[-2] % 4 == 0 and x.min() >= -1 and x.max() <= 1
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: torch.nn.functional.avg_pool2d(x, 4)))

    def decode(self, z): return SimpleNamespace(sample=z.repeat_interleave(4, -1).repeat_interleave(4, -2))


@pytest.mark.parametrize("size", [(16, 16), (17, 30), (3, 5)])
def test_vae_bound_decodes_the_encoded_ground_truth_at_any_size(size):
    gt = rand(*size)
    bound = VAEBound(Rounding())
    y = bound(gt, subtask="sr_x4", seed=0)
    assert bound.uses_ground_truth and y.shape == gt.shape and not y.requires_grad
    if size == (16, 16): assert torch.allclose(y[:, 0, 0], gt[:, :4, :4].mean(dim=(1, 2)), atol=1e-5)


def test_vae_bound_of_the_real_classes():
    from diffusers import AutoencoderKL
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, layers_per_block=1, norm_num_groups=4,
                        latent_channels=4).eval()
    y = VAEBound(vae)(rand(15, 18))
    assert y.shape == (3, 15, 18) and 0 <= y.min() and y.max() <= 1


class Recorder:
    config = dict(default_prompt="none")

    def __init__(self): self.calls = []

    def __call__(self, images, **options):
        self.calls.append(options)
        task = {1: "haze", 4: "sr_x4"}[options["upscale"]]
        return SimpleNamespace(images=[Identity()(x, subtask=task) for x in images])


def test_pipeline_restorer_is_blind_and_seeded():
    pipe = Recorder()
    r = PipelineRestorer(pipe, num_inference_steps=3, guidance_scale=1.0, start="lq")
    assert isinstance(r, Restorer)
    assert r(rand(), subtask="haze", seed=11).shape == (3, 24, 20)
    assert r(rand(), subtask="sr_x4", seed=12).shape == (3, 96, 80)
    assert [c["generator"][0].initial_seed() for c in pipe.calls] == [11, 12]
    assert [c["upscale"] for c in pipe.calls] == [1, 4]
    assert all((c["num_inference_steps"], c["guidance_scale"], c["start"]) == (3, 1.0, "lq") for c in pipe.calls)
    assert not {"subtask", "task"} & set(pipe.calls[0]), "the model is not told what is wrong with the picture"


def test_captions_are_told_where_they_are_wanted():
    pipe = Recorder()
    for prompt in (None, "none", "caption"): PipelineRestorer(pipe, prompt=prompt)(rand(), caption="a cat")
    pipe.config = dict(default_prompt="caption")
    PipelineRestorer(pipe)(rand(), caption="a cat")
    assert [c["prompt"] for c in pipe.calls] == [[""], [""], ["a cat"], ["a cat"]]
    with pytest.raises(FoundIRError, match="prompt: expected one of none, caption"):
        make_restorer("pipeline:tiny", {"prompt": "always"})


def test_guidance_and_captions_reach_the_evaluation():
    from foundir_v2.evaluate import compare
    told = dict(prompt="caption")
    of = lambda guidance, **more: make_restorer("pipeline:tiny", dict(told, guidance_scale=guidance, **more))
    todo = [SimpleNamespace(lq=degrade(rand(32, 32), "haze", 1), gt=rand(32, 32), subtask="haze", photo="a", seed=1,
                            caption="a cup of coffee on a table")]
    systems = dict(plain=of(1.0), guided=of(5.0), negative=of(5.0, negative_prompt="blur"), silent=of(5.0))
    systems["silent"].options["prompt"] = "none"
    value = compare(systems, todo, ["psnr"]).set_index("restorer").value
    assert len({round(value[name], 6) for name in ("plain", "guided", "negative")}) == 3
    assert value["silent"] != value["guided"]


def items():
    gt = rand(32, 32)
    return [SimpleNamespace(lq=degrade(gt, t, seed), subtask=t, photo="train/a b", seed=seed)
            for t, seed in (("haze", 1), ("sr_x2", 1), ("haze", 2))]


def test_a_folder_of_results_is_matched_by_content(tmp_path):
    todo = items()
    paths = export_inputs(todo, tmp_path/"in")
    assert len(set(paths)) == 3 and all(p.parent == tmp_path/"in" and p.is_file() for p in paths)
    (tmp_path/"out").mkdir()
    for item, path in zip(todo, paths):
        save_image(1 - Bicubic()(item.lq, subtask=item.subtask), tmp_path/"out"/path.name)
    r = FolderRestorer(tmp_path/"in", tmp_path/"out", "inverse")
    for item in reversed(todo):
        expected = 1 - Bicubic()(item.lq, subtask=item.subtask)
        assert (r(item.lq, subtask=item.subtask) - expected).abs().max() <= 0.5 / 255 + 1e-6
    with pytest.raises(FoundIRError, match="no result"): r(rand())


def test_a_folder_with_missing_or_ambiguous_results_is_refused(tmp_path):
    paths = export_inputs(items(), tmp_path/"in")
    with pytest.raises(FoundIRError, match="no folder"): FolderRestorer(tmp_path/"in", tmp_path/"out")
    (tmp_path/"out").mkdir()
    for p in paths[1:]: save_image(rand(), tmp_path/"out"/p.name)
    with pytest.raises(FoundIRError, match=paths[0].stem): FolderRestorer(tmp_path/"in", tmp_path/"out")
    for suffix in (".png", ".jpg"): save_image(rand(), tmp_path/"out"/f"{paths[0].stem}{suffix}")
    with pytest.raises(FoundIRError, match="2 results"): FolderRestorer(tmp_path/"in", tmp_path/"out")


def test_two_items_with_one_name_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(FoundIRError, match="seed"): export_inputs(items()[:1] * 2, tmp_path/"in")
    assert not (tmp_path/"in").exists()


@pytest.mark.parametrize("spec", ["", "bicubik", "identity:x", "vae", "vae:", "pipeline:", "folder:a", None])
def test_unknown_names_are_refused_with_the_choices(spec):
    with pytest.raises(FoundIRError) as e: make_restorer(spec)
    assert "\n" not in str(e.value) and ("choose" in str(e.value) or "expected" in str(e.value))


@pytest.fixture(scope="module")
def untrained():
    "The shipped base model with new, untrained conditioning: the real pipeline."
    return make_restorer("pipeline:base", {"num_inference_steps": 1, "guidance_scale": 1.0, "start": "noise"})


def test_the_real_pipeline_behind_the_interface(untrained):
    x = rand(40, 33)
    a, b, c = (untrained(x, subtask="haze", seed=s) for s in (1, 1, 2))
    assert a.shape == x.shape and a.min() >= 0 and a.max() <= 1 and a.dtype == torch.float32
    assert torch.equal(a, b) and not torch.equal(a, c), "the seed decides, and nothing else"
    assert untrained(rand(16, 20), subtask="sr_x2", seed=1).shape == (3, 32, 40)


def test_the_output_of_a_training_stage_is_a_restorer(untrained, tmp_path, monkeypatch):
    from foundir_v2.inference import Recipe, write_recipe
    tmp_path = tmp_path/"tiny"  # also the name of a shipped model
    untrained.pipe.unet.save_pretrained(tmp_path/"unet")
    with pytest.raises(FoundIRError, match="train_stage2"): make_restorer(f"trained:{tmp_path}/unet")
    write_recipe(Recipe(), tmp_path)
    again = make_restorer(f"trained:{tmp_path}", {"num_inference_steps": 1, "guidance_scale": 1.0, "start": "noise"})
    monkeypatch.chdir(tmp_path.parent)
    named = make_restorer("trained:tiny")
    assert torch.equal(named.pipe.unet.conv_out.weight, untrained.pipe.unet.conv_out.weight), (
        "the folder, not the shipped model")
    # a matrix product picks its kernel by where the weights lie in memory
    torch.testing.assert_close(again(rand(), seed=3), untrained(rand(), seed=3), atol=1e-5, rtol=0)


def test_the_bound_of_the_shipped_base_model():
    from foundir_v2.core import load_image, repo_root
    from foundir_v2.iqa import score
    photo = load_image(repo_root()/"data/photos/astronaut.png")[:, 100:196, 200:296]
    assert score("psnr", make_restorer("vae:base")(photo), photo) > 30


def test_systems_of_a_comparison_from_params():
    made = make_restorers({"input": "bicubic", "sharp": {"restorer": "unsharp"}})
    assert list(made) == ["input", "sharp"] and isinstance(made["input"], Bicubic)
    assert isinstance(made["sharp"], Unsharp)
    for wrong, words in [({"a": {}}, "restorer"),
                         ({"a": "bicubik"}, "system 'a'"),
                         ({"a": {"restorer": "bicubic", "start": "lq"}}, "unknown option start"),
                         ({"a": {"restorer": "pipeline:base", "steps": 1}}, "num_inference_steps"),
                         ({"a": "best:levels"}, "reference items"),
                         ({"a": "best:levels,vae:base"}, "vae:base"),
                         ({"a": "encoder:"}, "encoder:NAME_OR_PATH"),
                         ({"a": {"restorer": "encoder:tiny", "start": "lq"}}, "unknown option start")]:
        with pytest.raises(FoundIRError, match=words): make_restorers(wrong)


def test_inputs_of_a_generator_are_exported(tmp_path):
    items = [SimpleNamespace(lq=rand(seed=i), subtask="haze", photo=f"p{i}", seed=i) for i in range(3)]
    assert [p.is_file() for p in export_inputs(iter(items), tmp_path)] == [True] * 3


def test_a_folder_without_inputs_is_refused(tmp_path):
    with pytest.raises(FoundIRError, match="export the inputs first"): FolderRestorer(tmp_path, tmp_path)


@pytest.mark.parametrize("options", [dict(start="lr"), dict(num_inference_steps=0), dict(guidance_scale="five")])
def test_options_that_cannot_be_are_refused_when_named(options):
    with pytest.raises(FoundIRError, match="lr|steps|five"): make_restorer("pipeline:tiny", options)


def test_settings_and_weights_are_told_beside_a_systems_numbers(tmp_path):
    from foundir_v2.base import load_base, save_base
    save_base(load_base("base"), tmp_path / "base")
    shutil.copytree(assets_path("tiny"), tmp_path / "mine")
    file = tmp_path / "mine/pipeline.json"
    file.write_text(file.read_text().replace('"base": "base"', f'"base": "{tmp_path}/base"'))
    systems = {"input": "bicubic", "plain": f"trained:{tmp_path}/mine",
               "told": {"restorer": f"trained:{tmp_path}/mine", "prompt": "caption", "color_fix": "none"}}
    before = described(systems)
    assert before.weights["input"] == before.settings["input"] == ""
    assert "prompt: none" in before.settings["plain"] and "color_fix: adain where enlarged" in before.settings["plain"]
    assert "prompt: caption" in before.settings["told"] and "color_fix: none" in before.settings["told"]
    weights = next((tmp_path / "base/vae").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (tmp_path / "mine/log.jsonl").write_text("{}")
    after = described(systems)
    mine, base = zip(before.weights["plain"].split("; "), after.weights["plain"].split("; "))
    assert mine[0] == mine[1] and base[0] != base[1], "the base model's weights count, a log doesn't"
    with pytest.raises(FoundIRError, match="unknown restorer"): described({"a": "nonsense"})
