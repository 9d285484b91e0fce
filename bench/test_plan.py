"""The plan of a training against what it takes: `python -m pytest -s bench/test_plan.py`.

Every configuration trains two steps in a process of its own, on models between the tiny one and SDXL's. Measured is
the high-water mark of the process's resident memory, minus what it had before the base model was loaded. malloc gives
memory back at once (its two thresholds are set), so that what is held by nobody doesn't count.
"""
import json, os, subprocess, sys
import pytest

CHILD = '''
import gc, json, os, sys
from foundir_v2 import plan
from foundir_v2.settings import TrainConfig
import foundir_v2.pipeline, diffusers, transformers.models.clip.modeling_clip, timm.optim.muon

options, folder = json.loads(sys.argv[1]), sys.argv[2]
status = lambda key: 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))
if options.get("optimizer") == "adamw8bit": import bitsandbytes
config = TrainConfig(steps=100, base=folder, noise_offset=0., lq_norm_groups=0, moe_heads=4, **options)
predicted = plan.plan_stage(config, int(os.environ.get("WORLD_SIZE", 1)))
gc.collect()
before = status("VmRSS")
open("/proc/self/clear_refs", "w").write("5")
plan.step_seconds(config, steps=1)  # in the second, the optimizer has its state
found = dict(predicted=predicted.peak[1], phase=predicted.peak[0], measured=status("VmHWM") - before)
if os.environ.get("RANK", "0") == "0":
    print("\\n" + json.dumps(found | dict(parts=predicted.parts, phases=predicted.phases)))
'''
BASE = '''
import sys, torch
from foundir_v2.base import TINY_UNET, new_base, save_base
from foundir_v2.vae import PatchAutoencoderKL
torch.manual_seed(0)
unet = dict(TINY_UNET, block_out_channels=(64, 128, 192), attention_head_dim=(2, 4, 4), layers_per_block=2,
            transformer_layers_per_block=(1, 1, 2))
save_base(new_base(PatchAutoencoderKL(channels=96, hidden=128), unet), sys.argv[1])
'''
PLAIN = dict(stage=2, crop=96, batch_size=6, mixed_precision="no", optimizer="adamw")
CONFIGS = dict(
    plain=PLAIN, bf16=PLAIN | dict(mixed_precision="bf16"), checkpointing=PLAIN | dict(gradient_checkpointing=True),
    accumulation=PLAIN | dict(gradient_accumulation=3, batch_size=9), bytes=PLAIN | dict(optimizer="adamw8bit"),
    frozen=PLAIN | dict(stage=1, mixed_precision="bf16"), encoder=PLAIN | dict(stage=0, crop=192, loss="l1"),
    muon=PLAIN | dict(optimizer="muon", channels_last=True), shared=PLAIN | dict(fsdp=True, crop=64))


def child(code, *arguments, processes=1):
    environment = os.environ | dict(MALLOC_MMAP_THRESHOLD_="65536", MALLOC_TRIM_THRESHOLD_="65536", OMP_NUM_THREADS="1")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), "--no-python",
                sys.executable] if processes > 1 else []
    if launcher: environment["ACCELERATE_USE_CPU"] = "1"
    command = [sys.executable, *launcher, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    child(BASE, str(folder))
    return folder


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads the peak from /proc")
@pytest.mark.parametrize("name", CONFIGS)
def test_peak(name, base):
    "Within 20 %."
    processes = 2 if CONFIGS[name].get("fsdp") else 1
    found = json.loads(child(CHILD, json.dumps(CONFIGS[name]), str(base), processes=processes).splitlines()[-1])
    ratio, mb = found["predicted"] / found["measured"], lambda parts: {k: round(v / 1e6) for k, v in parts.items()}
    print(f"\n{name}: planned {found['predicted'] / 1e6:.0f} MB ({found['phase']}), measured "
          f"{found['measured'] / 1e6:.0f} MB, ratio {ratio:.2f}; {mb(found['parts'])}; {mb(found['phases'])}")
    assert abs(ratio - 1) <= 0.2
