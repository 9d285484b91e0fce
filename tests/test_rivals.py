"A comparison that goes on where it stopped, in which every value is one of a picture that was really restored."
from types import SimpleNamespace

import pytest
import torch

from foundir_v2 import networks, restorers
from foundir_v2.core import FoundIRError
from foundir_v2.memo import Memo
from foundir_v2.classical import Bicubic
from foundir_v2.restorers import Kind
from foundir_v2.rivals import COLUMNS, Rival, item_id, read_rivals, rival_id, rival_table, rival_words, run_rivals

photo = lambda seed: (torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(seed)) * 255).round() / 255


def item(subtask="haze", seed=0, lq=None):
    gt = photo(seed)
    return SimpleNamespace(lq=gt / 2 if lq is None else lq, gt=gt, subtask=subtask, photo=f"p{seed}", seed=seed)


@pytest.fixture
def calls(monkeypatch):
    "A kind `counted:FACTOR` that notes its pictures and fails at those of photograph p9."
    seen = []
    class Counted:
        name = "counted"
        def __init__(self, factor): self.factor = factor
        def __call__(self, lq, *, subtask=None, seed=0, caption=""):
            seen.append((self.factor, subtask.name, seed))
            if seed == 9: raise RuntimeError("nine\nis too much")
            return Bicubic()(lq, subtask=subtask) * self.factor
    monkeypatch.setitem(restorers.KINDS, "counted", Kind("FACTOR", lambda a, o, r: Counted(float(a))))
    return seen


@pytest.fixture
def memo(tmp_path): return Memo(tmp_path / "memo.sqlite")


def test_nothing_is_restored_twice(calls, memo):
    systems, sets = {"double": "counted:2"}, {"in": [item(), item(seed=1)]}
    first = run_rivals(systems, sets, ["psnr"], memo)
    assert len(calls) == 2 and list(first) == list(COLUMNS) and first.value.min() > 60
    assert run_rivals(systems, sets, ["psnr"], memo).equals(first) and len(calls) == 2
    run_rivals(systems, sets, ["psnr", "ssim"], memo)  # one more question
    assert len(calls) == 4
    run_rivals({"other": "counted:1"}, {"in": [item(), item(seed=2)]}, ["psnr"], memo)
    assert len(calls) == 6


def test_an_interrupted_run_goes_on(calls, memo, monkeypatch):
    sets, real = {"in": [item(seed=s) for s in range(4)]}, Memo.add
    def stopped(self, who, answers):
        real(self, who, answers)
        if len(calls) == 2: raise KeyboardInterrupt
    monkeypatch.setattr(Memo, "add", stopped)
    with pytest.raises(KeyboardInterrupt): run_rivals({"double": "counted:2"}, sets, ["psnr"], memo)
    monkeypatch.setattr(Memo, "add", real)
    assert run_rivals({"double": "counted:2"}, sets, ["psnr"], memo).value.notna().all()
    assert [seed for *_, seed in calls] == [0, 1, 2, 3]


def test_a_sitting_has_an_end(calls, memo):
    sets = {"in": [item(), item(seed=1)]}
    run_rivals({"double": "counted:2"}, {"in": sets["in"][:1]}, ["psnr"], memo)
    table = run_rivals({"double": "counted:2"}, sets, ["psnr"], memo, minutes=-1)
    assert len(calls) == 1 and table.value.notna().tolist() == [True, False] and not table.reason[0]
    assert "run it again" in table.reason[1]
    assert run_rivals({"double": "counted:2"}, sets, ["psnr"], memo, minutes=5).value.notna().all()


def test_failures_are_rows_and_are_tried_again(calls, memo):
    sets = {"in": [item(), item(seed=9)], "out": [item(seed=1)]}
    for n in (3, 4):
        table = run_rivals({"double": "counted:2", "lost": "trained:nowhere"}, sets, ["psnr"], memo)
        assert len(calls) == n
    mine = table[table.system == "double"]
    assert mine.reason.tolist() == ["", "nine is too much", ""] and mine.value.notna().tolist() == [True, False, True]
    assert table[table.system == "lost"].reason.str.contains("no trained model in nowhere").all()
    words = rival_words(rival_table(table, "double"), ["psnr"])
    assert words.loc[("in", "weather"), "double"].endswith("(1 of 2)")
    assert words.loc[("in", "weather"), "lost"] == "not there"


def test_each_restores_what_it_is_made_for(calls, memo):
    small = photo(3)[:, ::2, ::2]
    systems = {"input": "bicubic", "one": {"restorer": "counted:1", "categories": ["sr"]}}
    table = run_rivals(systems, {"in": [item(), item("sr_x2", 3, small)]}, ["psnr"], memo)
    assert table.groupby("system").subtask.agg(list).to_dict() == {"input": ["haze", "sr_x2"], "one": ["sr_x2"]}
    assert rival_words(rival_table(table, "input"), ["psnr"])["one"].tolist() == ["", f"{table.value.iloc[-1]:.1f}"]
    for wrong, words in [({"a": {"restorer": "bicubic", "categories": ["dark"]}}, "dark"),
                         ({"a": "bicubik"}, "bicubik"),
                         ({"a": {"restorer": "bicubic", "start": "lq"}}, "start")]:
        with pytest.raises(FoundIRError, match=words): run_rivals(wrong, {"in": []}, ["psnr"], memo)


def test_differences_are_over_the_pictures_of_both(calls, memo):
    sets = {"in": [item(), item(seed=1), item(seed=9)]}
    means = rival_table(run_rivals({"input": "bicubic", "double": "counted:2"}, sets, ["psnr"], memo), "input")
    mine = means.set_index("system").loc["double"]
    values = run_rivals({"input": "bicubic"}, {"in": sets["in"][:2]}, ["psnr"], memo).value
    assert (mine.pictures, mine.of) == (2, 3) and mine.difference == pytest.approx(mine.value - values.mean())
    with pytest.raises(FoundIRError, match="choose from input, double"):
        rival_table(run_rivals({"input": "bicubic", "double": "counted:2"}, sets, ["psnr"], memo), "mine")


def test_what_a_value_is_kept_by(monkeypatch):
    one = item()
    others = [item(seed=1), item("rain"), item(lq=photo(5)), SimpleNamespace(**vars(one) | {"caption": "a cat"})]
    assert item_id(item()) == item_id(one) and len({item_id(i) for i in [one, *others]}) == 5
    best = Rival({"restorer": "best:bicubic,levels"})
    assert rival_id(best, [one]) != rival_id(best, others[:1])
    ids = {rival_id(r) for r in read_rivals({n: f"network:{n}" for n in networks.NETWORKS}).values()}
    assert len(ids) == len(networks.NETWORKS)


def test_a_published_networks_values_hold_until_its_own_code_changes(monkeypatch):
    from foundir_v2 import trials
    asked, real = [], trials.run_name
    def recorded(told, module, files):
        asked.append(module)
        return real(told, module, files)
    monkeypatch.setattr(trials, "run_name", recorded)
    for spec in ("network:realsr", "bicubic", {"restorer": "network:ffdnet", "sigma": 12}): trials.method_id(spec)
    assert asked == ["foundir_v2.networks", "foundir_v2.restorers", "foundir_v2.networks"]
    assert trials.method_id("network:ffdnet") != trials.method_id({"restorer": "network:ffdnet", "sigma": 12})
