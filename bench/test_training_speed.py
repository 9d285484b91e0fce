"""Where a training's time goes: `python -m pytest -s bench/test_training_speed.py`.

Ratios within one run, one thread, the tiny model and the settings of params.yaml, stage 2. Steps are compared by CPU
time, medians of interleaved rounds; what waits for other processes by the wall clock of the run's own table (notebook
60a). BENCH_ROUNDS=3 gives a first impression. Scoring needs the metrics' weights: `foundir-v2 data fetch`.
"""
import os, statistics, time
from dataclasses import replace

import numpy as np, pandas as pd, pytest, skimage.data, torch
from PIL import Image

from foundir_v2.clock import times_path
from foundir_v2.config import load_params
from foundir_v2.core import repo_root
from foundir_v2.index import build_manifest, save_manifest
from foundir_v2.learner import Feed, Learner, make_accelerator
from foundir_v2.objective import sample_losses
from foundir_v2.settings import PARTS, TrainConfig
from foundir_v2.train import run_folder, train
from foundir_v2.vae import encode_latents

ROUNDS = int(os.environ.get("BENCH_ROUNDS", 9))
PROFILES = repo_root() / "profiles"


def sections(name=None):
    params = load_params(repo_root() / "params.yaml")
    for section, values in (load_params(PROFILES / f"{name}.yaml") if name else {}).items():
        params[section] = params[section] | values if isinstance(values, dict) else values
    return params


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("training")
    for split, names in dict(train=["coffee", "rocket", "chelsea"], reference=["astronaut"]).items():
        (folder / "photos" / split).mkdir(parents=True)
        for name in names:
            Image.fromarray(np.array(getattr(skimage.data, name)())).save(folder / f"photos/{split}/{name}.png")
    save_manifest(build_manifest(folder / "photos", root=folder), folder / "manifest.parquet")
    params = sections()
    own = params["train_stage2"] | dict(steps=ROUNDS)
    files = dict(root=str(folder), manifest=str(folder / "manifest.parquet"), output=str(folder / "out"),
                 checkpoints=str(folder / "runs"))
    return TrainConfig.from_sections(2, own, files, **{s: params[s] for s in PARTS})


def bare_step(learner, batch, encode):
    """Forward, backward, optimizer, of the same model and batch; noise and texts are ready before the clock, and
    latents, too, unless the frozen VAE's forward pass over the ground truth counts (`encode`)."""
    seen, gt = [], batch["gt"] * 2 - 1
    hook = learner.model.register_forward_pre_hook(lambda model, args: seen.append(args))
    with torch.no_grad(): learner.losses(batch)
    hook.remove()
    target = torch.randn_like(seen[0][1])
    def step():
        if encode:
            with torch.no_grad(): encode_latents(learner.trainee.vae, gt)
        losses = sample_losses(learner.model(*seen[0]), target, learner.config.loss, learner.trainee.gain)
        losses.mean().backward()
        learner.optimizer.step(); learner.optimizer.zero_grad()
    return step


def test_a_step_against_its_bare_passes(config):
    learner, feed = Learner(config, make_accelerator(config)), Feed(replace(config, update_every=0))
    batch, tasks = next(iter(feed.loader)), list(config.task_table)
    runs = {"bare": bare_step(learner, batch, True), "without VAE": bare_step(learner, batch, False),
            "step": lambda: learner.step(batch, tasks)}
    seconds = {name: [] for name in runs}
    for _ in range(ROUNDS + 2):
        for name, run in runs.items():
            start = time.process_time()
            run()
            seconds[name].append(time.process_time() - start)
    ratio = lambda name: statistics.median(a / b for a, b in list(zip(seconds["step"], seconds[name]))[2:])
    print(f"\nstep: {ratio('bare'):.3f} x its bare forward + backward + optimizer step, "
          f"{ratio('without VAE'):.3f} x where the VAE's latents are there already")
    assert ratio("bare") <= 1.05


def times_of(config):
    "Train; seconds by part after the first row, with which processes start and files are seen for the first time."
    train(config)
    rows = pd.read_csv(times_path(run_folder(config)))
    assert rows["step"].iloc[-1] == config.steps
    return rows.iloc[1:].drop(columns="step").sum(), config.steps - rows["step"].iloc[0]


def test_waiting_for_data(config):
    "At most 2 % of the time with two data processes, while the training has a core to itself."
    share = {}
    for workers in (0, 2):
        c = replace(config, num_workers=workers, steps=5 * ROUNDS, checkpoint_every=ROUNDS, update_every=0,
                    output=f"{config.output}{workers}")
        spent, _ = times_of(c)
        share[workers] = spent["data"] / spent.sum()
    print(f"\nwaiting for data: {share[0]:.1%} without data processes, {share[2]:.2%} with two")
    assert share[2] <= .02 and share[0] <= .15


def des_share(item, sample, every, batch, items):
    "Part of the time that scoring takes, from the costs of a reference item and of a training sample in one unit."
    return item * items / (item * items + sample * batch * every)


def test_the_price_of_des(config):
    """At the paper's ratio of T, batch and |D_ref|: by the times of a run of the tiny model, and for SDXL by counting
    passes of its U-Net at 512 x 512. An item takes 20 steps with guidance, and the VAE about two passes more; a sample
    a forward pass, a backward pass of two, and where activations are computed again a third: without is dearer."""
    paper, tiny = (sections(name) for name in ("sdxl", None))
    ratio = dict(every=paper["train_stage2"]["update_every"], batch=paper["train"]["batch_size"],
                 items=paper["mixture"]["reference_per_task"] * 5)
    c = replace(config, steps=3 * ROUNDS, update_every=ROUNDS, checkpoint_every=ROUNDS, output=f"{config.output}des")
    spent, steps = times_of(c)
    item = spent["scoring"] / 2 / (5 * c.reference_per_task)
    sample = (spent["forward"] + spent["backward"] + spent["optimizer"]) / (steps * c.batch_size)
    solver = paper["inference"]
    passes = solver["num_inference_steps"] * (2 if solver["guidance_scale"] > 1 else 1) + 2
    own = des_share(item, sample, tiny["train_stage2"]["update_every"], c.batch_size, 5 * c.reference_per_task)
    measured, counted = des_share(item, sample, **ratio), des_share(passes, 3, **ratio)
    least = next(t for t in range(1, 10**6) if des_share(passes, 3, **ratio | dict(every=t)) <= .05)
    print(f"\nDES: a reference item costs {item / sample:.1f} samples; {measured:.4%} of the time at the paper's ratio "
          f"({ratio}), {own:.0%} at the tiny default's; SDXL, by counting passes: {counted:.3%}, 5 % at T = {least}")
    assert measured <= .05 and counted <= .05
