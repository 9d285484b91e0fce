"""The authors' checkpoint: their modules, written down once more from the description and with their names, agree
with ours; files are read safely and completely or not at all."""
import copy
import csv
import json
import os
import pickle
import types
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import save_file
from torch import nn

from foundir_v2.base import SDXL_UNET
from foundir_v2.core import FoundIRError
from foundir_v2.official import LAYOUTS, load_official, official_key, read_weights, to_official
from foundir_v2.unet import OWN_MODULES, FoundIRUNet

CSV = {row["key"]: tuple(map(int, row["shape"].split("x")))
       for row in csv.DictReader((Path(__file__).parent / "data/official_added_weights.csv").open())}
UNUSED = [k for k in CSV if k.startswith("information_transformer_layes.")]
PLAIN = dict(sample_size=8, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
             up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), block_out_channels=(16, 32), layers_per_block=1,
             attention_head_dim=(2, 4), cross_attention_dim=8, use_linear_projection=True, norm_num_groups=8,
             addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=56)
ENCODER = dict(block_out_channels=[8, 16, 24], down_block_types=["DownEncoderBlock2D"] * 3, layers_per_block=1,
               norm_num_groups=4)
OURS = dict(lq_encoder={"class": "LQEncoder", **ENCODER}, lq_norm_groups=8, moe_heads=4)


# The reference: the authors' modules as they are described, in plain torch, with their names.

class QuickGELU(nn.Module):
    def forward(self, x): return x / (1 + torch.exp(-1.702 * x))


class Transformer(nn.Module):
    """Pre-norm layer with torch's sequence-first attention.
    `quirk`: it is handed (batch, tokens, channels) all the same."""
    def __init__(self, c, heads):
        super().__init__()
        self.attn = nn.MultiheadAttention(c, heads)
        self.ln_1 = nn.LayerNorm(c)
        self.ln_2 = nn.LayerNorm(c)
        self.quirk = True
        self.mlp = nn.Sequential(OrderedDict(c_fc=nn.Linear(c, 2 * c), act=QuickGELU(), c_proj=nn.Linear(2 * c, c)))

    def forward(self, x):
        n = self.ln_1(x)
        if self.quirk: a = self.attn(n, n, n)[0]
        else: a = self.attn(*[n.permute(1, 0, 2)] * 3)[0].permute(1, 0, 2)
        x = x + a
        return x + self.mlp(self.ln_2(x))


class Norm(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.body = nn.Module()
        self.body.weight, self.body.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):
        mean, var = x.mean(1, keepdim=True), x.var(1, keepdim=True, unbiased=False)
        return (
            (x - mean) / torch.sqrt(var + 1e-5) * self.body.weight.view(1, -1, 1, 1) + self.body.bias.view(1, -1, 1, 1))


class ChannelAttention(nn.Module):
    def __init__(self, c, heads, sparse):
        super().__init__()
        self.temperature, self.heads, self.sparse = nn.Parameter(torch.ones(heads, 1, 1)), heads, sparse
        if sparse: self.attn3 = nn.Parameter(torch.tensor([0.2]))
        self.qkv = nn.Conv2d(c, 3 * c, 1, bias=False)
        self.qkv_dwconv = nn.Conv2d(3 * c, 3 * c, 3, padding=1, groups=3 * c, bias=False)
        self.project_out = nn.Conv2d(c, c, 1, bias=False)

    def forward(self, x):
        b, c, h, w = x.shape
        q, k, v = (t.reshape(b, self.heads, c // self.heads, h * w) for t in self.qkv_dwconv(self.qkv(x)).split(c, 1))
        q, k = q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
        a = torch.einsum("bhin,bhjn->bhij", q, k) * self.temperature
        if self.sparse:
            smallest_kept = a.sort(-1, descending=True).values[..., int(a.shape[-1] * 3 / 4) - 1, None]
            a = a.masked_fill(a < smallest_kept, float("-inf"))
        out = torch.einsum("bhij,bhjn->bhin", a.softmax(-1), v).reshape(b, c, h, w)
        return self.project_out(out * self.attn3 if self.sparse else out)


class ChannelFFN(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = int(2.66 * c)
        self.project_in = nn.Conv2d(c, 2 * h, 1, bias=False)
        self.dwconv = nn.Conv2d(2 * h, 2 * h, 3, padding=1, groups=2 * h, bias=False)
        self.project_out = nn.Conv2d(h, c, 1, bias=False)

    def forward(self, x):
        first, second = self.dwconv(self.project_in(x)).tensor_split(2, 1)
        return self.project_out(F.gelu(first) * second)


class SparseFFN(nn.Module):
    def __init__(self, c):
        super().__init__()
        h = int(2.66 * c)
        conv = lambda i, o, k, groups: nn.Conv2d(i, o, k, padding=k // 2, groups=groups, bias=False)
        self.project_in = conv(c, 2 * h, 1, 1)
        self.dwconv3x3, self.dwconv5x5 = conv(2 * h, 2 * h, 3, 2 * h), conv(2 * h, 2 * h, 5, 2 * h)
        self.dwconv3x3_1, self.dwconv5x5_1 = conv(2 * h, h, 3, h), conv(2 * h, h, 5, h)
        self.project_out = conv(2 * h, c, 1, 1)

    def forward(self, x):
        x = self.project_in(x)
        (a1, a2), (b1, b2) = self.dwconv3x3(x).relu().tensor_split(2, 1), self.dwconv5x5(x).relu().tensor_split(2, 1)
        return self.project_out(torch.cat(
            [self.dwconv3x3_1(torch.cat([a1, b1], 1)).relu(), self.dwconv5x5_1(torch.cat([a2, b2], 1)).relu()], 1))


class ConvLayer(nn.Module):
    def __init__(self, c, heads, sparse):
        super().__init__()
        self.norm1 = Norm(c)
        self.attn = ChannelAttention(c, heads, sparse)
        self.norm2 = Norm(c)
        self.ffn = SparseFFN(c) if sparse else ChannelFFN(c)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.ffn(self.norm2(x))


def tokens(layers, x):
    return layers(x.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(x.shape)


class Added(nn.Module):
    """What the authors added to SDXL's U-Net. `faithdiff`: without the mixture."""
    def __init__(self, width=320, encoder=None, groups=32, heads=8, faithdiff=False):
        super().__init__()
        c, encoder = 2 * width, encoder or dict(
            block_out_channels=(128, 256, 512, 512), down_block_types=["DownEncoderBlock2D"] * 4, layers_per_block=2,
            norm_num_groups=32)
        self.denoise_encoder = AutoencoderKL(
            **encoder, up_block_types=["UpDecoderBlock2D"] * len(encoder["block_out_channels"])).encoder
        del self.denoise_encoder.conv_norm_out, self.denoise_encoder.conv_act, self.denoise_encoder.conv_out
        f = encoder["block_out_channels"][-1]
        self.condition_embedding = nn.ModuleDict(
            dict(norm_in=nn.GroupNorm(groups, f, eps=1e-6), conv_in=nn.Conv2d(f, f, 3, padding=1),
                 conv_out=nn.Conv2d(f, width, 3, padding=1)))
        self.information_transformer_layes = nn.Sequential(*[Transformer(c, heads) for _ in range(2)])
        self.spatial_ch_projs, self.faithdiff = nn.Linear(c, width), faithdiff
        if faithdiff: return
        self.MoE = nn.Module()
        self.MoE.gate, self.MoE.experts = nn.Conv2d(c, 3, 1), nn.ModuleList(nn.Module() for _ in range(3))
        self.MoE.experts[0].ExpertA_transformer_layes = nn.Sequential(*[Transformer(c, heads) for _ in range(2)])
        self.MoE.experts[1].ExpertB_transformer_layes = nn.Sequential(*[ConvLayer(c, heads, False) for _ in range(2)])
        self.MoE.experts[2].ExpertC_transformer_layes = nn.Sequential(*[ConvLayer(c, heads, True) for _ in range(2)])

    def features(self, h, lq):
        x = self.denoise_encoder.conv_in(lq)
        for block in self.denoise_encoder.down_blocks: x = block(x)
        e = self.condition_embedding
        x = e["conv_out"](F.silu(e["conv_in"](e["norm_in"](self.denoise_encoder.mid_block(x)))))
        z = torch.cat([h, x], 1)
        if self.faithdiff: z = tokens(self.information_transformer_layes, z)
        else:
            gate, (a, b, c) = self.MoE.gate(z).softmax(1), self.MoE.experts
            out = tokens(a.ExpertA_transformer_layes, z), b.ExpertB_transformer_layes(z), c.ExpertC_transformer_layes(z)
            z = sum(gate[:, i, None] * o for i, o in enumerate(out))
        return h + self.spatial_ch_projs(z.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    def set_quirk(self, on):
        for m in self.modules():
            if isinstance(m, Transformer): m.quirk = on
        return self


def randomise(module, seed):
    g = torch.Generator().manual_seed(seed)
    for p in module.parameters(): p.data = p.data + torch.randn(p.shape, generator=g) * (0.1 if p.ndim > 1 else 0.3)
    return module.eval()


@pytest.fixture(scope="module")
def theirs():
    torch.manual_seed(0)
    return (randomise(Added(16, ENCODER, 8, 4), 1), randomise(Added(16, ENCODER, 8, 4, faithdiff=True), 2),
            randomise(UNet2DConditionModel(**PLAIN), 3))


@pytest.fixture(scope="module")
def published(theirs):
    """The file, as their own modules save it."""
    added, _, plain = theirs
    return {**plain.state_dict(), **added.state_dict()}


@pytest.fixture(scope="module")
def faithdiff(theirs):
    _, added, plain = theirs
    return {**plain.state_dict(), **added.state_dict()}


def official_plain(key):
    return key.split(".")[0] not in ("denoise_encoder", "condition_embedding", "information_transformer_layes",
                                     "spatial_ch_projs", "MoE")


def build(seed=9, **options):
    torch.manual_seed(seed)
    return FoundIRUNet(**PLAIN, **{**OURS, **options}).eval()


def inputs(batch=3):
    g = torch.Generator().manual_seed(5)
    r = lambda *s: torch.randn(*s, generator=g)
    return ((r(batch, 4, 6, 8), 400, r(batch, 5, 8)), r(batch, 3, 24, 32).clamp(-1, 1),
            dict(added_cond_kwargs=dict(text_embeds=r(batch, 8), time_ids=torch.zeros(batch, 6))))


@torch.no_grad()
def output(unet, batch=3):
    args, lq, extra = inputs(batch)
    return unet(*args, unet.embed_lq(lq), **extra).sample


@torch.no_grad()
def their_output(added, plain, quirk, batch=3):
    """Their U-Net: the plain one whose `conv_in` is followed by what was added."""
    args, lq, extra = inputs(batch)
    plain = copy.deepcopy(plain)
    conv, added = plain.conv_in, added.set_quirk(quirk)
    plain.conv_in = nn.Identity()
    plain.conv_in.forward = lambda x: added.features(conv(x), lq)
    return plain(*args, **extra).sample


# The reference itself, and the names

def test_reference_has_the_published_names_and_shapes():
    with torch.device("meta"): added = Added()
    assert {k: tuple(v.shape) for k, v in added.state_dict().items()} == CSV
    with torch.device("meta"): added = Added(faithdiff=True)
    assert {k: tuple(v.shape) for k, v in added.state_dict().items()} == {
        k: s for k, s in CSV.items() if not k.startswith("MoE.")}


def test_every_published_key_is_used_or_named_at_full_size():
    with torch.device("meta"):
        unet = FoundIRUNet(**SDXL_UNET)
        file = {**{k: v.detach() for k, v in UNet2DConditionModel(**SDXL_UNET).state_dict().items()},
                **{k: torch.empty(s) for k, s in CSV.items()}}
    report = load_official(file, unet)
    assert sorted(report.unused) == sorted(UNUSED) and not report.kept
    assert set(report.used) == set(file) - set(UNUSED)
    assert sum(file[k].numel() for k in report.used if k not in CSV) == 2_567_463_684
    assert {k: v.shape for k, v in to_official(unet).items()} == {k: v.shape for k, v in file.items()}
    names = [official_key(k) for k in unet.state_dict()]
    assert len(set(names)) == len(names)


# Outputs

@pytest.mark.parametrize("quirk", [True, False])
def test_outputs_are_those_of_the_authors_modules(theirs, published, quirk):
    unet = build()
    load_official(published, unet, batch_axis_attention=quirk)
    want = their_output(theirs[0], theirs[2], quirk)
    torch.testing.assert_close(output(unet), want, atol=1e-5, rtol=0)
    assert (want - their_output(theirs[0], theirs[2], not quirk)).abs().max() > 1e-3, (
        "the switch must matter, or this test shows nothing")


@pytest.mark.parametrize("quirk", [True, False])
@pytest.mark.parametrize("options", [dict(), dict(moe_experts=("spatial",))])
def test_faithdiff(theirs, faithdiff, quirk, options):
    unet = build(**options)
    report = load_official(faithdiff, unet, batch_axis_attention=quirk)
    assert report.layout == "FaithDiff" and not report.unused and set(report.used) == set(faithdiff)
    want = their_output(theirs[1], theirs[2], quirk)
    torch.testing.assert_close(output(unet), want, atol=1e-5, rtol=0)
    nn.init.normal_(unet.moe_scheduler.gate.weight)
    torch.testing.assert_close(output(unet), want, atol=1e-5, rtol=0, msg="the gate of a single expert must not matter")


def test_every_added_weight_acts(theirs, published):
    """No weight may land where it does nothing, or in another one's place: each alone changes both models in the
    same way."""
    added, unet, (args, lq, _) = copy.deepcopy(theirs[0]).set_quirk(True), build(), inputs(2)
    load_official(published, unet)
    reference, h = dict(added.named_parameters()), unet.conv_in(args[0])
    own = {official_key(k): p for k, p in unet.named_parameters() if k.split(".")[0] in OWN_MODULES}
    assert set(own) == {k for k in reference if not k.startswith("information_transformer_layes.")}
    with torch.no_grad():
        base = unet.condition(args[0], unet.embed_lq(lq))
        for key, p in own.items():
            q, before = reference[key], p.clone()
            q += torch.randn(q.shape, generator=torch.Generator().manual_seed(0)) * 0.5
            p.copy_(q.reshape(p.shape))
            got = unet.condition(args[0], unet.embed_lq(lq))
            torch.testing.assert_close(got, added.features(h, lq), atol=3e-5, rtol=1e-5, msg=lambda m: f"{key}: {m}")
            # that one shifts all scores of a row alike, and softmax doesn't notice
            if not key.endswith("to_k.bias"): assert (got - base).abs().max() > 1e-6, key
            p.copy_(before)
            q.copy_(before.reshape(q.shape))


# Round trip

def test_round_trip_bit_for_bit(published):
    unet = build()
    report = load_official(published, unet)
    assert sorted((*report.used, *report.unused)) == sorted(published) and len(report.unused) == len(UNUSED)
    again = to_official(unet)
    assert again.keys() == published.keys()
    for k, v in published.items(): assert again[k].dtype == v.dtype and torch.equal(again[k], v), k


def test_round_trip_through_files(published, faithdiff, tmp_path):
    for i, weights in enumerate((published, faithdiff)):
        torch.save(weights, tmp_path / "model.bin")
        torch.save(weights, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
        save_file({k: v.contiguous() for k, v in weights.items()}, tmp_path / "model.safetensors")
        (tmp_path / "model.safetensors").rename(tmp_path / "renamed.bin")
        torch.save(weights, tmp_path / "torch.safetensors")
        for name in ("model.bin", "old.bin", "renamed.bin", "torch.safetensors"):  # judged by content, not by suffix
            unet = build()
            load_official(str(tmp_path / name) if i else tmp_path / name, unet)
            again = to_official(unet)
            save_file(again, tmp_path / name)  # over the file it came from
            back = read_weights(tmp_path / name)
            assert back.keys() == weights.keys() and all(torch.equal(back[k], v) for k, v in weights.items())


def test_saved_in_our_format_with_the_switch(published, faithdiff, tmp_path):
    for weights, quirk, experts in ((published, True, 3), (published, False, 3), (faithdiff, True, 1)):
        unet = build()
        load_official(weights, unet, batch_axis_attention=quirk)
        unet.save_pretrained(tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        assert config["batch_axis_attention"] is quirk and len(config["moe_experts"]) == experts
        again = FoundIRUNet.from_pretrained(tmp_path / "m").eval()
        assert torch.equal(output(again), output(unet))
        same = to_official(again)
        assert all(torch.equal(same[k], v) for k, v in weights.items()
                   if not k.startswith("information_transformer_layes.") or weights is faithdiff)
        assert same.keys() == weights.keys(), "their code wants the keys that nothing reads, too"


def test_reloading_switches_back_and_forth(published, faithdiff):
    unet = build()
    load_official(published, unet)
    first = output(unet)
    load_official(faithdiff, unet, batch_axis_attention=False)
    assert tuple(unet.config.moe_experts) == LAYOUTS["FaithDiff"] and unet.config.batch_axis_attention is False
    assert to_official(unet).keys() == faithdiff.keys()
    load_official(published, unet)
    assert tuple(unet.config.moe_experts) == LAYOUTS["FoundIR-v2"] and torch.equal(output(unet), first)
    assert all(p.requires_grad for p in unet.parameters())


def test_model_without_memory_and_other_precision(published, tmp_path):
    torch.save(published, tmp_path / "model.bin")
    want = build()
    load_official(published, want)
    for source in (published, tmp_path / "model.bin"):
        with torch.device("meta"): unet = FoundIRUNet(**PLAIN, **OURS).eval()
        load_official(source, unet)
        assert torch.equal(output(unet), output(want))
        assert all(p.requires_grad and not p.is_meta for p in unet.parameters())
        with torch.device("meta"): unet = nn.Module.to(FoundIRUNet(**PLAIN, **OURS), torch.bfloat16)
        load_official(source, unet)
        assert {v.dtype for v in to_official(unet).values()} == {torch.bfloat16}
        assert all(torch.equal(v, published[k].bfloat16()) for k, v in to_official(unet).items())
    with torch.device("meta"): unet = FoundIRUNet(**PLAIN, **OURS)
    added = {k: v for k, v in published.items() if not official_plain(k)}
    with pytest.raises(FoundIRError, match="meta device"): load_official(added, unet, strict=False)


@torch.no_grad()
def test_quirk_sees_the_same_pixel_of_the_batch_only(published):
    unet, x = build(), torch.randn(3, 32, 5, 5, generator=torch.Generator().manual_seed(0))
    for quirk in (True, False):
        load_official(published, unet, batch_axis_attention=quirk)
        expert, y = unet.moe_scheduler.experts[0], x.clone()
        y[1, :, 2, 3] += torch.linspace(-1, 1, 32)
        changed = (expert(x) - expert(y)).abs().amax(1) > 1e-6
        want = torch.zeros(3, 5, 5, dtype=torch.bool)
        if quirk: want[:, 2, 3] = True
        else: want[1] = True
        assert torch.equal(changed, want)
        alone = torch.cat([expert(x[i:i + 1]) for i in range(3)])
        assert torch.allclose(alone, expert(x), atol=1e-5) is not quirk


# What doesn't fit

def fails(weights, unet, *parts, **options):
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    config = dict(unet.config)
    with pytest.raises(FoundIRError) as e: load_official(weights, unet, **options)
    text = str(e.value)
    assert "\n" not in text and len(text) < 700
    for part in parts: assert part in text, f"{part!r} is not in {text!r}"
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items()) and dict(unet.config) == config, (
        "a refused file must change nothing")


def test_wrong_keys_and_shapes(published, faithdiff):
    unet = build()
    without = lambda *names: {k: v for k, v in published.items() if k not in names}
    fails(without("MoE.gate.bias", "mid_block.resnets.0.conv1.bias"), unet, "2 missing", "MoE.gate.bias",
          "mid_block.resnets.0.conv1.bias")
    fails(without("MoE.gate.bias"), unet, "1 missing", "MoE.gate.bias", strict=False)
    fails(published | {"agg_net.0.weight": torch.ones(1)}, unet, "1 unknown", "agg_net.0.weight")
    fails(published | {"agg_net.0.weight": torch.ones(1)}, unet, "1 unknown", strict=False)
    fails(published | {"conv_in.weight": torch.ones(16, 8, 3, 3)}, unet, "conv_in.weight", "expected 16x4x3x3",
          "found 16x8x3x3")
    fails(published | {"MoE.experts.1.ExpertB_transformer_layes.0.attn.temperature": torch.ones(8, 1, 1)}, unet,
          "expected 4x1x1", "found 8x1x1")
    fails(without("spatial_ch_projs.weight") | {"information_transformer_layes.0.ln_1.bias": torch.ones(3)}, unet,
          "spatial_ch_projs.weight")
    fails({k: v for k, v in faithdiff.items() if k != "information_transformer_layes.1.ln_2.bias"}, unet, "FaithDiff",
          "information_transformer_layes.1.ln_2.bias")
    fails(published, FoundIRUNet(**PLAIN | dict(block_out_channels=(24, 32)), **OURS), "of another shape",
          "expected 24x4x3x3, found 16x4x3x3")
    fails(published, build(moe_layers=1), "unknown", "ExpertA_transformer_layes.1")
    fails(published, build(moe=None), "moe=None")
    fails(published, build(lq_norm_groups=0), "condition_embedding.norm_in.weight")


def test_files_of_other_kinds_get_a_hint(published):
    unet = build()
    fails(unet.state_dict(), unet, "from_pretrained")
    fails({k: v for k, v in published.items() if official_plain(k)}, unet, "build_foundir_unet", "denoise_encoder")
    fails({k: v for k, v in published.items() if not official_plain(k)}, unet, "strict=False")
    fails({"state_dict": published, "step": torch.ones(1)}, unet, "'state_dict'")
    fails({k: v.int() for k, v in published.items()}, unet, "floating-point")
    fails({}, unet, "missing")
    with pytest.raises(FoundIRError, match="FoundIRUNet"): load_official(published, UNet2DConditionModel(**PLAIN))
    with pytest.raises(FoundIRError, match="list"): load_official([1], unet)


def test_strict_false_keeps_the_plain_unet(published):
    unet = build()
    own = {k: v.clone() for k, v in unet.state_dict().items()}
    some = {k: v for k, v in published.items() if not official_plain(k) or k == "conv_out.bias"}
    report = load_official(some, unet, strict=False)
    assert set(report.kept) == {k for k in published if official_plain(k)} - {"conv_out.bias"}
    for k, v in unet.state_dict().items():
        if k == "conv_out.bias": assert torch.equal(v, published[k])
        elif k.split(".")[0] in OWN_MODULES: assert torch.equal(v, published[official_key(k)].reshape(v.shape))
        else: assert torch.equal(v, own[k])


def test_models_that_their_layout_cannot_hold(caplog):
    for options in (dict(moe="hard"), dict(moe=None), dict(lq_context_width=8),
                    dict(moe_experts=("channel", "spatial", "sparse")), dict(lq_norm_groups=0),
                    dict(lq_encoder={"class": "PatchEncoder", "channels": 48, "hidden": 16, "blocks": 1})):
        with pytest.raises(FoundIRError, match=next(iter(options))): to_official(build(**options))
    unet = build(batch_axis_attention=True)
    assert not caplog.records
    unused = {k: v for k, v in to_official(unet).items() if k.startswith("information_transformer_layes.")}
    assert len(unused) == 24 and not any(v.any() for v in unused.values()) and not caplog.records
    to_official(build())
    assert "along the batch" in caplog.text


# Files

class Trap:
    def __init__(self, path): self.path = path
    def __reduce__(self): return os.mkdir, (self.path,)


def test_a_malicious_pickle_is_never_executed(tmp_path, published):
    trace, unet = str(tmp_path / "trace"), build()
    content = {**published, "trap": Trap(trace)}
    torch.save(content, tmp_path / "zip.bin")
    torch.save(content, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.bin").write_bytes(pickle.dumps({"trap": Trap(trace)}))
    (tmp_path / "raw.safetensors").write_bytes(pickle.dumps({"trap": Trap(trace)}, protocol=2))
    torch.save(content, tmp_path / "zip.safetensors")
    for name in ("zip.bin", "old.bin", "raw.bin", "raw.safetensors", "zip.safetensors"):
        fails(tmp_path / name, unet, name, "nothing of it was executed")
        assert not os.path.exists(trace)
    fails(tmp_path / "zip.bin", unet, "posix.mkdir" if os.name == "posix" else "mkdir")
    pickle.loads((tmp_path / "raw.bin").read_bytes())
    assert os.path.exists(trace), "the trap works when someone unpickles it"


def test_objects_in_a_pickle(tmp_path):
    torch.save({"args": types.SimpleNamespace(lr=1)}, tmp_path / "a.bin")
    with pytest.raises(FoundIRError, match="SimpleNamespace"): read_weights(tmp_path / "a.bin")
    torch.save([torch.ones(1)], tmp_path / "b.bin")
    with pytest.raises(FoundIRError, match="list"): read_weights(tmp_path / "b.bin")


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.999])
def test_truncated(tmp_path, published, kind, share):
    path, cut = tmp_path / "whole", tmp_path / "cut"
    if kind == "safetensors": save_file({k: v.contiguous() for k, v in published.items()}, path)
    else: torch.save(published, path, _use_new_zipfile_serialization=kind == "zip")
    data = path.read_bytes()
    cut.write_bytes(data[:int(len(data) * share)])
    fails(cut, build(), "cut", "ownload it again")


def test_no_weights_at_all(tmp_path):
    (tmp_path / "empty").touch()
    (tmp_path / "pointer").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    (tmp_path / "short").write_bytes(b"abc")
    for name, part in (("empty", "0 bytes"), ("pointer", "Git LFS"), ("short", "neither"), ("absent", "no weight file"),
                       (".", "folder")):
        fails(tmp_path / name, build(), part)
