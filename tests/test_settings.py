"What a stage is told: bounds, what must fit together, any policy by name, and only what it reads."
import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from foundir_v2.config import ConfigError, declarations, load_params
from foundir_v2.core import FoundIRError
from foundir_v2.mixture import POLICIES, write_mixture
from foundir_v2.settings import (FLAT, NO_INFLUENCE, PARTS, LoopConfig, MixtureConfig, ModelConfig, TrainConfig,
                                 build_mixture, fields_read, parameters, read_config)

ROOT = Path(__file__).resolve().parents[1]
TASKS = dict(denoise=["gaussian_noise"], sr=["sr_x2"])
SIZES = dict(denoise=30, sr=10)


def config(**changes):
    return TrainConfig(
        **(dict(stage=2, steps=1, update_every=1, tasks=TASKS, score=dict.fromkeys(TASKS, "psnr")) | changes))


@pytest.mark.parametrize("changes", [
    dict(weight_decay=-1), dict(adam_betas=[1, 1]), dict(adam_betas=[.9]), dict(adam_eps=-1), dict(adam_eps=0),
    dict(lq_norm_groups=-1), dict(batch_size=10**9), dict(num_workers=10**6), dict(moe_layers=10**6), dict(moe_heads=0),
    dict(learning_rate=math.nan), dict(learning_rate=math.inf), dict(terminal_fraction=math.nan),
    dict(noise_offset=-.1), dict(seed=2**64), dict(seed=-1), dict(steps=-1), dict(steps=10**12), dict(crop=100),
    dict(crop=0), dict(scale_range=[.5, 2]), dict(scale_range=[1, .5]), dict(ema_decay=1), dict(max_grad_norm=0),
    dict(loss="l3"), dict(moe="sotf"), dict(mixed_precision="fp8"), dict(conditioning_init="identiy"),
    dict(moe_experts=["spatail"]), dict(moe_experts=[]), dict(reference_options=dict(num_inference_steps=0)),
    dict(reference_options=dict(steps=1)), dict(inference=dict(start="lp")), dict(stage=True), dict(base=""),
    dict(policy="dse"), dict(score=dict(denoise="pnsr", sr="psnr")), dict(tasks=dict(sr="sr_x2")),
    dict(start=dict(denoise=.5)), dict(proportions=dict(denoise=.9, sr=.9))], ids=str)
def test_impossible_values_are_refused_by_name_in_one_line(changes):
    with pytest.raises(FoundIRError, match=next(iter(changes))) as caught: config(**changes)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


def test_what_does_not_fit_together_is_told_at_once():
    with pytest.raises(FoundIRError) as caught:
        config(stage=1, steps=0, lq_encoder_learning_rate=1e-3, score={}, options=dict(alfa=1), policy="des")
    assert all(w in str(caught.value) for w in ("steps=0", "lq_encoder_learning_rate", "denoise, sr",
                                                "no option alfa; the choices are tasks, alpha"))


OPTIONS = dict(fixed={}, proportional={}, temperature=dict(temperature=2), sequential=dict(boundaries=[3]),
               incremental=dict(boundaries=[3]), replay=dict(table="a.csv"), des=dict(alpha=.5),
               excess_loss=dict(reference=dict.fromkeys(TASKS, 30.)),
               target_gap=dict(targets=dict.fromkeys(TASKS, 30.)), odm=dict(best=40, worst=10), slope=dict(window=2),
               art=dict(tau=.2), rebalance=dict(best=40))


@pytest.mark.parametrize("policy", POLICIES)
def test_any_policy_of_the_library_trains(tmp_path, policy):
    write_mixture([dict(step=s, task=t, weight=w, score=None) for s, ws in {0: (.6, .4), 5: (.1, .9)}.items()
                   for t, w in zip(TASKS, ws)],
                  tmp_path / "a.csv")
    c = config(policy=policy, options=OPTIONS.get(policy, {}), root=str(tmp_path))
    mixture = build_mixture(c, SIZES)
    assert type(mixture) is POLICIES[policy] and set(mixture.weights) == set(TASKS)
    for step, score in ((0, 20.), (5, 21.)): mixture.update(dict(denoise=score, sr=25.), step)
    assert sum(mixture.weights.values()) == pytest.approx(1)
    with pytest.raises(FoundIRError, match="has no option nonsense; the choices are"):
        replace(c, options=OPTIONS.get(policy, {}) | dict(nonsense=1))


def test_a_registered_policy_is_a_choice(monkeypatch):
    class Mine(POLICIES["fixed"]): pass
    monkeypatch.setitem(POLICIES, "mine", Mine)
    assert type(build_mixture(config(policy="mine"))) is Mine


def test_start_and_sizes_reach_the_policies_that_take_them():
    start = dict(denoise=.7, sr=.3)
    for policy in ("fixed", "des", "slope", "target_gap", "art", "rebalance"):
        assert build_mixture(config(policy=policy, options=OPTIONS[policy], start=start)).weights == start
    assert build_mixture(config(policy="proportional"), SIZES).weights == pytest.approx(dict(denoise=.75, sr=.25))
    with pytest.raises(FoundIRError, match="'sizes'"): build_mixture(config(policy="proportional"))
    # the stage's own come first
    assert build_mixture(config(policy="des", options=dict(alpha=1), proportions=start)).weights == start


def test_a_stage_is_told_and_named_by_what_it_reads():
    def made(stage, **mixture):
        return TrainConfig.from_sections(
            stage, dict(steps=1) | (dict(update_every=1) if stage == 2 else {}), mixture=dict(policy="des") | mixture,
            train=dict(caption_dropout=.7), inference=dict(start="noise"))
    assert [made(s).inference.start for s in (0, 1, 2)] == ["lq", "noise", "noise"]
    for stage in (0, 1):
        assert parameters(made(stage, options=dict(alpha=1))) == parameters(
            made(stage, options=dict(alpha=2), reference_seed=3))
    assert parameters(made(2, options=dict(alpha=1))) != parameters(made(2, options=dict(alpha=2)))
    assert [made(s).caption_dropout for s in (0, 1, 2)] == [.2, .7, .7]


def test_sections_are_checked_even_where_they_are_not_read():
    for bad in (dict(train=dict(caption_dropuot=.1)), dict(train=dict(caption_dropout=2)),
                dict(mixture=dict(policy="dse")), dict(mixture=dict(tasks=dict(a=["b"]))), dict(tarin={})):
        with pytest.raises(ConfigError, match="train|mixture|tarin"): TrainConfig.from_sections(0, dict(steps=1), **bad)


def test_parts_are_the_fields_of_the_whole():
    names = [f for part in FLAT.values() for f in declarations(part)]
    assert len(names) == len(set(names)) and set(names) < {f.name for f in fields(TrainConfig)}
    assert set(NO_INFLUENCE) < {f.name for f in fields(TrainConfig)}
    assert set(fields_read(LoopConfig, 1, False)) - set(fields_read(LoopConfig, 0, False)) == {
        "terminal_fraction", "noise_offset", "caption_dropout", "caption_cache"}
    assert fields_read(MixtureConfig, 1, False) == ["tasks", "start"]
    assert fields_read(ModelConfig, 0, False) == list(declarations(ModelConfig))


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_the_command_line_and_the_pipeline_read_one_configuration(stage):
    params = load_params(ROOT / "params.yaml")
    piped = TrainConfig.from_sections(stage, params[f"train_stage{stage}"], **{p: params[p] for p in PARTS})
    assert read_config(ROOT / "params.yaml", stage) == piped
    assert (read_config(ROOT / "params.yaml", stage, ["seed=3", "output=elsewhere"])
            == replace(piped, seed=3, output="elsewhere"))


def test_a_stage_that_is_told_to_update_reads_how():
    "Not the defaults of the code: those of the parameter file."
    c, params = (read_config(ROOT / "params.yaml", 0, ["proportions=null", "update_every=300"]),
                 load_params(ROOT / "params.yaml"))
    assert (c.policy, c.reference_size, c.proportions) == (
        params["mixture"]["policy"], params["mixture"]["reference_size"], None)
    assert read_config(ROOT / "params.yaml", 2, ["update_every=0"]).update_every == 0


def test_a_file_without_the_sections_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("mixture:\n  policy: des\n")
    with pytest.raises(ConfigError, match="no section model, train, inference, train_stage1"):
        read_config(tmp_path / "a.yaml", 1)


def test_cheaper_scoring_holds_only_what_was_chosen():
    assert config().reference_options.call == {} and not config().reference_options.autocast
    chosen = config(reference_options=dict(guidance_scale=1, color_fix="none", autocast=True)).reference_options
    assert chosen.call == dict(guidance_scale=1.0, color_fix="none") and chosen.autocast


def test_updates_go_on_from_given_proportions():
    led = dict(denoise=.7, sr=.3)
    made = lambda **given: build_mixture(config(policy="des", options=dict(alpha=1), **given), start=led).weights
    own = dict(denoise=.2, sr=.8)
    assert made(start=own) == led and made(proportions=own) == own
