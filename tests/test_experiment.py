"Variants of the parameters: what they are told, their training and its resumption, their rows."
import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pandas as pd
import pytest
import torch

from foundir_v2 import experiment as ex
from foundir_v2.base import load_base
from foundir_v2.config import ConfigError, load_yaml, overlay
from foundir_v2.core import FoundIRError
from foundir_v2.data import Item
from foundir_v2.experiment import (MEASURED, Experiment, Variant, gather, read_experiment, read_rows, settings_hash,
                                   train_variant, variant_params)
from foundir_v2.params import STAGES
from foundir_v2.runner import assign, check_parameters, notebook_parameters, parser, read_sections
from foundir_v2.settings import PARTS
from foundir_v2.tasks import CATEGORIES, SUBTASKS
from foundir_v2.trainlog import Course, read_course, write_course
from small_training import TASKS, equal, weights

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {p: overlay((ROOT / "params.yaml").read_text(), (ROOT / f"profiles/{p}.yaml").read_text())
         for p in ("tiny", "smoke")}
FOLDERS = {f.name: (f, read_experiment(f / "variants.yaml"), load_yaml(f / "dvc.yaml")["stages"])
           for f in (ROOT / "nbs/contributions", ROOT / "nbs/experiments")}
TWO = Experiment(seeds=[0, 1, 2], metrics=["psnr", "stlpips"],
                 variants=dict(full=Variant(about="all", against=None), less=Variant(about="less")))


# --- variants.yaml and its pipeline -----------------------------------------------------------------------------------

@pytest.mark.parametrize("folder", FOLDERS)
def test_dvc_sees_a_stage_per_variant_and_seed_whose_only_output_is_a_file_in_git(folder):
    from dvc.repo import Repo
    here, experiment, pipeline = FOLDERS[folder]
    found = {s.addressing.rpartition(":")[2]: s for s in Repo(str(ROOT)).stage.load_all(str(here / "dvc.yaml"))}
    rows = {f"row@{seed}-{name}": f"{name}-{seed}" for seed in experiment.seeds for name in experiment.variants}
    assert set(found) - set(rows) == set(pipeline) - {"row"} and set(rows) < set(found)
    for stage, row in rows.items():
        (out,) = found[stage].outs
        assert Path(out.fs_path) == here / f"results/{row}.json" and not out.use_cache
        assert {Path(d.fs_path) for d in found[stage].deps if hasattr(d, "params") and d.params} <= {
            ROOT / "params.yaml", here / "variants.yaml"}
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().splitlines() if line.startswith("/")]
    for out in (o for name in pipeline if name != "row" for o in found[name].outs):
        assert out.use_cache == (Path(out.fs_path).relative_to(ROOT).parts[0] in ignored)


@pytest.mark.parametrize("folder", FOLDERS)
def test_dvc_looks_at_all_that_a_row_depends_on(folder):
    _, experiment, pipeline = FOLDERS[folder]
    named = [p for p in pipeline["row"]["params"] if isinstance(p, str)]
    assert {*PARTS, *STAGES, "evaluate.systems.restored", *(f"evaluate.{k}" for k in MEASURED)} <= set(named)
    shared = [k for k in ("params", "parts") if getattr(experiment, k)]
    own = {f"nbs/{folder}/variants.yaml": ["metrics", *shared, "variants.${item.variant}"]}
    assert own in pipeline["row"]["params"]


@pytest.mark.parametrize("folder, name", [(f, n) for f, (_, _, pipeline) in FOLDERS.items() for n in pipeline])
def test_every_stage_gives_its_notebook_all_parameters(monkeypatch, folder, name):
    monkeypatch.chdir(ROOT)
    cmd = FOLDERS[folder][2][name]["cmd"]
    args = parser().parse_args(
        shlex.split(cmd.replace("${item.variant}", "full").replace("${item.seed}", "1"))[3:])
    wanted = notebook_parameters(nbformat.read(ROOT / args.src, 4), args.src)
    values = assign(*read_sections(args.sections, args.set), wanted)
    check_parameters(values, wanted, args.src)
    if name == "row": assert values == dict(folder=f"nbs/{folder}", variant="full", seed=1)


@pytest.mark.parametrize("variants, words", [
    (dict(a=dict(about="x")), "compared with 'full'"),
    (dict(a=dict(about="x", against="a")), "compared with 'a'"),
    (dict(a=dict(against=None)), "missing about"),
    (dict(a=dict(about="x", against=None, inference=dict(b=dict(guidance=5)))), "unknown option guidance"),
    (dict(a=dict(about="x", against=None, inference=dict(b={}), encoder_alone=True)), "no settings of inference"),
    (dict(a=dict(about="x", against=None), b=dict(about="y", against="a", encoder_alone=True, time=2)),
     "b trains for 2 and a for 1 times"),
    (dict(a=dict(about="x", against=None, parts=["b"])), "a has unknown parts b"),
    (dict(a=dict(about="x", against=None, steps=4)), "unknown steps")])
def test_mistakes_in_variants_are_one_line(tmp_path, variants, words):
    (tmp_path / "variants.yaml").write_text(json.dumps(dict(seeds=[0], metrics=["psnr"], variants=variants)))
    with pytest.raises(FoundIRError, match=words) as e: read_experiment(tmp_path / "variants.yaml")
    assert "\n" not in str(e.value)


def test_a_key_that_params_does_not_have_is_refused():
    with pytest.raises(ConfigError, match="train.sed"):
        variant_params(TEXTS["tiny"], [dict(train=dict(sed=1))], 0)


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
    trained, real = [], ex.train
    def train(config, cut=None):
        trained.append(config.stage)
        if config.stage == cut: raise PowerCut
        return real(config)
    kept = tmp_path / "kept"
    monkeypatch.setattr(ex, "train", lambda config: train(config, cut=2))
    with pytest.raises(PowerCut): train_variant(params, params, kept, kept / "full-0", **files)
    monkeypatch.setattr(ex, "train", train)
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
    scores = ex.measure_variant("alone", alone, result.output, "trained:x", items, ["psnr"])
    assert scores.restorer.tolist() == ["alone"] and scores.value.notna().all()
    settings = lambda p, v: settings_hash(variant_params(p, [v.params], 0), v, ["psnr"])
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


# --- rows -------------------------------------------------------------------------------------------------------------

def scores(system, value):
    return pd.DataFrame([("in", system, c, c, "p", 0, m, value) for c in CATEGORIES for m in ("psnr", "stlpips")],
                        columns=[*ex.KEY, "metric", "value"])


def test_rows_of_other_settings_and_missing_ones_are_named(tmp_path):
    text = TEXTS["smoke"]
    named = lambda seed, name: settings_hash(variant_params(text, TWO.layers(name), seed), TWO.variants[name],
                                             TWO.metrics)
    write_course(Course([]).followed_by(2, 1, [], dict(sr=1.0)), tmp_path / "mixture")
    nothing = [SimpleNamespace(steps=[dict(samples=dict(sr=4))], output=tmp_path)] * 3
    write = lambda name, seed, settings: ex.write_row(tmp_path / f"{name}-{seed}.json", settings, nothing,
                                                      scores(name, 20.123456789))
    write("full", 0, named(0, "full")), write("full", 1, named(0, "full")), write("less", 0, named(0, "less"))
    rows, missing = read_rows(tmp_path, TWO, text)
    assert list(rows) == [("full", 0), ("less", 0)]
    assert missing == {"full-1": "made with other settings", "full-2": "not there", "less-1": "not there",
                       "less-2": "not there"}
    found = gather(rows)
    assert {(r, v, k) for r, v, k in zip(found.restorer, found.variant, found.run)} == {
        ("full", "full", 0), ("less", "less", 0)}
    assert found.value.unique().tolist() == [20.1235]
    assert ex.read_row(tmp_path / "full-0.json")["samples"] == [dict(sr=4)] * 3
    course = gather(rows, "course")
    assert course[["step", "stage", "task", "weight", "variant"]].values.tolist() == [
        [0, 2, "sr", 1.0, "full"], [0, 2, "sr", 1.0, "less"]]
    assert gather(read_rows(tmp_path / "elsewhere", TWO, text)[0]).empty


def test_a_row_from_before_courses_were_kept_still_counts(tmp_path):
    row = json.loads((ROOT / "nbs/contributions/results/full-0.json").read_text())
    row.pop("course", None)
    (tmp_path / "full-0.json").write_text(json.dumps(row))
    assert ex.read_row(tmp_path / "full-0.json")["course"].empty


# --- parts, and other architectures -----------------------------------------------------------------------------------

def test_parts_are_laid_over_what_all_share_and_own_params_over_both():
    steps = lambda n: dict(train_stage2=dict(steps=n))
    many = Experiment(seeds=[0], metrics=["psnr"], params=dict(train_stage1=dict(steps=1), **steps(1)),
                      parts=dict(a=steps(2), b=steps(3)),
                      variants={n: Variant(about=n, against=None, parts=p, params=own) for n, p, own in [
                          ("none", [], {}), ("ab", ["a", "b"], {}), ("ba", ["b", "a"], {}), ("own", ["a"], steps(4))]})
    told = {n: variant_params(TEXTS["tiny"], many.layers(n), 5) for n in many.variants}
    assert {n: p["train_stage2"]["steps"] for n, p in told.items()} == dict(none=1, ab=3, ba=2, own=4)
    assert {(p["train_stage1"]["steps"], p["train"]["seed"]) for p in told.values()} == {(1, 5)}


def test_a_network_on_pixels_is_trained_by_its_one_stage(params, files, tmp_path):
    sizes = dict(width=8, blocks=[1, 1, 1, 1], refinement=1, heads=[1, 1, 1, 1], prompts=2, prompt_width=[8, 8, 8],
                 prompt_size=[8, 8, 8])
    model = dict(params["model"], architecture="promptir", architecture_options=sizes)
    for k in ("lq_context_width", "lq_norm_groups", "moe", "moe_layers", "moe_heads"): model.pop(k)
    pixels = {**params, "model": model}
    (result,) = train_variant(pixels, params, tmp_path / "kept", tmp_path / "kept/own", **files)
    assert result.output.parent == tmp_path / "kept/own" and (result.output / "network").is_dir()
    assert read_course(result.output).rows[-1]["stage"] == 2
