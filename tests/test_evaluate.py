"Evaluation: the table, its means and intervals, the control, and the metrics file."
import json
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from foundir_v2 import evaluate as ev
from foundir_v2.core import FoundIRError
from foundir_v2.degrade import degrade, upsample_lq
from foundir_v2.evaluate import (OFFLINE, SHUFFLED, Pictures, compare, evaluate, gains, intervals, load_pictures,
                                 metrics_tree, restore, shuffled, summary, write_metrics)
from foundir_v2.iqa import score
from foundir_v2.tasks import CATEGORIES, SUBTASKS, paired_task


def photograph(seed, side=48):
    coarse = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0, 1)[0]


@pytest.fixture(scope="module")
def items():
    out = []
    for i in range(3):
        gt = photograph(i)
        for task in ("motion_blur", "gaussian_noise", "haze", "low_light", "sr_x4"):
            lq = degrade(gt, task, seed=i)
            out.append(SimpleNamespace(photo=f"p{i}", subtask=task, seed=100 + i, gt=gt, lq=lq,
                                       input=upsample_lq(lq, gt.shape[-2:])))
    return out


class Input:
    name = "input"

    def __call__(self, lq, *, subtask=None, seed=0): return upsample_lq(lq, [n * subtask.scale for n in lq.shape[-2:]])


class Oracle:
    name = "oracle"
    uses_ground_truth = True

    def __call__(self, gt, *, subtask=None, seed=0): return gt


class Grey:
    name = "grey"

    def __call__(self, lq, *, subtask=None, seed=0): return torch.full((3, 48, 48), 0.5)


class Remember:
    "Ignores its input but knows the answers: what a model that memorised the test set would do."
    name = "remember"

    def __init__(self, items): self.answers, self.i = [i.gt for i in items], -1
    def __call__(self, lq, *, subtask=None, seed=0): self.i += 1; return self.answers[self.i % len(self.answers)]


def test_one_row_per_picture_and_metric_with_the_library_scores(items):
    table = evaluate(Input(), items)
    assert list(table.columns) == list(ev.COLUMNS) and len(table) == len(items) * len(OFFLINE)
    assert not table.duplicated(["photo", "subtask", "seed", "metric"]).any()
    for item in items[::4]:
        row = table[(table.photo == item.photo) & (table.subtask == item.subtask) & (table.metric == "psnr")].iloc[0]
        assert row.value == pytest.approx(score("psnr", (item.input * 255).round() / 255, item.gt), abs=1e-4)
        assert (row.restorer, row.category, row.seed) == ("input", SUBTASKS[item.subtask].category, item.seed)


def test_the_restorer_gets_the_lq_the_sub_task_and_the_items_seed(items):
    seen = []
    class Spy(Input):
        def __call__(self, lq, *, subtask=None, seed=0):
            seen.append((lq, subtask, seed))
            return super().__call__(lq, subtask=subtask)
    evaluate(Spy(), items, ["psnr"])
    for (lq, task, seed), item in zip(seen, items, strict=True):
        assert lq is item.lq and task is SUBTASKS[item.subtask] and seed == item.seed


def test_captions_go_to_those_who_take_them_and_with_the_picture(items):
    told = [SimpleNamespace(**{**vars(i), "caption": f"a picture of {i.photo}"}) for i in items]
    seen = []
    class Reader(Input):
        def __call__(self, lq, *, subtask=None, seed=0, caption=""):
            seen.append(caption)
            return super().__call__(lq, subtask=subtask)
    class Open(Input):
        def __call__(self, lq, **told):
            seen.append(told["caption"])
            return super().__call__(lq, subtask=told["subtask"])
    for restorer in (Reader(), Open(), Input()): evaluate(restorer, told, ["psnr"])
    assert seen == [i.caption for i in told] * 2
    wrong = shuffled(told)
    assert all(w.caption != i.caption for w, i in zip(wrong, told)), "what the picture that is seen shows"
    seen.clear(); evaluate(Reader(), items, ["psnr"])
    assert set(seen) == {""}


def test_only_a_declared_bound_sees_the_ground_truth(items):
    assert evaluate(Oracle(), items, ["psnr"]).value.min() > 45, "the GT itself, rounded to 8 bits"
    class Undeclared(Oracle): uses_ground_truth = False
    with pytest.raises(FoundIRError, match="sr_x4"): evaluate(Undeclared(), items, ["psnr"])


def test_what_is_scored_is_what_a_file_would_hold(items):
    x = restore(Input(), items[0])
    assert torch.equal((x * 255).round() / 255, x) and x.min() >= 0 and x.max() <= 1


@pytest.mark.parametrize("output, words", [
    (torch.rand(3, 48, 47), "expected"),
    (torch.rand(1, 3, 48, 48), "expected"),
    (torch.full((3, 48, 48), float("nan")), "NaN")])
def test_wrong_output_is_refused_naming_restorer_picture_and_sub_task(items, output, words):
    restorer = lambda lq, *, subtask, seed: output
    restorer.name = "mine"
    with pytest.raises(FoundIRError, match=f"mine on p0, motion_blur.*{words}"): evaluate(restorer, items, ["psnr"])


def test_metrics_are_checked_before_anything_is_restored(items):
    class Never(Input):
        def __call__(self, *args, **kwargs): raise AssertionError("was run")
    with pytest.raises(FoundIRError, match="pnsr"): evaluate(Never(), items, ["psnr", "pnsr"])


def test_metrics_that_cannot_judge_small_pictures_are_nan_and_absent_from_the_file(items):
    table = evaluate(Input(), items[:2], ["psnr", "niqe"])
    assert table[table.metric == "niqe"].value.isna().all() and table[table.metric == "psnr"].value.notna().all()
    tree = metrics_tree(table)
    assert set(tree["mean"]["input"]) == {"psnr"} and "niqe" not in json.dumps(tree)


def test_an_empty_benchmark_is_an_error():
    with pytest.raises(FoundIRError, match="no items"): evaluate(Input(), [])


def test_shuffled_never_returns_a_photographs_own_picture(items):
    wrong = shuffled(items)
    assert [(w.photo, w.subtask, w.seed) for w in wrong] == [(i.photo, i.subtask, i.seed) for i in items]
    for w, i in zip(wrong, items):
        assert torch.equal(w.gt, i.gt) and w.lq.shape == i.lq.shape
        own = [k.lq for k in items if k.photo == i.photo and k.lq.shape == w.lq.shape]
        assert not any(torch.equal(w.lq, x) for x in own)
    assert all(torch.equal(a.lq, b.lq) for a, b in zip(wrong, shuffled(items))), "deterministic"


def test_shuffled_works_when_one_photograph_dominates_and_refuses_a_single_one(items):
    lopsided = [i for i in items if i.photo == "p0"] + items[-1:]
    for w, i in zip(shuffled(lopsided), lopsided): assert not torch.equal(w.lq, i.lq)
    with pytest.raises(FoundIRError, match="two photographs"): shuffled([i for i in items if i.photo == "p0"])


def test_the_control_unmasks_what_does_not_look_at_its_input(items):
    cost = lambda restorer: metrics_tree(
        compare({"x": restorer}, items, ["psnr"], control="x"), "x")["shuffled"]["cost"]["psnr"]
    assert cost(Input()) > 3 and abs(cost(Grey())) < 1e-6 and abs(cost(Remember(items))) < 1e-6


def test_compare_keeps_systems_apart_and_pairs_their_items(items):
    table = compare({"input": Input(), "grey": Grey()}, items, ["psnr"], control="grey")
    assert list(table.restorer.unique()) == ["input", "grey", SHUFFLED]
    a, b = (table[table.restorer == r].reset_index(drop=True) for r in ("input", "grey"))
    assert a[["photo", "subtask", "seed"]].equals(b[["photo", "subtask", "seed"]])
    with pytest.raises(FoundIRError, match="control"): compare({"input": Input()}, items, control="restored")
    with pytest.raises(FoundIRError, match="control"): compare({SHUFFLED: Input()}, items)


def rows(values, restorer="x", metric="psnr"):
    "values: category -> photo -> list of values."
    return pd.DataFrame([(restorer, c, f"{c}_task", p, k, metric, v) for c, photos in values.items()
                         for p, vs in photos.items() for k, v in enumerate(vs)],
                        columns=ev.COLUMNS)


def test_the_mean_is_the_mean_of_categories_not_of_items():
    table = rows({"deblur": {"a": [10.0] * 9}, "sr": {"a": [20.0]}})
    means = summary(table)[("psnr", "x")]
    assert means["deblur"] == 10 and means["sr"] == 20 and means["mean"] == 15
    assert list(means.index) == ["deblur", "sr", "mean"]


def test_categories_come_in_the_catalogues_order(items):
    assert list(summary(evaluate(Input(), items[::-1], ["psnr"])).index) == [*CATEGORIES, "mean"]


def test_stored_pairs_alone_are_scored_under_their_tasks_name_after_the_catalogue(items):
    murky = [SimpleNamespace(**vars(i) | dict(subtask=paired_task("murky"), lq=i.gt / 2)) for i in items[:10:5]]
    scores = compare({"input": Input(), "oracle": Oracle()}, [*murky, *items], ["psnr"], control="input")
    tree = metrics_tree(scores, "input")
    assert list(tree["categories"]) == [*CATEGORIES, "murky"] and tree["mean"]["input"]["psnr"] == pytest.approx(
        np.mean([c["input"]["psnr"] for c in tree["categories"].values()]), abs=1e-3)
    assert tree["gain"]["murky"]["oracle"]["psnr"][0] > 0 and "murky" in tree["shuffled"]["categories"]


def test_intervals_resample_photographs_not_items():
    photos = {f"p{i}": [float(v)] for i, v in enumerate(np.random.default_rng(0).normal(20, 3, 40))}
    once, often = intervals(rows({"sr": photos})), intervals(rows({"sr": {p: v * 5 for p, v in photos.items()}}))
    assert np.allclose(once[["low", "high"]], often[["low", "high"]]), (
        "copies of a photograph's value add no information")
    values = np.array([v[0] for v in photos.values()])
    half = 1.96 * values.std(ddof=1) / len(values) ** 0.5
    sr = once[once.category == "sr"].iloc[0]
    assert sr.low == pytest.approx(values.mean() - half, abs=0.25)
    assert sr.high == pytest.approx(values.mean() + half, abs=0.25)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng, hits = np.random.default_rng(1), 0
    for k in range(60):
        row = intervals(
            rows({"sr": {f"p{i}": [v] for i, v in enumerate(rng.normal(0, 1, 30))}}), resamples=300, seed=k).query(
                "category == 'sr'").iloc[0]
        hits += row.low <= 0 <= row.high
    assert 50 <= hits <= 60


def test_one_photograph_gives_an_interval_of_no_width_rather_than_an_error():
    row = intervals(rows({"sr": {"a": [1.0, 3.0]}})).iloc[0]
    assert row.low == row.high == 2.0


def test_a_photograph_that_is_missing_from_a_category_does_not_break_the_mean():
    table = intervals(rows({"sr": {"a": [1.0], "b": [3.0]}, "deblur": {"a": [10.0]}}))
    assert table[["low", "high"]].notna().all().all()


def test_intervals_on_two_levels_cover_the_mean_where_those_over_photographs_do_not():
    "Trainings and photographs both differ, and all trainings see the same photographs."
    rng, covered = np.random.default_rng(1), dict(two=0, one=0)
    for k in range(60):
        trainings, photos = rng.normal(0, 1, (12, 1)), rng.normal(0, 2, (1, 25))
        values = trainings + photos + rng.normal(0, .3, (12, 25))
        table = pd.concat(
            [rows({"sr": {f"p{i}": [v] for i, v in enumerate(row)}}).assign(run=n) for n, row in enumerate(values)])
        for name, above in dict(two="run", one=None).items():
            row = intervals(table, resamples=200, seed=k, above=above).query("category == 'sr'").iloc[0]
            covered[name] += row.low <= 0 <= row.high
    assert covered["two"] >= 52 and covered["two"] > covered["one"], covered


def test_a_training_that_saw_fewer_photographs_weighs_by_what_it_saw():
    both, one = rows({"sr": {"a": [1.0], "b": [3.0]}}).assign(run=0), rows({"sr": {"a": [1.0]}}).assign(run=1)
    row = intervals(pd.concat([both, one]), above="run").query("category == 'sr'").iloc[0]
    assert (row.low, row.high) == (1, 3)


def test_gains_are_paired_and_positive_for_better():
    table = pd.concat([rows({"sr": {"a": [20.0], "b": [30.0]}}, "input"),
                       rows({"sr": {"b": [31.0], "a": [22.0]}}, "x"),
                       rows({"sr": {"a": [0.5], "b": [0.4]}}, "input", "stlpips"),
                       rows({"sr": {"a": [0.3], "b": [0.45]}}, "x", "stlpips")])
    out = gains(table).set_index(["metric", "photo"]).value
    assert out["psnr", "a"] == 2 and out["psnr", "b"] == 1
    assert out["stlpips", "a"] == pytest.approx(0.2) and out["stlpips", "b"] == pytest.approx(-0.05)
    with pytest.raises(FoundIRError, match="choose"): gains(table, "bicubic")


def test_the_metrics_file_has_the_agreed_layout(items, tmp_path):
    systems = {"input": Input(), "restored": Grey(), "shipped": Grey(), "vae": Oracle()}
    tree = metrics_tree(compare(systems, items, control="restored"), "restored")
    path = write_metrics(tree, tmp_path/"evaluate.json")
    again = json.loads(path.read_text())
    assert again == tree and list(again["categories"]) == list(CATEGORIES)
    for node in (*again["categories"].values(), again["mean"]):
        assert list(node) == list(systems) and all(set(v) == set(OFFLINE) for v in node.values())
        assert all(math.isfinite(x) for v in node.values() for x in v.values())
    assert again["items"] == 15 and again["photographs"] == 3 and again["shuffled"]["system"] == "restored"
    for c in (*CATEGORIES, "mean"):
        low, high = again["interval95"][c]["input"]["psnr"]
        value = (again["categories"] | {"mean": again["mean"]})[c]["input"]["psnr"]
        assert low - 1e-3 <= value <= high + 1e-3
        gain = again["gain"][c]["vae"]["psnr"]
        assert gain[0] > 0 and gain[1] <= gain[0] + 1e-3 and gain[0] <= gain[2] + 1e-3


def test_equal_tables_give_equal_bytes(items, tmp_path):
    a, b = (write_metrics(metrics_tree(compare({"input": Input()}, items, ["psnr", "piqe"], control="input"), "input"),
                          tmp_path/n).read_bytes() for n in ("a", "b"))
    assert a == b


def test_pictures_keep_the_first_item_of_every_sub_task_from_every_system(items, tmp_path):
    kept = Pictures()
    compare({"input": Input(), "grey": Grey()}, items, ["psnr"], control="grey", watch=kept)
    assert kept.save(tmp_path)
    again = load_pictures(tmp_path)
    assert set(again) == {i.subtask for i in items}
    for item in items[:5]:
        shown = again[item.subtask]
        assert set(shown) == {"photograph", "input", "grey", SHUFFLED}
        assert (shown["photograph"] - item.gt).abs().max() < 0.5 / 255 + 1e-6
        assert (shown["input"] - item.input).abs().max() < 0.5 / 255 + 1e-6
    with pytest.raises(FoundIRError, match="no pictures"): load_pictures(tmp_path/"nothing")


def test_what_cannot_be_compared_is_refused_before_any_work(items):
    class Busy(Grey):
        def __call__(self, lq, **kw): raise AssertionError("work was done")
    with pytest.raises(FoundIRError, match="given the ground truth"):
        compare({"busy": Busy(), "oracle": Oracle()}, items, control="oracle")
    with pytest.raises(FoundIRError, match="name every sub-task once"): compare({"busy": Busy()}, [items[0], *items])
    with pytest.raises(FoundIRError): compare({"busy": Busy()}, [i for i in items if i.photo == "p0"], control="busy")


def test_a_metric_without_a_word_leaves_no_mean():
    rows = [dict(zip(ev.COLUMNS, (name, "weather", "haze", "p", 1, "niqe", float("nan"))))
            for name in ("input", "grey", SHUFFLED)]
    tree = metrics_tree(pd.DataFrame(rows), "grey")
    assert tree["mean"] == {} and tree["shuffled"]["cost"] == {}
    with pytest.raises(FoundIRError, match="no control of 'gray'"): metrics_tree(pd.DataFrame(rows), "gray")
