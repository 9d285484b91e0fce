"""The mixture of experts: Eqs. 4 and 5, hard gating, errors, and the official checkpoint's shapes."""
import csv
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from foundir_v2.core import FoundIRError
from foundir_v2.moe import MoEScheduler, gate_softmax
from foundir_v2.unet import LQEmbedding
from foundir_v2.vae import build_lq_encoder

OFFICIAL = Path(__file__).parent / "data/official_added_weights.csv"


def small(**options):
    torch.manual_seed(0)
    return MoEScheduler(16, **{"layers": 1, "heads": 4, **options})


@given(st.integers(1, 5), st.integers(0, 2**31))
@settings(max_examples=20, deadline=None)
def test_soft_weights_are_a_distribution_and_hard_ones_their_largest_part(n, seed):
    logits = 3 * torch.randn(2, n, 3, 4, generator=torch.Generator().manual_seed(seed))
    soft = gate_softmax(logits)
    torch.testing.assert_close(soft.sum(1), torch.ones(2, 3, 4))
    for k in range(1, n + 1):
        hard = gate_softmax(logits, k)
        assert ((hard > 0).sum(1) == k).all() and ((hard == 0) | (hard == soft)).all()
        torch.testing.assert_close(hard.sum(1), soft.sort(1, descending=True).values[:, :k].sum(1))


def test_output_is_the_weighted_sum_of_the_experts():
    moe, z = small(), torch.randn(2, 16, 5, 6)
    w = moe.gate.weight[:, :, 0, 0] @ z.flatten(2) + moe.gate.bias[:, None]
    w = (w.exp() / w.exp().sum(1, keepdim=True)).unflatten(2, (5, 6))
    want = torch.stack([w[:, i, None] * e(z) for i, e in enumerate(moe.experts)]).sum(0)
    torch.testing.assert_close(moe(z), want)
    torch.testing.assert_close(moe.gate_weights(z), w)


@pytest.mark.parametrize("gating, top_k", [("soft", 1), ("hard", 1), ("hard", 2)])
def test_gate_and_experts_get_gradients(gating, top_k):
    moe = small(gating=gating, top_k=top_k)
    moe(torch.randn(2, 16, 6, 6)).square().mean().backward()
    assert moe.gate.weight.grad.abs().sum() > 0 and moe.gate.bias.grad.abs().sum() > 0
    assert all(any(p.grad.abs().sum() > 0 for p in e.parameters()) for e in moe.experts)


def test_hard_gating_is_not_renormalised():
    w = small(gating="hard").gate_weights(torch.randn(2, 16, 6, 6))
    assert (w.sum(1) < 1).all() and (w.sum(1) >= 1 / 3 - 1e-6).all()


@pytest.mark.parametrize("experts", [("channel",), ("sparse", "sparse"), ("channel", "spatial", "sparse", "spatial")])
def test_any_choice_of_experts(experts):
    moe, z = small(experts=experts), torch.randn(1, 16, 4, 4)
    assert len(moe.experts) == len(experts) and moe.gate_weights(z).shape == (1, len(experts), 4, 4)
    assert moe(z).shape == z.shape


def test_gradient_checkpointing_changes_memory_only():
    moe, z = small(), torch.randn(1, 16, 6, 6)
    grads = []
    for on in (False, True):
        moe.gradient_checkpointing = on
        moe.zero_grad()
        moe(z).square().mean().backward()
        grads.append([p.grad.clone() for p in moe.parameters()])
    for a, b in zip(*grads):
        assert torch.equal(a, b)


def test_state_dict_round_trip_gives_the_same_output():
    a, z = small(), torch.randn(1, 16, 4, 4)
    b = MoEScheduler(16, layers=1, heads=4)
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(z), b(z))


@pytest.mark.parametrize("options, words", [
    (dict(gating="firm"), ["firm", "soft", "hard"]),
    (dict(gating="hard", top_k=4), ["top_k=4", "1 to 3"]),
    (dict(top_k=0), ["top_k=0"]),
    (dict(experts=("spatial", "spectral")), ["spectral", "sparse"]),
    (dict(experts=()), ["at least one"]),
    (dict(heads=3), ["heads=3"])])
def test_wrong_settings_are_named(options, words):
    with pytest.raises(FoundIRError) as e:
        small(**options)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_shapes_correspond_one_to_one_to_the_official_checkpoint():
    """Every added weight of the authors' file has exactly one place here (a linear layer there may be a 1×1
    convolution here); their unused transformer is left out."""
    rows = [r for r in csv.DictReader(OFFICIAL.open()) if not r["key"].startswith("information_transformer_layes.")]
    squeeze = lambda shape: tuple(shape[:2]) if len(shape) == 4 and tuple(shape[2:]) == (1, 1) else tuple(shape)
    official = {r["key"]: squeeze([int(n) for n in r["shape"].split("x")]) for r in rows}
    with torch.device("meta"):
        ours = {"MoE": MoEScheduler(640),
                "condition_embedding": LQEmbedding(512, 320),
                "denoise_encoder": build_lq_encoder(),
                "spatial_ch_projs": torch.nn.Conv2d(640, 320, 1)}
    for part, module in ours.items():
        theirs = Counter(s for k, s in official.items() if k.startswith(part + "."))
        assert theirs == Counter(squeeze(p.shape) for p in module.state_dict().values()), part
    assert {k.split(".")[0] for k in official} == set(ours)
    for i in range(3):
        theirs = Counter(s for k, s in official.items() if k.startswith(f"MoE.experts.{i}."))
        assert theirs == Counter(squeeze(p.shape) for p in ours["MoE"].experts[i].state_dict().values()), f"expert {i}"
    assert {k for k in official if k.startswith("denoise_encoder.")} == {
        "denoise_encoder." + k for k in ours["denoise_encoder"].state_dict()}
