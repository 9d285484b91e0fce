"""Base models: tokenizer facts, schedules, layout on disk, and the step from base to restorer."""
import json
import shutil

import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DConditionModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import foundir_v2.base as base_module
from foundir_v2.base import (
    ASSETS, SDXL_SCHEDULE, SDXL_UNET, TINY_SCHEDULE, TINY_UNET, assets_path, build_foundir_unet, encode_prompts,
    load_base, micro_conditioning, new_base, resolve_model, save_base, start_at_identity, training_scheduler)
from foundir_v2.core import FoundIRError
from foundir_v2.unet import OWN_MODULES, FoundIRUNet
from foundir_v2.vae import PatchAutoencoderKL

NARROW = dict(TINY_UNET, block_out_channels=(32, 48, 48), attention_head_dim=(2, 2, 2))
OPTIONS = dict(lq_context_width=8, lq_norm_groups=0, moe_layers=1, moe_heads=4)


@pytest.fixture(scope="module")
def base():
    torch.manual_seed(0)
    return new_base(PatchAutoencoderKL(hidden=16, encoder_blocks=1, decoder_blocks=1), NARROW)


class Widest(TorchDispatchMode):
    """Most elements of a tensor made in the block, by precision."""
    def __init__(self): super().__init__(); self.elements = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor): self.elements[t.dtype] = max(self.elements.get(t.dtype, 0), t.numel())
        return out


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory):
    return save_base(base, tmp_path_factory.mktemp("base"))


def test_tokenizer_facts(base):
    assert base.tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    padded = base.tokenizer("a", padding="max_length").input_ids, base.tokenizer_2("a", padding="max_length").input_ids
    assert padded[0] == [49406, 320] + [49407] * 75 and padded[1] == [49406, 320, 49407] + [0] * 74
    assert len(base.tokenizer) == len(base.tokenizer_2) == 49408


def test_round_trip_on_disk(base, saved):
    again = load_base(saved)
    for field in ("vae", "text_encoder", "text_encoder_2", "unet_prior"):
        a, b = getattr(base, field), getattr(again, field)
        assert type(a) is type(b) and not any(p.requires_grad for p in b.parameters()) and not b.training
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values()):
            assert torch.equal(p.half().float(), q.float()), name
    for text in ["", "a naïve café, 3 dogs! 日本 🙂", "word " * 100]:
        for a, b in ((base.tokenizer, again.tokenizer), (base.tokenizer_2, again.tokenizer_2)):
            assert (a(text, padding="max_length", truncation=True).input_ids
                    == b(text, padding="max_length", truncation=True).input_ids)
    assert isinstance(again.noise_scheduler, EulerDiscreteScheduler)
    assert again.noise_scheduler.config.prediction_type == "v_prediction"
    assert load_base(saved, dtype=torch.bfloat16).vae.dtype == torch.bfloat16


def test_a_base_without_its_unet_for_those_who_have_their_own(saved, tmp_path):
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("unet"))
    again = load_base(tmp_path, prior=False)
    assert again.unet_prior is None and again.vae.config.scaling_factor == load_base(saved).vae.config.scaling_factor
    with pytest.raises(FoundIRError, match="no unet in"): load_base(tmp_path)
    for needs_it in (lambda: build_foundir_unet(again), lambda: save_base(again, tmp_path / "half")):
        with pytest.raises(FoundIRError, match="prior=True"): needs_it()
    assert not (tmp_path / "half").exists()


def test_a_restorer_is_built_in_the_precision_of_its_base(saved):
    base, default = load_base(saved, dtype=torch.bfloat16), torch.get_default_dtype()
    with Widest() as made: unet = build_foundir_unet(base, **OPTIONS)
    assert torch.get_default_dtype() == default and {p.dtype for p in unet.parameters()} == {torch.bfloat16}
    largest = max(p.numel() for p in unet.parameters())
    assert made.elements.get(torch.float32, 0) < largest <= made.elements[torch.bfloat16], made.elements


def test_layout_on_disk_is_diffusers_and_the_vocabulary_is_there_once(saved):
    assert {p.name for p in saved.iterdir()} == {"vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                                                 "unet", "scheduler"}
    assert len(list(saved.rglob("vocab.json"))) == len(list(saved.rglob("merges.txt"))) == 1
    assert not list(saved.rglob("*.bin"))
    assert UNet2DConditionModel.from_pretrained(saved, subfolder="unet").config.block_out_channels == [32, 48, 48]
    assert json.loads((saved / "tokenizer_2/tokenizer_config.json").read_text())["pad_token"] == "!"


def test_restorer_starts_as_the_prior(base):
    unet = build_foundir_unet(base, **OPTIONS)
    assert all(p.requires_grad for p in unet.parameters())
    # torch.matmul picks its kernel by this flag, also without gradients; the prior is frozen
    unet.requires_grad_(False)
    embeds, pooled = encode_prompts(base, ["a cat", ""])
    extra = dict(added_cond_kwargs=dict(text_embeds=pooled, time_ids=micro_conditioning(*torch.full((3, 2, 2), 64))))
    x, lq = torch.randn(2, 16, 8, 8), torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        assert torch.equal(unet(x, 999, embeds, unet.embed_lq(lq), **extra).sample,
                           base.unet_prior(x, 999, embeds, **extra).sample)
        assert torch.equal(unet.lq_features(lq), base.vae.encoder(lq))
    for p in unet.parameters():
        p.data.add_(1)
    with torch.no_grad():
        both = zip(base.unet_prior.parameters(), unet.parameters())
        assert not any(torch.equal(p, q) for p, q in both if p.shape == q.shape), "copies, not shared memory"


def test_new_modules_depend_on_the_seed_alone(base):
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = build_foundir_unet(base, **OPTIONS)
    assert torch.equal(before, torch.random.get_rng_state()), "the caller's random numbers stay as they were"
    torch.manual_seed(2)
    b, c = build_foundir_unet(base, **OPTIONS), build_foundir_unet(base, seed=1, **OPTIONS)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.moe_scheduler.gate.weight, c.moe_scheduler.gate.weight)


def test_wrong_option_is_an_error(base):
    with pytest.raises(TypeError, match="moe_layer"):
        build_foundir_unet(base, moe_layer=1)


def test_prompts(base):
    embeds, pooled = encode_prompts(base, ["a cat", "", "a cat"])
    assert embeds.shape == (3, 77, 16) and pooled.shape == (3, 16) and not embeds.requires_grad
    assert torch.equal(embeds[0], embeds[2]) and not torch.allclose(embeds[0], embeds[1])
    ids = base.tokenizer_2(["a cat"], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        out = base.text_encoder_2(ids, output_hidden_states=True)
    torch.testing.assert_close(embeds[0, :, 8:], out.hidden_states[-2][0])
    torch.testing.assert_close(pooled[0], out.text_embeds[0])
    with pytest.raises(FoundIRError, match="list of texts"):
        encode_prompts(base, "a cat")


@pytest.mark.parametrize("schedule", [TINY_SCHEDULE, SDXL_SCHEDULE])
def test_training_scheduler_keeps_the_schedule(schedule):
    euler = EulerDiscreteScheduler(**schedule)
    ddpm = training_scheduler(euler)
    assert isinstance(ddpm, DDPMScheduler) and ddpm.config.prediction_type == schedule["prediction_type"]
    assert not ddpm.config.clip_sample
    torch.testing.assert_close(ddpm.alphas_cumprod, euler.alphas_cumprod, atol=2**-23, rtol=1e-5)
    assert (float(ddpm.alphas_cumprod[-1]) == 0) == bool(schedule.get("rescale_betas_zero_snr"))


def test_euler_recovers_the_picture_with_a_perfect_velocity():
    """20 trailing steps from pure noise: fp32 is enough although the first sigma is 4096."""
    euler = EulerDiscreteScheduler(**TINY_SCHEDULE)
    ddpm = training_scheduler(euler)
    euler.set_timesteps(20)
    assert euler.timesteps[0] == 999 and euler.init_noise_sigma == pytest.approx(4096, rel=1e-3)
    x0, noise = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    x = noise * euler.init_noise_sigma
    for t in euler.timesteps:
        seen = euler.scale_model_input(x, t)
        a = euler.alphas_cumprod[int(t)]
        v = (a.sqrt() * seen - x0) / (1 - a).sqrt()
        x = euler.step(v, t, x).prev_sample
    assert (x - x0).abs().max() < 1e-2
    assert torch.equal(ddpm.get_velocity(x0, noise, torch.tensor([999])), -x0)


def test_sdxl_size_and_tiny_structure():
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet2DConditionModel(**SDXL_UNET).parameters()) == 2_567_463_684
        tiny, sdxl = UNet2DConditionModel(**TINY_UNET), UNet2DConditionModel(**SDXL_UNET)
    kinds = lambda u: [type(b).__name__ for b in (*u.down_blocks, u.mid_block, *u.up_blocks)]
    assert kinds(tiny) == kinds(sdxl) and tiny.config.addition_embed_type == "text_time"


@pytest.mark.parametrize("source, words", [
    ("sdxl", ["sdxl", "base", "tiny"]), ("/no/such/folder", ["/no/such/folder"]), ("./a/b", ["./a/b"])])
def test_unknown_models_are_named(source, words):
    with pytest.raises(FoundIRError) as e:
        load_base(source)
    assert all(w in str(e.value) for w in words) and "\n" not in str(e.value)


def test_names_folders_and_hub_names_are_told_apart(tmp_path, saved):
    assert resolve_model(saved) == saved and resolve_model(str(saved)) == saved
    assert resolve_model("owner/name") == "owner/name"
    with pytest.raises(FoundIRError, match="no shipped model"):
        assets_path("owner/name")
    with pytest.raises(FoundIRError, match="no vae in"):
        load_base(tmp_path)


@pytest.mark.parametrize("answer, offline", [
    (200, False), (404, False), (503, True), (OSError("no network"), True), (RuntimeError, True)])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, answer, offline):
    import huggingface_hub
    class Session:
        def head(self, url, timeout):
            calls.append(timeout)
            if not isinstance(answer, int): raise answer
            return type("Answer", (), dict(status_code=answer))
    calls = []
    monkeypatch.setattr(huggingface_hub, "get_session", Session)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert base_module.go_offline() == offline == huggingface_hub.constants.HF_HUB_OFFLINE and calls == [5.0]
    base_module.go_offline()
    assert len(calls) == (1 if offline else 2)


def test_what_comes_from_the_hub(tmp_path):
    assert base_module.on_hub("owner/name") and not base_module.on_hub("tiny") and not base_module.on_hub(tmp_path)
    for name, text, expected in (("config.json", '{"base": "base"}', False), ("config.json", "{", False),
                                 ("pipeline.json", '{"base": "owner/name"}', True)):
        (tmp_path / name).write_text(text)
        assert base_module.on_hub(tmp_path) == expected


def test_missing_assets_are_explained(monkeypatch, tmp_path):
    monkeypatch.setattr(base_module, "files", lambda _: tmp_path)
    for name in ASSETS:
        with pytest.raises(FoundIRError, match="missing"):
            assets_path(name)


def test_a_trained_restorer_is_not_a_base(base, saved, tmp_path):
    for part in saved.iterdir():
        if part.name != "unet":
            (tmp_path / part.name).symlink_to(part)
    build_foundir_unet(base, **OPTIONS).save_pretrained(tmp_path / "unet")
    with pytest.raises(FoundIRError, match="trained restorer"):
        load_base(tmp_path)
    assert set(OWN_MODULES) <= set(dict(FoundIRUNet.from_pretrained(tmp_path / "unet").named_children()))


def test_mismatched_vae_is_refused():
    with pytest.raises(FoundIRError, match="8 latent channels"):
        new_base(PatchAutoencoderKL(latent_channels=8))


def test_shipped_base():
    """The model in the package: complete, in fp16, small, trained."""
    base = load_base()
    folder = assets_path("base")
    size = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file() and not p.parent.name.startswith("tokenizer"))
    assert size < 18e6
    from safetensors import safe_open
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "pt") as f:
            assert {f.get_slice(k).get_dtype() for k in f.keys()} <= {"F16", "I64"}, path
    assert dict(base.unet_prior.config)["block_out_channels"] and base.vae.config.scaling_factor != 1
    assert base.noise_scheduler.config.rescale_betas_zero_snr
    assert base.noise_scheduler.config.timestep_spacing == "trailing"
    fresh = new_base(base.vae, {k: v for k, v in base.unet_prior.config.items() if not k.startswith("_")})
    assert (fresh.unet_prior.conv_out.weight - base.unet_prior.conv_out.weight).abs().mean() > 1e-3, (
        "trained, not initialised")


# --- a start at the identity ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def wide():
    torch.manual_seed(0)
    vae = PatchAutoencoderKL(hidden=16, encoder_blocks=1, decoder_blocks=1)
    torch.nn.init.normal_(vae.quant_conv.bias, std=0.3)
    vae.register_to_config(scaling_factor=1.7)
    return new_base(vae, dict(TINY_UNET, block_out_channels=(48, 48, 48), attention_head_dim=(2, 2, 2)))


@torch.no_grad()
def one_step(base, unet, lq, seed=0):
    "What the untrained restorer gives at the last time step, and the latents of its input."
    latents = base.vae.encode(lq).latent_dist.mode() * base.vae.config.scaling_factor
    embeds, pooled = encode_prompts(base, [""] * len(lq))
    sizes = torch.full((len(lq), 2), lq.shape[-1])
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed))
    return (
        unet(noise, 999, embeds, unet.embed_lq(lq),
             added_cond_kwargs=dict(text_embeds=pooled, time_ids=micro_conditioning(sizes, 0 * sizes, sizes))).sample,
        latents)


@pytest.mark.parametrize("moe, kind, sign", [
    ("soft", "v_prediction", -1), (None, "v_prediction", -1), ("soft", "sample", 1)])
def test_identity_start_returns_the_latents_of_its_input(wide, moe, kind, sign):
    schedule = EulerDiscreteScheduler(**{**TINY_SCHEDULE, "prediction_type": kind})
    base = base_module.Base(wide.vae, wide.text_encoder, wide.text_encoder_2, wide.tokenizer, wide.tokenizer_2,
                            wide.unet_prior, schedule)
    unet = build_foundir_unet(base, **{**OPTIONS, "moe": moe}).eval()
    start_at_identity(unet, base)
    lq = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    lq[1] = lq[1] * 0.2 - 0.7  # dark and flat: brightness and contrast survive the norm
    (out, latents), (other, _) = one_step(base, unet, lq), one_step(base, unet, lq, seed=9)
    assert (sign * out - latents).square().mean() < 0.01 * latents.square().mean()
    torch.testing.assert_close(out, other, atol=1e-4, rtol=1e-4)  # from whatever noise
    again = build_foundir_unet(base, **{**OPTIONS, "moe": moe})
    start_at_identity(again, base)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), again.parameters()))


def test_identity_start_leaves_what_it_does_not_need(wide):
    unet, fresh = (build_foundir_unet(wide, **OPTIONS) for _ in range(2))
    start_at_identity(unet, wide)
    changed = {n for (n, a), b in zip(unet.named_parameters(), fresh.parameters()) if not torch.equal(a, b)}
    assert all(n.startswith(("lq_embedding.", "moe_scheduler.experts.", "moe_projection.", "up_blocks.2.resnets.1.",
                             "conv_norm_out.", "conv_out.")) for n in changed)
    assert not any(n.startswith("lq_features.") for n in changed)


@pytest.mark.parametrize("options, what", [
    (dict(moe="hard"), "soft gating"),
    (dict(lq_norm_groups=16), "lq_norm_groups=0")])
def test_identity_start_says_what_it_needs(wide, options, what):
    unet = build_foundir_unet(wide, **{**OPTIONS, **options})
    before = [p.clone() for p in unet.parameters()]
    with pytest.raises(FoundIRError, match=what): start_at_identity(unet, wide)
    assert all(torch.equal(a, b) for a, b in zip(before, unet.parameters()))


def test_identity_start_needs_room_in_the_norm_and_a_schedule_without_signal(base, wide):
    with pytest.raises(FoundIRError, match="group of three"):
        start_at_identity(build_foundir_unet(base, **OPTIONS), base)
    epsilon = base_module.Base(wide.vae, wide.text_encoder, wide.text_encoder_2, wide.tokenizer, wide.tokenizer_2,
                               wide.unet_prior, EulerDiscreteScheduler(**SDXL_SCHEDULE))
    with pytest.raises(FoundIRError, match="not epsilon"):
        start_at_identity(build_foundir_unet(epsilon, **OPTIONS), epsilon)
