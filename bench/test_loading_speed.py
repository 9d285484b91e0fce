"""Crops per second and core on a pool that doesn't fit into memory: `python -m pytest -s bench/test_loading_speed.py`.

Ratios of CPU time within one run, medians of interleaved rounds, one thread. BENCH_ROUNDS=1 gives a first impression.

The yardstick is the plain way without waste, written out below: decode the photograph whole, cut, turn the cut into
floats, shrink, degrade. (Turning the whole into floats, as many loaders do, takes up to three times as long.) It keeps
nothing; the dataset keeps a quarter of the pool's bytes, and has seen the pool before.
"""
import os, statistics, time
from functools import partial

import numpy as np, pandas as pd, pytest, skimage.data, torch
import torch.nn.functional as F
from PIL import Image

from foundir_v2.data import RestorationDataset, from_photograph
from foundir_v2.reading import Photos, cut
from foundir_v2.tasks import by_category

ROUNDS, DRAWS, CROP = int(os.environ.get("BENCH_ROUNDS", 3)), 40, 128
KINDS = {"jpeg": ("jpg", (4000, 3000), dict(quality=92)), "png": ("png", (2040, 1356), {})}
RANGES = {"crops at half to full size": (0.5, 1.0), "all scales (the default)": (0.0, 1.0)}
VARIED = dict(recoloured=0.5, variety=0.5, clean_share=0.1)


@pytest.fixture(scope="module", params=KINDS)
def pool(request, tmp_path_factory):
    "Eight photographs of the size that cameras or the usual sets have, with a camera's grain."
    torch.set_num_threads(1)
    folder, (suffix, size, options), rows = tmp_path_factory.mktemp(request.param), KINDS[request.param], []
    for i, name in enumerate(2 * ["astronaut", "coffee", "chelsea", "rocket"]):
        large = np.array(Image.fromarray(getattr(skimage.data, name)()).resize(size, Image.LANCZOS)).astype(np.int16)
        large += np.random.default_rng(i).integers(-4, 5, large.shape, np.int16)
        Image.fromarray(large.clip(0, 255).astype(np.uint8)).save(folder / f"{i}.{suffix}", **options)
        rows.append(dict(photo=f"{i}", path=f"{i}.{suffix}", lq="", task="", split="train", width=size[0],
                         height=size[1], caption=""))
    return request.param, folder, pd.DataFrame(rows)


def plain_sample(folder, row, tasks, draw, scale_range):
    with Image.open(folder / row["path"]) as im: whole = np.array(im.convert("RGB"))
    def photo(window, halved):
        top, left, height, width = (n << halved for n in window)
        part = torch.from_numpy(whole[top:top + height, left:left + width]).permute(2, 0, 1).contiguous()
        if not halved: return part
        return F.interpolate(part[None] / 255, window[2:], mode="bicubic", antialias=True)[0].clamp(0, 1)
    options = dict(crop=CROP, scale_range=scale_range, **VARIED)
    return from_photograph(photo, whole.shape[:2], tasks[draw[0]], seed=draw[2], **options)[:2]


def db(pairs): return -10 * np.log10(max(np.mean([(a - b).square().mean().item() for a, b in pairs]), 1e-12))


@pytest.mark.parametrize("name", RANGES)
def test_crops_per_second_and_core(pool, name):
    "At least twice the plain way's, with the same samples; draft mode gives JPEGs 40 dB from them, with nothing kept."
    kind, folder, rows = pool
    tasks, scale_range = by_category(), RANGES[name]
    bytes_of_all = int(3 * (rows["width"] * rows["height"]).sum())
    options = dict(crop=CROP, root=folder, scale_range=scale_range, cache=bytes_of_all // 4, **VARIED)
    exact, bare, drafted = (RestorationDataset(rows, "train", tasks, **options | more)
                            for more in ({}, dict(cache=0), dict(cache=0, draft=True)))
    draws = [(list(tasks)[i % 5], i % 8, 1000 + i) for i in range(DRAWS)]
    for i in range(5 * len(rows)): exact[list(tasks)[i % 5], i % len(rows), i]
    runs = {"plain": lambda d: plain_sample(folder, rows.iloc[d[1]], tasks, d, scale_range),
            "exact": exact.__getitem__, "bare": bare.__getitem__, "draft": drafted.__getitem__}
    seconds, samples = {run: [] for run in runs}, {}
    for _ in range(ROUNDS):
        for run, sample in runs.items():
            start = time.process_time()
            samples[run] = [sample(d) for d in draws]
            seconds[run].append(time.process_time() - start)
    ratio = lambda a, b: statistics.median(x / y for x, y in zip(seconds[a], seconds[b]))
    ours, unaided, fast = (ratio("plain", run) for run in ("exact", "bare", "draft"))
    near = db((a["gt"], b["gt"]) for a, b in zip(samples["exact"], samples["draft"]))
    rate, kept = DRAWS / statistics.median(seconds["exact"]), exact.photos.held / bytes_of_all
    print(f"\n{kind}, {name}: {rate:.0f} crops per second and core, {ours:.1f} x the plain way's, with {kept:.0%} of "
          f"the pool kept; with nothing kept {unaided:.1f} x, and in draft mode {fast:.1f} x"
          + (f" at {near:.0f} dB" if near < 120 else ", the same samples"))
    assert exact.photos.held <= exact.photos.cache < bytes_of_all / 3
    assert all(torch.equal(a[key], b[key]) for a, b in zip(samples["exact"], samples["bare"]) for key in ("lq", "gt"))
    if scale_range[0] > 0:
        for (lq, gt), s in zip(samples["plain"], samples["exact"]):
            assert torch.equal(lq, s["lq"]) and torch.equal(gt, s["gt"])
    else:  # halves are another way to shrink: compare with photographs that are decoded and halved whole
        fresh = Photos(folder, 0)
        for (task, i, seed), s in list(zip(draws, samples["exact"]))[:8]:
            path = rows["path"][i]
            def photo(window, k, whole=partial(fresh, path)): return cut(whole(k), window)
            size = rows["height"][i], rows["width"][i]
            lq, gt = from_photograph(photo, size, tasks[task], CROP, scale_range, seed, **VARIED)[:2]
            assert torch.equal(lq, s["lq"]) and torch.equal(gt, s["gt"])
    assert near >= 40 and ours >= 2 and (unaided if kind == "png" else fast) >= 2
