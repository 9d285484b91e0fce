import hashlib, json, subprocess, sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from foundir_v2.core import FoundIRError, generator, repo_root
from foundir_v2.degrade import (OPERATORS, Applied, apply, camera_noise, convolve, crop_to_multiple, defocus_blur, degrade, depth_map, disc_kernel, downscale,
                                draw_parameters, gaussian_noise, haze, linear_to_srgb, low_light, motion_blur, motion_kernel, rain, snow, srgb_to_linear, upsample_lq)
from foundir_v2.tasks import SUBTASKS, Integers, LogUniform, Step, SubTask, Uniform


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


def digest():
    h = hashlib.sha256()
    for name in SUBTASKS: h.update((degrade(picture(), name, 7) * 255).round().byte().numpy().tobytes())
    return h.hexdigest()


def test_another_process_makes_the_same_pixels():
    code = "import sys; sys.path.insert(0, 'tests'); import torch; torch.manual_seed(99); torch.rand(5); from test_degrade import digest; print(digest())"
    other = subprocess.run([sys.executable, "-c", code], cwd=repo_root(), capture_output=True, text=True, check=True)
    assert other.stdout.strip() == digest()


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(list(SUBTASKS)), st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**63 - 1))
def test_any_size_works_or_is_refused_in_one_line(name, h, w, seed):
    x, k = picture(h, w), SUBTASKS[name].scale
    if min(h, w) < k:
        with pytest.raises(FoundIRError, match="at least"): degrade(x, name, seed)
        return
    y = degrade(x, name, seed)
    assert y.shape == (3, h // k, w // k) and y.isfinite().all()


@pytest.mark.parametrize("bad, match", [(torch.rand(1, 3, 8, 8), "3, H, W"), (torch.rand(1, 8, 8), "3, H, W"), (torch.rand(3, 0, 8), "3, H, W"),
                                        (torch.zeros(3, 8, 8, dtype=torch.uint8), "255"), (torch.full((3, 8, 8), 2.0), "0, 1"), (torch.full((3, 8, 8), torch.nan), "nan"), ("x.png", "str")])
def test_bad_images_are_refused(bad, match):
    with pytest.raises(FoundIRError, match=match): degrade(bad, "haze", 0)


def test_unknown_names_are_refused():
    with pytest.raises(FoundIRError, match="motion_blur"): degrade(picture(), "fog", 0)
    with pytest.raises(FoundIRError, match="unknown operator 'smoke'.*haze"): draw_parameters(SubTask("x", "weather", (Step("smoke", {}),)), 0)
    with pytest.raises(FoundIRError, match="unknown range"): draw_parameters(SubTask("x", "weather", (Step("low_light", {"stops": (1, 2)}),)), 0)


def test_parameters_stay_in_their_ranges_and_cover_them():
    ranges = dict(a=Uniform(2, 4), b=LogUniform(0.01, 1), c=Integers(3, 5))
    task = SubTask("x", "weather", (Step("jpeg", ranges),))
    drawn = [draw_parameters(task, s)[0].parameters for s in range(300)]
    for k, r in ranges.items():
        v = [d[k] for d in drawn]
        assert r.low <= min(v) and max(v) <= r.high
    assert {d["c"] for d in drawn} == {3, 4, 5} and all(isinstance(d["c"], int) for d in drawn)
    assert abs(sum(d["b"] < 0.1 for d in drawn) / 300 - 0.5) < 0.12, "not even in the exponent"
    assert abs(sum(d["a"] < 3 for d in drawn) / 300 - 0.5) < 0.12


def test_parameters_replay_from_json():
    stored = json.loads(json.dumps(draw_parameters("rain_haze", 5)))
    assert torch.equal(apply(picture(), [Applied(*s) for s in stored]), degrade(picture(), "rain_haze", 5))


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
    assert abs((bent.sum(0) * at).sum()) < 0.2 and abs((bent.sum(1) * at).sum()) < 0.2 and not torch.equal(bent, motion_kernel(25, 0, 2, seed + 1))


def test_blur_keeps_light_and_flat_areas():
    flat = torch.full((3, 20, 20), 0.4)
    for y in (motion_blur(flat, 20, 30, 1, 0), defocus_blur(flat, 4)): assert torch.allclose(y, flat, atol=1e-4)
    point = torch.zeros(3, 41, 41)
    point[:, 20, 20] = 1
    for y in (motion_blur(point, 15, 30, 1, 0), defocus_blur(point, 3)): assert abs(srgb_to_linear(y).sum() / 3 - 1) < 0.02
    assert abs(disc_kernel(3).count_nonzero() - 37) <= 8


def test_noise_has_the_asked_variance():
    grey = torch.full((3, 200, 200), 0.5)
    assert abs((gaussian_noise(grey, 25, 3) - grey).std() * 255 - 25) < 0.4
    for light in (0.02, 0.2, 0.6):  # Poisson below 16 photons, Gaussian above
        flat = linear_to_srgb(torch.full((3, 200, 200), light))
        law = 1e-3 * light + 1e-3**2.18 * 2.718281828**1.2
        noisy = srgb_to_linear(camera_noise(flat, 1e-3, 0, 1))
        assert abs(noisy.var() / law - 1) < 0.05 and abs(noisy.mean() - light) < 2e-3


def test_haze_follows_koschmieder():
    x, d = picture(), depth_map(48, 56, 3)
    y = haze(x, 1.2, 0.9, 0.0, 3)
    t = torch.exp(-1.2 * d)
    assert torch.allclose(y, x * t + 0.9 * (1 - t), atol=1e-6) and d.min() == 0 and d.max() == 1
    assert sum((depth_map(48, 56, s)[:12].mean() > depth_map(48, 56, s)[-12:].mean()).item() for s in range(20)) >= 18, "far is not at the top"
    assert haze(x, 1.2, 0.9, 0.04, 3)[2].mean() > y[2].mean() > haze(x, 1.2, 0.9, -0.04, 3)[2].mean()


def test_weather_only_adds_light_on_black_and_more_with_density():
    black = torch.zeros(3, 64, 64)
    for f, extra in ((rain, dict(length=15, angle=20)), (snow, dict(radius=3, angle=20))):
        few, many = (f(black, density=d, strength=0.8, seed=1, **extra) for d in (0.004, 0.04))
        assert few.min() > -1e-4 and 0 < few.mean() < many.mean() and many.max() <= 1 + 1e-4


def test_rain_falls_in_its_direction():
    y = rain(torch.zeros(3, 128, 128), 0.005, 25, 0, 0.9, 1)[0]
    assert y.diff(dim=0).abs().mean() < 0.7 * y.diff(dim=1).abs().mean(), "vertical streaks change more across than along"


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
    assert all(0 <= m.min() and m.max() <= 1 for m in made) and upsample_lq(lq.double(), (48, 56), 1).dtype == torch.float64


def test_every_operator_is_pure():
    x = picture()
    for name in SUBTASKS:
        for operator, parameters in draw_parameters(name, 3): assert torch.equal(OPERATORS[operator](x, **parameters), OPERATORS[operator](x, **parameters)), operator


@pytest.mark.parametrize("step, words", [(Applied("smoke", {}), "choose one of"), (Applied("haze", {"betta": 1.0}), "its parameters are"), (Applied("motion_blur", dict(length=60.0, angle=0.0, wobble=0.0, seed=0)), "holds 0 to 30")])
def test_an_edited_table_that_cannot_be_replayed_is_one_clear_line(step, words):
    with pytest.raises(FoundIRError, match=words) as e: apply(picture(), iter([step]))
    assert "\n" not in str(e.value)
