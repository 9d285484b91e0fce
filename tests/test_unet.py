"""The conditioned U-Net: starts as the plain one, round-trips, trains what it should."""
import inspect
import json

import pytest
import torch
from diffusers import UNet2DConditionModel

from foundir_v2.base import SDXL_UNET
from foundir_v2.core import FoundIRError
from foundir_v2.unet import OWN_MODULES, FoundIRUNet, LQContext, LQEmbedding, join_pooled

PLAIN = dict(sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
             attention_head_dim=(2, 4), cross_attention_dim=8, use_linear_projection=True, norm_num_groups=8,
             addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56)
OURS = dict(lq_encoder={"class": "PatchEncoder", "channels": 48, "hidden": 16, "blocks": 1}, lq_norm_groups=0,
            moe_layers=1, moe_heads=4)


def build(**options):
    torch.manual_seed(0)
    return FoundIRUNet(**PLAIN, **{**OURS, **options})


def inputs(batch=2, size=8):
    g = torch.Generator().manual_seed(1)
    r = lambda *s: torch.randn(*s, generator=g)
    return ((r(batch, 4, size, size), 500, r(batch, 5, 8)), r(batch, 3, 4 * size, 4 * size).clamp(-1, 1),
            dict(added_cond_kwargs=dict(text_embeds=r(batch, 8), time_ids=torch.zeros(batch, 6))))


def awake(unet):
    """Give the zero-initialised layers weights, so that the conditioning acts."""
    torch.manual_seed(3)
    torch.nn.init.normal_(unet.moe_projection.weight, std=0.3)
    torch.nn.init.normal_(unet.lq_embedding.conv_out.weight, std=0.3)
    return unet


@torch.no_grad()
@pytest.mark.parametrize("options", [
    dict(), dict(moe="hard", moe_top_k=2), dict(moe=None), dict(lq_norm_groups=8), dict(batch_axis_attention=True),
    dict(moe_experts=("channel",))])
def test_untouched_model_is_the_plain_unet_bit_for_bit(options):
    unet = build(**options)
    plain = UNet2DConditionModel(**PLAIN)
    plain.load_state_dict({k: v for k, v in unet.state_dict().items() if k.split(".")[0] not in OWN_MODULES})
    args, lq, extra = inputs()
    assert torch.equal(unet(*args, unet.embed_lq(lq), **extra).sample, plain(*args, **extra).sample)


def test_sizes_at_sdxl_scale():
    with torch.device("meta"):
        unet = FoundIRUNet(**SDXL_UNET)
    count = lambda m: sum(p.numel() for p in m.parameters())
    own = sum(count(m) for name in OWN_MODULES if (m := getattr(unet, name)) is not None)
    assert count(unet) - own == 2_567_463_684
    assert [count(e) for e in unet.moe_scheduler.experts] == [6_567_680, 9_913_448, 12_493_682]
    assert own - count(unet.lq_features) == pytest.approx(33.0e6, rel=2e-3)


@torch.no_grad()
@pytest.mark.parametrize("options", [
    dict(), dict(moe=None), dict(moe="hard", moe_top_k=2, moe_experts=("channel", "sparse"), lq_norm_groups=4)])
def test_save_and_load(tmp_path, options):
    unet = awake(build(**options))
    unet.save_pretrained(tmp_path)
    again = FoundIRUNet.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)  # says nothing about where it came from
    args, lq, extra = inputs()
    assert torch.equal(unet(*args, unet.embed_lq(lq), **extra).sample, again(*args, again.embed_lq(lq), **extra).sample)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["_class_name"] == "FoundIRUNet" and not config.get("_name_or_path")
    for k, v in {**PLAIN, **OURS, **options}.items():
        assert config[k] == (list(v) if isinstance(v, tuple) else v), k


def test_config_contract():
    parameters = inspect.signature(FoundIRUNet.__init__).parameters
    for name, p in inspect.signature(UNet2DConditionModel.__init__).parameters.items():
        assert parameters[name].default == p.default, name
    ours = dict(lq_encoder=None, lq_context_width=0, lq_norm_groups=32, moe="soft",
                moe_experts=("spatial", "channel", "sparse"), moe_layers=2, moe_heads=8, moe_top_k=1,
                batch_axis_attention=False)
    assert {k: parameters[k].default for k in ours} == ours
    assert set(parameters) == set(inspect.signature(UNet2DConditionModel.__init__).parameters) | set(ours)


@torch.no_grad()
def test_the_picture_and_only_its_own_picture_matters():
    unet = awake(build())
    args, lq, extra = inputs()
    out = unet(*args, unet.embed_lq(lq), **extra).sample
    changed = lq.clone()
    changed[1] *= -1
    other = unet(*args, unet.embed_lq(changed), **extra).sample
    torch.testing.assert_close(out[0], other[0])
    assert (out[1] - other[1]).abs().max() > 1e-3


@torch.no_grad()
def test_features_can_be_shared():
    unet = awake(build())
    args, lq, extra = inputs()
    e = unet.embed_lq(lq)
    features = unet.condition(args[0], e)
    assert features.shape == (2, 16, 8, 8)
    assert torch.equal(unet(*args, features=features, **extra).sample, unet(*args, e, **extra).sample)
    assert torch.equal(unet(*args, e, **extra, return_dict=False)[0], unet(*args, e, **extra).sample)


@torch.no_grad()
def test_context_is_the_identity_until_trained_and_then_sees_the_whole_picture():
    unet, plain = build(lq_context_width=8), build()
    unet.load_state_dict(plain.state_dict(), strict=False)
    torch.nn.init.normal_(unet.lq_embedding.conv_out.weight, generator=torch.Generator().manual_seed(1))
    plain.lq_embedding.load_state_dict(unet.lq_embedding.state_dict())
    lq = torch.rand(2, 3, 52, 76, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(unet.embed_lq(lq), plain.embed_lq(lq)) and plain.lq_context is None
    torch.nn.init.normal_(unet.lq_context.out[-1].weight, generator=torch.Generator().manual_seed(2))
    lit = lq.clone(); lit[..., -4:, -4:] = 1.
    assert ((unet.embed_lq(lit) - unet.embed_lq(lq)).abs().amax(1) > 1e-4).all()   # one bright corner, everywhere
    torch.testing.assert_close(unet.embed_lq(lq)[:1], unet.embed_lq(lq[:1]))       # every picture by itself


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 16), (37, 70), (5, 33)])
def test_pools_of_parts_are_those_of_the_picture(size):
    context, x = LQContext(4, 8), torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(0))
    parts = [list(rows.split(16, dim=3)) for rows in x.split(32, dim=2)]
    joined = join_pooled(
        [join_pooled([context.pool(p) for p in row], [p.shape[3] for p in row], dim=3) for row in parts],
        [row[0].shape[2] for row in parts], dim=2)
    for a, b in zip(joined, context.pool(x), strict=True): torch.testing.assert_close(a, b)


@torch.no_grad()
def test_a_tile_with_its_margin_is_embedded_as_part_of_its_picture():
    unet = build(lq_context_width=8, lq_encoder=dict({"class": "PatchEncoder"}, channels=48, hidden=8),
                 lq_norm_groups=0)
    for i, m in enumerate([unet.lq_context.out[-1], unet.lq_embedding.conv_out,
                           *(b.conv2 for b in unet.lq_features.blocks)]):
        torch.nn.init.normal_(m.weight, std=.2, generator=torch.Generator().manual_seed(i))
    m, lq = unet.lq_margin, torch.rand(2, 3, 160, 176, generator=torch.Generator().manual_seed(9)) * 2 - 1
    assert m == 6
    whole, contexts = unet.embed_lq(lq), unet.summarize_lq(unet.pool_lq(lq, slice(None), slice(None)))
    # everything, inside, at the end
    for top, left, height, width in ((0, 0, 40, 44), (9, 3, 20, 21), (28, 30, 12, 14)):
        tile = unet.embed_lq(lq[..., 4 * top:4 * (top + height), 4 * left:4 * (left + width)], contexts,
                             [(top, left)] * 2)
        inner = lambda start, n, length: slice(start + m * (start > 0), start + n - m * (start + n < length))
        rows, columns = inner(top, height, 40), inner(left, width, 44)
        torch.testing.assert_close(
            tile[..., rows.start - top:rows.stop - top, columns.start - left:columns.stop - left],
            whole[..., rows, columns], atol=1e-5, rtol=1e-4)
    assert build(lq_norm_groups=2).lq_margin is None
    assert build(lq_encoder=dict({"class": "LQEncoder"}, block_out_channels=(8, 8, 8),
                                 down_block_types=("DownEncoderBlock2D",) * 3, norm_num_groups=2)).lq_margin is None


def test_trainable_parameters():
    unet = build(lq_context_width=8)
    stage1, (encoder, rest) = unet.trainable_parameters(1), unet.trainable_parameters(2)
    ids = lambda ps: {id(p) for p in ps}
    assert len(stage1) == 1
    assert ids(stage1[0]["params"]) == ids(p for m in (unet.lq_embedding, unet.moe_scheduler, unet.moe_projection)
                                           for p in m.parameters())
    assert encoder["name"] == "lq_encoder"
    assert ids(encoder["params"]) == ids([*unet.lq_features.parameters(), *unet.lq_context.parameters()])
    assert unet.trainable_parameters(0) == [encoder]
    assert ids(encoder["params"]) | ids(rest["params"]) == ids(unet.parameters())
    assert not ids(encoder["params"]) & ids(rest["params"])
    torch.optim.AdamW(unet.trainable_parameters(2))
    assert all(id(p) not in ids(build(moe=None).trainable_parameters(1)[0]["params"]) for p in encoder["params"])


@pytest.mark.parametrize("moe", ["soft", "hard", None])
def test_gradient_reaches_every_parameter_after_a_few_steps(moe):
    """Two zero-initialised layers in a row wake up one after the other; without a mixture between them there is one."""
    unet = build(moe=moe)
    args, lq, extra = inputs()
    optimizer = torch.optim.AdamW(unet.parameters(), 1e-2)
    seen = set()
    for _ in range(4):
        unet(*args, unet.embed_lq(lq), **extra).sample.sub(args[0]).square().mean().backward()
        seen |= {n for n, p in unet.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    assert {n for n, _ in unet.named_parameters()} - seen == set()


def test_gradient_checkpointing_gives_the_same_gradients():
    grads = []
    for on in (False, True):
        unet = awake(build()).train()
        if on:
            unet.enable_gradient_checkpointing()
            assert unet.moe_scheduler.gradient_checkpointing
        args, lq, extra = inputs(1)
        unet(*args, unet.embed_lq(lq), **extra).sample.square().mean().backward()
        grads.append({n: p.grad for n, p in unet.named_parameters()})
    for n in grads[0]:
        torch.testing.assert_close(grads[0][n], grads[1][n], atol=1e-5, rtol=1e-3)


@torch.no_grad()
def test_channels_last_and_odd_sizes():
    unet = awake(build())
    g = torch.Generator().manual_seed(0)
    x, lq = torch.randn(1, 4, 6, 10, generator=g), torch.rand(1, 3, 24, 40, generator=g)
    args, _, extra = inputs(1)
    want = unet(x, *args[1:], unet.embed_lq(lq), **extra).sample
    last = unet.to(memory_format=torch.channels_last)
    got = last(x.to(memory_format=torch.channels_last), *args[1:],
               last.embed_lq(lq.to(memory_format=torch.channels_last)), **extra).sample
    assert want.shape == x.shape
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-3)


def test_bf16_autocast_trains():
    unet = awake(build())
    args, lq, extra = inputs(1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = unet(*args, unet.embed_lq(lq), **extra).sample.float().square().mean()
    loss.backward()
    assert all(p.grad.isfinite().all() for p in unet.parameters() if p.grad is not None)


@torch.no_grad()
def test_wrong_calls_are_explained():
    unet = build()
    args, lq, extra = inputs()
    e = unet.embed_lq(lq)
    with pytest.raises(FoundIRError, match="lq_embedding is missing"):
        unet(*args, **extra)
    with pytest.raises(FoundIRError, match="latents of 4"):
        unet(torch.randn(2, 16, 8, 8), *args[1:], e, **extra)
    with pytest.raises(FoundIRError, match="size of the output"):
        unet(*args, e[..., :4], **extra)
    with pytest.raises(FoundIRError, match="size of the output"):
        unet(*args, e[:1], **extra)
    with pytest.raises(FoundIRError, match="stage=3"):
        unet.trainable_parameters(3)


@pytest.mark.parametrize("options, words", [
    (dict(moe="topk"), ["topk", "soft", "hard"]),
    (dict(moe=""), ["soft", "hard"]),
    (dict(moe="hard", moe_top_k=5), ["top_k=5", "1 to 3"]),
    (dict(moe_experts=("channel", "global")), ["global", "sparse"]),
    (dict(moe_heads=5), ["heads=5"]),
    (dict(lq_norm_groups=32), ["lq_norm_groups=32", "48"]),
    (dict(lq_encoder={"class": "nope"}), ["nope", "PatchEncoder"])])
def test_wrong_settings_are_explained(options, words):
    with pytest.raises(FoundIRError) as e:
        build(**options)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_ambiguous_widths_are_refused():
    with pytest.raises(FoundIRError, match="equals in_channels"):
        FoundIRUNet(**{**PLAIN, "in_channels": 16}, **OURS)
    with pytest.raises(FoundIRError, match="center_input_sample"):
        FoundIRUNet(**PLAIN, center_input_sample=True, **OURS)
    with pytest.raises(TypeError):
        FoundIRUNet(**PLAIN, **OURS, moe_expert=("channel",))


@torch.no_grad()
def test_embedding_starts_at_zero_with_and_without_norm():
    x = torch.randn(2, 8, 5, 5)
    for groups in (0, 4):
        assert LQEmbedding(8, 6, groups)(x).abs().max() == 0
    assert not any("norm" in k for k in LQEmbedding(8, 6, 0).state_dict())
