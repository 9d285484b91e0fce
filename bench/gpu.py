"""What a GPU does at SDXL's size, with random weights: `python bench/gpu.py`, ten minutes at most.

1. The rate of its matrix product in bfloat16.
2. Stage-2 steps at 512 x 512 for 1 to 16 samples: memory against the plan, time per sample.
3. The pipeline at 1024 x 1024, 20 steps with guidance: its share of that rate.

Writes a dated table to bench/. `--tiny` runs the same code at a tiny size, on a CPU, too. `measured_step` is also how
steps at SDXL's size were measured on a CPU for notebook 64.
"""
import argparse, datetime, gc, sys, time
from pathlib import Path
from unittest import mock

import psutil, torch
from diffusers import EulerDiscreteScheduler

from foundir_v2 import diffusion
from foundir_v2.base import SDXL_SCHEDULE, TINY_SCHEDULE, Base, assets_path, load_tokenizers
from foundir_v2.pipeline import FoundIRv2Pipeline
from foundir_v2.plan import StepMeter, plan_stage, step_seconds, training_skeleton
from foundir_v2.planner import Skeleton, random_models
from foundir_v2.settings import TrainConfig

LIMIT = 540  # seconds after which nothing new is begun
SIZES = dict(
    full=dict(base="SG161222/RealVisXL_V4.0", batches=(1, 2, 4, 8, 16), crop=512, side=1024, steps=20, matrix=8192),
    tiny=dict(base="base", batches=(1, 2), crop=32, side=64, steps=2, matrix=256))


def training_config(size: dict, batch: int, **changes) -> TrainConfig:
    values = dict(stage=2, steps=1000, base=size["base"], crop=size["crop"], batch_size=batch, mixed_precision="bf16",
                  noise_offset=0.0, moe_layers=2, moe_heads=8)
    return TrainConfig(**values | changes)


def sync() -> float:
    "Now, when everything has ended."
    if torch.cuda.is_available(): torch.cuda.synchronize()
    return time.perf_counter()


def matrix_rate(n: int, device: str) -> float:
    "Floating-point operations per second of a product of n x n matrices."
    a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    a @ b
    start, times = sync(), 20
    for _ in range(times): a @ b
    return 2 * n**3 * times / (sync() - start)


def random_base(skeleton: Skeleton, schedule: dict, dtype: torch.dtype = torch.float32) -> tuple[Base, torch.nn.Module]:
    "A base model without its U-Net, and the restorer."
    models = random_models(skeleton, dtype)
    unet, tokenizers = models.pop("unet"), load_tokenizers(assets_path("base"))
    return Base(**models, tokenizer=tokenizers[0], tokenizer_2=tokenizers[1], unet_prior=None,
                noise_scheduler=EulerDiscreteScheduler(**schedule)), unet


def measured_step(config: TrainConfig, skeleton: Skeleton, schedule: dict, steps: int = 2) -> tuple[float, int, int]:
    "Seconds of a training step on random weights; bytes at its peak, and when the models were there."
    def load(*_, device, **__):
        for model in (base.vae, base.text_encoder, base.text_encoder_2): model.to(device)
        return base
    def build(config, _):
        if config.gradient_checkpointing: unet.enable_gradient_checkpointing()
        unet.requires_grad_(False)
        for group in unet.trainable_parameters(config.stage):
            for p in group["params"]: p.requires_grad_(True)
        return unet
    before = psutil.Process().memory_info().rss
    base, unet = random_base(skeleton, schedule)
    loaded = psutil.Process().memory_info().rss - before
    cuda = torch.cuda.is_available()
    if cuda: torch.cuda.reset_peak_memory_stats()
    with mock.patch.multiple(diffusion, load_base=load, build_unet=build): seconds = step_seconds(config, steps)
    if cuda: return seconds, torch.cuda.max_memory_allocated(), loaded
    peak = 1024 * int(next(x.split()[1] for x in open("/proc/self/status") if x.startswith("VmHWM")))
    return seconds, peak - before, loaded


def training_rows(size: dict, schedule: dict, device: str, begun: float) -> list[str]:
    "A line per batch; where memory ends, the same with checkpointing."
    rows, checkpointing = [], False
    for batch in size["batches"]:
        if time.perf_counter() - begun > LIMIT: break
        for checkpointing in (False, True) if not checkpointing else (True,):
            config = training_config(size, batch, gradient_checkpointing=checkpointing)
            skeleton = training_skeleton(config)
            planned = plan_stage(config, 1, device, skeleton).phases["step"]
            try: seconds, peak, _ = measured_step(config, skeleton, schedule)
            except torch.OutOfMemoryError:
                rows.append(f"| {batch} | {'yes' if checkpointing else 'no'} | {planned / 1e9:.2f} | out of memory | |")
                continue
            finally:
                gc.collect()
                if device == "cuda": torch.cuda.empty_cache()
            rows.append(f"| {batch} | {'yes' if checkpointing else 'no'} | {planned / 1e9:.2f} | {peak / 1e9:.2f} | "
                        f"{seconds / batch:.3f} |")
            break
    return rows


@torch.no_grad()
def pipeline_row(size: dict, schedule: dict, device: str, rate: float) -> str:
    "Seconds of a restoration, and what of the card's matrix rate it reaches."
    base, unet = random_base(training_skeleton(training_config(size, 1)), schedule, torch.bfloat16)
    pipe = FoundIRv2Pipeline(unet=unet.eval(), vae=base.vae, text_encoder=base.text_encoder, tokenizer=base.tokenizer,
                             text_encoder_2=base.text_encoder_2, tokenizer_2=base.tokenizer_2,
                             scheduler=replace_spacing(base.noise_scheduler)).to(device)
    pipe.set_progress_bar_config(disable=True)
    picture = torch.rand(3, size["side"], size["side"])
    def restore(steps: int) -> float:
        start = sync()
        pipe(picture, prompt="a harbour", num_inference_steps=steps, guidance_scale=5.0, output_type="pt",
             generator=torch.Generator().manual_seed(0))
        return sync() - start
    flops = []
    for steps in (1, 2):
        with StepMeter(device, ()) as meter: restore(steps)
        flops.append(meter.flops)
    total = flops[0] + (size["steps"] - 1) * (flops[1] - flops[0])
    seconds = min(restore(size["steps"]) for _ in range(2))
    return (f"{size['side']}², {size['steps']} steps with guidance: {seconds:.2f} s, {total / 1e12:.3g} TFLOP, "
            f"{total / seconds / rate:.0%} of the matrix rate")


def replace_spacing(scheduler: EulerDiscreteScheduler) -> EulerDiscreteScheduler:
    "Spacing that lets one or two steps be asked for."
    return EulerDiscreteScheduler.from_config(scheduler.config, timestep_spacing="trailing")


def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--tiny", action="store_true", help="tiny models, on whatever there is")
    p.add_argument("--out", type=Path, default=Path(__file__).parent, metavar="DIR", help="where the table goes")
    args, device = p.parse_args(argv), "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.tiny:
        print("bench/gpu.py: no GPU here, nothing measured (--tiny tries the code)")
        return 0
    begun, size = time.perf_counter(), SIZES["tiny" if args.tiny else "full"]
    schedule = dict(TINY_SCHEDULE if args.tiny else SDXL_SCHEDULE)
    name = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    rate = matrix_rate(size["matrix"], device)
    today = datetime.date.today().isoformat()
    lines = [f"# {name}, {today}", "", f"torch {torch.__version__}; product of bfloat16 matrices of {size['matrix']}²: "
             f"{rate / 1e12:.2f} TFLOP/s. Random weights.", "", pipeline_row(size, schedule, device, rate), "",
             f"Stage-2 steps at {size['crop']}², bfloat16, AdamW:", "",
             "| samples | checkpointing | planned GB | measured GB | seconds per sample |", "|---|---|---|---|---|"]
    gc.collect()
    lines += training_rows(size, schedule, device, begun)
    lines += ["", f"{time.perf_counter() - begun:.0f} s in all."]
    file = args.out / f"gpu-{today}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines), f"\n-> {file}")
    return 0


if __name__ == "__main__": sys.exit(main())
