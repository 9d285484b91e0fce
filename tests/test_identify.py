"Traces of mild damage: JPEG's step against the file's own table, the veil against known haze."
import io, math

import pytest
import torch
from PIL import Image

from foundir_v2.core import from_pil, load_image, repo_root, to_pil
from foundir_v2.degrade import Applied, apply
from foundir_v2.identify import Traces, block_coefficients, dark_channel, jpeg_step, veil

PHOTOS = ("barbara.png", "grace_hopper.jpg", "canal.jpg")


@pytest.fixture(scope="module", params=PHOTOS)
def photo(request): return load_image(repo_root()/"data/photos"/request.param)[:, :320, :320]


def saved(image, quality):
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "JPEG", quality=quality)
    file = Image.open(buffer)
    table = file.quantization[0]
    return from_pil(file), sorted(table[8 * u + v] for u, v in ((0, 1), (1, 0), (1, 1), (2, 0), (0, 2)))[2]


@pytest.mark.parametrize("quality", [75, 50, 25])
@pytest.mark.parametrize("crop", [(0, 0), (3, 6), (7, 1)])
def test_the_step_is_that_of_the_file_wherever_the_grid_lies(photo, quality, crop):
    decoded, step = saved(photo, quality)
    assert jpeg_step(decoded[:, crop[0]:, crop[1]:]) == pytest.approx(step, rel=.15)


def test_no_comb_where_jpeg_never_was_or_was_blurred_away():
    x = load_image(repo_root()/"data/photos/barbara.png")[:, :320, :320]
    blurred = torch.nn.functional.avg_pool2d(saved(x, 40)[0][None], 3, 1, 1)[0]
    assert jpeg_step(x) == jpeg_step(blurred) == 1


def test_coefficients_keep_the_energy_and_zero_is_flat():
    plane = torch.rand(64, 64, generator=torch.Generator().manual_seed(0)) * 255
    c = block_coefficients(torch.cat([plane] * 2))
    assert c.shape[1:] == (8, 8) and len(c) >= 7 * 15
    flat = block_coefficients(torch.full((32, 32), 100.))
    assert flat[:, 0, 0] == pytest.approx([800.] * len(flat), abs=.01) and flat.flatten(1)[:, 1:].abs().max() < .01


def test_more_haze_is_more_veil(photo):
    hazy = [apply(photo, [Applied("haze", dict(beta=b, airlight=.85, tint=0., seed=1))]) for b in (.4, .8, 1.6)]
    values = [veil(x) for x in (photo, *hazy)]
    assert values == sorted(values) and values[-1] > .3 > values[0]


def test_the_veil_does_not_depend_on_the_resolution(photo):
    double = torch.nn.functional.interpolate(photo[None], scale_factor=2, mode="bicubic")[0].clamp(0, 1)
    assert veil(double) == pytest.approx(veil(photo), abs=.03)


def test_the_dark_channel_is_the_least_of_channels_and_neighbours():
    x = torch.ones(3, 31, 31)
    x[1, 7, 7] = .2
    dark = dark_channel(x)
    assert dark.shape == (5, 5) and dark[0, 0] == pytest.approx(.2) and dark[-1, -1] == 1


@pytest.mark.parametrize("size", [(1, 1), (63, 300), (64, 64), (65, 400)])
def test_traces_of_any_size(size):
    found = Traces()(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    assert tuple(found) == Traces.measures and all(math.isfinite(v) for v in found.values()) == (min(size) >= 64)
