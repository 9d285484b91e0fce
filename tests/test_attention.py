"""Attention experts: what each can see, the official sizes, precision and errors."""
import pytest
import torch
import torch.utils.checkpoint
import torch.nn.functional as F

from foundir_v2 import attention
from foundir_v2.attention import (EXPERTS, LARGE, GroupedConv2d, SpatialBlock, TransposedAttention, attend,
                                  large_products, make_expert)
from foundir_v2.core import FoundIRError, repo_root
from foundir_v2.config import load_params

KINDS = list(EXPERTS)


def gradient_reach(expert, channels, batch=1, size=15):
    """Input positions (image, row, column) that the centre output pixel of image 0 depends on."""
    x = torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(0)).requires_grad_()
    (expert(x)[0, :, size // 2, size // 2] * torch.linspace(-1, 2, channels)).sum().backward()
    return x.grad.abs().amax(1) > 0


@pytest.mark.parametrize("kind, count", [("spatial", 6_567_680), ("channel", 9_913_448), ("sparse", 12_493_682)])
def test_official_sizes_at_width_640(kind, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in make_expert(kind, 640).parameters()) == count


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (2, 16, 5, 9), (1, 16, 12, 4)])
def test_shape_is_kept(kind, shape):
    y = make_expert(kind, 16, layers=2, heads=4)(torch.randn(shape))
    assert y.shape == shape and y.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_images_of_a_batch_do_not_mix(kind):
    reach = gradient_reach(make_expert(kind, 16, layers=1, heads=4), 16, batch=3)
    assert reach[0].all() and not reach[1:].any()


def test_batch_axis_quirk_sees_the_same_pixel_of_all_images_only():
    reach = gradient_reach(make_expert("spatial", 16, layers=2, heads=4, batch_axis_attention=True), 16, batch=3)
    assert reach[:, 7, 7].all() and reach.sum() == 3


def test_batch_axis_quirk_is_sequence_first_attention():
    torch.manual_seed(0)
    block, x = SpatialBlock(16, heads=4, batch_axis_attention=True), torch.randn(3, 10, 16)
    out, _ = F.multi_head_attention_forward(x, x, x, 16, 4, block.to_qkv.weight, block.to_qkv.bias, None, None, False,
                                            0.0, block.to_out.weight, block.to_out.bias)
    torch.testing.assert_close(block.attend(x), out)
    block.batch_axis_attention = False
    out, _ = F.multi_head_attention_forward(*[x.transpose(0, 1)] * 3, 16, 4, block.to_qkv.weight, block.to_qkv.bias,
                                            None, None, False, 0.0, block.to_out.weight, block.to_out.bias)
    torch.testing.assert_close(block.attend(x), out.transpose(0, 1))


def test_sparse_map_keeps_the_largest_three_quarters():
    torch.manual_seed(0)
    full, sparse = TransposedAttention(160, heads=2), TransposedAttention(160, heads=2, keep=0.75)
    q, k = torch.randn(2, 1, 2, 80, 30)
    a, b = full.attention_map(q, k), sparse.attention_map(q, k)
    kept = b > 0
    assert (kept.sum(-1) == 60).all()
    assert (a.masked_fill(~kept, 2).amin(-1) >= a.masked_fill(kept, -2).amax(-1)).all()
    torch.testing.assert_close(b, (a * kept) / (a * kept).sum(-1, keepdim=True))


def test_attention_map_ignores_the_scale_of_channels_and_follows_the_temperature():
    torch.manual_seed(0)
    attention = TransposedAttention(8, heads=2)
    q, k = torch.randn(2, 1, 2, 4, 50)
    torch.testing.assert_close(attention.attention_map(q * 7, k * 0.1), attention.attention_map(q, k))
    cold = attention.attention_map(q, k).max()
    torch.nn.init.constant_(attention.temperature, 20.0)
    assert attention.attention_map(q, k).max() > cold


def test_sparse_expert_starts_with_scale_one_fifth_and_channel_expert_has_none():
    sparse, channel = make_expert("sparse", 16, heads=4)[0].attn, make_expert("channel", 16, heads=4)[0].attn
    assert sparse.scale.item() == pytest.approx(0.2) and channel.scale is None


@pytest.mark.parametrize("channels, groups, kernel", [(8, 8, 3), (8, 8, 5), (8, 4, 5), (12, 6, 3), (4, 4, 7)])
def test_grouped_convolution_equals_conv2d_with_the_same_gradients(channels, groups, kernel):
    torch.manual_seed(0)
    conv = GroupedConv2d(channels, groups, kernel).double()
    x = torch.randn(2, channels, 9, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(2, groups, 9, 8, dtype=torch.float64)
    plain = torch.nn.functional.conv2d(x, conv.weight, padding=kernel // 2, groups=groups)
    for y in (conv(x), torch.utils.checkpoint.checkpoint(conv, x, use_reentrant=False)):
        torch.testing.assert_close(y, plain)
        torch.testing.assert_close(torch.autograd.grad((y * cotangent).sum(), (x, conv.weight)),
                                   torch.autograd.grad((plain * cotangent).sum(), (x, conv.weight), retain_graph=True))


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_autocast_trains_and_stays_close_to_fp32(kind):
    torch.manual_seed(0)
    expert, x = make_expert(kind, 32, layers=1, heads=4), torch.randn(1, 32, 8, 8)
    exact = expert(x)
    with torch.autocast("cpu", torch.bfloat16):
        out = expert(x.clone().requires_grad_())
    out.float().square().mean().backward()
    assert (out.float() - exact).abs().max() < 0.1 * exact.abs().max()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in expert.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_channels_last_gives_the_same_result(kind):
    torch.manual_seed(0)
    expert, x = make_expert(kind, 16, heads=4), torch.randn(2, 16, 6, 5)
    torch.testing.assert_close(expert.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last)),
                               expert(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("arguments, words", [
    (dict(kind="spatail", channels=16), ["spatail", "spatial", "channel", "sparse"]),
    (dict(kind="channel", channels=20), ["channels=20", "heads=8"]),
    (dict(kind="sparse", channels=16, layers=0), ["layers=0"]),
    (dict(kind="spatial", channels=16, heads=0), ["heads=0"])])
def test_wrong_arguments_are_named(arguments, words):
    with pytest.raises(FoundIRError) as e:
        make_expert(**arguments)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


@pytest.mark.parametrize("keep", [0, -0.1, 1.5])
def test_keep_must_be_a_share(keep):
    with pytest.raises(FoundIRError, match="keep"):
        TransposedAttention(8, heads=2, keep=keep)


@pytest.mark.parametrize("scale, blocks", [(1, True), (6, False)])
def test_attention_over_many_positions_is_equal(scale, blocks, monkeypatch):
    calls, head = [], attention._attend_head
    monkeypatch.setattr(attention, "LARGE", 700)
    monkeypatch.setattr(attention, "_BLOCK", (128, 300))
    monkeypatch.setattr(attention, "_attend_head", lambda *a: calls.append(1) or head(*a))
    qkv = torch.randn(2, 700, 3 * 3 * 16, generator=torch.Generator().manual_seed(0))
    q, k, v = qkv.unflatten(-1, (3, 3, 16)).permute(2, 0, 3, 1, 4)  # as a block cuts them: not contiguous
    q = scale * q
    with torch.no_grad(), large_products(700): found = attend(q, k, v)
    assert found.shape == q.shape and len(calls) == (6 if blocks else 0)
    torch.testing.assert_close(found.double(), F.scaled_dot_product_attention(q.double(), k.double(), v.double()),
                               rtol=0, atol=1e-5 * scale)


def test_attention_with_gradients_or_few_positions_is_torchs_to_the_bit(monkeypatch):
    monkeypatch.setattr(attention, "LARGE", 64)
    q, k, v = torch.randn(3, 1, 2, 64, 16, generator=torch.Generator().manual_seed(0))
    usual = F.scaled_dot_product_attention(q, k, v)
    assert torch.equal(attend(q, k, v), usual)
    with torch.no_grad():
        assert not torch.equal(attend(q, k, v), usual)
        assert torch.equal(attend(*(x[:, :, :63] for x in (q, k, v))),
                           F.scaled_dot_product_attention(*(x[:, :, :63] for x in (q, k, v))))


def test_products_are_as_before_after_a_large_picture(monkeypatch):
    matmul = torch.backends.mkldnn.matmul
    monkeypatch.setattr(attention, "_exact_onednn", lambda: True)
    with pytest.raises(KeyError), large_products(LARGE):
        assert matmul.fp32_precision == "bf16"
        raise KeyError
    assert matmul.fp32_precision == "none"
    with large_products(LARGE - 1): assert matmul.fp32_precision == "none"
    monkeypatch.setattr(attention, "_exact_onednn", lambda: False)
    with large_products(LARGE): assert matmul.fp32_precision == "none"


def test_what_is_measured_is_smaller_than_large():
    params, pixels = load_params(repo_root() / "params.yaml"), 4**2  # per latent of the tiny model
    evaluate = params["evaluate"]
    sides = params["train"]["crop"], params["mixture"]["reference_size"], evaluate["size"]
    assert max(*(side**2 for side in sides), evaluate["out_of_distribution"]["max_pixels"]) / pixels < 0.9 * LARGE
