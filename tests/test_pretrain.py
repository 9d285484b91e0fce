"""Dead leaves, crops, and the resumable pretraining runs."""
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from torch import nn
from hypothesis import given, settings, strategies as st

from foundir_v2.base import TINY_UNET, new_base
from foundir_v2.core import FoundIRError, generator
from foundir_v2.pretrain import (
    CropPool, PretrainConfig, _resume, dead_leaves, photographs, power_law, pretrain_prior, pretrain_vae)
from foundir_v2.vae import PatchAutoencoderKL

PALETTE = torch.rand(50, 3, generator=torch.Generator().manual_seed(0))
QUICK = dict(lr=1e-3, batch_size=2, crop=32, save_every=2)
SMALL_VAE = dict(hidden=16, encoder_blocks=1, decoder_blocks=1)


@pytest.fixture(scope="module")
def pool():
    photos = {f"p{i}": dead_leaves(160, PALETTE, 1000 + i, leaves=150) for i in range(3)}
    return CropPool(photos, leaves=2, size=96, smallest=64)


@given(st.integers(0, 2**40), st.integers(16, 48))
@settings(max_examples=8, deadline=None)
def test_dead_leaves_are_a_pure_function(seed, size):
    a = dead_leaves(size, PALETTE, seed, leaves=60)
    assert a.shape == (3, size, size) and a.min() >= 0 and a.max() <= 1 and a.std() > 0.01
    np.random.seed(0)
    torch.manual_seed(0)
    assert torch.equal(a, dead_leaves(size, PALETTE, seed, leaves=60))
    assert not torch.equal(a, dead_leaves(size, PALETTE, seed + 1, leaves=60))


def test_dead_leaves_take_their_colours_from_the_palette():
    red = dead_leaves(48, torch.tensor([[0.8, 0.0, 0.0]]), 0)
    assert red[0].mean() > 0.4 and red[1:].mean() < 0.05


@pytest.mark.parametrize("alpha", [2.0, 3.0])
def test_power_law(alpha):
    r = power_law(np.random.default_rng(0), 100_000, 2.0, 200.0, alpha)
    assert 2 <= r.min() and r.max() <= 200
    cdf = lambda x: (2 ** (1 - alpha) - x ** (1 - alpha)) / (2 ** (1 - alpha) - 200 ** (1 - alpha))
    for x in (3.0, 5.0, 20.0):
        assert (r < x).mean() == pytest.approx(cdf(x), abs=0.01)


def test_crops(pool):
    a, b = pool.crops(generator("t", 1), 12, 48, 0.5), pool.crops(generator("t", 1), 12, 48, 0.5)
    assert torch.equal(a.images, b.images) and torch.equal(a.time_ids, b.time_ids)
    assert a.images.shape == (12, 3, 48, 48) and a.images.min() >= -1 and a.images.max() <= 1
    assert 0 < a.is_leaves.sum() < 12 and (a.time_ids[a.is_leaves][:, :2] == 96).all()
    corner, original = a.time_ids[:, 2:4], a.time_ids[:, :2]
    assert (corner >= 0).all() and (corner + 48 <= original).all() and (a.time_ids[:, 4:] == 48).all()
    assert not pool.crops(generator("t", 2), 6, 48, leaf_share=0).is_leaves.any()
    assert pool.crops(generator("t", 2), 6, 48, leaf_share=1).is_leaves.all()


def test_crop_is_where_the_micro_conditioning_says(pool):
    """Up to the mirror image, the crop is found at its corner in a picture of its size."""
    c = pool.crops(generator("where"), 6, 32, 0)
    for image, ids in zip(c.images, c.time_ids.long().tolist()):
        h, w, y, x, *_ = ids
        found = [p[:, y:y + 32, x:x + 32] for p in pool.photos if tuple(p.shape[1:]) == (h, w)]
        mine = ((image + 1) * 127.5).round().to(torch.uint8)
        assert any(torch.equal(mine, f) or torch.equal(mine.flip(-1), f) for f in found)


def test_pool_errors(pool):
    with pytest.raises(FoundIRError, match="at least 128"):
        CropPool({"a": torch.rand(3, 40, 40)}, leaves=0)
    with pytest.raises(FoundIRError, match="crop of 500"):
        pool.crops(generator(), 1, 500)


def test_photographs_without_data(tmp_path):
    with pytest.raises(FileNotFoundError, match="fetch"):
        photographs(tmp_path)


def test_learning_rate():
    c = PretrainConfig(steps=100, lr=1.0, warmup=10)
    rates = [c.lr_at(s) for s in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates.index(max(rates)) == 9 and rates[-1] < 1e-2
    assert all(a >= b for a, b in zip(rates[9:], rates[10:]))


def test_vae_run_resumes_exactly_and_beats_its_start(pool, tmp_path):
    config = PretrainConfig(steps=8, **QUICK)
    whole, losses = pretrain_vae(pool, tmp_path / "a", config, SMALL_VAE)
    pretrain_vae(pool, tmp_path / "b", config, SMALL_VAE, stop_at=3)  # the last checkpoint is that of step 2
    resumed, again = pretrain_vae(pool, tmp_path / "b", config, SMALL_VAE)
    assert losses == again and len(losses) == 8
    saved = PatchAutoencoderKL.from_pretrained(tmp_path / "a/vae")
    for p, q, r in zip(whole.parameters(), resumed.parameters(), saved.parameters()):
        assert torch.equal(p, q) and torch.equal(p, r)
    z = whole.encode(pool.crops(generator("z"), 16, 32, 0).images).latent_dist.mode() * whole.config.scaling_factor
    assert 0.5 < z.std() < 2


def test_prior_run_resumes_exactly_and_learns(pool, tmp_path):
    torch.manual_seed(0)
    base = new_base(PatchAutoencoderKL(**SMALL_VAE),
                    dict(TINY_UNET, block_out_channels=(16, 32, 32), attention_head_dim=(2, 2, 2)))
    before = {k: v.clone() for k, v in base.unet_prior.state_dict().items()}
    config = PretrainConfig(steps=4, **QUICK)
    unet, losses = pretrain_prior(base, pool, tmp_path / "a", config)
    pretrain_prior(base, pool, tmp_path / "b", config, stop_at=2)
    again, more = pretrain_prior(base, pool, tmp_path / "b", config)
    assert losses == more and all(math.isfinite(x) for x in losses)
    assert all(torch.equal(p, q) for p, q in zip(unet.parameters(), again.parameters()))
    assert any(not torch.equal(v, before[k]) for k, v in unet.state_dict().items()), "trained"
    assert all(torch.equal(v, before[k]) for k, v in base.unet_prior.state_dict().items()), "the base is left alone"


def test_checkpoint_of_other_settings_is_refused(pool, tmp_path):
    pretrain_vae(pool, tmp_path, PretrainConfig(steps=2, **QUICK), SMALL_VAE)
    with pytest.raises(FoundIRError, match="steps, seed"):
        pretrain_vae(pool, tmp_path, PretrainConfig(steps=3, seed=5, **QUICK), SMALL_VAE)


def test_a_checkpoint_of_another_model_or_damaged_is_refused(pool, tmp_path):
    path, config = tmp_path / "checkpoint.pt", PretrainConfig(steps=1, lr=1e-3)
    torch.save(dict(config=asdict(config), model=nn.Linear(2, 2).state_dict(), optimizer={}, ema={}, losses=[]), path)
    with pytest.raises(FoundIRError, match="another model"): _resume(path, config, nn.Linear(3, 3), None, None)
    path.write_bytes(b"nothing")
    with pytest.raises(FoundIRError, match="delete it"): _resume(path, config, nn.Linear(2, 2), None, None)


@pytest.mark.parametrize("name", ["steps", "warmup", "batch_size", "crop", "save_every"])
def test_settings_that_cannot_be_are_refused(name):
    with pytest.raises(FoundIRError, match=f"{name}=0"): PretrainConfig(**(dict(steps=1, lr=1e-3) | {name: 0}))


def test_broken_loss_stops_the_run_and_keeps_the_checkpoint(pool, tmp_path):
    config = PretrainConfig(steps=6, **QUICK)
    pretrain_vae(pool, tmp_path, config, SMALL_VAE, stop_at=2)
    good = (tmp_path / "checkpoint.pt").read_bytes()
    pool_of_nan = CropPool({"a": torch.rand(3, 64, 64)}, leaves=0, smallest=32)
    real = pool_of_nan.crops
    def crops(rng, n, s, leaf_share=0.3):
        return _nan(real(rng, n, s, leaf_share)) if leaf_share else real(rng, n, s, leaf_share)
    object.__setattr__(pool_of_nan, "crops", crops)
    with pytest.raises(FoundIRError, match="loss is nan at step 2"):
        pretrain_vae(pool_of_nan, tmp_path, config, SMALL_VAE)
    assert (tmp_path / "checkpoint.pt").read_bytes() == good


def _nan(crops):
    crops.images.fill_(math.nan)
    return crops
