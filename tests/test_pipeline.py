"""The pipeline on real classes at a tiny size with untrained weights: numbers, shapes, seeds, batches, tiles,
saving, refusals."""
import json, logging, subprocess, sys, weakref
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pytest, torch
import torch.nn.functional as F
from accelerate import cpu_offload
from diffusers import AutoencoderKL, DDIMScheduler, EulerDiscreteScheduler
from PIL import Image
from foundir_v2 import loading as L, pipeline as P, solver as S
from foundir_v2.base import (
    SDXL_SCHEDULE, TINY_SCHEDULE, TINY_UNET, build_foundir_unet, encode_prompts, new_base, save_base)
from foundir_v2.core import FoundIRError
from foundir_v2.caption import VLMCaptioner
from foundir_v2.degrade import upsample_lq
from foundir_v2.pictures import as_images, crop
from foundir_v2.inference import InferenceConfig, Recipe, write_recipe
from foundir_v2.loading import load_pipeline, save_restorer
from foundir_v2.pipeline import FoundIRv2Pipeline
from foundir_v2.tiling import tile_starts
from foundir_v2.vae import PatchAutoencoderKL, decode_latents, encode_latents, pca_init

SMALL_UNET = {**TINY_UNET, "block_out_channels": (24, 32, 32), "attention_head_dim": (2, 2, 2), "norm_num_groups": 8}
SMALL_MOE = dict(lq_norm_groups=0, moe_layers=1, moe_heads=4)
ASSETS = Path(P.__file__).parent / "assets"


def seeded(*seeds): return [torch.Generator().manual_seed(s) for s in seeds]


def picture(h, w, seed=0):
    return F.interpolate(torch.rand(1, 3, 6, 6, generator=seeded(seed)[0]), (h, w), mode="bicubic")[0].clamp(0, 1)


def trained_looking(unet, seed=0):
    "Zero-initialised outputs would hide the LQ branch: give them weights."
    g = torch.Generator().manual_seed(seed)
    for p in (*unet.moe_projection.parameters(), *unet.lq_embedding.conv_out.parameters()):
        p.data = 0.2 * torch.randn(p.shape, generator=g)
    return unet.eval()


def assemble(base, unet, schedule=TINY_SCHEDULE, **defaults):
    defaults = dict(default_num_inference_steps=1, default_guidance_scale=1.0, default_start="noise",
                    default_tile_size=512) | defaults
    pipe = FoundIRv2Pipeline(base.vae, base.text_encoder, base.text_encoder_2, base.tokenizer, base.tokenizer_2, unet,
                             EulerDiscreteScheduler(**schedule), **defaults)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(hidden=4, encoder_blocks=1, decoder_blocks=1)
    pca_init(vae, torch.stack([picture(64, 64, i) for i in range(8)]) * 2 - 1)
    return new_base(vae, SMALL_UNET)


@pytest.fixture(scope="module")
def unet(base): return trained_looking(build_foundir_unet(base, **SMALL_MOE))

@pytest.fixture
def pipe(base, unet): return assemble(base, unet)

@pytest.fixture
def sdxl(base, unet): return assemble(base, unet, SDXL_SCHEDULE)


def run(pipe, image, seed=0, **options):
    generator = options.pop("generator", None) or seeded(seed)[0]
    return pipe(image, generator=generator, **{"output_type": "pt", **options}).images

# ---------------------------------------------------------------- pictures in and out


def test_every_form_of_a_picture_gives_the_same_result(pipe, tmp_path):
    array = (picture(20, 28).permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
    image = Image.fromarray(array)
    image.save(tmp_path / "a.png")
    exif = Image.Exif(); exif[0x0112] = 6
    image.rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    forms = [image, str(tmp_path / "a.png"), tmp_path / "a.png", array, array[None],
             torch.from_numpy(array).permute(2, 0, 1), array.astype(np.float32) / 255, array.astype(np.uint16) * 257,
             Image.open(tmp_path / "turned.png")]
    expected = run(pipe, forms[0])[0]
    for form in forms: torch.testing.assert_close(run(pipe, form)[0], expected, atol=1e-5, rtol=0)


def test_greyscale_has_three_equal_channels():
    grey = picture(9, 7)[:1]
    for form in (grey, grey[0], grey[0].numpy(), grey[0][..., None].numpy(), grey[None]):
        (x,) = as_images(form)
        assert torch.equal(x, grey.expand(3, -1, -1))


@pytest.mark.parametrize("bad", [
    [], np.zeros((4, 4, 3), np.float32) + 2, np.zeros((4, 4, 4), np.uint8), np.zeros((0, 4, 3), np.uint8),
    torch.full((3, 4, 4), float("nan")), torch.zeros(3, 4, 4, dtype=torch.int64), None, 3], ids=str)
def test_what_is_no_picture_is_refused(pipe, bad):
    with pytest.raises(FoundIRError): pipe(bad)


def test_damaged_files_are_refused(pipe, tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name in ("empty.png", "text.png"):
        with pytest.raises(FoundIRError, match=name): pipe(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="missing.png"): pipe(str(tmp_path / "missing.png"))


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (17, 16), (33, 50)])
@pytest.mark.parametrize("upscale", [1, 1.5, 4])
def test_any_size_and_factor(pipe, size, upscale):
    (x,) = run(pipe, picture(*size), upscale=upscale)
    assert x.shape == (3, *(round(upscale * n) for n in size)) and torch.isfinite(x).all() and 0 <= x.min()
    assert x.max() <= 1


def test_output_types(pipe):
    x, im, array = (run(pipe, picture(20, 30), output_type=t)[0] for t in ("pt", "pil", "np"))
    assert im.size == (30, 20) and array.shape == (20, 30, 3)
    assert np.array_equal(array, x.permute(1, 2, 0).numpy()) and np.abs(np.asarray(im) / 255 - array).max() < 0.51 / 255

# ---------------------------------------------------------------- numbers


def plain_restore(pipe, image, prompt, negative, steps, guidance, seed):
    """What the pipeline should compute for one padded picture, written plainly: both guidance halves through
    everything, the LQ embedding at every step."""
    vae, unet, noise_scheduler = pipe.vae, pipe.unet, pipe.scheduler
    lq = image[None] * 2 - 1
    noise_scheduler.set_timesteps(steps)
    noise = torch.randn((1, 16, lq.shape[2] // 4, lq.shape[3] // 4), generator=seeded(seed)[0])
    lq_latents = vae.encode(lq).latent_dist.mode() * vae.config.scaling_factor
    x = noise_scheduler.add_noise(lq_latents, noise, noise_scheduler.timesteps[:1])
    embeds, pooled = encode_prompts(pipe, [negative, prompt])
    ids = torch.tensor([[*image.shape[1:], 0, 0, *image.shape[1:]]] * 2, dtype=torch.float32)
    for t in noise_scheduler.timesteps:
        both = noise_scheduler.scale_model_input(x, t).repeat(2, 1, 1, 1)
        out = unet(both, t, embeds, unet.embed_lq(lq).repeat(2, 1, 1, 1),
                   added_cond_kwargs=dict(text_embeds=pooled, time_ids=ids)).sample
        x = noise_scheduler.step(out[:1] + guidance * (out[1:] - out[:1]), t, x).prev_sample
    return (vae.decode(x / vae.config.scaling_factor).sample[0] / 2 + 0.5).clamp(0, 1)


def test_equals_the_plain_algorithm(sdxl):
    image, options = picture(32, 48), dict(steps=10, guidance=4.0)
    with torch.no_grad(): expected = plain_restore(sdxl, image, "a cat", "blurry", seed=3, **options)
    (x,) = run(sdxl, image, seed=3, prompt="a cat", negative_prompt="blurry", num_inference_steps=10,
               guidance_scale=4.0, start="lq")
    torch.testing.assert_close(x, expected, atol=1e-4, rtol=0)
    assert x.std() > 0.01


@pytest.mark.parametrize("steps", [1, 2, 20])
def test_euler_at_zero_terminal_snr_is_ddim_in_float64(steps):
    "Independent formula: x0 = a x - b v, and the noise b x + a v stays, at the float64 schedule."
    v = lambda x, t: torch.tanh(1.5 * x + t / 700) - 0.3 * x
    euler = EulerDiscreteScheduler(**TINY_SCHEDULE)
    timesteps = S.set_timesteps(euler, steps)
    assert timesteps[0] == 999
    noise = torch.randn(1, 4, 32, 32, generator=seeded(0)[0])
    x = S.start_latents(euler, noise, "noise", None)
    exact, alpha_bar = noise.double(), euler.alphas_cumprod.double()
    for i, t in enumerate(timesteps):
        step = euler.step(v(euler.scale_model_input(x, t), t), t, x)
        a, b = alpha_bar[int(t)] ** 0.5, (1 - alpha_bar[int(t)]) ** 0.5
        velocity = v(exact, t)
        x0, eps = a * exact - b * velocity, b * exact + a * velocity
        if i == 0: torch.testing.assert_close(step.pred_original_sample.double(), x0, atol=1e-5, rtol=0)
        if i + 1 < steps:
            s = alpha_bar[int(timesteps[i + 1])]
            exact = s**0.5 * x0 + (1 - s) ** 0.5 * eps
        else: exact = x0
        x = step.prev_sample
    torch.testing.assert_close(x.double(), exact, atol=2e-3, rtol=0)


def test_one_step_returns_the_prediction_of_the_clean_latents(pipe, monkeypatch):
    seen = {}
    step = pipe.scheduler.step
    monkeypatch.setattr(pipe.scheduler, "step",
                        lambda out, t, x, **k: seen.update(v=out, t=float(t), x=x) or step(out, t, x, **k))
    monkeypatch.setattr(P, "decode_latents",
                        lambda vae, z: seen.update(z=z) or torch.zeros(len(z), 3, 4 * z.shape[2], 4 * z.shape[3]))
    run(pipe, picture(32, 32))
    assert seen["t"] == 999 and seen["x"].std() > 3000
    torch.testing.assert_close(seen["z"], -seen["v"], atol=2e-3, rtol=0)

# ---------------------------------------------------------------- starts and seeds


@pytest.mark.parametrize("start", ["lq", "noise"])
def test_seeds(sdxl, start):
    options = dict(start=start, num_inference_steps=10)
    a, b, c = (run(sdxl, picture(20, 20), seed=s, **options)[0] for s in (1, 1, 2))
    assert torch.equal(a, b) and (a - c).abs().max() > 1e-3


def test_starts_differ_where_the_schedule_shows_the_picture(sdxl, base):
    lq, noise = (run(sdxl, picture(20, 20), start=s, num_inference_steps=10)[0] for s in ("lq", "noise"))
    assert (lq - noise).abs().max() > 1e-3
    n, z = torch.randn(1, 16, 4, 4), torch.ones(1, 16, 4, 4)
    S.set_timesteps(sdxl.scheduler, 20)
    torch.testing.assert_close(S.start_latents(sdxl.scheduler, n, "lq", lambda: z), z + n * sdxl.scheduler.sigmas[0])
    torch.testing.assert_close(S.start_latents(sdxl.scheduler, n, "noise", None),
                               n * (sdxl.scheduler.sigmas[0] ** 2 + 1) ** 0.5)


def test_zero_terminal_snr_makes_them_equal_and_says_so_once(pipe, caplog):
    S.say_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="foundir_v2.solver"):
        lq, again, noise = (run(pipe, picture(20, 20), start=s, num_inference_steps=2)[0]
                            for s in ("lq", "lq", "noise"))
    assert torch.equal(lq, noise) and torch.equal(lq, again)
    assert [r.message for r in caplog.records].count(caplog.records[0].message) == 1
    assert "zero terminal SNR" in caplog.text


def test_default_start_says_nothing(pipe, caplog):
    S.say_once.cache_clear()
    run(pipe, picture(8, 8))
    assert not caplog.records

# ---------------------------------------------------------------- batches


SIZES = [(32, 32), (20, 45), (32, 32), (1, 1), (30, 31)]


@pytest.mark.parametrize("tile_batch", [1, 2, 8])
def test_a_list_equals_single_calls(sdxl, tile_batch):
    images = [picture(h, w, i) for i, (h, w) in enumerate(SIZES)]
    options = dict(num_inference_steps=10, guidance_scale=3.0, negative_prompt="blurry", start="lq")
    prompts = ["a cat", "blurry", "a dog", "", "a cat"]
    together = run(sdxl, images, generator=seeded(*range(5)), tile_batch=tile_batch, prompt=prompts, **options)
    for i, x in enumerate(images):
        (alone,) = run(sdxl, x, seed=i, prompt=prompts[i], **options)
        assert together[i].shape == x.shape
        torch.testing.assert_close(together[i], alone, atol=1e-4, rtol=0)


def test_one_generator_is_drawn_from_in_order(pipe):
    images = [picture(16, 16, 0), picture(40, 16, 1), picture(16, 16, 2)]
    together = run(pipe, images, seed=7, tile_batch=4)
    g = seeded(7)[0]
    for x, expected in zip(images, together):
        torch.testing.assert_close(run(pipe, x, generator=g)[0], expected, atol=1e-4, rtol=0)


def test_batch_axis_attention_gets_one_picture_at_a_time(base):
    pipe = assemble(base, trained_looking(build_foundir_unet(base, **SMALL_MOE, batch_axis_attention=True)))
    images = [picture(32, 32, i) for i in range(3)]
    options = dict(prompt="a cat", guidance_scale=3.0, num_inference_steps=2)
    together = run(pipe, images, generator=seeded(0, 1, 2), tile_batch=3, **options)
    for i, x in enumerate(images):
        torch.testing.assert_close(run(pipe, x, seed=i, **options)[0], together[i], atol=1e-4, rtol=0)

# ---------------------------------------------------------------- guidance


def count_calls(pipe, **options):
    calls = dict(lq=[], moe=[], mid=[])
    parts = dict(lq=pipe.unet.lq_features, moe=pipe.unet.moe_scheduler, mid=pipe.unet.mid_block)
    hooks = [m.register_forward_hook(lambda m, args, out, k=k: calls[k].append(len(args[0]))) for k, m in parts.items()]
    try: run(pipe, **options)
    finally: [h.remove() for h in hooks]
    return calls


def test_mixture_runs_once_per_step_and_the_embedding_once(pipe):
    options = dict(image=picture(32, 32), num_inference_steps=3)
    assert count_calls(pipe, prompt="a cat", guidance_scale=5.0, **options) == dict(lq=[1], moe=[1] * 3, mid=[2] * 3)
    for without in (dict(guidance_scale=1.0, prompt="a cat"), dict(guidance_scale=5.0),
                    dict(guidance_scale=5.0, prompt="a cat", negative_prompt="a cat")):
        assert count_calls(pipe, **without, **options) == dict(lq=[1], moe=[1] * 3, mid=[1] * 3)


def test_the_decision_is_made_per_picture(pipe):
    calls = count_calls(pipe, image=[picture(32, 32, i) for i in range(3)], prompt=["", "a cat", ""],
                        guidance_scale=5.0, tile_batch=4)
    assert calls["mid"] == [2, 2]  # two pictures without guidance in one call, one with both halves in another


def test_guidance_is_linear_in_the_two_predictions(pipe):
    "With one step the latents are the prediction of x0, and x0 is linear in the U-Net's output."
    def latents(**options):
        seen = []
        run(pipe, picture(32, 32), callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"]), **options)
        return seen[0]
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)  # no rounding at sigma 4096
    texts = dict(prompt="a cat", negative_prompt="a dog")
    negative, positive, guided = (latents(guidance_scale=g, **texts) for g in (0.0, 1.0, 30.0))
    torch.testing.assert_close(negative, latents(prompt="a dog"), atol=1e-5, rtol=0)
    torch.testing.assert_close(positive, latents(prompt="a cat"), atol=1e-5, rtol=0)
    torch.testing.assert_close(guided, negative + 30 * (positive - negative), atol=2e-4, rtol=0)
    assert (guided - positive).abs().max() > 0.1


@pytest.mark.parametrize("interval, halves", [
    ((0, 1), [2, 2, 2, 2]), ((0, 0.5), [2, 2, 1, 1]), ((0.25, 0.75), [1, 2, 2, 1]), ((0.9, 1), [1, 1, 1, 1])])
def test_guidance_in_an_interval_of_the_steps(pipe, interval, halves):
    options = dict(image=picture(32, 32), prompt="a cat", num_inference_steps=4)
    assert count_calls(pipe, guidance_scale=5.0, guidance_interval=interval, **options)["mid"] == halves
    if halves == [1] * 4:
        torch.testing.assert_close(run(pipe, guidance_scale=5.0, guidance_interval=interval, **options)[0],
                                   run(pipe, guidance_scale=1.0, **options)[0], atol=1e-5, rtol=0)


def test_what_a_long_prompt_loses_is_said_once(pipe, caplog):
    S.say_once.cache_clear()
    fits, words = " ".join(["cat"] * 75), ["dog", "red", "door"]
    with caplog.at_level(logging.WARNING):
        long = [run(pipe, picture(16, 16), prompt=" ".join([fits, *words]), guidance_scale=2.0)[0] for _ in range(2)]
        short = run(pipe, picture(16, 16), prompt=fits, guidance_scale=2.0)[0]
    assert torch.equal(long[0], long[1]) and torch.equal(long[0], short)
    (said,) = [r.getMessage() for r in caplog.records if "77" in r.getMessage() or "dog" in r.getMessage()]
    assert "dog red door" in said and "cat" not in said and "\n" not in said


def test_texts_are_encoded_as_in_training(pipe):
    texts = ["a cat on a wall", "", "blurry"]
    found, (embeds, pooled) = P.embed_texts(pipe, texts), encode_prompts(pipe, texts)
    for i, t in enumerate(texts): torch.testing.assert_close(found[t], (embeds[i], pooled[i]))

# ---------------------------------------------------------------- micro-conditioning and tiles


def test_micro_conditioning_is_in_pixels(pipe, monkeypatch):
    seen, forward = [], pipe.unet.forward
    monkeypatch.setattr(pipe.unet, "forward",
                        lambda *a, **k: seen.append(k["added_cond_kwargs"]["time_ids"].tolist()) or forward(*a, **k))
    run(pipe, picture(60, 130), tile_size=64, tile_overlap=0.5, prompt="a cat", guidance_scale=2.0)
    # padded to 64 x 144, tiles of 64, both guidance halves alike
    assert seen == [[[60, 130, 0, left, 64, 64]] * 2 for left in (0, 16, 48, 80)]
    seen.clear()
    run(pipe, picture(60, 130), tile_size=64, tile_overlap=0.5, offset_unit="latent")
    # the authors' habit: only the corners
    assert seen == [[[60, 130, 0, left // 4, 64, 64]] for left in (0, 16, 48, 80)]


def test_one_tile_is_no_tiling(pipe):
    image = picture(40, 60)
    untiled = run(pipe, image, tile_size=0, num_inference_steps=2)[0]
    for overlap in (0, 0.5):
        assert torch.equal(untiled, run(pipe, image, tile_size=64, tile_overlap=overlap, num_inference_steps=2)[0])
    assert (untiled - run(pipe, image, tile_size=32, num_inference_steps=2)[0]).abs().max() > 1e-4  # the test can fail


class LocalUNet(torch.nn.Module):
    "Looks at one latent pixel at a time, so that tiles can't be noticed."
    device, dtype, config = torch.device("cpu"), torch.float32, SimpleNamespace(
        block_out_channels=(24, 32, 32), in_channels=16, batch_axis_attention=False)

    def embed_lq(self, lq): return F.avg_pool2d(lq, 4).repeat(1, 8, 1, 1)
    def condition(self, x, e): return torch.cat([x, e], 1)

    def forward(self, x, t, embeds, features, added_cond_kwargs):
        return SimpleNamespace(
            sample=torch.tanh(features[:, :16] + features[:, 16:32]) + embeds.mean((1, 2))[:, None, None, None])


@pytest.fixture
def local(pipe):
    object.__setattr__(pipe, "unet", LocalUNet())
    return pipe


@pytest.mark.parametrize("size", [(1, 1), (1, 70), (64, 64), (65, 130), (257, 193), (1025, 769)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_a_local_model_does_not_notice_tiles(local, size, overlap):
    image, options = picture(*size), dict(num_inference_steps=3, prompt="a cat", guidance_scale=2.0)
    untiled = run(local, image, tile_size=0, **options)[0]
    tile = 64 if max(size) < 500 else 256
    for other in (dict(tile_size=tile), dict(tile_size=tile, vae_tile_size=tile // 2),
                  dict(tile_size=0, vae_tile_size=tile)):
        torch.testing.assert_close(run(local, image, tile_overlap=overlap, tile_batch=5, **other, **options)[0],
                                   untiled, atol=1e-5, rtol=0)


def test_every_tile_is_judged_by_the_whole_picture(base):
    unet = trained_looking(build_foundir_unet(base, **SMALL_MOE, lq_context_width=8))
    torch.nn.init.normal_(unet.lq_context.out[-1].weight, generator=seeded(1)[0])
    pipe, dark = assemble(base, unet), 0.2 * picture(64, 96)
    lit = dark.clone(); lit[:, -8:, -8:] = 1
    for tile_batch in (1, 4):
        options = dict(tile_size=32, tile_overlap=0, tile_batch=tile_batch)
        both = run(pipe, [dark, lit], generator=seeded(0, 0), **options)
        for alone, together in zip((dark, lit), both):
            torch.testing.assert_close(run(pipe, alone, **options)[0], together, atol=1e-5, rtol=1e-4)
        assert (both[0] - both[1])[:, :32, :32].abs().max() > 1e-3   # the tile farthest from the light


def test_contexts_are_the_whole_pictures_behind_a_groupnorm_too(base, monkeypatch):
    "The embedding's GroupNorm forbids embedding in parts, but not collecting the context."
    unet = trained_looking(build_foundir_unet(base, **SMALL_MOE | dict(lq_norm_groups=2), lq_context_width=8))
    for block in unet.lq_features.blocks: torch.nn.init.normal_(block.conv2.weight, std=0.1, generator=seeded(2)[0])
    pipe, seen, collect, images = assemble(base, unet), [], P.picture_contexts, [picture(100, 150), picture(97, 155, 1)]
    monkeypatch.setattr(P, "picture_contexts", lambda *a: seen.extend(collect(*a)) or seen)
    run(pipe, images, tile_size=48, tile_batch=2, generator=seeded(0, 1))
    assert unet.lq_margin is None and unet.lq_reach is not None and len(seen) == 2
    for image, context in zip(images, seen):
        whole = crop(image, 0, 0, 112, 160)[None] * 2 - 1
        (expected,) = unet.summarize_lq(unet.pool_lq(whole, slice(None), slice(None)))
        for a, b in zip(context, expected, strict=True): torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_an_encoder_that_sees_everything_gets_no_slivers():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(8, 8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4, sample_size=32)
    own = new_base(vae, {**SMALL_UNET, "in_channels": 4, "out_channels": 4})
    unet = trained_looking(build_foundir_unet(own, **SMALL_MOE, lq_context_width=8))
    torch.nn.init.normal_(unet.lq_context.out[-1].weight, generator=seeded(1)[0])
    sizes, pipe = set(), assemble(own, unet)
    hook = unet.lq_features.register_forward_pre_hook(lambda m, args: sizes.add(tuple(args[0].shape[-2:])))
    (x,) = run(pipe, picture(80, 144), tile_size=64, tile_overlap=0.25)
    hook.remove()
    assert unet.lq_reach is unet.lq_margin is None and sizes == {(64, 64)} and torch.isfinite(x).all()


def calls_of(module, pipe, **options):
    "First dimension of the first argument, call by call."
    sizes = []
    hook = module.register_forward_pre_hook(lambda m, args: sizes.append(len(args[0])))
    try: run(pipe, **options)
    finally: hook.remove()
    return sizes


def test_tile_batch_is_never_exceeded(pipe):
    options = dict(image=[picture(64, 96, 1), picture(64, 96, 2), picture(20, 20)], tile_size=32, tile_overlap=0,
                   generator=seeded(0, 1, 2))
    for tile_batch, halves in ((1, 1), (4, 1), (4, 2)):
        more = dict(tile_batch=tile_batch, **(dict(prompt="a cat", guidance_scale=2.0) if halves == 2 else {}))
        for module, factor in ((pipe.unet.mid_block, halves), (pipe.unet.moe_scheduler, 1), (pipe.vae.decoder, 1)):
            sizes = calls_of(module, pipe, **options, **more)
            assert max(sizes) == tile_batch * factor and sum(sizes) == 13 * factor, (sizes, more)
        sizes = calls_of(pipe.unet.lq_features, pipe, **options, **more)   # in parts of 16 latents, without overlap
        assert max(sizes) == min(tile_batch, 2) and sum(sizes) == 5, (sizes, more)


@pytest.mark.parametrize("context", [0, 8])
@pytest.mark.parametrize("size", [(100, 150), (33, 300)])
def test_the_lq_embedding_does_not_depend_on_tiles(base, monkeypatch, context, size):
    unet = trained_looking(build_foundir_unet(base, **SMALL_MOE, lq_context_width=context))
    if context: torch.nn.init.normal_(unet.lq_context.out[-1].weight, generator=seeded(1)[0])
    for block in unet.lq_features.blocks: torch.nn.init.normal_(block.conv2.weight, std=0.1, generator=seeded(2)[0])
    pipe, seen, embed = assemble(base, unet), [], P.embed_pictures
    monkeypatch.setattr(P, "embed_pictures", lambda *a: seen.append(embed(*a)) or seen[-1])
    for tile_size, overlap in ((0, 0), (16, 0), (32, 0.5), (80, 0.25), (128, 0)):
        run(pipe, picture(*size), tile_size=tile_size, tile_overlap=overlap)
    assert pipe.unet.lq_margin is not None and seen[0].std() > 0.01
    for e in seen[1:]: torch.testing.assert_close(e, seen[0], atol=1e-5, rtol=1e-4)


def test_decoder_tiles_of_their_own(pipe):
    seen, image = [], picture(64, 96)
    hook = pipe.vae.decoder.register_forward_pre_hook(lambda m, args: seen.append(tuple(args[0].shape[-2:])))
    for vae_tile_size in (None, 0, 16): run(pipe, image, tile_size=32, tile_overlap=0, vae_tile_size=vae_tile_size)
    hook.remove()
    assert seen == [(8, 8)] * 6 + [(16, 24)] + [(4, 4)] * 24


def test_noise_does_not_depend_on_tiles_or_companions(pipe, monkeypatch):
    seen, start = [], P.start_latents
    monkeypatch.setattr(P, "start_latents", lambda s, noise, *a: seen.append(noise.clone()) or start(s, noise, *a))
    image = picture(64, 96)
    run(pipe, image, tile_size=0)
    run(pipe, image, tile_size=32, tile_overlap=0.5)
    run(pipe, [picture(64, 96, 3), image], generator=seeded(5, 0), tile_batch=2)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0][0], seen[2][1])

# ---------------------------------------------------------------- colour


def test_super_resolution_gets_the_inputs_colours(pipe):
    image = picture(24, 24)
    reference = upsample_lq(image, (48, 48))
    plain, default, adain = (run(pipe, image, upscale=2, color_fix=c)[0] for c in ("none", None, "adain"))
    assert torch.equal(default, adain)
    assert (default.mean((1, 2)) - reference.mean((1, 2))).abs().max() < 0.02 < (
        plain.mean((1, 2)) - reference.mean((1, 2))).abs().max()
    assert torch.equal(run(pipe, image)[0], run(pipe, image, color_fix="none")[0])
    assert run(pipe, image, color_fix="wavelet")[0].shape == image.shape


# ---------------------------------------------------------------- noise schedulers, precision, offload, callbacks

# classes that can run the tiny model's noise schedule
ZERO_SNR = ["ddim", "ddpm", "dpmsolver", "euler", "eulerancestral", "unipc"]
KNOWN = ZERO_SNR + ["deis", "dpmsolversinglestep", "heun", "kdpm2", "kdpm2ancestral", "lms", "pndm"]


@pytest.mark.parametrize("name", KNOWN)
def test_every_noise_scheduler_by_name(base, unet, name):
    pipe = assemble(base, unet, SDXL_SCHEDULE)
    images, before = [picture(16, 16, 0), picture(16, 16, 1)], dict(pipe.scheduler.config)
    options = dict(num_inference_steps=12, start="lq", noise_scheduler=name)
    if name == "lms": pytest.importorskip("scipy")
    a, b = (run(pipe, images, generator=seeded(1, 2), tile_batch=2, **options) for _ in range(2))
    assert torch.equal(a[1], b[1]) and torch.isfinite(a[0]).all() and a[0].std() > 0.01
    torch.testing.assert_close(a[1], run(pipe, images[1], seed=2, **options)[0], atol=1e-4, rtol=0)
    assert type(pipe.scheduler) is EulerDiscreteScheduler and dict(pipe.scheduler.config) == before


@pytest.mark.parametrize("name", KNOWN)
def test_steps_in_bands(base, unet, name, monkeypatch):
    """A canvas stepped in bands is the canvas stepped at once; where noise is drawn, it is other noise, different in
    every band, but still each picture's own."""
    if name == "lms": pytest.importorskip("scipy")
    pipe, seen = assemble(base, unet, SDXL_SCHEDULE), []
    options = dict(num_inference_steps=12, start="lq", noise_scheduler=name)
    images = [picture(32, 16, 0), picture(32, 16, 1)]
    whole = run(pipe, images, generator=seeded(1, 2), tile_batch=2, **options)
    monkeypatch.setattr(P, "BAND", 8)
    monkeypatch.setattr(P, "BandedSteps", lambda *args: seen.append(S.BandedSteps(*args)) or seen[-1])
    banded = run(pipe, images, generator=seeded(1, 2), tile_batch=2, **options)
    assert len(seen) == 1 and len(seen[0].noise_schedulers) == 4
    torch.testing.assert_close(banded[1], run(pipe, images[1], seed=2, **options)[0], atol=1e-4, rtol=0)
    if name in ("ddpm", "eulerancestral", "kdpm2ancestral"):
        assert not torch.allclose(banded[0], whole[0], atol=1e-2) and abs(banded[0].std() / whole[0].std() - 1) < 0.2
    else: torch.testing.assert_close(banded, whole, atol=1e-5, rtol=0)


def test_what_looks_at_a_whole_picture_is_not_cut_into_bands(sdxl):
    def bands(noise_scheduler):
        noise_scheduler.set_timesteps(4)
        steps, x = S.BandedSteps(noise_scheduler, band=8), torch.rand(1, 4, 8, 4)
        steps(x, noise_scheduler.timesteps[0], noise_scheduler.scale_model_input(x, noise_scheduler.timesteps[0]))
        return len(steps.noise_schedulers)
    brownian = EulerDiscreteScheduler(**SDXL_SCHEDULE)
    brownian.noise_sampler = None  # as noise schedulers with a Brownian tree
    assert bands(sdxl.scheduler) == 4 and bands(DDIMScheduler(thresholding=True)) == 1 and bands(brownian) == 1


@pytest.mark.parametrize("name", ["heun", "pndm", "unipc"])
def test_a_noise_scheduler_keeps_no_canvas(sdxl, name):
    "Copies for the bands of the next picture would copy it, too."
    sdxl.scheduler = S.make_noise_scheduler(name, sdxl.scheduler)
    run(sdxl, picture(16, 16), num_inference_steps=12)
    kept = [x for value in vars(sdxl.scheduler).values()
            for x in (value if isinstance(value, list) else [value]) if isinstance(x, torch.Tensor) and x.ndim == 4]
    assert not kept


@pytest.mark.parametrize("name", KNOWN)
def test_a_noise_scheduler_that_cannot_run_the_schedule_is_refused(pipe, name):
    if name in ZERO_SNR:
        assert torch.isfinite(run(pipe, picture(16, 16), num_inference_steps=4, noise_scheduler=name)[0]).all()
    else:
        with pytest.raises(FoundIRError, match="rescale_betas_zero_snr"):
            run(pipe, picture(16, 16), num_inference_steps=4, noise_scheduler=name)


def test_forms_of_a_name_and_unknown_ones(pipe):
    for name in ("DDIM", "ddim_scheduler", "DDIMScheduler"):
        assert type(S.make_noise_scheduler(name, pipe.scheduler)) is DDIMScheduler
    for name in ("", "flow", "edmeuler", "FlowMatchEulerDiscreteScheduler"):
        with pytest.raises(FoundIRError, match="choose from ddim, ddpm") as e: pipe(picture(8, 8), noise_scheduler=name)
        assert "\n" not in str(e.value)


def test_ddim_and_euler_agree(pipe):
    euler, ddim = (run(pipe, picture(16, 16), num_inference_steps=5, noise_scheduler=name)[0]
                   for name in (None, "ddim"))
    torch.testing.assert_close(ddim, euler, atol=5e-3, rtol=0)


def test_bfloat16_models_keep_float32_latents(base, unet):
    pipe = assemble(base, unet)
    expected = run(pipe, picture(32, 32), num_inference_steps=3)[0]
    half = FoundIRv2Pipeline(**{k: deepcopy(v).to(torch.bfloat16) if isinstance(v, torch.nn.Module) else v
                                for k, v in pipe.components.items()},
                             **pipe.parameters)
    half.set_progress_bar_config(disable=True)
    seen = []
    (x,) = run(half, picture(32, 32), num_inference_steps=3,
               callback_on_step_end=lambda p, i, t, k: seen.append(k["latents"].dtype))
    assert half.unet.dtype == torch.bfloat16 and seen == [torch.float32] * 3 and x.dtype == torch.float32
    assert (x - expected).abs().mean() < 0.02


def test_a_float16_vae_that_overflows_is_used_in_float32_and_put_back():
    vae = AutoencoderKL(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4, force_upcast=True).half()
    seen = []
    vae.encoder.register_forward_hook(lambda m, args, out: seen.append(args[0].dtype))
    with torch.no_grad(): z = encode_latents(vae, torch.rand(1, 3, 16, 16) * 2 - 1)
    assert seen == [torch.float32] and vae.dtype == torch.float16 and z.dtype == torch.float32


def test_with_sdxls_own_vae_class(base):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                        up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=4, latent_channels=4)
    own = new_base(vae, {**SMALL_UNET, "in_channels": 4, "out_channels": 4})
    pipe = assemble(own, trained_looking(build_foundir_unet(own, **SMALL_MOE)), SDXL_SCHEDULE,
                    default_num_inference_steps=10, default_start="lq", default_tile_size=64)
    (x,) = run(pipe, picture(70, 33))
    assert x.shape == (3, 70, 33)
    vae.enable_slicing()
    torch.testing.assert_close(run(pipe, picture(70, 33))[0], x, atol=1e-5, rtol=0)
    vae.enable_tiling()
    assert run(pipe, picture(70, 33), tile_size=0)[0].shape == (3, 70, 33)


def test_offload_hooks_run_before_calls_that_are_not_forward(pipe):
    calls = []
    hook = SimpleNamespace(pre_forward=lambda module, *a, **k: calls.append(type(module).__name__))
    pipe.unet._hf_hook = pipe.vae._hf_hook = hook
    try: run(pipe, picture(16, 16))
    finally: del pipe.unet._hf_hook, pipe.vae._hf_hook
    assert calls == ["FoundIRUNet", "FoundIRUNet", "PatchAutoencoderKL"]


def test_model_offload_changes_nothing(base, unet):
    expected = run(assemble(base, unet), picture(16, 16), prompt="a cat", guidance_scale=2.0)[0]
    pipe = assemble(deepcopy(base), deepcopy(unet))
    pipe.enable_model_cpu_offload(device="cpu")
    for _ in range(2):
        torch.testing.assert_close(run(pipe, picture(16, 16), prompt="a cat", guidance_scale=2.0)[0], expected,
                                   atol=1e-5, rtol=0)


def test_offload_by_argument(base, unet, tmp_path):
    save_base(base, tmp_path, torch.float32)
    expected = run(load_pipeline(tmp_path), picture(16, 16), num_inference_steps=2)[0]
    offloaded = load_pipeline(tmp_path, device="cpu", offload="model", tile_size=32, tile_batch=3)
    offloaded.set_progress_bar_config(disable=True)
    assert hasattr(offloaded.unet, "_hf_hook")
    assert (offloaded.config.default_tile_size, offloaded.config.default_tile_batch) == (32, 3)
    torch.testing.assert_close(run(offloaded, picture(16, 16), num_inference_steps=2)[0], expected, atol=1e-5, rtol=0)
    for bad, words in ((dict(offload="disk"), "none, model, sequential"),
                       (dict(offload="sequential", device="cpu"), "choose none"),
                       (dict(tile_size=50), "multiple of 16"),
                       (dict(tile_batch=0), "tile_batch")):
        with pytest.raises(FoundIRError, match=words): load_pipeline(tmp_path, **bad)


def test_sequential_offload_changes_nothing(base, unet):
    """accelerate's own call on VAE and U-Net: their weights are on the meta device but while a layer runs (on CPU it
    fails on the text encoders' embeddings)."""
    expected = run(assemble(base, unet), picture(16, 16))[0]
    pipe = assemble(deepcopy(base), deepcopy(unet))
    for module in (pipe.vae, pipe.unet): cpu_offload(module, torch.device("cpu"))
    assert {p.device.type for p in pipe.unet.parameters()} == {"meta"}
    for _ in range(2): torch.testing.assert_close(run(pipe, picture(16, 16))[0], expected, atol=1e-5, rtol=0)


def test_offload_with_tiles_and_a_context_changes_nothing(base):
    unet = trained_looking(build_foundir_unet(base, **SMALL_MOE, lq_context_width=8))
    options = dict(tile_size=32, tile_overlap=0.25)
    torch.nn.init.normal_(unet.lq_context.out[-1].weight, generator=seeded(1)[0])
    expected = run(assemble(base, unet), picture(64, 96), **options)[0]
    by_layer, by_model = (assemble(deepcopy(base), deepcopy(unet)) for _ in range(2))
    cpu_offload(by_layer.unet, torch.device("cpu"))
    by_model.enable_model_cpu_offload(device="cpu")
    for pipe in (by_layer, by_model):
        torch.testing.assert_close(run(pipe, picture(64, 96), **options)[0], expected, atol=1e-5, rtol=0)


def test_a_restorer_needs_no_unet_of_its_base(base, unet, tmp_path):
    save_base(base, tmp_path / "base")
    (tmp_path / "base/unet").rename(tmp_path / "elsewhere")
    inference = InferenceConfig(num_inference_steps=1, start="noise")
    save_restorer(unet, tmp_path / "mine", Recipe(str(tmp_path / "base"), inference))
    pipe = load_pipeline(tmp_path / "mine", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert run(pipe, picture(16, 16))[0].std() > 0.01


def test_callback_sees_and_changes_the_latents(pipe):
    seen = []
    def callback(p, i, t, tensors):
        seen.append((i, float(t), tuple(tensors["latents"].shape)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == 1 else {}
    (x,) = run(pipe, picture(16, 16), num_inference_steps=2, callback_on_step_end=callback)
    assert seen == [(0, 999.0, (1, 16, 4, 4)), (1, 499.0, (1, 16, 4, 4))]
    torch.testing.assert_close(x, decode_latents(pipe.vae, torch.zeros(1, 16, 4, 4))[0].detach())

# ---------------------------------------------------------------- settings


@pytest.mark.parametrize("bad, words", [
    (dict(num_inference_steps=0), "num_inference_steps"), (dict(num_inference_steps=2.5), "num_inference_steps"),
    (dict(guidance_scale=-1), "guidance_scale"), (dict(upscale=0), "upscale"), (dict(start="lr"), "lq, noise"),
    (dict(color_fix="lab"), "none, adain, wavelet"), (dict(tile_size=50), "multiple of 16"),
    (dict(tile_size=-16), "tile_size: expected .* got -16"), (dict(vae_tile_size=50), "multiple of 16"),
    (dict(tile_overlap=1.0), "tile_overlap"), (dict(guidance_interval=(0.5, 0.5)), "guidance_interval"),
    (dict(guidance_interval=0.5), "guidance_interval"), (dict(prompt=None), "give a text"),
    (dict(negative_prompt=3), "give a text"), (dict(generator=5), "torch.Generator"), (dict(upscale="2"), "upscale"),
    (dict(guidance_scale="five"), "five"), (dict(vae_tile_size="512"), "vae_tile_size"),
    (dict(num_inference_steps=float("inf")), "steps: expected .* got inf"),
    (dict(offset_unit="metre"), "pixel, latent"), (dict(noise_scheduler="karras"), "ddim, ddpm"),
    (dict(tile_batch=0), "tile_batch"), (dict(output_type="latent"), "pil, pt, np"),
    (dict(prompt=["a", "b"]), "prompt"), (dict(generator=seeded(1, 2)), "generator")])
def test_bad_settings_are_one_clear_line(pipe, bad, words):
    with pytest.raises(FoundIRError, match=words) as e: pipe(picture(8, 8), **bad)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("steps, ok", [(1, False), (4, False), (9, False), (10, True), (20, True)])
def test_few_steps_need_trailing_spacing(sdxl, steps, ok):
    if ok: run(sdxl, picture(8, 8), num_inference_steps=steps); return
    with pytest.raises(FoundIRError, match="trailing"): run(sdxl, picture(8, 8), num_inference_steps=steps)
    sdxl.scheduler = sdxl.scheduler.from_config(sdxl.scheduler.config, timestep_spacing="trailing")
    run(sdxl, picture(8, 8), num_inference_steps=steps)


def test_defaults_come_from_the_config(base, unet):
    pipe = assemble(base, unet, default_num_inference_steps=3, default_guidance_scale=2.0, default_tile_size=32)
    calls = count_calls(pipe, image=picture(32, 48), prompt="a cat")
    assert calls["mid"] == [2] * 3 * 2  # 3 steps, 2 tiles, both halves
    assert assemble(base, unet, default_num_inference_steps=20).config.default_num_inference_steps == 20


def test_a_plain_unet_is_refused(base):
    with pytest.raises(FoundIRError, match="build_foundir_unet"): assemble(base, base.unet_prior)

# ---------------------------------------------------------------- saving and loading


def test_save_and_load_a_whole_pipeline(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    expected = run(pipe, picture(20, 33), prompt="a cat", guidance_scale=2.0, num_inference_steps=2)[0]
    for loaded in (FoundIRv2Pipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        torch.testing.assert_close(
            run(loaded, picture(20, 33), prompt="a cat", guidance_scale=2.0, num_inference_steps=2)[0], expected,
            atol=1e-5, rtol=0)
        assert {k: v for k, v in loaded.config.items() if k.startswith("default_")} == {
            k: v for k, v in pipe.config.items() if k.startswith("default_")}
        assert (loaded.config.default_num_inference_steps, loaded.config.default_tile_size) == (1, 512)
        assert not loaded.unet.training


def test_a_restorer_is_loaded_over_its_base(pipe, base, unet, tmp_path):
    save_base(base, tmp_path / "base", torch.float32)
    settings = dict(num_inference_steps=2, guidance_scale=1.0, start="noise", tile_size=64, tile_overlap=0.5)
    recipe = Recipe(str(tmp_path / "base"), InferenceConfig(**settings))
    save_restorer(unet, tmp_path / "mine", recipe, torch.float32)
    assert unet.dtype == torch.float32
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["pipeline.json", "unet"]
    loaded = load_pipeline(tmp_path / "mine")
    loaded.set_progress_bar_config(disable=True)
    # other memory, other vector lanes
    torch.testing.assert_close(run(loaded, picture(20, 20))[0], run(pipe, picture(20, 20), num_inference_steps=2)[0],
                               atol=1e-5, rtol=0)
    assert loaded.config.default_tile_overlap == 0.5 and loaded.config.default_start == "noise"
    assert load_pipeline(tmp_path / "mine", dtype="bfloat16").unet.dtype == torch.bfloat16


def trained_folder(unet, base, folder, **inference):
    "What a training stage leaves behind."
    save_base(base, folder / "base", torch.float32)
    unet.save_pretrained(folder / "stage/unet")
    (folder / "stage/config.json").write_text(json.dumps(dict(base=str(folder / "base"), stage=2)))
    write_recipe(Recipe(str(folder / "base"), InferenceConfig(**inference)), folder / "stage")
    return folder / "stage"


def test_planner_pipeline_and_settings_have_one_origin(base, unet, tmp_path):
    "Once a trained folder had tiles of 128 latents and no guidance for one, 1024 pixels and guidance 5 for the other."
    from foundir_v2.skeleton import read_skeleton
    from foundir_v2.restorers import make_restorer
    inference = dict(num_inference_steps=3, guidance_scale=2.5, start="noise", prompt="caption", tile_size=48,
                     tile_overlap=0.125, tile_batch=2)
    assert all(getattr(InferenceConfig(), k) != v for k, v in inference.items()), "none of them is a default"
    folder = trained_folder(unet, base, tmp_path, **inference)
    pipe, skeleton = load_pipeline(folder), read_skeleton(folder)
    assert skeleton.defaults == InferenceConfig(**inference)
    assert {k: pipe.config[f"default_{k}"] for k in inference} == inference
    settings, prompt = P.resolve_settings(pipe, 1), inference.pop("prompt")
    assert {k: getattr(settings, k) for k in inference} == inference and prompt == "caption"
    evaluated = make_restorer(f"trained:{folder}").pipe
    assert {k: v for k, v in evaluated.config.items() if k.startswith("default_")} == {
        k: v for k, v in pipe.config.items() if k.startswith("default_")}
    pipe.save_pretrained(tmp_path / "whole")
    assert read_skeleton(tmp_path / "whole").defaults == skeleton.defaults


def test_the_pipelines_own_defaults_are_the_declared_ones():
    import inspect
    parameters = inspect.signature(FoundIRv2Pipeline.__init__).parameters
    own = {name: p.default for name, p in parameters.items() if name.startswith("default_")}
    assert Recipe().defaults == {k: v for k, v in own.items() if k != "default_vae_tile_size"}


def test_a_training_stages_folder_is_a_restorer(pipe, base, unet, tmp_path):
    settings = dict(num_inference_steps=2, guidance_scale=1.0, start="noise", tile_size=512)
    loaded = load_pipeline(trained_folder(unet, base, tmp_path, **settings))
    loaded.set_progress_bar_config(disable=True)
    restored, expected = run(loaded, picture(20, 20))[0], run(pipe, picture(20, 20), num_inference_steps=2)[0]
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)


def test_a_stage_from_before_it_wrote_a_recipe_is_refused(base, unet, tmp_path):
    from foundir_v2.skeleton import read_skeleton
    stage = trained_folder(unet, base, tmp_path)
    (stage / "pipeline.json").unlink()
    for read in (load_pipeline, read_skeleton):
        with pytest.raises(FoundIRError, match="no pipeline.json.*run its training stage again") as e: read(stage)
        assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", ["pipeline.json", "model_index.json"])
def test_old_names_are_told_the_new_ones(pipe, base, unet, tmp_path, name):
    if name == "pipeline.json": folder = trained_folder(unet, base, tmp_path)
    else: pipe.save_pretrained(folder := tmp_path / "whole")
    found = json.loads((folder / name).read_text())
    found["default_steps"] = found.pop("default_num_inference_steps")
    (folder / name).write_text(json.dumps(found))
    with pytest.raises(FoundIRError, match=f"{name}.*default_steps is now default_num_inference_steps") as e:
        load_pipeline(folder)
    assert "\n" not in str(e.value)


def test_damaged_training_folders(base, unet, tmp_path):
    stage = trained_folder(unet, base, tmp_path)
    weights = stage / "unet/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(FoundIRError, match="can't load the U-Net") as e: load_pipeline(stage)
    assert "\n" not in str(e.value)
    damaged = {"{": "JSON", "[]": "no object", '{"base": 3}': "base", '{"base": "no-such-base"}': "no-such"}
    for text, words in damaged.items():
        (stage / "pipeline.json").write_text(text)
        with pytest.raises(FoundIRError, match=words): load_pipeline(stage)


def test_a_base_model_gives_an_untrained_restorer(base, tmp_path):
    save_base(base, tmp_path, torch.float32)
    loaded = load_pipeline(str(tmp_path))
    loaded.set_progress_bar_config(disable=True)
    a, b = (run(loaded, picture(16, 16, i), num_inference_steps=2, guidance_scale=1.0)[0] for i in (0, 1))
    assert torch.equal(a, b)  # the LQ branch ends in zeros: the picture has no say yet


@pytest.mark.parametrize("name", ["sdxl", "no/such/folder", "Tiny"])
def test_unknown_names_are_told_the_choices(name):
    with pytest.raises(FoundIRError, match="base, tiny") as e: load_pipeline(name)
    assert "\n" not in str(e.value)


def test_the_hub_out_of_reach_is_one_clear_line(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FoundIRError, match="base, tiny") as e: load_pipeline("nobody/no-such-model-foundir")
    assert "\n" not in str(e.value)


def test_damaged_recipes(unet, tmp_path):
    damaged = {"{": "JSON",
               '{"steps": 3}': "default_num_inference_steps",
               '{"default_guidance": 5}': "now default_guidance_scale"}
    for text, words in damaged.items():
        (tmp_path / "pipeline.json").write_text(text)
        with pytest.raises(FoundIRError, match=words): load_pipeline(tmp_path)


def test_import_needs_no_pipeline_tools():
    code = ("import sys, foundir_v2.loading; bad = {'dvc', 'dvclive', 'jupyter_core', 'papermill', 'pyiqa', 'pandas', "
            "'matplotlib', 'nbdev', 'ruamel', 'skimage'} & set(sys.modules); assert not bad, bad")
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(P.__file__).parents[1])


@pytest.mark.parametrize("name", P.IN_LOADING)
def test_what_is_promised_is_importable_from_the_pipeline(name):
    namespace = {}
    exec(f"from foundir_v2.pipeline import {name}", namespace)
    assert namespace[name] is getattr(L, name)


def test_the_contract_names_are_where_the_documents_say():
    from foundir_v2.pipeline import FoundIRv2Pipeline, load_pipeline
    assert load_pipeline is L.load_pipeline and FoundIRv2Pipeline.__module__ == "foundir_v2.pipeline"
    with pytest.raises(ImportError, match="load_pipelines"): exec("from foundir_v2.pipeline import load_pipelines")


def test_diffusers_sees_one_class_with_its_call():
    import inspect
    components, options = FoundIRv2Pipeline._get_signature_keys(FoundIRv2Pipeline)
    assert len(components) == 7 and options and all(name.startswith("default_") for name in options)
    assert "image" in inspect.signature(FoundIRv2Pipeline.__call__).parameters and FoundIRv2Pipeline.__call__.__doc__

# ---------------------------------------------------------------- presets and captions


@pytest.mark.parametrize("name", L.PRESETS)
def test_presets_are_usable(pipe, name):
    options = L.preset_options(name, pipe.config)
    settings = P.resolve_settings(pipe, 1, **options)
    if name == "paper":
        expected = dict(num_inference_steps=20, guidance_scale=5.0, start="lq", tile_size=1024, tile_overlap=0.5)
        assert {k: getattr(settings, k) for k in expected} == expected
    if name == "fast":
        assert settings.num_inference_steps <= pipe.config.default_num_inference_steps and settings.guidance_scale == 1
    if name == "low-memory": assert settings.tile_batch == 1 and settings.vae_tile_size <= settings.tile_size <= 512
    assert run(pipe, picture(16, 16), **options)[0].shape == (3, 16, 16)


def test_loading_for_little_memory():
    assert L.preset_loading("fast", torch.device("cpu")) == {}
    assert L.preset_loading("low-memory", torch.device("cpu")) == dict(dtype="auto", offload="none")
    assert L.preset_loading("low-memory", torch.device("cuda"))["offload"] == "model"
    with pytest.raises(FoundIRError, match="paper, fast, low-memory"): L.preset_options("best", {})


def files(folder, *names):
    for name in names: Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / name)
    return [folder / name for name in names]


def test_captions_from_files_keep_their_places(tmp_path):
    paths = files(tmp_path, "a.png", "b.png", "c.png")
    (tmp_path / "a.txt").write_text("a cat"); (tmp_path / "c.txt").write_text("")
    first, second, third = L.describe(paths, "sidecar")
    assert (first, third) == ("a cat", "") and isinstance(second, FoundIRError) and "b.txt" in str(second)
    assert L.describe(paths) == ["", "", ""]
    with pytest.raises(FoundIRError, match="choose none, .*sidecar"): L.describe(paths, "magic")


def test_the_captioning_model_is_gone_afterwards(tmp_path, monkeypatch):
    "Its memory is free before the restorer is loaded: nothing refers to it any more."
    paths, alive = files(tmp_path, "a.png", "b.png"), []
    (tmp_path / "b.png").write_text("no picture")
    class Model: pass
    def describe(self, pictures):
        if self.vlm._loaded is None: self.vlm._loaded = Model(); alive.append(weakref.ref(self.vlm._loaded))
        from foundir_v2.core import load_image
        for path in pictures: load_image(path)
        return ["a cat"] * len(pictures)
    monkeypatch.setattr(VLMCaptioner, "describe", describe)
    first, second = L.describe(paths, "vlm:some/model", tmp_path / "cache", "cpu")
    assert first == "a cat" and isinstance(second, FoundIRError) and len(alive) == 1 and alive[0]() is None


def test_a_captioning_model_that_is_not_there_stops_everything(tmp_path):
    with pytest.raises(FoundIRError, match="can't load the vision-language model"):
        L.describe(files(tmp_path, "a.png"), f"vlm:{tmp_path}", tmp_path / "cache", "cpu")

# ---------------------------------------------------------------- memory


def test_little_is_held_besides_the_picture(pipe, monkeypatch):
    "8-bit pictures stay so, the noise goes when it is used, and the decoder works without embedding and noise."
    import foundir_v2.pipeline as module
    seen, make_job, decode = {}, module.make_job, module.decode_latents
    def watch(*args):
        seen["job"], (seen["request"],) = make_job(*args), [weakref.ref(r.noise) for r in args[1]]
        return seen["job"]
    monkeypatch.setattr(module, "make_job", watch)
    monkeypatch.setattr(module, "decode_latents", lambda *a: seen.update(noise=seen["request"]()) or decode(*a))
    image = (picture(64, 96).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    run(pipe, image, tile_size=32, num_inference_steps=2)
    assert seen["job"].pictures[0].dtype == torch.uint8 and seen["job"].noise is None and seen["noise"] is None

# ---------------------------------------------------------------- progress


@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("options", [
    {}, dict(tile_size=32), dict(tile_size=32, tile_batch=3, vae_tile_size=64, num_inference_steps=3),
    dict(tile_size=32, vae_tile_size=0)], ids=str)
def test_the_bar_counts_tiles_and_ends_full(pipe, monkeypatch, options, shipped):
    if shipped: pipe = load_pipeline("tiny", device="cpu")
    class Bar:
        def __enter__(self): return self
        def __exit__(self, *error): pass
        def update(self, n): done.append(n)
    done, totals = [], []
    monkeypatch.setattr(pipe, "progress_bar", lambda total: totals.append(total) or Bar())
    run(pipe, [picture(70, 130), picture(70, 130), picture(40, 60)], **options)
    assert totals == [sum(done)] and len(done) >= (20 if options else 6) and min(done) >= 1

# ---------------------------------------------------------------- shipped weights


@pytest.mark.skipif(not (ASSETS / "tiny").is_dir(), reason="the shipped weights are not in this checkout")
def test_the_shipped_restorer():
    pipe = load_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    image = picture(70, 90)
    (a,), (b,), (other,) = run(pipe, image), run(pipe, image), run(pipe, 1 - image)
    assert a.shape == image.shape and torch.equal(a, b) and torch.isfinite(a).all()
    mse = lambda x, y: F.mse_loss(x, y).item()
    # it looks at its input
    assert mse(a, image) < 0.25 * mse(a, 1 - image) and mse(other, 1 - image) < 0.25 * mse(other, image)


@pytest.mark.skipif(not (ASSETS / "tiny").is_dir(), reason="the shipped weights are not in this checkout")
@pytest.mark.parametrize("photo, task", [
    ("coffee", "gaussian_noise"), ("astronaut", "gaussian_noise"), ("coffee", "low_light"), ("coffee", "haze"),
    ("astronaut", "haze")])
def test_tiles_of_the_shipped_restorer_do_not_show(photo, task):
    "The mean step from pixel to pixel across the tiles' borders, against the untiled result's at the same places."
    import skimage.data
    from foundir_v2.degrade import degrade
    pipe = load_pipeline("tiny")
    pipe.set_progress_bar_config(disable=True)
    image = degrade(torch.from_numpy(getattr(skimage.data, photo)()[:384, :512]).permute(2, 0, 1) / 255, task, seed=1)
    untiled, tiled = (run(pipe, image, tile_size=size, tile_overlap=0.25)[0] for size in (0, 192))
    assert not torch.equal(untiled, tiled)
    for a, b in ((untiled, tiled), (untiled.mT, tiled.mT)):
        lines = sorted(
            {c for s in tile_starts(a.shape[-1], 192, 0.25, 16) for c in (s, s + 192) if 0 < c < a.shape[-1]})
        step = lambda x: float((x[..., lines] - x[..., [c - 1 for c in lines]]).abs().mean())
        assert len(lines) >= 3 and 0.95 < step(b) / step(a) < 1.05, (step(a), step(b))


def test_a_generator_for_some_pictures_only_is_refused(pipe):
    with pytest.raises(FoundIRError, match="for every picture, or none"):
        pipe([picture(16, 16), picture(16, 16)], generator=[None, *seeded(1)], tile_batch=2)


@pytest.mark.parametrize("content", ["[]", "null", "3"])
def test_a_recipe_that_is_no_object_is_one_clear_line(tmp_path, content):
    (tmp_path / "pipeline.json").write_text(content)
    with pytest.raises(FoundIRError, match="holds no object"): L.read_recipe(tmp_path)


def test_more_steps_than_the_schedule_has_are_refused(pipe):
    with pytest.raises(FoundIRError, match="num_inference_steps: expected .* to 1000, got 2000"):
        pipe(picture(8, 8), num_inference_steps=2000)


def test_only_noise_schedulers_that_can_run_the_model_are_offered(pipe):
    with pytest.raises(FoundIRError) as e: S.make_noise_scheduler("karras", pipe.scheduler)
    assert str(e.value).split("choose from ")[1].split(", ") == ZERO_SNR
