import hashlib, json, subprocess, sys
from pathlib import Path

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundir_v2.camera import gaussian_blur, long_motion_blur, raw_noise
from foundir_v2.clean import blockiness, detail, light, noise
from foundir_v2.core import FoundIRError, generator, repo_root
from foundir_v2.degrade import (DEPTHS, OPERATORS, Applied, apply, camera_exposure, camera_noise, coloured_noise,
                                colour_cast, convolve, crop_to_multiple, defocus_blur, degrade, depth_map,
                                depth_of_field, disc_kernel, downscale, draw_parameters, fog, gaussian_kernel,
                                gaussian_noise, guided_filter, haze, highlights, lamps, linear_to_srgb, low_light,
                                luma, motion_blur, motion_kernel, moving_object, phone_denoise, rain, resaved,
                                scatter, scene_depth, screens, shake, shrink, snow, srgb_to_linear, tone, upsample_lq)
from foundir_v2.scene import blown_drops, cloud, cracks, fade, film_grain, flaking, raindrop, scratches, specks
from foundir_v2.tasks import (BENCHMARK, SEVERITIES, SUBTASKS, VARIANTS, Choice, Integers, LogUniform, Step, SubTask,
                              Uniform, narrow)

EVERY_VARIANT = [v for several in VARIANTS.values() for v in several]


def picture(h=48, w=56):
    "Smooth colours with a textured half: something to blur and something to darken."
    y, x = torch.linspace(0, 1, h)[:, None], torch.linspace(0, 1, w)[None, :]
    base = torch.stack([x.expand(h, w), y.expand(h, w), (1 - x) * y])
    return (0.15 + 0.7 * base + 0.1 * torch.rand(3, h, w, generator=generator("picture"))).clamp(0, 1)


def psnr(a, b): return -10 * torch.log10(((a - b) ** 2).mean()).item()


@pytest.mark.parametrize("name", SUBTASKS)
def test_contract(name):
    x, k = picture(), SUBTASKS[name].scale
    before, state = x.clone(), torch.get_rng_state()
    a, b, other = degrade(x, name, 1), degrade(x, SUBTASKS[name], 1), degrade(x, name, 2)
    assert torch.equal(a, b) and a.shape == (3, 48 // k, 56 // k) and a.dtype == x.dtype
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    assert 0 <= a.min() and a.max() <= 1 and torch.allclose(a * 255, (a * 255).round(), atol=1e-3)
    if name not in ("sr_x2", "sr_x4"): assert not torch.equal(a, other)
    if k == 1: assert 4 < psnr(a, x) < 40


@pytest.mark.parametrize("task", EVERY_VARIANT, ids=lambda v: v.name)
def test_variants_hold_to_the_contract_and_are_damage(task):
    x, k = picture(), task.scale
    before, state = x.clone(), torch.get_rng_state()
    made = [degrade(x, task, s) for s in range(8)]
    assert torch.equal(made[1], degrade(x, task.name, 1))
    assert torch.equal(x, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(torch.equal(made[0], y) for y in made[1:]), "the seed does nothing"
    for y in made:
        assert y.shape == (3, 48 // k, 56 // k)
        assert 0 <= y.min()
        assert y.max() <= 1
        assert torch.allclose(y * 255, (y * 255).round(), atol=1e-3)
        assert 4 < psnr(upsample_lq(y, (48, 56)), x) < 40


def test_version_1_of_the_benchmark_never_changes():
    "Parameters exactly; pixels up to a rounding that another CPU may do otherwise."
    plain = lambda step: (step.operator, {k: v if k == "seed" else f"{v:.9g}" for k, v in step.parameters.items()})
    drawn = [(n, [plain(step) for step in draw_parameters(n, s)]) for n in BENCHMARK for s in range(20)]
    digest = hashlib.sha256(json.dumps(drawn).encode()).hexdigest()
    assert digest == "ef24a7485cbd6b404c6bbebdd016e66d3aee17e883106e6102d3cd86b5b01bbf"
    stored = np.load(Path(__file__).parent / "data/version1.npz")
    assert stored.files == list(BENCHMARK)
    for name in BENCHMARK:
        changed = np.abs((degrade(picture(24, 28), name, 7) * 255).round().numpy() - stored[name].astype(float))
        assert changed.max() <= 1 and (changed > 0).mean() < 0.01, name


def test_no_recipe_is_made_by_the_library_that_tests_out_of_distribution():
    assert {f.__module__ for f in OPERATORS.values()} == {"foundir_v2.camera", "foundir_v2.scene"}
    code = "import sys, foundir_v2.data; print([m for m in sys.modules if m.split('.')[0] == 'albumentations'])"
    other = subprocess.run([sys.executable, "-c", code], cwd=repo_root(), capture_output=True, text=True, check=True)
    assert other.stdout.strip() == "[]"


def digest():
    h = hashlib.sha256()
    for name in SUBTASKS: h.update((degrade(picture(), name, 7) * 255).round().byte().numpy().tobytes())
    return h.hexdigest()


def test_another_process_makes_the_same_pixels():
    code = ("import sys; sys.path.insert(0, 'tests'); import torch; torch.manual_seed(99); torch.rand(5); "
            "from test_degrade import digest; print(digest())")
    other = subprocess.run([sys.executable, "-c", code], cwd=repo_root(), capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


@settings(max_examples=50, deadline=None)
@given(st.sampled_from([*SUBTASKS, *(v.name for v in EVERY_VARIANT)]), st.integers(1, 40), st.integers(1, 40),
       st.integers(0, 2**63 - 1))
def test_any_size_works_or_is_refused_in_one_line(name, h, w, seed):
    x, k = picture(h, w), SUBTASKS[name.split(":")[0]].scale
    if min(h, w) < k:
        with pytest.raises(FoundIRError, match="at least"): degrade(x, name, seed)
        return
    y = degrade(x, name, seed)
    assert y.shape == (3, h // k, w // k) and y.isfinite().all()


def photographs(size):
    "Four that scikit-image ships: a person, an animal, a still life, a night."
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        x = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1) / 255
        top, left = ((n - size) // 2 for n in x.shape[1:])
        yield x[:, top:top + size, left:left + size].contiguous()


def test_severity_is_monotone_in_psnr():
    for name, task in SUBTASKS.items():
        mean = {}
        for severity in SEVERITIES:
            lqs = [upsample_lq(degrade(x, task, s, severity), (128, 128)) for s, x in enumerate(photographs(128))]
            mean[severity] = sum(psnr(lq, x) for lq, x in zip(lqs, photographs(128)))
        order = [mean[severity] for severity in ("mild", "typical", "severe")]
        assert order == sorted(order, reverse=True), name
        assert name in ("sr_x2", "sr_x4") or len(set(order)) == 3, name


def test_severity_is_that_of_a_narrowed_subtask_and_of_its_seed():
    x = picture()
    for name in ("haze", "low_light:lamps", "mural"):
        mild, severe = (degrade(x, name, 3, severity) for severity in ("mild", "severe"))
        assert torch.equal(mild, degrade(x, narrow(name, "mild"), 3)) and not torch.equal(mild, severe)
        assert torch.equal(degrade(x, name, 3, None), degrade(x, name, 3))
    fields = [[step.parameters.get("seed") for step in draw_parameters("mural", 3, s)] for s in (None, *SEVERITIES)]
    assert fields.count(fields[0]) == 4
    with pytest.raises(FoundIRError, match="'medium'; choose one of mild"): degrade(x, "haze", 0, "medium")


ISOLATED = {  # sub-task of one operator -> (measure of foundir_v2.clean, least change in the mean; < 0: it falls)
    "motion_blur": ("detail", -0.25), "defocus_blur": ("detail", -0.25), "heavy_defocus": ("detail", -0.25),
    "sr_x2": ("detail", -0.25), "sr_x4": ("detail", -0.25), "gaussian_noise": ("noise", 9),
    "camera_noise": ("noise", 3), "jpeg": ("blockiness", 0.2), "haze": ("black_level", 0.08),
    "dense_haze": ("black_level", 0.1), "nonhomogeneous_haze": ("black_level", 0.05),
    "surgical_smoke": ("black_level", 0.02),
    "rain": ("brightness", 0.003), "snow": ("brightness", 0.003), "cloud": ("brightness", 0.008),
    "raindrop": ("detail", 0.04), "uav_raindrop": ("detail", 0.04), "low_light": ("brightness", -0.2)}


def measures(x): return {"detail": detail(x), "noise": noise(x), "blockiness": blockiness(x), **light(x)}


def test_every_isolated_degradation_has_a_measure():
    assert set(ISOLATED) == {name for name, task in SUBTASKS.items() if len(task.recipe) == 1}


@pytest.mark.parametrize("name", ISOLATED)
def test_a_mild_isolated_degradation_is_seen_by_its_measure(name):
    measure, least = ISOLATED[name]
    changes = []
    for x in photographs(192):
        for seed in range(3):
            lq = upsample_lq(degrade(x, name, seed, "mild"), (192, 192))
            assert psnr(lq, x) < 40
            changes.append(measures(lq)[measure] - measures(x)[measure])
    mean = sum(changes) / len(changes)
    assert mean < least if least < 0 else mean > least


@pytest.mark.parametrize("bad, match", [
    (torch.rand(1, 3, 8, 8), "3, H, W"), (torch.rand(1, 8, 8), "3, H, W"), (torch.rand(3, 0, 8), "3, H, W"),
    (torch.zeros(3, 8, 8, dtype=torch.uint8), "255"), (torch.full((3, 8, 8), 2.0), "0, 1"),
    (torch.full((3, 8, 8), torch.nan), "nan"), ("x.png", "str")])
def test_bad_images_are_refused(bad, match):
    with pytest.raises(FoundIRError, match=match): degrade(bad, "haze", 0)


def test_unknown_names_are_refused():
    with pytest.raises(FoundIRError, match="fog.*--list"): degrade(picture(), "fog", 0)
    smoke = SubTask("x", "weather", (Step("smoke", {}),))
    with pytest.raises(FoundIRError, match="unknown operator 'smoke'.*haze"): draw_parameters(smoke, 0)
    with pytest.raises(FoundIRError, match="unknown range"):
        draw_parameters(SubTask("x", "weather", (Step("low_light", {"stops": (1, 2)}),)), 0)


def test_parameters_stay_in_their_ranges_and_cover_them():
    ranges = dict(a=Uniform(2, 4), b=LogUniform(0.01, 1), c=Integers(3, 5), d=Choice(("x", "y", "z")))
    task = SubTask("x", "weather", (Step("jpeg", ranges),))
    drawn = [draw_parameters(task, s)[0].parameters for s in range(300)]
    assert {d.pop("d") for d in drawn} == {"x", "y", "z"}
    for k in "abc":
        r, v = ranges[k], [d[k] for d in drawn]
        assert r.low <= min(v) and max(v) <= r.high
    assert {d["c"] for d in drawn} == {3, 4, 5} and all(isinstance(d["c"], int) for d in drawn)
    assert abs(sum(d["b"] < 0.1 for d in drawn) / 300 - 0.5) < 0.12, "not even in the exponent"
    assert abs(sum(d["a"] < 3 for d in drawn) / 300 - 0.5) < 0.12


def test_parameters_replay_from_json():
    for name in ("rain_haze", "haze:phone"):
        stored = json.loads(json.dumps(draw_parameters(name, 5)))
        assert torch.equal(apply(picture(), [Applied(*s) for s in stored]), degrade(picture(), name, 5))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_precision_is_kept(dtype):
    y = degrade(picture().to(dtype), "low_light_noise", 0)
    assert y.dtype == dtype and y.isfinite().all()


def test_convolution_matches_the_definition():
    x, k = picture(), torch.rand(5, 5, generator=generator("k"))
    y = convolve(x, k)
    assert torch.allclose(y[1, 20, 30], (x[1, 18:23, 28:33] * k.flip(0, 1)).sum(), atol=1e-5)
    per_channel = convolve(x, torch.stack([k, k * 2, k * 3]))
    assert torch.allclose(per_channel, y * torch.tensor([1.0, 2, 3])[:, None, None], atol=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_motion_kernel_is_centred_and_as_long_as_asked(seed):
    k, at = motion_kernel(20, 0, 0, seed), torch.arange(-15, 16.0)
    assert abs(k.sum() - 1) < 1e-5 and abs((k.sum(0) * at).sum()) < 0.05 and abs((k.sum(1) * at).sum()) < 0.05
    spread = (k.sum(0) * at**2).sum()
    assert abs(spread - (20**2 / 12 + 0.5)) < 1.5 and (k.sum(1) * at**2).sum() < 1, "not a horizontal line of 20 px"
    bent = motion_kernel(25, 0, 2, seed)
    assert abs((bent.sum(0) * at).sum()) < 0.2 and abs((bent.sum(1) * at).sum()) < 0.2
    assert not torch.equal(bent, motion_kernel(25, 0, 2, seed + 1))


def test_blur_keeps_light_and_flat_areas():
    flat = torch.full((3, 20, 20), 0.4)
    for y in (motion_blur(flat, 20, 30, 1, 0), defocus_blur(flat, 4)): assert torch.allclose(y, flat, atol=1e-4)
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    for y in (motion_blur(point, 15, 30, 1, 0), defocus_blur(point, 3)):
        assert abs(srgb_to_linear(y).sum() / 3 - 1) < 0.02
    assert abs(disc_kernel(3).count_nonzero() - 37) <= 8


def test_noise_has_the_asked_variance():
    grey = torch.full((3, 200, 200), 0.5)
    assert abs((gaussian_noise(grey, 25, 3) - grey).std() * 255 - 25) < 0.4
    for level in (0.02, 0.2, 0.6):  # Poisson below 16 photons, Gaussian above
        flat = linear_to_srgb(torch.full((3, 200, 200), level))
        law = 1e-3 * level + 1e-3**2.18 * 2.718281828**1.2
        noisy = srgb_to_linear(camera_noise(flat, 1e-3, 0, 1))
        assert abs(noisy.var() / law - 1) < 0.05 and abs(noisy.mean() - level) < 2e-3


def test_haze_follows_koschmieder():
    x, d = picture(), depth_map(48, 56, 3)
    y = haze(x, 1.2, 0.9, 0.0, 3)
    t = torch.exp(-1.2 * d)
    assert torch.allclose(y, x * t + 0.9 * (1 - t), atol=1e-6) and d.min() == 0 and d.max() == 1
    depths = [depth_map(48, 56, s) for s in range(20)]
    assert sum((d[:12].mean() > d[-12:].mean()).item() for d in depths) >= 18, "far is not at the top"
    assert haze(x, 1.2, 0.9, 0.04, 3)[2].mean() > y[2].mean() > haze(x, 1.2, 0.9, -0.04, 3)[2].mean()


def test_weather_only_adds_light_on_black_and_more_with_density():
    black = torch.zeros(3, 64, 64)
    for f, extra in ((rain, dict(length=15, angle=20)), (snow, dict(radius=3, angle=20))):
        few, many = (f(black, density=d, strength=0.8, seed=1, **extra) for d in (0.004, 0.04))
        assert few.min() > -1e-4 and 0 < few.mean() < many.mean() and many.max() <= 1 + 1e-4


def test_rain_falls_in_its_direction():
    y = rain(torch.zeros(3, 128, 128), 0.005, 25, 0, 0.9, 1)[0]
    assert y.diff(dim=0).abs().mean() < 0.7 * y.diff(dim=1).abs().mean(), (
        "vertical streaks change more across than along")


def test_each_stop_halves_linear_light():
    x = picture()
    assert torch.allclose(srgb_to_linear(low_light(x, 2)), srgb_to_linear(x) / 4, atol=1e-5)


def test_downscaling_is_antialiased_and_aligned():
    board = (torch.arange(32)[:, None] + torch.arange(32)[None, :]).remainder(2).float().expand(3, -1, -1)
    assert (downscale(board, 4) - 0.5).abs().max() < 0.05, "aliasing"
    ramp = torch.linspace(0, 1, 66).expand(3, 66, 66)
    gt = crop_to_multiple(ramp, 4)
    assert gt.shape == (3, 64, 64) and torch.equal(gt, ramp[:, :64, :64])
    assert (upsample_lq(downscale(ramp, 4), (64, 64)) - gt)[:, 8:-8, 8:-8].abs().max() < 5e-3, "shifted"


def test_upsampling_draws_all_three_modes_and_defaults_to_bicubic():
    lq = downscale(picture(), 4)
    made = [upsample_lq(lq, (48, 56), s) for s in range(20)]
    assert len({m.sum().item() for m in made}) == 3 and any(torch.equal(m, upsample_lq(lq, (48, 56))) for m in made)
    assert all(0 <= m.min() and m.max() <= 1 for m in made)
    assert upsample_lq(lq.double(), (48, 56), 1).dtype == torch.float64


def test_every_operator_is_pure():
    x = picture()
    for task in (*SUBTASKS.values(), *EVERY_VARIANT):
        for operator, parameters in draw_parameters(task, 3):
            a, b = (OPERATORS[operator](x, **parameters) for _ in range(2))
            assert torch.equal(a, b), operator


@pytest.mark.parametrize("step, words", [
    (Applied("smoke", {}), "choose one of"), (Applied("haze", {"betta": 1.0}), "its parameters are"),
    (Applied("motion_blur", dict(length=60.0, angle=0.0, wobble=0.0, seed=0)), "holds 0 to 30"),
    (Applied("fog", dict(beta=1.0, airlight=0.9, tint=0.0, depth="stereo", seed=0)), "'stereo'; choose one of plane"),
    (Applied("resaved", dict(first=30, second=30, scale=1.5, dy=0, dx=0)), "scale 1.5"),
    (Applied("coloured_noise", dict(sigma=9.0, grain=0.0, chroma=0.5, seed=0)), "above 0")])
def test_an_edited_table_that_cannot_be_replayed_is_one_clear_line(step, words):
    with pytest.raises(FoundIRError, match=words) as e: apply(picture(), iter([step]))
    assert "\n" not in str(e.value)


def test_a_guided_filter_keeps_edges_and_smooths_the_rest():
    step = (torch.arange(64) >= 32).float().expand(1, 64, 64) * 0.8
    noisy = step + 0.05 * torch.randn(1, 64, 64, generator=generator("guided"))
    for shrunk in (1, 4):
        y = guided_filter(step, noisy, 8, 1e-3, shrunk)
        assert (y - step).std() < 0.25 * (noisy - step).std() and y[:, :, 33:36].mean() - y[:, :, 28:31].mean() > 0.75


def test_shake_leaves_its_centre_and_smears_the_rim_around_it():
    stripes = picture(96, 96)
    y = shake(stripes, 9, 0, 0, 0)
    loss = (y - stripes).square().mean(0)
    assert loss[44:52, 44:52].mean() < 0.3 * loss[:12, :12].mean()
    flat = torch.full((3, 30, 40), 0.4)
    assert torch.allclose(shake(flat, 9, 0.06, 0.5, -0.5), flat, atol=1e-4)
    dot = torch.zeros(3, 65, 65)
    dot[:, 32, 52] = 1
    light = srgb_to_linear(shake(dot, 9, 0, 0, 0))[0]
    rows, columns, at = light.sum(1) / light.sum(), light.sum(0) / light.sum(), torch.arange(65.0) - 32
    assert abs((rows * at).sum()) < 0.1 and abs((columns * at).sum() - 20) < 0.3, "the picture is shifted"
    assert (rows * at**2).sum() > 3 * (columns * (at - 20) ** 2).sum(), "not smeared along the circle"


@pytest.mark.parametrize("seed", range(3))
def test_a_moving_object_leaves_the_rest_sharp(seed):
    x = picture(96, 96)
    changed = (moving_object(x, 20, 30, 1, 0.3, seed) - x).abs().amax(0) > 0.02
    assert 0.1 < changed.float().mean() < 0.65


def test_depth_of_field_is_sharp_at_the_focus():
    x = picture(96, 96)
    for prior in DEPTHS:
        d, y = scene_depth(x, prior, 1), depth_of_field(x, 5, 0, prior, 1)
        loss = (y - x).square().mean(0)
        assert loss[d < d.quantile(0.05)].mean() < 0.4 * loss[d > d.quantile(0.5)].mean(), prior


def test_depths_differ_and_one_follows_the_picture():
    x = picture()
    for prior in DEPTHS:
        d = scene_depth(x, prior, 1)
        assert d.shape == (48, 56)
        assert d.min() == 0
        assert abs(d.max() - 1) < 1e-6
        assert torch.equal(d, scene_depth(x, prior, 1))
        assert not torch.equal(d, scene_depth(x, prior, 2))
    sky = torch.stack([torch.full((80, 80), v) for v in (0.1, 0.3, 0.1)])
    sky[:, :, 40:] = 0.9  # pale and bright
    for s in range(5):
        d = scene_depth(sky, "attenuation", s)
        assert d[:, 44:].mean() > d[:, :36].mean() + 0.2
    d = scene_depth(x, "patches", 4)
    assert torch.equal(fog(x, 1.2, 0.9, 0.0, "patches", 4), scatter(x, d, 1.2, 0.9, 0.0))
    assert torch.equal(haze(x, 1.2, 0.9, 0.0, 3), scatter(x, depth_map(48, 56, 3), 1.2, 0.9, 0.0))


def test_correlated_noise_has_the_asked_deviation_and_is_shared_by_neighbours():
    grey = torch.full((3, 200, 200), 0.5)
    for grain in (0.3, 1.0):
        assert abs((coloured_noise(grey, 12, grain, 0, 3) - grey)[:, 10:-10, 10:-10].std() * 255 - 12) < 0.4
    shared = lambda n: (n[..., 1:] * n[..., :-1]).mean() / n.square().mean()
    n = coloured_noise(grey, 12, 1, 0.8, 3) - grey
    assert shared(n) > 0.5 > abs(shared(coloured_noise(grey, 12, 0.3, 0, 3) - grey))
    assert shared(n - luma(n)) > shared(luma(n))


def test_a_phone_leaves_less_noise_in_coarser_patches():
    grey = torch.full((3, 200, 200), 0.5)
    noise = gaussian_noise(grey, 10, 1) - grey
    left = phone_denoise(grey + noise, 40, 1, 0) - grey
    assert left.std() < 0.4 * noise.std() and (left[..., 2:] * left[..., :-2]).mean() > 0.4 * left.square().mean()
    step = (torch.arange(64) >= 32).float().expand(3, 64, 64) * 0.5 + 0.2
    assert phone_denoise(step, 20, 1, 1.5).max() > 0.7 + 0.02, "no bright rim from sharpening"
    assert torch.allclose(phone_denoise(grey, 30, 1, 1.5), grey, atol=1e-4)


def test_a_file_saved_twice_is_worse_than_once_and_not_shifted():
    x = picture()
    once, shifted, small = (resaved(x, 30, 95, *how) for how in ((1, 0, 0), (1, 3, 4), (0.6, 0, 0)))
    assert once.shape == shifted.shape == small.shape == x.shape
    for y in (shifted, small): assert all(psnr(y, x) > psnr(y.roll(1, d), x) for d in (1, 2))
    assert psnr(resaved(x, 30, 30, 1, 3, 4), x) < psnr(once, x)
    assert small.diff(dim=2).abs().mean() < once.diff(dim=2).abs().mean()


@pytest.mark.parametrize("seed", range(4))
def test_local_light_stays_in_the_dark(seed):
    "Something keeps its brightness, most of the picture is dark: what a darkened crop never shows."
    x = torch.full((3, 64, 64), 0.7)
    dark = low_light(x, 5).max()
    for y in (lamps(x, 5, 1, 0.1, 0.0, seed), screens(x, 5, 1, 0.08, 0.04, seed)):
        assert y.median() < 0.45 and y.min() >= dark - 1e-3 and y.max() > 1.8 * y.median() and y.max() <= 0.7 + 1e-3
    warm = lamps(x, 5, 1, 0.2, 0.6, seed)
    assert (warm[0] >= warm[2] - 1e-4).all() and (warm[0] - warm[2]).max() > 0.05


def test_highlights_keep_what_is_bright():
    x = torch.full((3, 64, 64), 0.4)
    x[:, 20:40, 20:40] = 0.9
    y = highlights(x, 4, 0.08, 0.2)
    assert abs(y[:, 26:34, 26:34].mean() - 0.9) < 0.02
    assert torch.allclose(y[:, :8, :8], low_light(x, 4)[:, :8, :8], atol=1e-3)


def test_curves_and_casts_do_what_they_say():
    x, ramp = picture(), torch.linspace(0, 1, 256).expand(3, 1, 256)
    for a, b in ((-0.25, 0.9), (-0.4, 1.3)):
        levels = [camera_exposure(x, s, a, b).mean() for s in (0, 1, 2, 4)]
        assert levels == sorted(levels, reverse=True) and abs(levels[0] - x.mean()) < 1e-5
        assert (camera_exposure(ramp, 2, a, b).diff() >= 0).all()
    for lifted in (tone(ramp, -0.6, 0.1), tone(ramp, 0.8, 0.1)):
        assert (lifted.diff() >= -1e-6).all() and abs(lifted[0, 0, 0] - 0.1) < 1e-6
    steep, plain, flat = ((tone(ramp, c, 0) - 0.5).abs().mean() for c in (0.8, 0, -0.6))
    assert steep > plain > flat
    grey = torch.full((3, 4, 4), 0.4)
    warm, cold = colour_cast(grey, 0.5, 0)[:, 0, 0], colour_cast(grey, -0.5, 0)[:, 0, 0]
    assert warm[0] > warm[1] > warm[2]
    assert cold[0] < cold[1] < cold[2]
    assert abs(srgb_to_linear(warm).mean() - srgb_to_linear(grey).mean()) < 1e-4


def test_other_kernels_are_aligned_and_range_from_aliased_to_soft():
    ramp, pairs = torch.linspace(0, 1, 64).expand(3, 64, 64), torch.arange(32) // 2
    board = (pairs[:, None] + pairs[None, :]).remainder(2).float().expand(3, -1, -1)
    for scale in (2, 4):
        error = shrink(ramp, scale, 0.4, 1.5, 30) - downscale(ramp, scale)
        assert error[:, :, 3:-3].abs().max() < 2e-3
    assert shrink(board, 2, 0.1, 1, 0).std() > 0.4 > 0.2 > shrink(board, 2, 0.6, 1, 0).std()
    with pytest.raises(FoundIRError, match="at least 4"): shrink(picture(3, 8), 4, 0.4, 1, 0)
    k = gaussian_kernel(1.0, 2.0, 0.0)
    at = torch.arange(-(k.shape[0] // 2), k.shape[0] // 2 + 1.0)
    assert abs(k.sum() - 1) < 1e-5
    assert abs((k.sum(0) * at**2).sum() - 4) < 0.1
    assert abs((k.sum(1) * at**2).sum() - 1) < 0.05
    for sigma, stretch in ((0, 1), (1, 0.5)):
        with pytest.raises(FoundIRError, match="Gaussian kernel"): gaussian_kernel(sigma, stretch)


def test_a_long_path_is_as_long_as_asked_and_keeps_light():
    dot = torch.zeros(3, 121, 121)
    dot[:, 60, 60] = 1
    seen = srgb_to_linear(long_motion_blur(dot, 80, 0, 0, 1))[0]
    at = torch.arange(121.0) - 60
    assert abs(seen.sum() - 1) < 0.05 and abs((seen.sum(0) * at).sum()) < 0.5
    assert abs((seen.sum(0) * at**2).sum() - 80**2 / 12) < 40 and (seen.sum(1) * at**2).sum() < 2
    with pytest.raises(FoundIRError, match="holds 0 to 30"): motion_kernel(31, 0, 0, 1)


def test_noise_behind_a_mosaic_is_shared_by_neighbours_and_stronger_in_red_and_blue():
    grey = torch.full((3, 200, 200), 0.5)
    noise = raw_noise(grey, 5e-3, 0, 2.2, 1.8, 1) - grey
    shared = (noise[..., 1:] * noise[..., :-1]).mean() / noise.square().mean()
    assert shared > 0.3 and noise[0].std() > noise[1].std() < noise[2].std() and noise.mean().abs() < 0.01
    for size in ((1, 1), (1, 9), (9, 1)): assert raw_noise(picture(*size), 1e-6, 0, 2, 2, 1).isfinite().all()


def test_a_gaussian_blur_has_its_width():
    dot = torch.zeros(3, 41, 41)
    dot[:, 20, 20] = 1
    seen, at = srgb_to_linear(gaussian_blur(dot, 3))[0], torch.arange(41.0) - 20
    assert abs((seen.sum(0) * at**2).sum() / seen.sum() - 9) < 0.3


@pytest.mark.parametrize("cover", [0.1, 0.3, 0.5])
def test_clouds_cover_what_they_should_and_cast_shadows(cover):
    black, grey = torch.zeros(3, 160, 160), torch.full((3, 160, 160), 0.5)
    above = cloud(black, cover, 4, 0, 3)[0]
    assert abs((above > 0.02).float().mean() - cover) < 0.15 and above.max() > 0.75
    dark = cloud(grey, cover, 4, 0.5, 3) < 0.47
    assert dark.any() and not (dark[0] & (above > 0.5)).any()


def test_drops_in_the_wind_are_longer_along_it():
    x = torch.linspace(0, 1, 128).expand(3, 128, 128).clone()
    assert torch.equal(raindrop(x, 0.2, 8, 2, 1), raindrop(x, 0.2, 8, 2, 1))
    hit = (blown_drops(x, 0.1, 6, 1, 3, 0, 2) - x).abs().amax(0) > 0.03
    assert 0.01 < hit.float().mean() < 0.4
    changes = [(hit.float().diff(dim=d)).abs().sum() for d in (0, 1)]
    assert changes[0] < 0.7 * changes[1], "upright drops change less from row to row"


def test_grain_is_strongest_in_the_mid_tones_and_grey():
    deviation = {u: (film_grain(torch.full((3, 96, 96), u), 20, 0.6, 1) - u).std().item() for u in (0.02, 0.5, 0.98)}
    assert abs(deviation[0.5] * 255 - 20) < 2 and max(deviation[0.02], deviation[0.98]) < 0.4 * deviation[0.5]
    change = film_grain(picture(), 20, 0.6, 1) - picture()
    assert torch.allclose(change[0], change[1], atol=1e-6)


def test_fading_takes_density():
    assert torch.allclose(fade(picture(), 0, 0, 0, 1), picture(), atol=2e-2)
    white, black, grey = (torch.full((3, 4, 4), v) for v in (1.0, 0.0, 0.5))
    assert torch.allclose(fade(white, 0.6, 0, 0, 1), white, atol=1e-4) and fade(black, 0.4, 0, 0, 1).min() > 0.1
    assert fade(grey, 0.5, 0, 0, 1).mean() > 0.55
    red, _, blue = fade(grey, 0.4, 0.3, 0, 1)[:, 0, 0]
    assert red > blue, "cyan fades first"
    paper = fade(white, 0, 0, 0.3, 1)[:, 0, 0]
    assert paper[0] > paper[1] > paper[2]


def test_scratches_and_specks_hide_little_and_more_with_their_number():
    grey = torch.full((3, 128, 128), 0.5)
    hit = lambda y: ((y - grey).abs().amax(0) > 0.05).float().mean().item()
    few, many = (hit(scratches(grey, n, 0.4, 0, 180, 1, 0.9, 1)) for n in (3, 15))
    assert 0 < few < many < 0.3 and torch.equal(scratches(grey, 0, 0.4, 0, 180, 1, 0.9, 1), grey)
    few, many = (hit(specks(grey, d, 1, 0.9, 1)) for d in (5e-4, 5e-3))
    assert 0 < few < many < 0.2
    upright = scratches(grey, 8, 1, 0, 3, 1, 0.9, 2)[0]
    assert upright.diff(dim=0).abs().mean() < 0.5 * upright.diff(dim=1).abs().mean()


def test_cracks_are_thin_and_flakes_cover_their_share():
    grey = torch.full((3, 160, 160), 0.3)
    darker = ((grey - cracks(grey, 6, 0.8, 1, 0.8, 1)).amax(0) > 0.05).float().mean()
    assert 0.02 < darker < 0.25
    for cover in (0.05, 0.25):
        bare = ((flaking(grey, cover, 0.5, 1) - grey).abs().amax(0) > 0.15).float().mean()
        assert abs(bare - cover) < 0.05
