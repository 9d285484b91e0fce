"Contributions by retraining: variants, resumption, rows, and the table. Their pipeline says the same as variants.yaml."
import json
import shlex
from dataclasses import replace
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from foundir_v2 import contributions as co
from foundir_v2.base import build_foundir_unet, load_base
from foundir_v2.config import ConfigError, load_params, load_yaml, overlay, parse_yaml
from foundir_v2.contributions import (Experiment, Variant, compare_variants, contributions_table, read_experiment,
                                      read_rows, settings_hash, train_variant, variant_params)
from foundir_v2.core import FoundIRError
from foundir_v2.data import Item
from foundir_v2.runner import assign, check_parameters, notebook_parameters, parser, read_sections
from foundir_v2.settings import PARTS, ModelConfig
from foundir_v2.params import STAGES
from foundir_v2.tasks import CATEGORIES, SUBTASKS
from foundir_v2.trainlog import read_course
from small_training import TASKS, equal, weights

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "nbs/contributions"
EXPERIMENT = read_experiment(HERE / "variants.yaml")
PIPELINE = load_yaml(HERE / "dvc.yaml")["stages"]
TEXTS = {p: overlay((ROOT / "params.yaml").read_text(), (ROOT / f"profiles/{p}.yaml").read_text())
         for p in ("tiny", "smoke")}


# --- variants.yaml and its pipeline -----------------------------------------------------------------------------------

@pytest.mark.parametrize("profile", TEXTS)
def test_every_variant_fits_params_and_changes_something(profile):
    hashes = {n: settings_hash(variant_params(TEXTS[profile], v, 0), replace(v, inference={}), ["psnr"])
              for n, v in EXPERIMENT.variants.items()}
    assert len(set(hashes.values())) == len(hashes)
    full = EXPERIMENT.variants["full"]
    assert variant_params(TEXTS[profile], full, 0) == parse_yaml(TEXTS[profile], "params.yaml"), (
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
    named = lambda text, seed=0: settings_hash(variant_params(text, full, seed), full, ["psnr"])
    assert len({named(TEXTS["tiny"]), named(TEXTS["tiny"], 1), named(TEXTS["smoke"])}) == 3


def test_experts_and_one_deep_expert_have_as_many_parameters():
    model, base = load_params(ROOT / "params.yaml")["model"], load_base("base")
    options = lambda name: ModelConfig(**model | EXPERIMENT.variants[name].params.get("model", {})).unet_options
    count = {n: sum(p.numel() for p in build_foundir_unet(base, **options(n)).parameters())
             for n in ("soft_moe_same_start", "hard_moe", "one_expert", "no_moe")}
    assert count["hard_moe"] == count["soft_moe_same_start"]
    assert count["one_expert"] == pytest.approx(count["hard_moe"], rel=5e-3) and count["no_moe"] < count["one_expert"]


def test_dvc_sees_a_stage_per_variant_and_seed_whose_only_output_is_a_file_in_git():
    from dvc.repo import Repo
    found = {s.addressing.rpartition(":")[2]: s for s in Repo(str(ROOT)).stage.load_all(str(HERE / "dvc.yaml"))}
    rows = {f"row@{seed}-{name}": f"{name}-{seed}" for seed in EXPERIMENT.seeds for name in EXPERIMENT.variants}
    assert set(found) == {*rows, "table"}
    for stage, row in rows.items():
        (out,) = found[stage].outs
        assert Path(out.fs_path) == HERE / f"results/{row}.json" and not out.use_cache
        assert {Path(d.fs_path) for d in found[stage].deps if hasattr(d, "params") and d.params} <= {
            ROOT / "params.yaml", HERE / "variants.yaml"}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    for out in found["table"].outs: assert out.use_cache == (Path(out.fs_path).relative_to(ROOT).parts[0] in ignored)


def test_dvc_looks_at_all_that_a_row_depends_on():
    named = [p for p in PIPELINE["row"]["params"] if isinstance(p, str)]
    assert {*PARTS, *STAGES, "evaluate.systems.restored", *(f"evaluate.{k}" for k in co.MEASURED)} <= set(named)
    assert {"nbs/contributions/variants.yaml": ["metrics", "variants.${item.variant}"]} in PIPELINE["row"]["params"]


@pytest.mark.parametrize("name", PIPELINE)
def test_every_stage_gives_its_notebook_all_parameters(monkeypatch, name):
    monkeypatch.chdir(ROOT)
    args = parser().parse_args(
        shlex.split(PIPELINE[name]["cmd"].replace("${item.variant}", "full").replace("${item.seed}", "1"))[3:])
    wanted = notebook_parameters(nbformat.read(ROOT / args.src, 4), args.src)
    values = assign(*read_sections(args.sections, args.set), wanted)
    check_parameters(values, wanted, args.src)
    if name == "row": assert values == dict(variant="full", seed=1)


@pytest.mark.parametrize("variants, words", [
    (dict(a=dict(about="x")), "compared with 'full'"),
    (dict(a=dict(about="x", against="a")), "compared with 'a'"),
    (dict(a=dict(against=None)), "missing about"),
    (dict(a=dict(about="x", against=None, inference=dict(b=dict(guidance=5)))), "unknown option guidance"),
    (dict(a=dict(about="x", against=None, inference=dict(b={}), encoder_alone=True)), "no settings of inference"),
    (dict(a=dict(about="x", against=None), b=dict(about="y", against="a", encoder_alone=True, time=2)),
     "b trains for 2 and a for 1 times"),
    (dict(a=dict(about="x", against=None, steps=4)), "unknown steps")])
def test_mistakes_in_variants_are_one_line(tmp_path, variants, words):
    (tmp_path / "variants.yaml").write_text(json.dumps(dict(seeds=[0], metrics=["psnr"], variants=variants)))
    with pytest.raises(FoundIRError, match=words) as e: read_experiment(tmp_path / "variants.yaml")
    assert "\n" not in str(e.value)


# --- training ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def params(bench):
    stage = dict(steps=2, loss="l1", learning_rate=1e-3, warmup_steps=1)
    return dict(mixture=dict(tasks=TASKS, score={t: "psnr" for t in TASKS}, policy="des", options=dict(alpha=.5),
                             reference_per_task=1, reference_size=32),
                inference=dict(num_inference_steps=1, guidance_scale=1.0, start="noise"),
                model=dict(base=str(bench / "base"), lq_context_width=4, lq_norm_groups=0, moe="soft", moe_layers=1,
                           moe_heads=4),
                train=dict(crop=32, batch_size=2, noise_offset=0., ema_decay=.9, mixed_precision="no", num_workers=0,
                           checkpoint_every=1, seed=0),
                train_stage0=dict(stage, proportions=None), train_stage1=dict(stage, proportions=None),
                train_stage2=dict(stage, update_every=1))


@pytest.fixture
def files(bench, tmp_path):
    return dict(manifest=str(bench / "manifest.parquet"), root=str(bench), checkpoints=str(tmp_path / "checkpoints"))


class PowerCut(Exception): pass


def test_a_variant_goes_on_where_it_was_and_shares_stage_0(params, files, tmp_path, monkeypatch):
    trained, real = [], co.train
    def train(config, cut=None):
        trained.append(config.stage)
        if config.stage == cut: raise PowerCut
        return real(config)
    kept = tmp_path / "kept"
    monkeypatch.setattr(co, "train", lambda config: train(config, cut=2))
    with pytest.raises(PowerCut): train_variant(params, params, kept, kept / "full-0", **files)
    monkeypatch.setattr(co, "train", train)
    results = train_variant(params, params, kept, kept / "full-0", **files)
    assert trained == [0, 1, 2, 2] and [len(r.steps) for r in results] == [2, 2, 2]
    whole = train_variant(params, params, tmp_path / "other", tmp_path / "other/full-0", **files)
    assert equal(weights(results[2].output), weights(whole[2].output)), "as without an interruption"
    trained.clear()
    hard = {**params, "model": params["model"] | dict(moe="hard")}
    train_variant(hard, params, kept, kept / "hard-0", **files)
    assert trained == [1, 2]
    assert {p.parent.name for p in kept.glob("*/unet")} == {results[0].output.name}, (
        "a row leaves nothing but stage 0 outside of its own folder")


def test_the_mixture_goes_on_where_the_shared_stage_0_has_led(params, files, tmp_path):
    led = {**params, "train_stage0": dict(steps=4, loss="l1", learning_rate=1e-2, warmup_steps=1, update_every=1)}
    hard = {**led, "model": led["model"] | dict(moe="hard")}
    courses = [read_course(train_variant(p, led, tmp_path / "kept", tmp_path / f"kept/{i}", **files)[2].output)
               for i, p in enumerate((led, hard))]
    first = [[r["weights"] for r in c.records if r["stage"] == 2][0] for c in courses]
    assert first[0] == first[1] == [r["weights"] for r in courses[0].records if r["stage"] == 0][-1]
    assert first[0] != dict.fromkeys(TASKS, 1 / 3)


def test_another_stage_0_is_trained_for_itself(params, files, tmp_path):
    other = {**params, "train_stage0": params["train_stage0"] | dict(steps=0)}
    first, second = (train_variant(p, params, tmp_path / "kept", tmp_path / f"kept/{i}", **files)[0].output
                     for i, p in enumerate((params, other)))
    assert first != second


def test_an_encoder_alone_is_stage_0_and_nothing_after_it(params, files, tmp_path):
    alone = Variant(about="x", encoder_alone=True)
    (result,) = train_variant(params, params, tmp_path / "kept", tmp_path / "kept/alone", True, **files)
    assert [p.parent.parent.name for p in tmp_path.glob("kept/**/unet")] == ["alone"], "it goes with the row"
    noisy = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    items = {"in": [Item(noisy, noisy.flip(1), SUBTASKS["gaussian_noise"], "a", 0, noisy)]}
    scores = co.measure_variant("alone", alone, result.output, "trained:x", items, ["psnr"])
    assert scores.restorer.tolist() == ["alone"] and scores.value.notna().all()
    settings = lambda p, v: settings_hash(variant_params(p, v, 0), v, ["psnr"])
    later = overlay(TEXTS["tiny"], "train_stage2: {steps: 7}")
    assert settings(TEXTS["tiny"], alone) == settings(later, alone) != settings(TEXTS["tiny"], Variant(about="x"))
    assert settings(overlay(TEXTS["tiny"], "train_stage0: {steps: 7}"), alone) != settings(later, alone)


def test_without_prior_the_unet_starts_at_random_weights(params, files, bench, tmp_path):
    random = {**params, "model": params["model"] | dict(base=f"random:{bench / 'base'}")}
    default = {**params,
               "train_stage1": params["train_stage1"] | dict(learning_rate=1e-9),
               "train_stage2": params["train_stage2"] | dict(learning_rate=1e-9)}
    slow = {**default, "model": random["model"]}
    full, none = (train_variant(p, default, tmp_path / "kept", tmp_path / "kept" / n, **files)
                  for n, p in dict(full=default, none=slow).items())
    assert full[0].output == none[0].output, "the LQ encoder never sees the prior"
    key = "mid_block.resnets.0.conv1.weight"
    prior, drawn = (load_base(b).unet_prior.state_dict()[key] for b in (bench / "base", tmp_path / "kept/none/base"))
    a, b = (weights(r[2].output)[key] for r in (full, none))
    assert torch.allclose(a, prior, atol=1e-4) and torch.allclose(b, drawn, atol=1e-4)
    assert not torch.allclose(a, b, atol=1e-2)


# --- rows and table ---------------------------------------------------------------------------------------------------

TWO = Experiment(
    seeds=[0, 1, 2], metrics=["psnr", "stlpips"],
    variants=dict(full=Variant(about="all", against=None, inference=dict(more=dict(num_inference_steps=4))),
                  less=Variant(about="less")))


def scores(system, seed, psnr, photos=6, benchmark="in"):
    "psnr: (category, photograph) -> value."
    return pd.DataFrame([(benchmark, system, c, c, f"p{p}", p, m, psnr(i, p) if m == "psnr" else 1 - psnr(i, p) / 100,
                          seed) for i, c in enumerate(CATEGORIES) for p in range(photos) for m in ("psnr", "stlpips")],
                        columns=[*co.KEY, "metric", "value", "run"])


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


def test_rows_of_other_settings_and_missing_ones_are_named(tmp_path):
    text = TEXTS["smoke"]
    named = lambda seed, name: settings_hash(variant_params(text, TWO.variants[name], seed), TWO.variants[name],
                                             TWO.metrics)
    nothing = [type("Result", (), dict(steps=[dict(samples=dict(sr=4))]))] * 3
    write = lambda name, seed, settings: co.write_row(tmp_path / f"{name}-{seed}.json", settings, nothing,
                                                      scores(name, seed, lambda c, p: 20.123456789).drop(columns="run"))
    write("full", 0, named(0, "full")), write("full", 1, named(0, "full")), write("less", 0, named(0, "less"))
    found, missing = read_rows(tmp_path, TWO, text)
    assert {(r, k) for r, k in zip(found.restorer, found.run)} == {("full", 0), ("less", 0)}
    assert missing == {"full-1": "made with other settings", "full-2": "not there", "less-1": "not there",
                       "less-2": "not there"}
    assert found.value[found.metric == "psnr"].unique().tolist() == [20.1235]
    assert co.read_row(tmp_path / "full-0.json")["samples"] == [dict(sr=4)] * 3
    with pytest.raises(FoundIRError, match="no rows"):
        compare_variants(read_rows(tmp_path / "elsewhere", TWO, text)[0], TWO)


def test_a_key_that_params_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="train.sed"):
        variant_params(TEXTS["tiny"], Variant(about="x", params=dict(train=dict(sed=1))), 0)
