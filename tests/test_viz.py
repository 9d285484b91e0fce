import matplotlib.pyplot as plt
import pandas as pd
import pytest
import torch

from foundir_v2.core import FoundIRError
from foundir_v2.viz import grid, heatmaps, plot_mixture, save_figure, strip

X = torch.rand(3, 10, 14, generator=torch.Generator().manual_seed(0))
TABLE = pd.DataFrame([(0, "a", 0.5, 20.0), (0, "b", 0.5, 10.0), (5, "a", 0.4, 21.0), (5, "b", 0.6, 9.0)],
                     columns=["step", "task", "weight", "score"])


def pictures(fig): return [ax for ax in fig.axes if ax.images]


def test_strip_shows_every_picture_with_its_label():
    fig = strip([X, X[:1], X[0], X[:, ::2, ::2].double() * 3 - 1], ["a", "b", "c", "d"])
    assert [ax.get_title() for ax in pictures(fig)] == ["a", "b", "c", "d"]
    assert torch.allclose(torch.as_tensor(pictures(fig)[0].images[0].get_array()).float(), X.permute(1, 2, 0))
    assert pictures(fig)[3].images[0].get_array().max() <= 1
    assert not plt.get_fignums()


def test_grid_leaves_gaps_empty():
    fig = grid([[X, X], [X]], ["r", "s"], ["c", "d"])
    assert len(pictures(fig)) == 3 and len(fig.axes) == 4 and fig.axes[2].get_ylabel() == "s"
    assert fig.axes[1].get_title() == "d"


def test_heatmaps_share_one_scale():
    fig = heatmaps([X[0] * 0.1, X[1]], ["a", "b"])
    assert len({tuple(ax.images[0].get_clim()) for ax in pictures(fig)}) == 1 and len(fig.axes) == 3
    assert pictures(heatmaps(X, vmin=-1, vmax=2))[0].images[0].get_clim() == (-1, 2)


def test_mixture_curves_hold_the_table():
    fig = plot_mixture(TABLE.sample(frac=1, random_state=1))
    weights, gains = ({tuple(line.get_ydata()) for line in ax.lines} for ax in fig.axes)
    assert weights == {(0.5, 0.4), (0.5, 0.6)} and gains == {(0.0, 1.0), (0.0, -1.0)}
    assert len(plot_mixture(TABLE.assign(score=float("nan"))).axes) == 1


@pytest.mark.parametrize("call, match", [
    (lambda: strip([]), "nothing"),
    (lambda: strip([X], ["a", "b"]), "1 pictures but 2"),
    (lambda: strip([X[None]]), "batch"),
    (lambda: grid([]), "nothing"),
    (lambda: grid([[X]], ["a", "b"]), "row"),
    (lambda: grid([[X]], None, ["a", "b"]), "column"),
    (lambda: heatmaps([]), "nothing"),
    (lambda: heatmaps([X]), "strip"),
    (lambda: heatmaps([X[0]], ["a", "b"]), "1 maps but 2"),
    (lambda: plot_mixture(TABLE[["step", "score"]]), "task, weight"),
    (lambda: plot_mixture(TABLE[:0]), "empty")])
def test_errors_are_one_line(call, match):
    with pytest.raises(FoundIRError, match=match) as e: call()
    assert "\n" not in str(e.value) and not plt.get_fignums()


def test_equal_figures_are_equal_files(tmp_path):
    a, b = (save_figure(strip([X]), tmp_path / "new" / f"{n}.png") for n in "ab")
    assert a.read_bytes() == b.read_bytes()
    assert [p.name for p in sorted((tmp_path / "new").iterdir())] == ["a.png", "b.png"]
