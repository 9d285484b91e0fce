"The mixing law: recovery from noisy runs, uncertainty, recommendations, bad input."
import dataclasses, math
import numpy as np, pytest
from foundir_v2.mixlaw import MixLaw, fit_law, predict, recommend, spread_mixtures
from foundir_v2.mixsim import Curves, best_fixed, experience, score_of
from foundir_v2.mixture import MixtureError

TASKS = ("a", "b", "c", "d")


def law_of(rng):
    "A random law with growing scores whose tasks mostly help themselves."
    t = np.where(np.eye(4, dtype=bool), -rng.uniform(1.5, 3), rng.uniform(-0.3, 0.6, (4, 4)))
    return MixLaw(TASKS, TASKS, rng.uniform(24, 30, 4), -rng.uniform(4, 9, 4), t - t.mean(1, keepdims=True),
                  np.zeros((4, 5, 5)), np.zeros(4), np.zeros(4))


def value(w): return np.array([w[t] for t in TASKS])

@pytest.mark.parametrize("seed", range(6))
def test_24_noisy_runs_are_enough(seed):
    rng = np.random.default_rng(seed)
    truth, plan = law_of(rng), spread_mixtures(TASKS, 24)
    runs = predict(truth, np.array([value(w) for w in plan]))[0] + rng.normal(0, 0.1, (24, 4))
    law = fit_law(plan, [dict(zip(TASKS, r)) for r in runs.tolist()])
    for goal in ("mean", "worst"):
        (found, _, _), (best, _, _) = recommend(law, goal), recommend(truth, goal)
        score = lambda w: predict(truth, value(w))[0].mean() if goal == "mean" else predict(truth, value(w))[0].min()
        assert np.abs(value(found) - value(best)).max() <= 0.02 or score(best) - score(found) <= 0.1
    assert (law.noise < 0.2).all() and (law.left_out < 0.3).all()


@pytest.mark.parametrize("seed", range(4))
def test_the_simulators_best_mixture_is_found(seed):
    rng = np.random.default_rng(seed)
    each = lambda v: tuple(float(x) for x in np.broadcast_to(v, 4))
    curves = Curves(TASKS, each(28), each(10), each(rng.uniform(300, 9000, 4)), each(0.6), each(0),
                    tuple(map(tuple, (np.eye(4) * 0.9 + 0.1).tolist())), each(3), each(0.3))
    reach = lambda w: score_of(curves, experience(curves, np.zeros(4), value(w), 30_000))
    plan = spread_mixtures(TASKS, 24)
    law = fit_law(plan, [dict(zip(TASKS, (reach(w) + rng.normal(0, 0.1, 4)).tolist())) for w in plan])
    best, ideal = best_fixed(curves, 30_000, "mean")
    found, predicted, _ = recommend(law)
    assert np.abs(value(found) - value(best)).max() <= 0.02 or ideal - reach(found).mean() <= 0.1
    assert np.abs(np.array(list(predicted.values())) - reach(found)).max() < 0.6


def test_standard_errors_cover_the_truth():
    rng, plan = np.random.default_rng(0), spread_mixtures(TASKS, 24)
    truth, inside = law_of(rng), []
    for _ in range(4):
        runs = predict(truth, np.array([value(w) for w in plan]))[0] + rng.normal(0, 0.1, (24, 4))
        law = fit_law(plan, [dict(zip(TASKS, r)) for r in runs.tolist()])
        at = rng.dirichlet(np.ones(4), 30)
        score, error = predict(law, at)
        inside += (np.abs(score - predict(truth, at)[0]) < 2 * error).ravel().tolist()
    assert 0.85 < np.mean(inside) <= 1


def test_losses_fit_as_well_as_scores():
    rng, plan = np.random.default_rng(1), spread_mixtures(TASKS, 24)
    truth = law_of(rng)
    losses = -predict(truth, np.array([value(w) for w in plan]))[0]
    law = fit_law(plan, [dict(zip(TASKS, r)) for r in losses.tolist()])
    assert (law.k > 0).all() and np.abs(predict(law, np.array([value(w) for w in plan]))[0] - losses).max() < 0.02


def test_recommendation_keeps_to_what_was_asked():
    truth = law_of(np.random.default_rng(2))
    mixture, scores, _ = recommend(truth, "worst", floor=0.1)
    assert abs(math.fsum(mixture.values()) - 1) < 1e-9 and min(mixture.values()) > 0.1 - 1e-9
    alone, _, _ = recommend(truth, {"a": 1, "b": 0, "c": 0, "d": 0})
    assert scores.keys() == set(TASKS)
    assert predict(truth, value(alone))[0][0] >= max(
        predict(truth, np.random.default_rng(0).dirichlet(np.ones(4), 500))[0][:, 0]) - 1e-6
    shifted, _, _ = recommend(truth, "worst", floor=0.1, reference={t: 0.0 for t in TASKS},
                              unit={t: 1.0 for t in TASKS})
    assert shifted == mixture


def test_bad_runs_are_refused():
    plan = spread_mixtures(TASKS, 8)
    scores = [dict(zip(TASKS, row)) for row in np.random.default_rng(0).normal(25, 1, (8, 4)).tolist()]
    fit_law(plan, scores)
    for mixtures, rows in (([], []), (plan[:7], scores), (plan[:6], scores[:6]),
                           (plan, [{**s, "a": math.nan} for s in scores]), (plan, [{**s, "a": 5.0} for s in scores]),
                           ([{**w, "a": 0.9} for w in plan], scores), (plan, [*scores[:7], {"a": 1.0}])):
        with pytest.raises(MixtureError): fit_law(mixtures, rows)
    law = law_of(np.random.default_rng(0))
    for bad in (dict(objective="median"), dict(objective={"a": 1}), dict(objective={t: 0 for t in TASKS}),
                dict(floor=0.3), dict(reference={"a": 1.0}), dict(unit=dict.fromkeys(TASKS, 0.0)),
                dict(reference=dict.fromkeys(TASKS, math.nan))):
        with pytest.raises(MixtureError): recommend(law, **bad)


@pytest.mark.parametrize("name", ["c", "k", "t", "covariance", "noise", "left_out"])
def test_a_law_holds_finite_numbers_of_its_shape(name):
    law = law_of(np.random.default_rng(0))
    spoilt = np.array(getattr(law, name))
    spoilt.flat[-1] = math.nan
    for bad in (spoilt, getattr(law, name)[:-1], np.array(["x"])):
        with pytest.raises(MixtureError, match=f"{name} of the law"): dataclasses.replace(law, **{name: bad})


def test_designs_are_apart():
    plan = np.array([value(w) for w in spread_mixtures(TASKS, 24)])
    random = np.random.default_rng(0).dirichlet(np.ones(4), 24)
    nearest = lambda p: min(np.linalg.norm(p[i] - p[j]) for i in range(24) for j in range(i))
    assert nearest(plan) > 2 * nearest(random) and np.allclose(plan[0], 0.25)
