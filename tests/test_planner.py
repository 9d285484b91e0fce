"The planner: the meter against known tensors, skeletons from any folder, choices in order, refusals before loading."
import pytest, torch
from torch import nn
from foundir_v2 import planner
from foundir_v2.base import SDXL_UNET, TINY_UNET, assets_path
from foundir_v2.cli import main
from foundir_v2.core import FoundIRError
from foundir_v2.inference import InferenceConfig, Recipe, write_recipe
from foundir_v2.loading import load_pipeline
from foundir_v2.planner import Plan, available_memory, make_plan, needed, predict_peak, random_models, weight_bytes
from foundir_v2.skeleton import SDXL_TEXT, SDXL_TEXT_2, SDXL_VAE, make_skeleton, metered, read_skeleton
from foundir_v2.unet import OWN_MODULES


@pytest.fixture(scope="module")
def tiny(): return read_skeleton("tiny")

@pytest.fixture(scope="module")
def wide():
    return make_skeleton(
        TINY_UNET | dict(in_channels=4, out_channels=4), dict(SDXL_VAE, block_out_channels=(32, 32, 32, 64)),
        SDXL_TEXT | dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2),
        SDXL_TEXT_2 | dict(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, projection_dim=16),
        defaults=InferenceConfig())


@pytest.fixture
def room(monkeypatch):
    "Sets what the machine has."
    def fix(device, host=None):
        monkeypatch.setattr(planner, "available_memory",
                            lambda d, limit=None: host if host is not None and d.type == "cpu" else device)
    return fix


def test_the_meter_counts_what_lives():
    with torch.device("meta"):
        x = torch.empty(4, 256)
        assert metered(lambda: x + 1, "cuda") == x.nbytes
        assert metered(lambda: (x + 1) * 2, "cuda") == 2 * x.nbytes
        assert metered(lambda: x.T.reshape(2, -1)[0].view(-1), "cuda") == x.nbytes  # one copy, views are free
        assert metered(lambda: x.add_(1), "cuda") == 0


def test_the_meter_agrees_with_cuda_like_allocation():
    "A sequence of layers: the largest neighbours."
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(8, 64, bias=False), nn.Linear(64, 32, bias=False), nn.Linear(32, 1, bias=False))
        x = torch.empty(10, 8)
        assert metered(lambda: net(x), "cuda", [net]) == 10 * (64 + 32) * 4


@pytest.mark.parametrize("name", ["tiny", "base"])
def test_a_skeleton_has_the_models_parameters(name):
    pipe, skeleton = load_pipeline(name, device="cpu"), read_skeleton(name)
    for part, n in skeleton.parameters().items(): assert n == sum(p.numel() for p in getattr(pipe, part).parameters())
    # a restorer doesn't read its base's U-Net
    assert skeleton.prior == (0 if name == "tiny" else sum(
        p.numel() for n, p in pipe.unet.named_parameters() if n.split(".")[0] not in OWN_MODULES))


def test_a_skeleton_of_a_whole_pipeline_and_of_a_training_stage(tmp_path):
    load_pipeline("tiny", device="cpu", tile_size=256).save_pretrained(tmp_path / "whole")
    whole = read_skeleton(tmp_path / "whole")
    assert whole.prior == 0 and whole.defaults.tile_size == 256
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/unet").symlink_to(assets_path("tiny") / "unet")
    write_recipe(Recipe(), tmp_path / "stage")
    assert read_skeleton(tmp_path / "stage").parameters() == whole.parameters()


def test_sdxl_has_its_number_of_parameters():
    skeleton = make_skeleton(SDXL_UNET, SDXL_VAE, SDXL_TEXT, SDXL_TEXT_2)
    assert (sum(p.numel() for n, p in skeleton.unet.named_parameters() if n.split(".")[0] not in OWN_MODULES)
            == 2_567_463_684)
    assert skeleton.parameters() | dict(unet=0) == dict(
        unet=0, vae=83_653_863, text_encoder=123_060_480, text_encoder_2=694_659_840)


def test_bytes_follow_the_precision(tiny):
    full = weight_bytes(tiny, torch.float32)["unet"]
    half = weight_bytes(tiny, torch.bfloat16)["unet"]
    eight = weight_bytes(tiny, torch.bfloat16, True)["unet"]
    assert full == 2 * half and half / 2 <= eight < 0.6 * half


@pytest.mark.parametrize("more", [dict(tile_size=512), dict(tile_batch=2), dict(dtype="float32")])
def test_more_needs_more(tiny, more):
    base = dict(device="cpu", dtype="bfloat16", tile_size=256, tile_batch=1)
    assert predict_peak(tiny, Plan(**base | more), (1024, 1024)).total > predict_peak(
        tiny, Plan(**base), (1024, 1024)).total


def test_tiles_bound_activations_not_canvases(tiny):
    small, large = (predict_peak(tiny, Plan(tile_size=256), (side, side)) for side in (1024, 2048))
    assert max(large.parts["canvases"], 1) > 3 * small.parts["canvases"] or large.stage != small.stage
    assert large.total < 4 * small.total


def test_the_fastest_that_fits(wide, room):
    chosen = []
    for gigabytes in (100, 3, 1, 0.5, 0.3):
        room(int(gigabytes * 1e9))
        try: chosen.append(make_plan(wide, (2048, 2048)))
        except FoundIRError: break
    assert all(p.predicted <= p.available for p in chosen)
    assert [p.predicted for p in chosen] == sorted((p.predicted for p in chosen), reverse=True)
    assert chosen[0].tile_size == 1024 and chosen[0].offload == "none"
    assert len({(p.tile_size, p.vae_tile_size) for p in chosen}) > 1


def test_an_accelerator_offloads_before_tiles_shrink(wide, room):
    room(10**10, 10**11)
    fast = make_plan(wide, device="cuda", dtype="bfloat16")
    assert (fast.offload, fast.tile_batch, fast.fp8) == ("none", 4, False)
    peak = predict_peak(wide, Plan("cuda", "bfloat16", 1024, 1, offload="model"), (1024, 1024))
    room(needed(peak), 10**11)
    assert make_plan(wide, device="cuda", dtype="bfloat16", vae_tile_size=1024, tile_size=1024).offload == "model"


def test_main_memory_has_to_hold_the_weights_of_an_accelerator(wide, room):
    room(10**10, 1000)
    with pytest.raises(FoundIRError, match="loading the model needs at least .* GB of main memory"):
        make_plan(wide, device="cuda")


def test_what_is_fixed_stays_and_the_refusal_says_what_would_fit(wide, room):
    room(int(1.5e9))
    assert make_plan(wide, (1024, 1024), dtype="bfloat16", tile_size=512).tile_size == 512
    room(int(0.6e9))
    with pytest.raises(FoundIRError, match="leave out dtype, tile_size, vae_tile_size; this would fit: cpu"):
        make_plan(wide, (1024, 1024), dtype="float32", tile_size=1024, vae_tile_size=1024)
    room(10**6)
    with pytest.raises(
        FoundIRError,
        match=r"needs at least 0\.\d+ GB of main memory, 0\.00 GB are left of what is free or allowed: [^\n]*$"):
        make_plan(wide)


def test_unknown_choices_are_refused(tiny):
    with pytest.raises(FoundIRError, match="a plan has no tiles: choose from"): make_plan(tiny, tiles=4)
    with pytest.raises(FoundIRError, match="unknown plan 'fast'"): load_pipeline("tiny", device="cpu", plan="fast")


def test_the_limit_is_the_processs():
    cpu = torch.device("cpu")
    assert available_memory(cpu, 1) == 0
    assert 0 < available_memory(cpu, 10**15) == pytest.approx(available_memory(cpu), rel=0.2)


def test_loading_follows_the_plan(tmp_path):
    pipe = load_pipeline("tiny", device="cpu", plan=Plan("cpu", "bfloat16", 256, 2, 128, fp8=True))
    assert ((pipe.config.default_tile_size, pipe.config.default_tile_batch, pipe.config.default_vae_tile_size)
            == (256, 2, 128))
    assert pipe.unet.dtype == torch.bfloat16 and pipe.vae.dtype == torch.bfloat16
    assert (sum(p.nbytes for p in pipe.unet.parameters())
            == weight_bytes(read_skeleton("tiny"), torch.bfloat16, True)["unet"])
    pipe.set_progress_bar_config(disable=True)
    (out,) = pipe(torch.rand(3, 96, 96), generator=torch.Generator().manual_seed(0), output_type="pt").images
    assert out.shape == (3, 96, 96) and out.isfinite().all()


def test_nothing_asked_nothing_changed():
    pipe = load_pipeline("tiny", device="cpu")
    assert pipe.unet.dtype == torch.float32 and pipe.config.default_tile_size == 512
    assert pipe.config.default_vae_tile_size is None


def test_refused_before_a_weight_is_read(monkeypatch):
    from foundir_v2 import loading
    monkeypatch.setattr(loading, "_load", lambda *a: pytest.fail("weights were loaded"))
    with pytest.raises(FoundIRError, match="GB are left of what is free or allowed"):
        load_pipeline("tiny", device="cpu", memory=1)
    with pytest.raises(FoundIRError, match="GB are left of what is free or allowed"):
        load_pipeline("tiny", device="cpu", plan="auto", memory=1)


def test_quantisation_needs_a_whole_pipeline():
    with pytest.raises(FoundIRError, match="only such can be quantised"):
        load_pipeline("tiny", device="cpu",
                      quantization=dict(quant_backend="bitsandbytes_8bit", quant_kwargs=dict(load_in_8bit=True)))


def test_the_command_prints_its_choice_or_refuses(tmp_path, capsys):
    from PIL import Image
    Image.radial_gradient("L").convert("RGB").resize((64, 64)).save(tmp_path / "in.png")
    run = lambda *more: main(["restore", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--device", "cpu", *more])
    assert run("--memory-limit", "1000", "--tile-size", "256") == 0 and (tmp_path / "out.png").exists()
    assert "tiles of 256 px" in capsys.readouterr().err
    (tmp_path / "out.png").unlink()
    for limit, message in (("0.001", "GB are left of what is free or allowed"), ("0", "(gigabytes)")):
        assert run("--memory-limit", limit) == 2 and not (tmp_path / "out.png").exists()
        assert message in capsys.readouterr().err


def test_random_models_are_a_whole_restorer(tiny, tmp_path):
    from diffusers import EulerDiscreteScheduler
    from foundir_v2.base import TINY_SCHEDULE, load_tokenizers
    from foundir_v2.pipeline import FoundIRv2Pipeline
    models, (first, second) = random_models(tiny, torch.bfloat16), load_tokenizers(assets_path("base"))
    pipe = FoundIRv2Pipeline(
        **models, tokenizer=first, tokenizer_2=second, scheduler=EulerDiscreteScheduler(**TINY_SCHEDULE),
        default_guidance_scale=2.0, default_start="noise")
    pipe.save_pretrained(tmp_path)
    again = load_pipeline(tmp_path, device="cpu", dtype="bfloat16")
    restore = lambda p: p(torch.full((3, 64, 64), 0.5), prompt="x", num_inference_steps=1,
                          generator=torch.Generator().manual_seed(0), output_type="pt").images[0]
    for p in (pipe, again): p.set_progress_bar_config(disable=True)
    assert torch.equal(restore(pipe), restore(again))
    assert read_skeleton(tmp_path).parameters() == tiny.parameters()
