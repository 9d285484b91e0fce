"""Predicted against measured peaks of memory: `python -m pytest -s bench/test_planner.py`.

Every configuration runs in a process of its own; those at SDXL's size need 10 GB and minutes: BENCH_SDXL=1.

Measured is the high-water mark of the process's resident memory, minus what it had before the model was loaded.
malloc gives memory back at once (its two thresholds are set), so that what is held by nobody doesn't count.
"""
import json, os, subprocess, sys
import pytest
from foundir_v2.planner import Plan, predict_peak
from foundir_v2.skeleton import SDXL_TEXT, SDXL_TEXT_2, SDXL_VAE, make_skeleton, read_skeleton

CHILD = '''
import gc, json, sys, torch
from diffusers import EulerDiscreteScheduler
from foundir_v2.base import SDXL_SCHEDULE, SDXL_UNET, assets_path, load_tokenizers
from foundir_v2.pipeline import FoundIRv2Pipeline, load_pipeline
from foundir_v2.planner import random_models
from foundir_v2.skeleton import SDXL_TEXT, SDXL_TEXT_2, SDXL_VAE, make_skeleton

c = json.loads(sys.argv[1])
status = lambda key: 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))
def sdxl(dtype):
    models = random_models(make_skeleton(SDXL_UNET, SDXL_VAE, SDXL_TEXT, SDXL_TEXT_2), dtype)
    first, second = load_tokenizers(assets_path("base"))
    schedule = EulerDiscreteScheduler(**SDXL_SCHEDULE | dict(timestep_spacing="trailing"))
    return FoundIRv2Pipeline(**models, tokenizer=first, tokenizer_2=second, scheduler=schedule)
picture = torch.rand(3, *c["size"], generator=torch.Generator().manual_seed(0)).mul(255).byte()
dtype = getattr(torch, c["dtype"])
gc.collect()
before = status("VmRSS")
pipe = sdxl(dtype) if c["model"] == "sdxl" else load_pipeline(c["model"], device="cpu", dtype=dtype)
if c.get("fp8"): pipe.unet.enable_layerwise_casting(compute_dtype=dtype)
pipe.set_progress_bar_config(disable=True)
loaded = status("VmHWM")
open("/proc/self/clear_refs", "w").write("5")
pipe(picture, prompt="a photograph of a harbour", num_inference_steps=c["steps"], guidance_scale=c["guidance"],
     tile_size=c["tile_size"], tile_batch=c["tile_batch"], vae_tile_size=c.get("vae_tile_size"),
     generator=torch.Generator().manual_seed(0))
print(json.dumps(dict(peak=status("VmHWM") - before, loading=loaded - before)))
'''
TINY = [
    dict(model="tiny", size=size, tile_size=tile, tile_batch=batch, dtype=dtype, guidance=guidance, steps=2)
    for size, tile, batch, dtype, guidance in (
        ((512, 512), 0, 1, "float32", 1.0), ((512, 512), 0, 1, "bfloat16", 1.0), ((768, 1024), 0, 1, "float32", 1.0),
        ((1024, 1024), 512, 1, "float32", 5.0), ((1024, 1024), 512, 4, "float32", 5.0),
        ((1024, 1024), 256, 2, "bfloat16", 5.0), ((2048, 2048), 256, 1, "float32", 1.0))]
SDXL = [dict(model="sdxl", size=(side, side), tile_size=1024, tile_batch=1, dtype="bfloat16", guidance=5.0, steps=1,
             fp8=fp8) for side, fp8 in ((256, False), (512, False))]
name = lambda c: " ".join(f"{k}={v}" for k, v in c.items() if k not in ("steps",))


def measure(c):
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", OMP_NUM_THREADS="2")
    done = subprocess.run([sys.executable, "-c", CHILD, json.dumps(c)], check=True, capture_output=True, text=True,
                          env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def predict(c):
    from foundir_v2.base import SDXL_UNET
    skeleton = (make_skeleton(SDXL_UNET, SDXL_VAE, SDXL_TEXT, SDXL_TEXT_2) if c["model"] == "sdxl"
                else read_skeleton(c["model"]))
    plan = Plan("cpu", c["dtype"], c["tile_size"], c["tile_batch"], c.get("vae_tile_size"), fp8=c.get("fp8", False))
    return predict_peak(skeleton, plan, c["size"], c["guidance"] != 1, start="lq" if c["model"] == "sdxl" else None)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("c", [*TINY, *SDXL], ids=name)
def test_peak(c):
    "Within 20 %."
    if c["model"] == "sdxl" and not os.environ.get("BENCH_SDXL"): pytest.skip("needs 10 GB and minutes: BENCH_SDXL=1")
    predicted, measured = predict(c), measure(c)
    print("\n"
          f"{name(c)}: predicted {predicted.total / 1e6:.0f} MB ({predicted.stage}: "
          f"{', '.join(f'{k} {v / 1e6:.0f}' for k, v in predicted.parts.items())}), measured "
          f"{measured['peak'] / 1e6:.0f} MB, ratio {predicted.total / measured['peak']:.2f}; loading: "
          f"{predicted.loading / 1e6:.0f}, {measured['loading'] / 1e6:.0f} MB")
    assert abs(predicted.total / measured["peak"] - 1) <= 0.2
