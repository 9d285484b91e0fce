"The report: tables, figures and gate maps from the files of a run, and what it says when they are missing or damaged."
import json
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure

from foundir_v2.core import FoundIRError
from foundir_v2.degrade import degrade
from foundir_v2.evaluate import Pictures, compare, load_pictures, metrics_tree, write_metrics
from foundir_v2.moe import MoEScheduler
from foundir_v2.report import (apart_table, before_after, control_table, gate_shares, gates_by_task, gains_table,
                               in_and_out, metrics_table, outside_part, plot_course, plot_gains, plot_gates, plot_loss,
                               read_metrics, read_mixture, read_stages, read_steps, record_gates, write_figures)
from foundir_v2.classical import Bicubic, Levels


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    items = []
    for i in range(2):
        coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(i))
        gt = torch.nn.functional.interpolate(coarse, size=(48, 48), mode="bicubic").clamp(0, 1)[0]
        items += [SimpleNamespace(photo=f"p{i}", subtask=t, seed=i, gt=gt, lq=degrade(gt, t, seed=i))
                  for t in ("motion_blur", "haze", "low_light", "sr_x2")]
    pictures = Pictures()
    tree = metrics_tree(compare({"input": Bicubic(), "restored": Levels()}, items, ["psnr", "stlpips"],
                                control="restored", watch=pictures),
                        "restored")
    write_metrics(tree, folder/"evaluate.json")
    pictures.save(folder/"pictures")
    return folder


def texts(figure): return [t.get_text() for t in figure.findobj(lambda a: hasattr(a, "get_text")) if t.get_text()]


def test_the_table_holds_the_files_numbers_with_the_direction(run):
    tree = read_metrics(run/"evaluate.json")
    table = metrics_table(tree)
    assert list(table.index) == ["deblur", "weather", "lowlight", "sr", "mean"]
    assert list(table.columns) == [("psnr ↑", "input"), ("psnr ↑", "restored"), ("stlpips ↓", "input"),
                                   ("stlpips ↓", "restored")]
    assert table.loc["sr", ("stlpips ↓", "input")] == tree["categories"]["sr"]["input"]["stlpips"]
    assert table.loc["mean", ("psnr ↑", "restored")] == tree["mean"]["restored"]["psnr"]


def test_in_and_out_of_distribution_stand_side_by_side(run):
    tree = read_metrics(run/"evaluate.json")
    alone = in_and_out(tree)
    assert list(alone.index) == [("in", c) for c in ("deblur", "weather", "lowlight", "sr", "mean")]
    assert alone.loc[("in", "mean"), "restored"] == tree["mean"]["restored"]["psnr"]
    with pytest.raises(FoundIRError, match="set `out_of_distribution`"): outside_part(tree)
    out = {"weather": {"input": {"psnr": 12.0}, "restored": {"psnr": 14.0}}}
    gain = {"weather": {"restored": {"psnr": [2.0, 1.5, 2.5]}}}
    clean = {"mean": {"restored": {"psnr": 33.0}}, "worst": {"restored": {"psnr": 29.0}}}
    beside = {"version": 1, "mean": out["weather"], "gain": gain, "items": 1, "clean": clean}
    tree |= {"out_of_distribution": out, "outside": beside}
    both = in_and_out(tree)
    assert both.loc[("out", "weather"), "restored"] == 14 and both.loc[("in", "sr")].equals(alone.loc[("in", "sr")])
    assert gains_table(outside_part(tree)).loc["weather", "restored"] == "+2.00 [+1.50, +2.50]"
    assert apart_table(tree).restored.to_dict() == {("clean", "mean"): 33.0, ("clean", "worst"): 29.0}
    with pytest.raises(FoundIRError, match="no values of 'niqe'"): in_and_out(tree, "niqe")


def test_gains_are_printed_with_sign_and_interval(run):
    tree = read_metrics(run/"evaluate.json")
    table = gains_table(tree)
    assert list(table.columns) == ["restored"] and list(table.index)[-1] == "mean"
    value, low, high = tree["gain"]["lowlight"]["restored"]["psnr"]
    assert table.loc["lowlight", "restored"] == f"{value:+.2f} [{low:+.2f}, {high:+.2f}]" and value > 0


def test_bars_have_the_heights_of_the_gains(run):
    tree = read_metrics(run/"evaluate.json")
    figure = plot_gains(tree, "stlpips")
    heights = [p.get_height() for p in figure.axes[0].patches]
    assert heights == pytest.approx([tree["gain"][c]["restored"]["stlpips"][0] for c in (*tree["categories"], "mean")])


@pytest.mark.parametrize("arguments, words", [
    (dict(metric="musiq"), "musiq"),
    (dict(systems=["ours"]), "choose from restored")])
def test_unknown_gains_are_refused(run, arguments, words):
    with pytest.raises(FoundIRError, match=words): plot_gains(read_metrics(run/"evaluate.json"), **arguments)


def test_the_control_shows_its_cost(run):
    table = control_table(read_metrics(run/"evaluate.json"))
    assert table.cost["psnr"] == pytest.approx(table.restored["psnr"] - table.shuffled["psnr"], abs=1e-3)
    assert table.cost["psnr"] > 0
    assert table.cost["stlpips"] == pytest.approx(table.shuffled["stlpips"] - table.restored["stlpips"], abs=1e-3)
    with pytest.raises(FoundIRError, match="control"): control_table({"categories": {}, "mean": {}})


@pytest.mark.parametrize("content, words", [
    (None, "evaluation first"), ("", "JSON"), ("[]", "categories"), ('{"mean": {}}', "categories")])
def test_a_missing_or_foreign_metrics_file_is_one_line(tmp_path, content, words):
    if content is not None: (tmp_path/"m.json").write_text(content)
    with pytest.raises(FoundIRError, match=words) as e: read_metrics(tmp_path/"m.json")
    assert "\n" not in str(e.value)


def test_before_and_after_has_a_row_per_sub_task_in_the_columns_asked_for(run):
    pictures = load_pictures(run/"pictures")
    figure = before_after(pictures, "weather", ["photograph", "input", "restored"])
    assert {"photograph", "input", "restored", "haze"} <= set(texts(figure)) and "sr_x2" not in texts(figure)
    with pytest.raises(FoundIRError, match="deblur"): before_after(pictures, "denoise", ["input"])
    murky = before_after(pictures | {"murky": pictures["haze"]}, "murky", ["input", "restored"])
    assert "murky" in texts(murky) and "haze" not in texts(murky)
    with pytest.raises(FoundIRError, match="ours.*haze"): before_after(pictures, "weather", ["ours"])


def records(n):
    return [dict(kind="step", step=i, loss=1 / i, lr={"unet": 1e-3 / i, "moe": 2e-3 / i}) for i in range(1, n + 1)]


def test_steps_are_read_from_a_folder_or_a_file_and_other_records_left_out(tmp_path):
    lines = [dict(kind="mixture", step=0, weights={"a": 1}, scores={"a": 2}), *records(4)]
    (tmp_path/"log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines))
    for source in (tmp_path, tmp_path/"log.jsonl"):
        log = read_steps(source)
        assert list(log.step) == [1, 2, 3, 4] and list(log.loss) == [1, 1 / 2, 1 / 3, 1 / 4]
        assert log["lr.moe"][1] == 1e-3


@pytest.mark.parametrize("content, words", [
    (None, "no training log"), ('{"kind": "step", "st', "damaged"), ("", "no training step"),
    ('{"kind": "mixture", "step": 0}\n', "no training step")])
def test_a_missing_or_damaged_log_is_one_line(tmp_path, content, words):
    if content is not None: (tmp_path/"log.jsonl").write_text(content)
    with pytest.raises(FoundIRError, match=words): read_steps(tmp_path/"log.jsonl")


def test_a_stage_without_steps_is_left_out_and_a_broken_one_is_not(tmp_path):
    for name, steps in (("zero", 0), ("one", 4)):
        (tmp_path/name).mkdir()
        (tmp_path/name/"config.json").write_text(json.dumps(dict(steps=steps)))
        (tmp_path/name/"log.jsonl").write_text("")
    assert read_stages({"stage 0": tmp_path/"zero"}) == {}
    for broken in ("one", "nowhere"):
        with pytest.raises(FoundIRError): read_stages({"stage": tmp_path/broken})


def test_the_loss_curve_is_the_running_mean(tmp_path):
    log = pd.json_normalize(records(6))
    figure = plot_loss({"one": log, "two": log[3:]}, window=2)
    single, mean = figure.axes[0].get_lines()
    assert list(single.get_ydata()) == list(log.loss) and mean.get_ydata()[3] == pytest.approx((1 / 3 + 1 / 4) / 2)
    assert mean.get_ydata()[0] == 1
    rates = [a for a in figure.axes if "learning rate" in a.get_ylabel()]
    assert len(rates) == 2 and max(rates[0].get_lines()[0].get_ydata()) == 2e-3
    with pytest.raises(FoundIRError): plot_loss({})
    logarithm = log.assign(loss=[-1., -2., -2.5, 0.5, -3., -3.])
    bottom, top = plot_loss({"psnr": logarithm}).axes[0].get_ylim()
    assert bottom < -3 and top > .4 and figure.axes[0].get_ylim()[0] == 0   # a loss below zero is seen
    assert isinstance(plot_loss({"one step, no rate": pd.DataFrame([dict(step=1, loss=0.5)])}), Figure)


def test_the_mixture_file_is_checked(tmp_path):
    path = tmp_path/"mixture.csv"
    with pytest.raises(FoundIRError, match="training"): read_mixture(path)
    path.write_text("step,stage,task,weight\n0,0,haze,1\n")
    with pytest.raises(FoundIRError, match="score"): read_mixture(path)
    path.write_text("step,stage,task,weight,score\n0,0,haze,1,0.2\n")
    assert read_mixture(path).score[0] == 0.2
    path.write_text("")
    with pytest.raises(FoundIRError): read_mixture(path)


def test_the_course_shows_where_stages_begin_and_gains_within_them():
    told = [(0, 0, None), (10, 1, 20.), (20, 1, 21.), (20, 2, 30.), (30, 2, 30.5)]
    fig = plot_course(pd.DataFrame(told, columns=["step", "stage", "score"]).assign(task="haze", weight=1.))
    left, right = fig.axes
    assert [float(line.get_xdata()[0]) for line in left.get_lines()[1:]] == [10, 20]
    assert right.get_lines()[0].get_ydata().tolist() == [0, 1, 0, .5]


@pytest.fixture
def moe():
    torch.manual_seed(0)
    return MoEScheduler(16, layers=1, heads=2).eval()


def test_recorded_gates_are_those_the_model_used(moe):
    z = torch.randn(2, 16, 6, 5)
    with record_gates(torch.nn.Sequential(moe)) as maps, torch.no_grad(): moe(z)
    assert len(maps) == 1 and torch.allclose(maps[0], moe.gate_weights(z).mean(0)) and not maps[0].requires_grad
    moe(z)
    assert len(maps) == 1 and not moe._forward_pre_hooks, "the listener is gone"


def test_the_listener_goes_even_when_the_run_fails(moe):
    with pytest.raises(ZeroDivisionError):
        with record_gates(moe): 1 / 0
    assert not moe._forward_pre_hooks


@pytest.mark.parametrize("model", [
    torch.nn.Linear(2, 2),
    torch.nn.ModuleList([MoEScheduler(16, layers=1, heads=2), MoEScheduler(16, layers=1, heads=2)])])
def test_models_without_exactly_one_gate_are_refused(model):
    with pytest.raises(FoundIRError, match="MoE"):
        with record_gates(model): pass


def test_gates_by_task_average_over_steps_and_sum_to_one(moe):
    pictures = {"haze": torch.rand(3, 6, 5), "rain": torch.rand(3, 6, 5)}
    seen = []
    def two_steps(x):
        for k in (1, 2):
            z = x.repeat(6, 1, 1)[None, :16] * k
            seen.append(moe.gate_weights(z)[0]); moe(z)
    with torch.no_grad(): gates = gates_by_task(two_steps, moe, pictures)
    assert torch.allclose(gates["haze"], (seen[0] + seen[1]) / 2, atol=1e-6)
    shares = gate_shares(gates, ["spatial", "channel", "sparse"])
    assert shares.sum(axis=1).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert shares.loc["rain", "sparse"] == pytest.approx(float(gates["rain"][2].mean()))
    figure = plot_gates(gates, pictures, ["spatial", "channel", "sparse"])
    assert {"haze", "rain"} <= set(texts(figure))
    with pytest.raises(FoundIRError, match="never used"): gates_by_task(lambda x: None, moe, pictures)
    with pytest.raises(ValueError): gate_shares(gates, ["spatial"])


def test_figures_are_written_with_equal_bytes(run, tmp_path):
    tree = read_metrics(run/"evaluate.json")
    a, b = (write_figures({"gains": plot_gains(tree)}, tmp_path/n)[0] for n in "ab")
    assert a.name == "gains.png" and a.read_bytes() == b.read_bytes() and a.read_bytes().startswith(b"\x89PNG")
