"""Pictures per second of the cleaning: `python -m pytest -s bench/test_cleaning_speed.py`.

What a million photographs cost is said by three numbers: a picture per second and core from the file to its measures,
by judge; what worker processes make of it; and a rerun that remembers all. BENCH_PICTURES=8 gives a first impression.
"""
import os, time
import pandas as pd, pytest, torch
import torch.nn.functional as F
from foundir_v2.clean import clean
from foundir_v2.core import save_image
from foundir_v2.judges import make_judges
from foundir_v2.memo import Memo
from foundir_v2.targets import file_hash

PICTURES, SIDE = int(os.environ.get("BENCH_PICTURES", 32)), (1080, 1920)
JUDGES = {"statistics": (["statistics"], []), "traces": (["traces"], []), "piqe": ([], ["piqe"])}


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    torch.set_num_threads(1)
    folder, rows = tmp_path_factory.mktemp("photos"), []
    for i in range(PICTURES):
        g = torch.Generator().manual_seed(i)
        coarse = F.interpolate(torch.rand(1, 3, 68, 120, generator=g), SIDE, mode="bicubic")[0]
        path = save_image((coarse + torch.randn(3, *SIDE, generator=g) * .03).clamp(0, 1), folder/f"{i}.jpg")
        rows.append(dict(photo=str(i), path=str(path), verdict="", reason="", sha256=file_hash(path)))
    return pd.DataFrame(rows)


def seconds(index, judges, **how):
    begin = time.perf_counter()
    clean(index, judges, [], **how)
    return time.perf_counter() - begin


@pytest.mark.parametrize("name", JUDGES)
def test_pictures_per_second_and_core(index, name):
    judges = make_judges(*JUDGES[name])
    seconds(index[:2], judges)
    rate = len(index) / seconds(index, judges)
    print(f"\n{name}: {rate:.1f} pictures of 2 megapixels per second and core, "
          f"{1e6 / rate / 3600 / 32:.1f} h for a million with 32 cores")


def test_what_is_known_costs_a_look_into_the_memo(index, tmp_path):
    judges, memo = make_judges(["statistics"]), Memo(tmp_path/"memo")
    first = seconds(index, judges, memo=memo)
    again = seconds(index, judges, memo=memo)
    print(f"\nthe second time: {len(index) / again:.0f} pictures per second, {first / again:.0f} times as many")
    assert again < first / 5


def test_a_memo_of_a_hundred_thousand(tmp_path):
    memo, answer = Memo(tmp_path/"memo"), {"detail": .7, "noise": 1.0}
    keys = [f"{i:064x}" for i in range(100_000)]
    begin = time.perf_counter()
    for i in range(0, len(keys), 1000): memo.add("statistics", dict.fromkeys(keys[i:i + 1000], answer))
    written = time.perf_counter()
    assert len(memo.known("statistics", keys)) == len(keys)
    read = time.perf_counter()
    print(f"\n100,000 answers written in {written - begin:.1f} s, read in {read - written:.1f} s, "
          f"{memo.path.stat().st_size / 2**20:.0f} MiB")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_worker_processes_share_the_work(index):
    judges = make_judges(["statistics", "traces"])
    alone, two = seconds(index, judges), seconds(index, judges, num_workers=2)
    print(f"\ntwo processes, their start included: {alone / two:.2f} times as fast")
