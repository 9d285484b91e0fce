"What contributes what: its variants are what they say, and the table of comparisons."
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from foundir_v2.base import build_foundir_unet, load_base
from foundir_v2.config import load_params, overlay, parse_yaml
from foundir_v2.contributions import compare_variants, contributions_table
from foundir_v2.experiment import KEY, Experiment, Variant, read_experiment, settings_hash, variant_params
from foundir_v2.params import STAGES
from foundir_v2.settings import ModelConfig
from foundir_v2.tasks import CATEGORIES

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "nbs/contributions"
EXPERIMENT = read_experiment(HERE / "variants.yaml")
TEXTS = {p: overlay((ROOT / "params.yaml").read_text(), (ROOT / f"profiles/{p}.yaml").read_text())
         for p in ("tiny", "smoke")}


# --- variants.yaml ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("profile", TEXTS)
def test_every_variant_fits_params_and_changes_something(profile):
    told = lambda name: variant_params(TEXTS[profile], EXPERIMENT.layers(name), 0)
    hashes = {n: settings_hash(told(n), replace(v, inference={}), ["psnr"])
              for n, v in EXPERIMENT.variants.items()}
    assert len(set(hashes.values())) == len(hashes)
    assert told("full") == parse_yaml(TEXTS[profile], "params.yaml"), (
        "the default is params.yaml as it is")


def test_the_papers_path_trains_as_long_as_the_default():
    "Eight steps of stage 0 take as long as one of stage 2."
    default, paper = load_params(ROOT / "params.yaml"), EXPERIMENT.variants["paper"].params
    assert paper["train_stage0"]["steps"] == 0
    assert paper["train_stage2"]["steps"] == default["train_stage2"]["steps"] + default["train_stage0"]["steps"] // 8, (
        "change variants.yaml with the recipe")


def test_longer_trainings_are_multiples_of_the_default():
    default, variants = load_params(ROOT / "params.yaml"), EXPERIMENT.variants
    for k in (2, 4):
        steps = {s: dict(steps=k * default[s]["steps"]) for s in STAGES}
        assert variants[f"full_x{k}"].params == steps, "change variants.yaml with the recipe"
        assert variants[f"full_x{k}"].time == k
    alone = {n: v for n, v in variants.items() if v.encoder_alone}
    assert {n: v.params["train_stage0"]["steps"] for n, v in alone.items()} == {
        n: 12000 * v.time for n, v in alone.items()}
    assert len(alone) == 3


def test_a_row_is_of_its_seed_and_of_the_recipe_of_today():
    full = EXPERIMENT.variants["full"]
    named = lambda text, seed=0: settings_hash(variant_params(text, EXPERIMENT.layers("full"), seed), full, ["psnr"])
    assert len({named(TEXTS["tiny"]), named(TEXTS["tiny"], 1), named(TEXTS["smoke"])}) == 3


def test_experts_and_one_deep_expert_have_as_many_parameters():
    model, base = load_params(ROOT / "params.yaml")["model"], load_base("base")
    options = lambda name: ModelConfig(**model | EXPERIMENT.variants[name].params.get("model", {})).unet_options
    count = {n: sum(p.numel() for p in build_foundir_unet(base, **options(n)).parameters())
             for n in ("soft_moe_same_start", "hard_moe", "one_expert", "no_moe")}
    assert count["hard_moe"] == count["soft_moe_same_start"]
    assert count["one_expert"] == pytest.approx(count["hard_moe"], rel=5e-3) and count["no_moe"] < count["one_expert"]


# --- table ------------------------------------------------------------------------------------------------------------

TWO = Experiment(
    seeds=[0, 1, 2], metrics=["psnr", "stlpips"],
    variants=dict(full=Variant(about="all", against=None, inference=dict(more=dict(num_inference_steps=4))),
                  less=Variant(about="less")))


def scores(system, seed, psnr, photos=6, benchmark="in"):
    "psnr: (category, photograph) -> value."
    return pd.DataFrame([(benchmark, system, c, c, f"p{p}", p, m, psnr(i, p) if m == "psnr" else 1 - psnr(i, p) / 100,
                          seed) for i, c in enumerate(CATEGORIES) for p in range(photos) for m in ("psnr", "stlpips")],
                        columns=[*KEY, "metric", "value", "run"])


def at(table, system, metric="psnr", category="mean"):
    return table[(table.restorer == system) & (table.metric == metric) & (table.category == category)].iloc[0]


def test_differences_are_paired_by_seed_and_photograph():
    "Trainings and photographs differ by decibels, the partners by 0.5 in each of them."
    made = pd.concat([scores(s, k, lambda c, p: 20 + 3 * k + p + c + d) for s, d in dict(full=0, less=-.5).items()
                      for k in range(3)])
    row = at(compare_variants(made, TWO), "less")
    assert (row.value, row.difference, row.low, row.high) == pytest.approx((27, -.5, -.5, -.5))
    assert row.against == "full"
    assert at(compare_variants(made, TWO), "less", "stlpips").difference < 0, "improvements, also where less is better"


def test_seeds_are_resampled_not_only_photographs():
    made = pd.concat([scores(s, k, lambda c, p: 20 + d * k) for s, d in dict(full=0, less=1).items() for k in range(3)])
    row = at(compare_variants(made, TWO), "less")
    assert (row.low, row.difference, row.high) == pytest.approx((0, 1, 2))


def test_partners_meet_only_in_trainings_that_both_have():
    made = pd.concat([scores("full", 0, lambda c, p: 20), scores("full", 2, lambda c, p: 30),
                      scores("less", 0, lambda c, p: 21), scores("less", 1, lambda c, p: 99)])
    row = at(compare_variants(made, TWO), "less")
    assert row.difference == pytest.approx(1) and (row.seeds, row.paired) == (2, 1)
    row = at(compare_variants(made[made.restorer == "less"], TWO), "less")
    assert np.isnan(row.difference) and row.paired == 0
    assert contributions_table(compare_variants(made, TWO)).loc["less", "in: psnr"] == "60.00, +1.00 [+1.00, +1.00]"


def test_a_metric_without_values_is_not_defined_rather_than_a_number():
    made = pd.concat([scores(s, k, lambda c, p: 20) for s in ("full", "less") for k in range(3)])
    made.loc[made.metric == "stlpips", "value"] = float("nan")
    assert contributions_table(compare_variants(made, TWO)).loc["less", "in: stlpips"] == "not defined"
