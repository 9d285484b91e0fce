"Every table of the library takes a row from outside, which then works by its name in the configuration."
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.configuration_utils import register_to_config
from torch import nn

from foundir_v2 import (
    architectures, attention, benchmark, caption, degrade, iqa, judges, layouts, mixture, networks, objective, optim,
    restorers, reweighting, systems, tasks)
from foundir_v2.architectures import PixelArchitecture
from foundir_v2.attention import ConvBlock, GatedFFN, make_expert
from foundir_v2.caption import CaptionerKind, make_captioner
from foundir_v2.classical import Unsharp
from foundir_v2.clean import make_thresholds
from foundir_v2.degrade import degrade as damage
from foundir_v2.learner import make_trainee
from foundir_v2.mixture import FixedMixture, policy_for
from foundir_v2.params import check_params
from foundir_v2.pixelnet import PixelNetwork
from foundir_v2.restorers import Kind, make_restorer
from foundir_v2.settings import TrainConfig
from foundir_v2.tasks import Step, SubTask, Uniform

X = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))


def config(**changes): return TrainConfig(**(dict(stage=1, steps=1, moe_heads=2) | changes))


def test_a_degradation(monkeypatch):
    def fade(image, amount): return image * (1 - amount) + 0.5 * amount
    monkeypatch.setitem(degrade.OPERATORS, "fade", fade)
    recipe = Step("fade", {"amount": Uniform(.3, .6)}),
    monkeypatch.setitem(tasks.SUBTASKS, "faded", SubTask("faded", "lowlight", recipe))
    assert damage(X, "faded", 0).std() < 0.75 * X.std()
    assert config(tasks=dict(lowlight=["faded"])).task_table == dict(lowlight=["faded"])


def test_an_expert(monkeypatch):
    def local(channels, heads, batch_axis_attention):
        return ConvBlock(channels, nn.Conv2d(channels, channels, 3, padding=1), GatedFFN(channels))
    monkeypatch.setitem(attention.EXPERTS, "local", local)
    assert config(moe_experts=["spatial", "local"]).moe_experts == ("spatial", "local")
    assert make_expert("local", 8, 2, 2)(torch.rand(1, 8, 6, 6)).shape == (1, 8, 6, 6)


def test_an_architecture(monkeypatch, tmp_path):
    class Filter(PixelNetwork):
        "One convolution."
        @register_to_config
        def __init__(self, kernel):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, kernel, padding=kernel // 2)
        def forward(self, x): return self.conv(x)

    @dataclass(frozen=True, kw_only=True)
    class Row(PixelArchitecture):
        kernel: int = 3
        @staticmethod
        def network_class(): return Filter

    monkeypatch.setitem(architectures.ARCHITECTURES, "filter", Row)
    c = config(stage=2, architecture="filter", architecture_options=dict(kernel=5), reference_per_task=1)
    model = make_trainee(c, torch.device("cpu"))
    losses = model.losses(model.module, dict(lq=X[None], gt=1 - X[None], seed=torch.zeros(1).long()))
    losses.mean().backward()
    assert losses.shape == (1,) and model.parameter_groups()[0]["params"][0].grad.shape == (3, 3, 5, 5)
    model.save(tmp_path)
    with torch.no_grad(): expected = model.network(X[None])[0].clamp(0, 1)
    assert torch.allclose(make_restorer(f"trained:{tmp_path}")(X), expected, atol=1e-6)


def test_a_policy_with_an_option(monkeypatch):
    class Leader(FixedMixture):
        "All but a rest for one task."
        def __init__(self, tasks, first, rest=0.1, start=None):
            super().__init__({t: 1 - rest if t == first else rest / (len(tasks) - 1) for t in tasks})
    monkeypatch.setitem(mixture.POLICIES, "leader", Leader)
    c = config(policy="leader", options=dict(first="sr", rest=0.2))
    assert policy_for(list(c.task_table), c.policy, c.options).weights["sr"] == pytest.approx(0.8)


def test_a_kind_of_score_for_art(monkeypatch):
    monkeypatch.setitem(reweighting.SCORE_LOSSES, "share", lambda score: 1 - score)
    c = config(policy="art", options=dict(loss=dict(sr="share")))
    assert policy_for(list(c.task_table), c.policy, c.options).kinds["sr"] == "share"


def test_a_loss_and_an_optimizer(monkeypatch):
    monkeypatch.setitem(objective.LOSSES, "l4", lambda error, gain: error.pow(4).flatten(1).mean(1))
    sgd = lambda groups, betas, eps, weight_decay: torch.optim.SGD(groups, weight_decay=weight_decay)
    monkeypatch.setitem(optim.OPTIMIZERS, "sgd", sgd)
    c = config(loss="l4", optimizer="sgd")
    assert objective.sample_losses(torch.full((1, 1, 2, 2), 2.), torch.zeros(1, 1, 2, 2), c.loss).item() == 16
    made = optim.make_optimizer(c.optimizer, [dict(params=[nn.Parameter(X.clone())], lr=.1)])
    assert isinstance(made, torch.optim.SGD)


def test_a_metric(monkeypatch):
    monkeypatch.setitem(iqa.METRICS, "mad", iqa.Metric("mad", "mad", True, False, (0, 1)))
    c = config(score=dict.fromkeys(config().task_table, "mad"), policy="des", update_every=1)
    assert set(c.score.values()) == {"mad"} and iqa.oriented("mad", 0.5) == -0.5


def test_a_layout(monkeypatch, tmp_path):
    monkeypatch.setitem(layouts.LAYOUTS, "twins", layouts.Layout("{key}_after", "{key}_before", task="rain"))
    for name in ("1_after", "1_before"): (tmp_path / f"{name}.png").touch()
    data = layouts.DataSet(name="mine", root=str(tmp_path), layout="twins", split="train")
    (entry,) = layouts.read_dataset(data).entries
    assert entry.path.endswith("1_after.png") and entry.lq.endswith("1_before.png") and entry.task == "rain"


def test_a_captioner(monkeypatch):
    monkeypatch.setitem(caption.CAPTIONERS, "name", CaptionerKind(("name",), lambda *_: lambda path: path.stem))
    assert make_captioner("name", "unused")(Path("a/red_car.jpg")) == "red_car"


def test_a_judge(monkeypatch):
    class Grey:
        name, measures = "grey", ("greyness",)
        def __call__(self, image): return {"greyness": 1 - float((image.amax(0) - image.amin(0)).mean())}
    monkeypatch.setitem(judges.JUDGES, "grey", judges.JudgeKind("grey", Grey.measures, lambda *_: Grey()))
    section = dict(limits={"greyness": [.9, .99]}, judges=["grey"], metrics=[], window=64, manual=None, num_workers=0)
    check_params({"clean": section})
    (judge,) = judges.make_judges(["grey"])
    verdict = make_thresholds(section["limits"], [judge])[0].verdict
    colour, grey = (verdict(judge(x)["greyness"]) for x in (X, X.mean(0).expand(3, -1, -1)))
    assert (colour, grey) == ("accepted", "rejected")


def test_a_compared_system_with_an_argument(monkeypatch):
    class Power:
        name = "power"
        def __init__(self, exponent): self.exponent = exponent
        def __call__(self, lq, *, subtask=None, seed=0, caption=""): return lq ** self.exponent
    make = lambda argument, options, reference: Power(float(argument))
    monkeypatch.setitem(restorers.KINDS, "power", Kind("EXPONENT", make))
    assert np.allclose(make_restorer("power:0.5")(X), X ** 0.5)


def test_a_published_network(monkeypatch):
    monkeypatch.setitem(networks.NETWORKS, "mean", lambda: Unsharp(amount=-1.0))
    assert make_restorer("network:mean")(X).std() < X.std()
    monkeypatch.setitem(networks.NETWORKS, "told", lambda sigma=None: Unsharp(amount=-sigma / 75))
    assert make_restorer("network:told", {"sigma": 75})(X).equal(make_restorer("network:mean")(X))


def test_a_form_of_the_results_table(monkeypatch):
    monkeypatch.setitem(benchmark.STYLES, "csv", lambda words, places: words.to_csv())
    paper = benchmark.published()
    text = benchmark.results_table(paper[paper.dataset == "LSD"], "csv")
    assert text.splitlines()[0].endswith("FoundIR-v2") and "LSD,PSNR ↑,19.63," in text


def test_a_published_system(monkeypatch, tmp_path):
    writer = "import shutil, sys; shutil.copy(*sys.argv[1:])"
    row = systems.System("Copier", "-", "a/copier", "MIT", "none", "nothing", "command",
                         command=f"{{python}} -c '{writer}' {{input}} {{output}}")
    monkeypatch.setitem(systems.SYSTEMS, "copier", row)
    assert "github.com/a/copier" in systems.catalogue().missing["copier"]
    same = make_restorer("system:copier", {"folder": str(tmp_path), "python": sys.executable})(X)
    assert (same - X).abs().max() <= 0.5 / 255 + 1e-6
