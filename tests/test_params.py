"params.yaml as a whole: everything wrong is found before anything runs, whichever stage it is for."
import copy
from pathlib import Path

import pytest

from foundir_v2.config import ConfigError, load_params
from foundir_v2.params import check_params, dvc_params, keys_read

ROOT = Path(__file__).resolve().parents[1]
PARAMS = load_params(ROOT / "params.yaml")
FIVE = ("deblur", "denoise", "weather", "lowlight", "sr")


def changed(**settings):
    "params.yaml with `section__key__key=value`."
    params = copy.deepcopy(PARAMS)
    for path, value in settings.items():
        *where, last = path.split("__")
        target = params
        for name in where: target = target[name]
        target[last] = value
    return params


def kept(stage, **proportions):
    "The section of a training stage that isn't to move its proportions."
    own = {k: v for k, v in PARAMS[f"train_stage{stage}"].items() if k != "update_every"}
    return own | dict(proportions=proportions or None)


def test_the_file_is_fine(): check_params(PARAMS, ROOT)


@pytest.mark.parametrize("settings, words", [
    (dict(ingest__max_pixels=0), "ingest.max_pixels: expected a whole number from 1"),
    (dict(ingest__datasets=[]), "ingest.datasets: expected"),
    (dict(ingest__datasets=[dict(name="a", root="b", layout="resid")]), r"ingest.datasets.*layout.*reside.*'resid'"),
    (dict(ingest__datasets=[dict(name="a", root="b", wieght=2)]), r"ingest.datasets\[0\]: unknown wieght"),
    (dict(ingest__datasets=[dict(name="a", root="b", layout="pairs", task="fog")]), "pairs of a are for fog"),
    (dict(ingest__datasets=[dict(name="a", root="b", layout="reside")], mixture__tasks=dict(sr=["sr_x4"])),
     "pairs of a are for haze, which is not trained"),
    (dict(clean__limits=dict(sharpness=[1, 2])), "clean.limits: unknown measure sharpness"),
    (dict(manifest__captioner="shiped"), "manifest.captioner: unknown captioner 'shiped': choose none, shipped"),
    (dict(clean__limits__piqe=[70]), "clean.limits.piqe: expected 2 values"),
    (dict(clean__metrics=["psnr"]), "clean.metrics: psnr compares with a reference"),
    (dict(mixture__options__alfa=1), "train_stage2: policy des has no option alfa"),
    (dict(mixture__options__alpha=-1), "train_stage2: mixture: alpha is -1"),
    (dict(mixture__options__alpha=None), "alpha"),
    (dict(mixture__policy="replay", mixture__options=dict(table="schedules/none.csv")), "none.csv"),
    (dict(mixture__tasks=dict(dehaze=["haze"])), "train_stage2: no score metric for dehaze"),
    (dict(mixture__tasks="foundir"), None),
    (dict(mixture__tasks="all", evaluate__subtasks="all"), None),
    (dict(mixture__tasks="haze"), "mixture.tasks: expected one of version1, foundir, .* or a mapping, got 'haze'"),
    (dict(mixture__tasks=None), "mixture.tasks: expected one of version1"),
    (dict(mixture__tasks=["haze"]), "mixture.tasks: expected one of version1"),
    (dict(mixture__tasks=dict(sr=["sr_x5"])), "mixture.tasks.sr.0.: expected one of motion_blur"),
    (dict(mixture__start=dict.fromkeys(FIVE, .3)), "train_stage0, train_stage1, train_stage2: start sum to 1.5"),
    (dict(mixture__reference_size=136, mixture__tasks=dict(sr=["sr_x4"]), mixture__score=dict(sr="psnr")), None),
    (dict(mixture__reference_per_task=0), "mixture.reference_per_task: expected a whole number from 1"),
    (dict(train_stage0=kept(0, sr=1.0)), "train_stage0: proportions of deblur"),
    (dict(train_stage1__proportions=None), "train_stage1: expected one of the keys"),
    (dict(train_stage1__lq_encoder_learning_rate=1e-3), "train_stage1: lq_encoder_learning_rate is for stage 2"),
    (dict(train_stage2__conditioning_init="identity"), "train_stage2: conditioning_init: identity would undo"),
    (dict(train_stage2__steps=0), "train_stage2: steps=0"),
    (dict(evaluate__systems__input="bicubc"),
     "evaluate.systems.input: unknown restorer 'bicubc': choose identity, bicubic"),
    (dict(evaluate__systems__restored=dict(restorer="trained:x", strat="lq")), "unknown option strat"),
    (dict(report__gate_model=dict(restorer="trained:x", guidance_scale=-1)),
     "report.gate_model.*guidance_scale: expected"),
    (dict(inference__tile_overlap=1), "inference.tile_overlap: expected"),
    (dict(mixture__reference_options=dict(steps=1)), "mixture.reference_options: unknown steps"),
    (dict(evaluate__control="nobody"), "evaluate.control"),
    (dict(evaluate__subtasks=["haz"]), "evaluate.subtasks: unknown sub-task 'haz'; did you mean haze"),
    (dict(evaluate__subtasks=[]), "evaluate.subtasks: expected"),
    (dict(mixture__tasks=dict(underwater=[]), mixture__score={}, evaluate__subtasks=["underwater"],
          report__gate_subtasks=["underwater"],
          ingest__datasets=[dict(name="a", root="b", layout="pairs", task="underwater")]), None),
    (dict(evaluate__subtasks=["underwater"]), "evaluate.subtasks: unknown sub-task 'underwater'.*underwater: .."),
    (dict(evaluate__subtasks="foundir"), "report.gate_subtasks: sr_x4 is not in the evaluation"),
    (dict(evaluate__subtasks=["haze"]), "report.gate_subtasks: motion_blur, gaussian_noise"),
    (dict(evaluate__size=1001), "evaluate.size: .* multiple of 8"),
    (dict(report__headline="musiq"), "report.headline: musiq is not in the evaluation"),
    (dict(report__columns=["input", "restord"]), "report.columns: restord"),
    (dict(report__gate_model="trained"), "report.gate_model"),
    (dict(evaluate__split="tests"), "evaluate.split: expected one of")], ids=str)
def test_each_mistake_is_named(settings, words):
    if words is None: return check_params(changed(**settings), ROOT)
    with pytest.raises(ConfigError, match=words) as caught: check_params(changed(**settings), ROOT)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("params.yaml: ")


def test_missing_and_unknown_keys_are_refused():
    for section, key in (("train", "seed"), ("mixture", "score"), ("train_stage1", "loss"),
                         ("train_stage2", "lq_encoder_learning_rate"), ("train_stage2", "update_every"),
                         ("report", "columns"), ("model", "moe"), ("inference", "prompt")):
        params = copy.deepcopy(PARAMS)
        value = params[section].pop(key)
        with pytest.raises(ConfigError, match=f"{section}.*{key}"): check_params(params, ROOT)
        params[section] |= {key: value, key + "x": value}
        with pytest.raises(ConfigError, match=f"{section}: unknown {key}x"): check_params(params, ROOT)


def test_all_mistakes_are_told_together():
    params = changed(ingest__near_bits=-1, model__moe="sotf", evaluate__metrics=["pnsr"],
                     train_stage1__conditioning_init="identiy")
    with pytest.raises(ConfigError) as caught: check_params(params, ROOT)
    assert all(w in str(caught.value)
               for w in ("ingest.near_bits", "model.moe", "evaluate.metrics[0]", "train_stage1.conditioning_init"))


def test_sections_of_others_pass():
    check_params(dict(mine=dict(x=1)), ROOT)
    assert keys_read(["mine"], dict(mine=dict(x=1))) == dict(mine=["x"])
    assert dvc_params(["mine"], dict(mine=dict(x=1))) == ["mine"]


def test_a_stage_that_keeps_its_proportions_does_not_read_the_policy():
    params, sections = changed(train_stage1=kept(1)), ["mixture", "train_stage1"]
    check_params(params, ROOT)
    assert dvc_params(sections, PARAMS) == sections
    assert keys_read(sections, params)["mixture"] == ["tasks", "start"]


def test_ingestion_knows_what_will_be_asked_of_the_data():
    sections = ["ingest", "mixture", "evaluate"]
    assert keys_read(sections, PARAMS)["mixture"] == ["tasks"]
    assert dvc_params(sections, PARAMS) == ["ingest", "mixture.tasks", "evaluate.subtasks", "evaluate.split"]
    assert dvc_params(["evaluate"], PARAMS) == ["evaluate"]
