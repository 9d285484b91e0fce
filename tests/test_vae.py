"""The tiny autoencoder, its PCA start, and LQ encoders."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from foundir_v2.core import FoundIRError
from foundir_v2.vae import (PatchAutoencoderKL, PatchEncoder, build_lq_encoder, lq_encoder_config, lq_encoder_from_vae,
                            pca_init, vae_scale_factor)


def smooth_images(count=4, size=64, seed=0):
    noise = torch.randn(count, 3, size // 8, size // 8, generator=torch.Generator().manual_seed(seed))
    fine = torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed + 1))
    return (F.interpolate(noise, size=(size, size), mode="bicubic") * 0.4 + fine * 0.05).clamp(-1, 1)


@torch.no_grad()
def test_pca_start_is_linear_pca():
    """Compared with NumPy's SVD, a second route to the same subspace."""
    train, test = smooth_images(6), smooth_images(2, seed=9)
    vae = PatchAutoencoderKL(latent_channels=8)
    pca_init(vae, train)
    rows = lambda x: F.pixel_unshuffle(x, 4).permute(0, 2, 3, 1).reshape(-1, 48).numpy().astype(np.float64)
    mean = rows(train).mean(0)
    basis = np.linalg.svd(rows(train) - mean, full_matrices=False)[2][:8]
    want = (rows(test) - mean) @ basis.T @ basis + mean
    np.testing.assert_allclose(rows(vae(test).sample), want, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("whiten", [0.0, 0.5, 1.0])
def test_whitening_changes_latents_but_not_pictures(whiten):
    images = smooth_images(6)
    vae, plain = PatchAutoencoderKL(latent_channels=6), PatchAutoencoderKL(latent_channels=6)
    pca_init(plain, images, whiten=0)
    variances = pca_init(vae, images, whiten=whiten)
    torch.testing.assert_close(vae(images).sample, plain(images).sample, atol=2e-4, rtol=0)
    z = vae.encode(images).latent_dist.mode()
    torch.testing.assert_close(z.var((0, 2, 3)), variances[:6] ** (1 - whiten), rtol=0.02, atol=1e-4)


@torch.no_grad()
def test_same_calls_as_autoencoder_kl():
    torch.manual_seed(0)
    vae, x = PatchAutoencoderKL(), torch.rand(2, 3, 32, 48) * 2 - 1
    posterior = vae.encode(x).latent_dist
    assert isinstance(posterior, DiagonalGaussianDistribution)
    assert posterior.sample(torch.Generator().manual_seed(0)).shape == (2, 16, 8, 12)
    assert vae.decode(posterior.mode()).sample.shape == x.shape
    assert torch.equal(vae.encode(x, return_dict=False)[0].mode(), posterior.mode())
    assert torch.equal(vae.decode(posterior.mode(), return_dict=False)[0], vae(x).sample)


@torch.no_grad()
def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(hidden=24, decoder_blocks=1, scaling_factor=1.7)
    vae.save_pretrained(tmp_path)
    again, x = PatchAutoencoderKL.from_pretrained(tmp_path), torch.rand(1, 3, 16, 16)
    assert torch.equal(vae(x).sample, again(x).sample) and again.config.scaling_factor == 1.7


def test_training_lowers_the_error_of_the_pca_start():
    torch.manual_seed(0)
    images = smooth_images(8)
    vae = PatchAutoencoderKL(latent_channels=4, hidden=32, encoder_blocks=1, decoder_blocks=1)
    pca_init(vae, images)
    optimizer = torch.optim.AdamW(vae.parameters(), 1e-3)
    errors = []
    for _ in range(25):
        loss = F.mse_loss(vae(images).sample, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        errors.append(loss.item())
    assert min(errors) < 0.97 * errors[0]


def test_lq_encoder_copies_an_autoencoder_kl():
    torch.manual_seed(0)
    vae = AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
                        block_out_channels=(8, 16), norm_num_groups=8)
    encoder, x = lq_encoder_from_vae(vae), torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        e = vae.encoder
        torch.testing.assert_close(e.conv_out(e.conv_act(e.conv_norm_out(encoder(x)))), e(x))
    assert encoder.out_channels == 16 and all(p.requires_grad for p in encoder.parameters())
    next(encoder.parameters()).data.zero_()
    assert next(vae.encoder.parameters()).abs().sum() > 0, "a copy, not shared memory"


def test_lq_encoder_copies_a_patch_autoencoder():
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(hidden=24, encoder_blocks=3)
    config = lq_encoder_config(vae)
    assert config["class"] == "PatchEncoder" and config["blocks"] == 3
    x = torch.rand(1, 3, 16, 24)
    with torch.no_grad():
        assert torch.equal(lq_encoder_from_vae(vae)(x), vae.encoder(x))


def test_sdxl_lq_encoder_is_the_default():
    with torch.device("meta"):
        encoder = build_lq_encoder()
        assert encoder.out_channels == 512 and encoder(torch.empty(1, 3, 64, 80)).shape == (1, 512, 8, 10)


@pytest.mark.parametrize("config, words", [
    ({"class": "VGG"}, ["VGG", "LQEncoder", "PatchEncoder"]),
    ({"patch_size": 4}, ["None", "PatchEncoder"]),
    ({"class": "PatchEncoder", "depth": 2}, ["depth", "blocks"])])
def test_wrong_lq_encoder_configs_are_named(config, words):
    with pytest.raises(FoundIRError) as e:
        build_lq_encoder(config)
    assert all(w in str(e.value) for w in words)


def test_other_errors():
    with pytest.raises(FoundIRError, match="multiple of 4"):
        PatchEncoder()(torch.zeros(1, 3, 33, 32))
    with pytest.raises(FoundIRError, match="192"):
        PatchAutoencoderKL(patch_size=8)
    with pytest.raises(FoundIRError, match="Linear"):
        lq_encoder_config(torch.nn.Linear(1, 1))


def test_scale_factor():
    assert vae_scale_factor(PatchAutoencoderKL(patch_size=2)) == 2
    with torch.device("meta"):
        assert vae_scale_factor(
            AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
                          block_out_channels=(32,) * 4)) == 8
