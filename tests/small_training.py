"A data set of noise-like pictures, a very small base model and a configuration to train it: for tests that train."
import multiprocessing, os, random, signal, socket, sys, time
from pathlib import Path

import torch
from safetensors.torch import load_file

from foundir_v2 import train as tr
from foundir_v2.base import TINY_UNET, new_base, save_base
from foundir_v2.core import generator, save_image
from foundir_v2.fsdp import own_part
from foundir_v2.index import build_manifest, save_manifest
from foundir_v2.learner import Feed, Learner, make_accelerator
from foundir_v2.vae import PatchAutoencoderKL

TASKS = {"denoise": ["gaussian_noise"], "lowlight": ["low_light"], "sr": ["sr_x2"]}


def make_bench(folder):
    "Pictures, their manifest and the base model."
    for split, n in dict(train=3, reference=2).items():
        for i in range(n):
            coarse = torch.rand(1, 3, 12, 12, generator=generator(split, i))
            save_image(torch.nn.functional.interpolate(coarse, size=(96, 96), mode="bicubic")[0].clamp(0, 1),
                       folder / f"photos/{split}/{split}{i}.png")
    save_manifest(build_manifest(folder / "photos", root=folder), folder / "manifest.parquet")
    torch.manual_seed(0)
    unet = dict(TINY_UNET, block_out_channels=(32, 32, 48), attention_head_dim=(2, 2, 2))
    save_base(new_base(PatchAutoencoderKL(channels=48, hidden=8, encoder_blocks=1, decoder_blocks=1), unet),
              folder / "base")
    return folder


def config(bench, out, **changes):
    values = dict(stage=1, steps=6, tasks=TASKS, score={t: "psnr" for t in TASKS}, policy="des",
                  options=dict(alpha=.5, score_scale="raw"), reference_per_task=2, reference_size=32,
                  inference=dict(num_inference_steps=1, guidance_scale=1, start="noise", tile_size=0),
                  base=str(bench / "base"), lq_norm_groups=0, moe_layers=1, moe_heads=4, crop=32, batch_size=4,
                  terminal_fraction=.5, noise_offset=0., ema_decay=.9, mixed_precision="no", num_workers=0,
                  checkpoint_every=2, warmup_steps=2, learning_rate=2e-3, manifest=str(bench / "manifest.parquet"),
                  root=str(bench), checkpoints=str(out / "runs"), output=str(out / "out"))
    return tr.TrainConfig(**(values | changes))


def weights(folder): return load_file(next(Path(folder).glob("unet/*.safetensors")))


def equal(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- a process that dies ----------------------------------------------------------------------------------------------

NAMES = ("checkpoint", "diffusion", "kept", "learner", "pixels", "train", "trainlog")
OURS = tuple(str(Path(tr.__file__).with_name(f"{name}.py")) for name in NAMES)
FORKS = multiprocessing.get_context("forkserver")  # its processes come with torch loaded
FORKS.set_forkserver_preload(
    ["foundir_v2.train", "transformers.models.clip.modeling_clip", "diffusers.models.unets.unet_2d_condition"])


def explode(at, rank=0):
    "From now on, this process's loss at that step is NaN."
    losses = Learner.losses
    def harmed(self, batch):
        step = self.lr_scheduler.scheduler.last_epoch + 1
        return losses(self, batch) * (float("nan") if (step, self.accelerator.process_index) == (at, rank) else 1)
    Learner.losses = harmed


def be_one_of_two(rank, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="1")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def held_in_a_step(values, rank, port, answers):
    "In one of two processes: how many numbers it holds of weights, gradients, moments and average in a step."
    be_one_of_two(rank, port)
    c = tr.TrainConfig(**values)
    learner, feed = Learner(c, accelerator := make_accelerator(c)), Feed(c, rank, 2)
    step, found = learner.optimizer.step, {}
    count = lambda tensors: sum(own_part(t).numel() for t in tensors)
    def noting():
        found.update(gradients=count(p.grad for p in learner.parameters if p.grad is not None))
        step()
    learner.optimizer.step = noting
    learner.step(next(iter(feed.loader)), list(c.task_table))
    moments = [s["exp_avg"] for s in learner.optimizer.state.values()]
    answers.put(found | dict(all=sum(p.numel() for p in learner.parameters), weights=count(learner.parameters),
                             moments=count(moments), average=count(learner.ema.shadow_params)))
    accelerator.end_training()


def train_until(values, line=None, lines=None, rank=None, port=None, nan=None):
    """In a process of its own: train, and be gone at the n-th line of our code; `lines` gets how many there were.
    With a rank, as one of two processes; `nan`: step and rank of a loss that is none."""
    if rank is not None: be_one_of_two(rank, port)
    if nan: explode(*nan)
    if line is not None or lines is not None:
        count = 0
        def trace(frame, event, arg):
            nonlocal count
            if frame.f_code.co_filename not in OURS: return None
            count += event == "line"
            if count == line: os.kill(os.getpid(), signal.SIGKILL)
            return trace
        sys.settrace(trace)
    try: tr.train(tr.TrainConfig(**values))
    except tr.Stopped as e: sys.exit(128 + e.number)
    sys.settrace(None)
    if lines is not None: lines.value = count


def start(c, **options):
    process = FORKS.Process(target=train_until, args=(dict(c.__dict__),), kwargs=options)
    process.start()
    return process


def start_two(c, victim=0, line=None, lines=None, **options):
    "Two processes that train together; the victim is the one that is gone at a line."
    port, watched = free_port(), dict(line=line, lines=lines)
    return [start(c, rank=rank, port=port, **(watched if rank == victim else {}), **options) for rank in range(2)]


def lines_of(c, starter=start, **options):
    "How many lines of our code a whole training runs through."
    lines = FORKS.Value("q", 0)
    processes = starter(c, lines=lines, **options)
    for process in (processes := processes if isinstance(processes, list) else [processes]): process.join()
    assert not any(process.exitcode for process in processes)
    return lines.value


def kill_in_a_checkpoint(c, seed):
    """Start, and kill some milliseconds after a seeded number of checkpoints has begun to be written.
    True if it came to that."""
    draw, folder, seen = random.Random(seed), tr.run_folder(c), set()
    begun, process = draw.randrange(1, 4), start(c)
    while process.is_alive() and len(seen) < begun:
        seen |= {p.name for p in folder.glob(".partial-0*")}
        time.sleep(.0005)
    time.sleep(draw.random() * .02)
    process.kill(); process.join()
    return process.exitcode == -signal.SIGKILL
