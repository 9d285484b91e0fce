"What saves memory while training: same results where they must be the same, and one line where it can't be."
import sys
from functools import partial
from pathlib import Path

import pytest, torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from foundir_v2 import train as tr
from foundir_v2.base import load_base
from foundir_v2.checkpoint import HostEMA, make_ema
from foundir_v2.config import ConfigError
from foundir_v2.core import FoundIRError
from foundir_v2.diffusion import build_unet
from foundir_v2.learner import make_accelerator
from foundir_v2.optim import make_optimizer
from foundir_v2.settings import parameters, read_config
from foundir_v2.vae import PatchEncoder
from small_training import config, equal, weights

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def plain(bench, tmp_path_factory):
    "A stage 0 and a stage 2 as they are."
    folder = tmp_path_factory.mktemp("plain")
    return {stage: tr.train(config(bench, folder, stage=stage, steps=4, output=str(folder / f"stage{stage}"),
                                   update_every=2)) for stage in (0, 2)}


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize("switch", [dict(gradient_checkpointing=True), dict(ema_device="cpu"), dict(tf32=True)],
                         ids=str)
def test_a_switch_changes_no_bit(bench, tmp_path, plain, stage, switch):
    switched = tr.train(config(bench, tmp_path, stage=stage, steps=4, update_every=2, **switch))
    assert switched.log == plain[stage].log
    assert equal(weights(switched.output), weights(plain[stage].output))


def test_what_cannot_influence_a_result_lets_a_run_go_on(bench, tmp_path):
    "Whoever ran out of memory turns checkpointing on, and goes on from the last checkpoint."
    c = config(bench, tmp_path)
    for switch in (dict(gradient_checkpointing=True), dict(ema_device="cpu")):
        assert parameters(config(bench, tmp_path, **switch)) == parameters(c)
    assert parameters(config(bench, tmp_path, tf32=True)) != parameters(c)


def test_checkpointing_reaches_every_part(bench, tmp_path):
    c = config(bench, tmp_path, stage=2, gradient_checkpointing=True)
    unet = build_unet(c, load_base(c.base))
    assert unet.lq_features.gradient_checkpointing and unet.moe_scheduler.gradient_checkpointing
    assert all(b.gradient_checkpointing for b in (*unet.down_blocks, unet.mid_block, *unet.up_blocks))


def test_the_encoder_keeps_less_with_checkpointing():
    "Bytes that wait for the backward pass, and the gradients."
    kept, grads, x = [], [], torch.rand(1, 3, 64, 64)
    for on in (False, True):
        torch.manual_seed(0)
        encoder, held = PatchEncoder(blocks=6), []
        encoder.gradient_checkpointing = on
        encoder._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: held.append(x.nbytes) or x, lambda x: x): y = encoder(x)
        y.square().sum().backward()
        kept.append(sum(held)); grads.append([p.grad for p in encoder.parameters()])
    assert kept[1] < 0.5 * kept[0] and all(map(torch.equal, *grads))


def test_an_average_in_main_memory_is_the_same():
    torch.manual_seed(0)
    walk = [nn.Parameter(torch.randn(3, 40)), nn.Parameter(torch.randn(9))]
    same, host = make_ema(walk, 0.9), make_ema(walk, 0.9, "cpu")
    assert isinstance(host, HostEMA) and not isinstance(same, HostEMA)
    for _ in range(20):
        for p in walk: p.data += torch.randn_like(p)
        same.step(walk); host.step(walk)
    assert all(torch.equal(a, b) for a, b in zip(same.shadow_params, host.shadow_params))
    assert same.state_dict() | dict(shadow_params=0) == host.state_dict() | dict(shadow_params=0)
    assert host.shadow_params[0].data_ptr() != walk[0].data_ptr()


def test_tf32_is_this_runs_alone(bench, tmp_path):
    seen = []
    for tf32 in (True, False):
        make_accelerator(config(bench, tmp_path, tf32=tf32))
        seen.append(torch.backends.cuda.matmul.allow_tf32)
    assert seen == [True, False]


def test_bytes_hold_the_state_of_adamw8bit():
    pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    target, found = torch.randn(128, 128), {}
    for kind in ("adamw", "adamw8bit"):
        p = nn.Parameter(torch.zeros(128, 128))
        optimizer = make_optimizer(kind, [dict(params=[p], lr=0.05)], weight_decay=0)
        for _ in range(60):
            (p - target).square().mean().backward()
            optimizer.step(); optimizer.zero_grad()
        moments = [t for t in optimizer.state[p].values() if isinstance(t, torch.Tensor) and t.shape == p.shape]
        found[kind] = p.detach(), sum(t.nbytes for t in moments)
    assert found["adamw8bit"][1] * 4 == found["adamw"][1]
    assert (found["adamw8bit"][0] - found["adamw"][0]).abs().mean() < 0.05 * target.abs().mean()


def test_without_bitsandbytes_one_line_says_what_to_do(monkeypatch):
    for name in ("bitsandbytes", "bitsandbytes.optim"): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(FoundIRError, match="needs bitsandbytes: pip install bitsandbytes, or choose adamw"):
        make_optimizer("adamw8bit", [])


@pytest.mark.parametrize("setting, words", [
    ("ema_device=gpu", "same, cpu"), ("gradient_checkpointing=perhaps", "true or false"), ("tf32=1", "true or false")])
def test_other_values_are_refused(setting, words):
    with pytest.raises(ConfigError, match=words): read_config(ROOT / "params.yaml", 2, [setting])
