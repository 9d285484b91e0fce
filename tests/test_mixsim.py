"The simulator: its equation, the search for the best fixed mixture, races, and the fit to a log."
from dataclasses import replace
import numpy as np, pytest
from foundir_v2.mixsim import (Curves, best_fixed, experience, fit_curves, load_curves, log_arrays, objective, race,
                               regret_table, replay_experience, save_curves, score_of, shipped_file, simulate)
from foundir_v2.mixture import DataEquilibrium, FixedMixture, ReplayMixture, read_mixture


def curves(half=(500, 1000, 4000), cross=0.0, forget=0.0, wobble=0.3):
    each = lambda v: tuple(float(x) for x in np.broadcast_to(v, 3))
    return Curves(("a", "b", "c"), each(28), each(10), each(half), each(0.6), each(forget),
                  tuple(map(tuple, np.where(np.eye(3, dtype=bool), 1.0, cross).tolist())), each(3), each(wobble))


def test_experience_solves_its_equation():
    c = curves(cross=0.3, forget=1e-4)
    done, w, n = np.array([100.0, 0.0, 900.0]), np.array([0.6, 0.3, 0.1]), 2000
    fine = done.copy()
    for _ in range(20_000): fine += (n / 20_000) * (w @ np.array(c.helps) - np.array(c.forget) * fine)
    assert np.allclose(experience(c, done, w, n), fine, rtol=1e-3)
    assert np.allclose(experience(c, experience(c, done, w, 700), w, 1300), experience(c, done, w, n))
    assert (experience(curves(cross=-5.0), np.zeros(3), w, 100) >= 0).all()


@pytest.mark.parametrize("kind", ["mean", "share", "worst"])
def test_best_fixed_beats_a_grid(kind):
    c = curves(cross=0.1)
    mixture, value = best_fixed(c, 10_000, kind)
    grid = np.array([(i, j, 50 - i - j) for i in range(51) for j in range(51 - i)]) / 50
    values = objective(c, score_of(c, experience(c, np.zeros(3), grid, 10_000)), kind)
    assert value >= values.max() - 1e-9 and abs(sum(mixture.values()) - 1) < 1e-9


def test_races_are_reproducible_and_a_perfect_mixture_has_no_regret():
    c = curves()
    best, _ = best_fixed(c, 20_000)
    policies = {"best": lambda: FixedMixture(best),
                "des": lambda: DataEquilibrium(c.tasks, 0.3),
                "banded": lambda: DataEquilibrium(c.tasks, 0.3, dead_band=2)}
    rows = race(c, policies, updates=20, interval=1000, seeds=3, as_list=["banded"])
    assert rows == race(c, policies, updates=20, interval=1000, seeds=3, as_list=["banded"])
    table = {r["policy"]: r for r in regret_table(rows)}
    assert abs(table["best"]["regret"]) < 1e-6 and table["des"]["regret"] > 0 and table["des"]["runs"] == 3
    assert len({r["value"] for r in rows if r["policy"] == "des"}) == 3
    with pytest.raises(ValueError, match="as_list"): race(c, policies, as_list=["desk"])


def test_noise_of_the_scores_shrinks_with_more_images():
    seen = []
    class Watch:
        weights = {"a": 0.4, "b": 0.3, "c": 0.3}
        def update(self, scores, step): seen.append(scores["a"])
    def spread(images):
        seen.clear()
        simulate(curves(half=1e12, wobble=2.0), Watch, updates=200, interval=1, seeds=1, images=images)
        return np.std(np.diff(seen))
    assert spread(1) == pytest.approx(2 * 2**0.5, rel=0.2) and spread(100) == pytest.approx(0.2 * 2**0.5, rel=0.2)


def test_fit_predicts_mixtures_it_never_saw():
    truth, rng = curves(cross=0.1, forget=1e-5), np.random.default_rng(3)
    mix = rng.dirichlet(np.full(3, 4.0), 20)
    clean = score_of(truth, replay_experience(truth, np.arange(20) * 1600.0, mix))
    log = [{"step": 100 * i, "task": t, "weight": mix[i, j], "score": clean[i, j] + rng.normal(0, 0.05)}
           for i in range(20) for j, t in enumerate(truth.tasks)]
    fitted, residual = fit_curves(log, samples_per_step=16)
    other = np.array([0.1, 0.2, 0.7])
    assert residual < 0.03
    assert np.abs(score_of(fitted, experience(fitted, np.zeros(3), other, 30_000)) - score_of(
        truth, experience(truth, np.zeros(3), other, 30_000))).max() < 0.4
    # a real log begins at its first update
    late, _ = fit_curves([r for r in log if r["step"] >= 100], samples_per_step=16)
    assert np.isfinite(late.half).all()


def test_shipped_curves_are_the_fit_to_the_shipped_record():
    record, shipped = read_mixture(shipped_file("tiny.csv")), load_curves("tiny")
    tasks, samples, weights, scores = log_arrays(record)
    assert tasks == shipped.tasks and len(samples) == 26 and samples[-1] == 4000
    fitted, residual = fit_curves(record, spread=dict(zip(shipped.tasks, shipped.spread)))
    assert fitted.spread == shipped.spread and np.allclose(fit_curves(record)[0].spread, 0.75 * np.ptp(scores, 0))
    lines = [score_of(c, replay_experience(c, samples, weights)) for c in (fitted, shipped)]
    assert np.abs(lines[0] - lines[1]).max() < 0.02 and residual < 0.1
    assert np.sqrt(np.mean(((lines[1] - scores) / np.ptp(scores, 0)) ** 2)) == pytest.approx(residual, rel=0.02)
    # the finding that notebook 30 rests on
    assert shipped.half[tasks.index("weather")] > 5 * max(h for h, t in zip(shipped.half, tasks) if t != "weather")


@pytest.mark.parametrize("name, last", [("tiny.csv", 500), ("tiny_1500.csv", 1500)])
def test_shipped_records_can_be_replayed(name, last):
    rows = read_mixture(shipped_file(name))
    assert ReplayMixture(shipped_file(name), stretch=100).at(100 * last) == pytest.approx(
        {r["task"]: r["weight"] for r in rows if r["step"] == last}, abs=1e-12)


def test_counted_samples_go_before_weights():
    rows = [{"step": s, "task": t, "weight": 0.5, "score": 20.0, "samples": n}
            for s, counts in ((0, (0, 0)), (10, (30, 10)), (20, (8, 32))) for t, n in zip("ab", counts)]
    tasks, samples, weights, _ = log_arrays(rows)
    assert samples.tolist() == [0, 40, 80] and weights.tolist() == [[0.75, 0.25], [0.2, 0.8], [0.5, 0.5]]
    assert log_arrays([{k: v for k, v in r.items() if k != "samples"} for r in rows], 4)[2].tolist() == [[0.5, 0.5]] * 3
    _, late, weights, scores = log_arrays(rows[2:])  # a record that begins at its first update
    assert late.tolist() == [0, 40, 80] and weights.tolist() == [[0.75, 0.25], [0.2, 0.8], [0.5, 0.5]]
    assert np.isnan(scores[0]).all()
    with pytest.raises(ValueError, match="samples per training step"):
        log_arrays([{k: v for k, v in r.items() if k != "samples"} for r in rows])


def test_bad_constants_and_logs(tmp_path):
    save_curves(curves(), tmp_path / "c.json")
    assert load_curves(tmp_path / "c.json") == curves()
    save_curves(curves(), tmp_path / "c.json", source="drawn by hand")
    assert "drawn by hand" in (tmp_path / "c.json").read_text() and load_curves(tmp_path / "c.json") == curves()
    for text in ("{", "[]", "{}", '{"tasks": ["a"]}', (tmp_path / "c.json").read_text().replace("500.0", "-1")):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json"): load_curves(tmp_path / "bad.json")
    with pytest.raises(ValueError, match="at least 5"):
        fit_curves([{"step": s, "task": "a", "weight": 1.0, "score": 20.0} for s in range(3)], 16)
    with pytest.raises(ValueError, match="no row for step 1, task b"):
        fit_curves([{"step": 0, "task": "a", "weight": 1, "score": 1},
                    {"step": 0, "task": "b", "weight": 0, "score": 1},
                    {"step": 1, "task": "a", "weight": 1, "score": 1}],
                   16)
    with pytest.raises(ValueError, match="choices"): objective(curves(), np.zeros(3), "median")


def test_numbers_that_are_none_are_refused():
    curves = load_curves("tiny")
    with pytest.raises(ValueError, match="finite"):
        replace(curves, helps=tuple(tuple(float("nan") if i != j else 1.0 for j in range(5)) for i in range(5)))
    with pytest.raises(ValueError, match="must not be negative"): replace(curves, forget=(-1.0,) * 5)
    with pytest.raises(ValueError, match="no rows"): log_arrays([])
