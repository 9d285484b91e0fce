"Tiles: where they lie, how they are weighted, and that merging changes nothing that it should not."
import pytest, torch
from hypothesis import given, settings, strategies as st
from foundir_v2.core import FoundIRError
from foundir_v2.tiling import TileGrid, gaussian_weights, map_tiles, tile_grid, tile_starts, total_weights


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(1, 20), st.floats(0, 0.9), st.sampled_from([1, 2, 4]))
def test_starts_cover_overlap_and_waste_nothing(length, tile, overlap, multiple):
    length, tile = length * multiple, tile * multiple
    starts = tile_starts(length, tile, overlap, multiple)
    assert starts[0] == 0 and all(s % multiple == 0 for s in starts)
    if length <= tile: assert starts == (0,); return
    assert starts[-1] + tile == length
    steps = [b - a for a, b in zip(starts, starts[1:])]
    stride = max(int(tile * (1 - overlap)) // multiple, 1) * multiple
    # at least the overlap, evenly spread
    assert all(0 < s <= stride for s in steps) and max(steps) - min(steps) <= multiple
    assert (len(starts) - 2) * stride + tile < length  # one tile less would not do


def test_overlap_is_what_it_says():
    for overlap in (0, 0.25, 0.5, 0.75):
        starts = tile_starts(64 + 6 * 16, 64, overlap)
        assert {a + 64 - b for a, b in zip(starts, starts[1:])} == {int(64 * overlap)} or overlap == 0
    assert tile_starts(256, 64, 0) == (0, 64, 128, 192)


def test_tile_counts_of_the_paper():
    count = lambda h, w: len(tile_grid(h // 8, w // 8, 128, 0.5, 4).corners)
    assert [count(1024, 1024), count(2048, 2048), count(2144, 3840), count(4320, 7680)] == [1, 9, 28, 112]


@pytest.mark.parametrize("bad", [
    dict(overlap=1.0), dict(overlap=-0.5), dict(tile=10, multiple=4), dict(tile=0), dict(tile=-8),
    dict(length=63, multiple=2)])
def test_impossible_settings_are_refused(bad):
    with pytest.raises(FoundIRError, match="tile"): tile_starts(**{"length": 64, "tile": 32, "overlap": 0.25, **bad})


def test_weights():
    w = gaussian_weights(64)
    assert torch.equal(w, w.flip(0)) and (w > 0).all() and (w.diff()[:31] > 0).all()
    x = (torch.arange(64.0) - 31.5) / 64
    torch.testing.assert_close(w, torch.exp(-x**2 / 0.02))
    brute = torch.zeros(40, 56)
    grid = tile_grid(40, 56, 16, 0.5)
    for top, left in grid.corners:
        grid.crop(brute, top, left).add_(gaussian_weights(16)[:, None] * gaussian_weights(16))
    torch.testing.assert_close(total_weights(grid.tops, 40, 16)[:, None] * total_weights(grid.lefts, 56, 16), brute,
                               atol=0, rtol=1e-5)


def run(function, x, grid, **options):
    return map_tiles(lambda tiles: function(torch.stack([grid.crop(x[t.picture], t.top, t.left) for t in tiles])),
                     len(x), grid, **options)


@pytest.mark.parametrize("size", [(1, 1), (1, 40), (31, 17), (64, 64), (129, 97)])
@pytest.mark.parametrize("overlap", [0, 0.25, 0.5])
def test_a_local_function_does_not_notice_tiles(size, overlap):
    x = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(run(lambda t: 1 - t, x, tile_grid(*size, 32, overlap), batch_size=5), 1 - x, atol=1e-6,
                               rtol=0)


def test_a_single_tile_is_untouched():
    x = torch.rand(2, 3, 30, 20, dtype=torch.bfloat16)
    out = run(lambda t: t.flip(-1), x, tile_grid(30, 20, 32, 0.5))
    assert out.dtype == x.dtype and torch.equal(out, x.flip(-1))


def test_merging_is_the_weighted_mean():
    "Tiles of constant value: each pixel is the mean of the tiles over it, weighted by their Gaussians."
    grid = TileGrid(8, 12, 8, 8, (0,), (0, 4))
    out = map_tiles(lambda tiles: torch.stack([torch.full((1, 8, 8), float(t.left)) for t in tiles]), 1, grid)
    w = gaussian_weights(8)
    assert (out[..., :4] == 0).all() and torch.allclose(out[..., 8:], torch.tensor(4.0))
    torch.testing.assert_close(out[0, 0, 3, 4:8], 4 * w[:4] / (w[:4] + w[4:]))


def test_batches_do_not_change_the_result():
    x = torch.rand(3, 1, 50, 70)
    grid, seen = tile_grid(50, 70, 32, 0.25), []
    results = [run(lambda t: seen.append(len(t)) or t**2, x, grid, batch_size=b) for b in (1, 4, 100)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    n = 3 * len(grid.corners)
    assert seen == [1] * n + [4] * (n // 4) + [n % 4] * (n % 4 > 0) + [n]


def test_scaled_output():
    x = torch.rand(1, 2, 50, 70)
    grow = lambda t: t.repeat_interleave(4, -1).repeat_interleave(4, -2)
    torch.testing.assert_close(run(grow, x, tile_grid(50, 70, 32, 0.25), batch_size=2, scale=4), grow(x), atol=1e-6,
                               rtol=0)


def test_half_precision_tiles_are_merged_in_float32():
    x = torch.rand(1, 2, 64, 64)
    out = run(lambda t: t.bfloat16(), x, tile_grid(64, 64, 32, 0.5))
    assert out.dtype == torch.float32 and torch.isfinite(out).all()
    torch.testing.assert_close(out, x.bfloat16().float(), atol=1e-6, rtol=0)
