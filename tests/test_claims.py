"The paper's experiments: variants that say what their names do, and claims that are judged by their intervals."
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foundir_v2.claims import Claim, judge_claims, law_of, mixture_points, read_claims, steps_to_reach, tell_apart
from foundir_v2.config import ConfigError
from foundir_v2.experiment import KEY, read_experiment, settings_hash, stages_of, variant_params

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "nbs/experiments"
EXPERIMENT = read_experiment(HERE / "variants.yaml")
TOLD = {n: variant_params((ROOT / "params.yaml").read_text(), EXPERIMENT.layers(n), 0) for n in EXPERIMENT.variants}


def test_no_two_variants_are_trained_alike():
    hashes = Counter(settings_hash(TOLD[n], v, EXPERIMENT.metrics) for n, v in EXPERIMENT.variants.items())
    assert max(hashes.values()) == 1


@pytest.mark.parametrize("name", EXPERIMENT.variants)
def test_variants_agree_in_all_that_is_not_asked(name):
    told, uniform = TOLD[name], TOLD["mixing"]
    assert list(told["mixture"]["tasks"]) == ["deblur", "weather", "lowlight", "sr"][:len(told["mixture"]["tasks"])]
    assert told["evaluate"]["subtasks"] == [s for names in told["mixture"]["tasks"].values() for s in names]
    for section, key in (("train_stage2", "steps"), ("train_stage2", "update_every"), ("train", "batch_size"),
                         ("train", "crop"), ("evaluate", "per_subtask"), ("evaluate", "size")):
        assert told[section][key] == uniform[section][key]
    boundaries = told["mixture"]["options"].get("boundaries", [])
    steps, tasks = told["train_stage2"]["steps"], told["mixture"]["tasks"]
    assert boundaries in ([], [steps * (k + 1) // len(tasks) for k in range(len(tasks) - 1)])
    weights = told["mixture"]["options"].get("weights", {})
    assert set(weights) in (set(), set(tasks)) and sum(weights.values()) in (0, pytest.approx(1))


def test_other_models_are_trained_by_the_same_stage_on_the_same_tasks():
    for model in ("promptir", "foundir"):
        assert stages_of(TOLD[f"{model}_des"]) == (2,)
        assert TOLD[f"{model}_des"]["mixture"] == TOLD["ours_des"]["mixture"]


def test_every_table_names_variants_and_every_variant_is_in_one():
    assert {n for shown in EXPERIMENT.tables.values() for n in shown} == set(EXPERIMENT.variants)


def test_a_claim_about_nothing_is_one_line(tmp_path):
    read_claims(HERE / "claims.yaml", EXPERIMENT)
    (tmp_path / "claims.yaml").write_text("claims: [{claim: x, where: y, variant: des, against: dse}]")
    with pytest.raises(ConfigError, match="names dse: choose from") as e:
        read_claims(tmp_path / "claims.yaml", EXPERIMENT)
    assert "\n" not in str(e.value)


def scores(variant, run, value):
    "value: task number -> decibels; photographs differ by one each."
    return pd.DataFrame([("in", variant, t, t, f"p{p}", p, "psnr", value(i) + p, variant, run)
                         for i, t in enumerate(("deblur", "weather")) for p in range(4)],
                        columns=[*KEY, "metric", "value", "variant", "run"])


def test_a_verdict_needs_all_trainings_on_one_side():
    judge = lambda *effects: judge_claims(
        [Claim(claim="x", where="y", variant="a", against="b")],
        pd.concat([scores(v, k, lambda i: 20 + 3 * k + i + (e if v == "a" else 0))
                   for k, e in enumerate(effects) for v in "ab"])).iloc[0]
    assert judge(.1, .2, .3)[["verdict", "trainings"]].tolist() == ["agrees", 3]
    assert judge(.1, .2, .3).difference == pytest.approx(.2)
    assert judge(-.1, .2, .3).verdict == judge(.1, -.2, -.3).verdict == "not told apart"
    assert judge(-.1, -.2, -.3).verdict == "disagrees"


def test_shares_are_those_that_were_drawn():
    samples = [{}, dict(deblur=5, weather=5), dict(deblur=30, weather=10)]
    row = dict(samples=samples, scores=scores("a", 0, lambda i: 20 + i))
    points = mixture_points({("a", 0): row, ("other", 0): row}, ["a"])
    assert points.loc[("a", 0)].to_dict() == {("share", "deblur"): .75, ("share", "weather"): .25,
                                              ("score", "deblur"): 21.5, ("score", "weather"): 22.5}


def test_the_law_is_fitted_to_points_and_predicts_them():
    rng, lines = np.random.default_rng(0), {}
    for k in range(9):
        w = rng.dirichlet([1, 1, 1])
        lines["m", k] = {**{("share", t): x for t, x in zip("abc", w)},
                         **{("score", t): 25 - 4 * np.exp(-3 * x) for t, x in zip("abc", w)}}
    law = law_of(pd.DataFrame(lines).T)
    assert law.tasks == law.names == ("a", "b", "c") and (law.left_out < .05).all()


def test_steps_are_counted_to_the_first_time_that_the_goal_is_reached():
    curves = pd.DataFrame({("goal", 0): [0., 1, 2], ("early", 0): [0., 3, 1], ("never", 0): [0., 1, 1.9],
                           ("there", 0): [2., 0, 0], ("goal", 1): [0., 1, 8]}, index=[0, 10, 20])
    found = steps_to_reach(curves, "goal")
    assert found["early"].item() == pytest.approx(20 / 3) and found["there"].item() == 0
    assert found["never"].item() == np.inf and found["goal"].tolist() == [20, 20]


def test_one_seed_tells_nothing_apart():
    means = pd.Series({("u", 0): 20.0, ("bad", 0): 10.0})
    assert tell_apart(means, dict(u=None, bad="u")).apart.isna().all()
