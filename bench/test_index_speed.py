"""A manifest of a million rows on one core: `python -m pytest -s bench/test_index_speed.py`.
From a listing of names to samples: checked, filtered, split, written, read. Bounds are the project's."""
import multiprocessing, resource, time
from pathlib import Path

import numpy as np, pandas as pd

from foundir_v2.data import rows_by_task, split_rows
from foundir_v2.index import ACCEPTED, REJECTED, leaks, load_manifest, refuse_leaks, save_manifest, select
from foundir_v2.layouts import LAYOUTS, DataSet, read_patterns
from foundir_v2.listing import Listing
from foundir_v2.mixture import FixedMixture
from foundir_v2.pool import counts, degraded_ground_truths, rejections
from foundir_v2.sampler import MixtureSampler
import foundir_v2.layouts

ROWS, HELD_OUT, DRAWS = 1_000_000, 1000, 100_000


def hashes(n, rng):
    "n random hashes of 256 bits, in hexadecimal digits."
    text = rng.bytes(32 * n).hex()
    return [text[i:i + 64] for i in range(0, 64 * n, 64)]


def listing(n):
    "Names as RESIDE's, ten hazy pictures per clear one."
    gts = [f"ITS/clear/{i:06}.png" for i in range(n // 10)]
    return gts + [f"ITS/hazy/{i // 10:06}_{i % 10}_0.9.png" for i in range(n)]


def million(path, report):
    "The whole way; puts (step, CPU seconds so far, peak memory so far in bytes) into the queue, and None at the end."
    start, rng = time.process_time(), np.random.default_rng(0)
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    def told(step): report.put((step, time.process_time() - start, peak()))
    told("start")
    foundir_v2.layouts.list_pictures = lambda root: Listing(files, [])
    files = listing(ROWS)
    data = DataSet(name="x", root=".", layout="reside", split=dict(reference=HELD_OUT // 2, test=HELD_OUT // 2))
    entries = read_patterns(data, LAYOUTS["reside"], Path("/data/RESIDE")).entries
    assert len(entries) == ROWS
    told("pairs found by their names, ground truths held out")
    table = pd.DataFrame(entries)
    del entries
    measures = pd.DataFrame(dict(path=table.path.unique()))
    n = len(measures)
    measures = measures.assign(sha256=hashes(n, rng), dhash=hashes(n, rng), width=640, height=480)
    table = table.merge(measures, on="path").assign(lq_sha256=hashes(ROWS, rng), scale=1, weight=1, dataset="x",
                                                    verdict=ACCEPTED, caption="")
    bad = (rng.random(ROWS) < 0.01) & (table.split == "train")
    empty = dict(sha256="", dhash="", width=0, height=0, verdict=REJECTED, reason="unreadable: cut")
    table = table.assign(**{c: table[c].mask(bad, v) for c, v in empty.items()})
    told("table built")
    refuse_leaks(leaks(table))
    told("photographs in two splits looked for")
    assert degraded_ground_truths(table).empty and len(counts(table)) == 3 and rejections(table).rows.sum() == bad.sum()
    told("degraded ground truths looked for, counted")
    save_manifest(select(table), path / "m.parquet")
    del table
    rows = split_rows(load_manifest(path / "m.parquet"), "train", 128)
    told("filtered, written, read")
    items = rows_by_task(rows, dict(weather=["haze"]))
    batches = iter(MixtureSampler({t: len(i) for t, i in items.items()}, FixedMixture(dict(weather=1.0)), 32, seed=0))
    for _ in range(DRAWS // 32): [rows.path.iat[items[d.task][d.index]] for d in next(batches)]
    told(f"{DRAWS:,} samples drawn")
    report.put(None)


def test_a_million_rows(tmp_path):
    context = multiprocessing.get_context("spawn")
    report = context.Queue()
    process = context.Process(target=million, args=(tmp_path, report))
    process.start()
    steps = list(iter(lambda: report.get(timeout=600), None))
    process.join()
    for (_, before, _), (step, t, peak) in zip(steps, steps[1:]):
        print(f"{t - before:6.1f} s {peak / 1e9:6.2f} GB  {step}")
    print(f"{steps[-1][1]:6.1f} s in all, {steps[-1][2] / 1e9:.2f} GB at most, {steps[0][2] / 1e9:.2f} for imports")
    assert steps[-1][1] < 60 and steps[-1][2] < 2e9
