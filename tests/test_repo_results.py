"The results in git: complete, as dvc.lock recorded them, and the mixture follows its rule."
import hashlib, json
from pathlib import Path

import pytest

from foundir_v2.config import from_dict, load_params, load_yaml
from foundir_v2.mixture import mixture_rows, read_mixture, replay_scores
from foundir_v2.settings import TrainConfig, build_mixture
from foundir_v2.tasks import CATEGORIES

ROOT = Path(__file__).resolve().parents[1]
LOCK = load_yaml(ROOT / "dvc.lock")["stages"]


def recorded(stage, path): return next(o["md5"] for o in LOCK[stage]["outs"] if o["path"] == path)


@pytest.mark.parametrize("stage, path", [
    ("evaluate", "metrics/evaluate.json"),
    ("train_stage2", "metrics/mixture.csv"),
    ("train_stage2", "metrics/mixture.jsonl")])
def test_results_are_those_of_the_recorded_run(stage, path):
    assert hashlib.md5((ROOT / path).read_bytes()).hexdigest() == recorded(stage, path)


def test_the_recorded_mixture_follows_from_its_scores():
    "Stage by stage, from the image scores, by the rule of the run that made it, whatever params.yaml says now."
    records = [json.loads(line) for line in (ROOT / "metrics/mixture.jsonl").read_text().splitlines()]
    rule = ("tasks", "start", "policy", "options")
    updates = {k: [r for r in records if r["stage"] == k and r["scores"]]
               for k in sorted({r["stage"] for r in records})}
    for stage, scored in updates.items():
        if not scored: continue
        section = LOCK[f"train_stage{stage}"]["params"]["params.yaml"]["mixture"]
        config = from_dict(TrainConfig, {k: section[k] for k in rule} | dict(stage=stage, steps=1, update_every=1))
        policy = build_mixture(config, start=scored[0]["weights"])
        replayed = replay_scores(policy, [dict(r, step=r["stage_step"]) for r in scored])
        assert [r["weights"] for r in replayed] == [r["weights"] for r in scored], "bit for bit"
    assert sum(map(len, updates.values())) >= 6, "the first scores and five updates"
    assert len({tuple(r["weights"].values()) for r in records}) >= 3
    rows = read_mixture(ROOT / "metrics/mixture.csv")
    assert rows == [row | dict(stage=r["stage"]) for r in records
                    for row in mixture_rows(r["step"], r["weights"], r["scores"])]


def test_the_metrics_are_complete():
    tree = json.loads((ROOT / "metrics/evaluate.json").read_text())
    assert tuple(tree["categories"]) == CATEGORIES
    metrics = load_params(ROOT / "params.yaml")["evaluate"]["metrics"]
    for part in [*tree["categories"].values(), tree["mean"]]:
        assert set(part) >= {"input", "restored", "shipped", "vae"} and all(set(part[s]) == set(metrics) for s in part)
    assert tree["shuffled"]["cost"]["psnr"] >= 3, "the model looks at its input"
