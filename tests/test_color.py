"Colour fixes: what they copy from the reference, what they keep, and what they refuse."
import pytest, torch
from foundir_v2.color import COLOR_FIXES, adain, fix_color, low_pass, wavelet_fix
from foundir_v2.core import FoundIRError


def pair(*shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, generator=g), 0.3 + 0.4 * torch.rand(*shape, generator=g)


def test_adain_copies_mean_and_std_of_each_picture_and_channel():
    image, reference = pair(2, 3, 17, 9)
    out = adain(image, reference)
    torch.testing.assert_close(out.mean((-2, -1)), reference.mean((-2, -1)), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.std((-2, -1)), reference.std((-2, -1)), atol=1e-4, rtol=0)
    torch.testing.assert_close(out[1], adain(image[1], reference[1]))


def test_adain_undoes_an_affine_cast_exactly():
    image, _ = pair(3, 32, 32)
    gain, offset = torch.tensor([0.5, 1.0, 0.8])[:, None, None], torch.tensor([0.1, -0.2, 0.3])[:, None, None]
    torch.testing.assert_close(adain(image * gain + offset, image), image, atol=1e-4, rtol=0)


def test_wavelet_keeps_detail_and_takes_the_coarse_part():
    image, reference = pair(3, 64, 48)
    out = wavelet_fix(image, reference)
    torch.testing.assert_close(out - image, low_pass(reference - image), atol=1e-6, rtol=0)
    torch.testing.assert_close(wavelet_fix(image, image), image)


def test_low_pass_removes_fine_waves_and_keeps_coarse_ones():
    x = torch.arange(512.0)
    wave = lambda period: torch.sin(2 * torch.pi * x / period).expand(1, 8, -1)
    gain = lambda period: (low_pass(wave(period))[..., 128:384].std() / wave(period)[..., 128:384].std()).item()
    assert gain(8) < 0.01 and gain(256) > 0.8


@pytest.mark.parametrize("name", COLOR_FIXES)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 3), (33, 20)])
def test_every_fix_takes_every_size_and_gives_a_picture(name, size):
    out = fix_color(*pair(3, *size), name)
    assert out.shape == (3, *size) and torch.isfinite(out).all() and 0 <= out.min() and out.max() <= 1


def test_flat_pictures_take_the_reference_colour():
    flat, grey = torch.full((3, 8, 8), 0.9), torch.full((3, 8, 8), 0.25)
    for name in ("adain", "wavelet"): torch.testing.assert_close(fix_color(flat, grey, name), grey, atol=1e-4, rtol=0)
    torch.testing.assert_close(fix_color(flat, grey, "none"), flat)


def test_refusals_say_what_to_do():
    image, reference = pair(3, 8, 8)
    with pytest.raises(FoundIRError, match="none, adain, wavelet"): fix_color(image, reference, "lab")
    with pytest.raises(FoundIRError, match="size"): fix_color(image, reference[:, :4], "adain")
