"The results in git: complete, as dvc.lock recorded them, and the mixture follows its rule."
import hashlib, json
from pathlib import Path

import pytest

from foundir_v2.config import load_params, load_yaml
from foundir_v2.mixture import read_mixture
from foundir_v2.tasks import CATEGORIES
from foundir_v2.train import TrainConfig, build_mixture

ROOT = Path(__file__).resolve().parents[1]
LOCK = load_yaml(ROOT / "dvc.lock")["stages"]


def recorded(stage, path): return next(o["md5"] for o in LOCK[stage]["outs"] if o["path"] == path)


@pytest.mark.parametrize("stage, path", [("evaluate", "metrics/evaluate.json"), ("train_stage2", "metrics/mixture.csv")])
def test_results_are_those_of_the_recorded_run(stage, path):
    assert hashlib.md5((ROOT / path).read_bytes()).hexdigest() == recorded(stage, path)


def test_the_recorded_mixture_follows_from_its_scores():
    section = LOCK["train_stage2"]["params"]["params.yaml"]["mixture"]  # of the run that made it, whatever params.yaml says now
    policy, rows = build_mixture(TrainConfig(stage=2, steps=1, **section)), read_mixture(ROOT / "metrics/mixture.csv")
    steps = sorted({r["step"] for r in rows})
    assert len(steps) >= 6, "the first scores and five updates"
    for step in steps:
        at = {r["task"]: r for r in rows if r["step"] == step}
        assert policy.update({t: r["score"] for t, r in at.items()}, step) == pytest.approx({t: r["weight"] for t, r in at.items()}, abs=1e-12)
    assert len({tuple(r["weight"] for r in rows if r["step"] == s) for s in steps}) >= 5


def test_the_metrics_are_complete():
    tree = json.loads((ROOT / "metrics/evaluate.json").read_text())
    assert tuple(tree["categories"]) == CATEGORIES
    metrics = load_params(ROOT / "params.yaml")["evaluate"]["metrics"]
    for part in [*tree["categories"].values(), tree["mean"]]:
        assert set(part) >= {"input", "restored", "shipped", "vae"} and all(set(part[s]) == set(metrics) for s in part)
    assert tree["shuffled"]["cost"]["psnr"] >= 3, "the model looks at its input"
