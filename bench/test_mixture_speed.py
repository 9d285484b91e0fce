"""Speed of the mixture library, by CPU time of one process: `python -m pytest -s bench`.
Bounds are the project's; -s shows the numbers."""
import subprocess, sys, time
import numpy as np, pytest
from foundir_v2.mixsim import load_curves, race
from foundir_v2.mixture import (DataEquilibrium, ExcessLossMixture, FixedMixture, IncrementalMixture, OnlineDataMixing,
                                SequentialMixture, SlopeMixture, TargetGapMixture)
from foundir_v2.sampler import MixtureSampler

TASKS = ["deblur", "denoise", "weather", "lowlight", "sr"]


def seconds(work, repeat=3):
    "Best CPU time of some repeats."
    times = []
    for _ in range(repeat):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def test_draws_per_second():
    batches = iter(MixtureSampler({t: 10_000 + i for i, t in enumerate(TASKS)}, FixedMixture(dict.fromkeys(TASKS, 0.2)),
                                  batch_size=32, seed=0))
    rate = 2000 * 32 / seconds(lambda: [next(batches) for _ in range(2000)])
    print(f"\n{rate:,.0f} draws per second at batch 32")
    assert rate >= 200_000


@pytest.mark.parametrize("options", [
    {},
    dict(min_step=5, max_step=10, floor=0.001, ceiling=0.5, protect_falling=True, score_scale="zscore")],
                         ids=["raw", "all limits"])
def test_one_update_of_64_tasks(options):
    tasks = [f"t{i}" for i in range(64)]
    policy, rng = DataEquilibrium(tasks, 0.1, **options), np.random.default_rng(0)
    rounds = iter([{t: row.tolist() for t, row in zip(tasks, rng.normal(24, 1, (64, 10)))} for _ in range(600)])
    took = seconds(lambda: [policy.update(next(rounds), 0) for _ in range(200)]) / 200
    print(f"\n{1e3 * took:.3f} ms per update of 64 tasks with 10 images each")
    assert took < 1e-3


def test_race_of_ten_policies():
    curves = load_curves("tiny")
    ends = dict(zip(TASKS, curves.top))
    bottoms = {t: top - span for t, top, span in zip(TASKS, curves.top, curves.span)}
    assert list(curves.tasks) == TASKS
    policies = {"uniform": lambda: FixedMixture(dict.fromkeys(TASKS, 0.2)),
                "sequential": lambda: SequentialMixture(TASKS, [3000, 6000, 9000, 12_000]),
                "incremental": lambda: IncrementalMixture(TASKS, [3000, 6000, 9000, 12_000]),
                "des": lambda: DataEquilibrium(TASKS, 0.3),
                "relative": lambda: DataEquilibrium(TASKS, 5, "relative"),
                "limits": lambda: DataEquilibrium(TASKS, 0.3, "zscore", 5, 10, 0.05),
                "excess": lambda: ExcessLossMixture(TASKS, ends, 0.1),
                "gap": lambda: TargetGapMixture(TASKS, ends, 0.1),
                "odm": lambda: OnlineDataMixing(TASKS, ends, bottoms),
                "slope": lambda: SlopeMixture(TASKS)}
    took = seconds(lambda: race(curves, policies, updates=150, interval=100, seeds=100), repeat=1)
    print(f"\n{took:.1f} s for 10 policies x 100 seeds x 150 updates")
    assert took < 60


def test_import():
    code = "import numpy, time; t = time.process_time(); import foundir_v2.mixture; print(time.process_time() - t)"
    took = min(float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
               for _ in range(3))
    print(f"\nimporting the mixture library takes {1e3 * took:.0f} ms more than NumPy")
    assert took < 0.15
