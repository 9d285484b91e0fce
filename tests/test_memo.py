"Worker processes, progress, and answers that are kept."
import math, os, time

import pytest

from foundir_v2.core import FoundIRError
from foundir_v2.memo import Memo, all_remembered, remembered, work_through


def test_answers_come_back_as_they_were_and_by_who(tmp_path):
    memo = Memo(tmp_path/"new folder"/"memo.sqlite")
    assert memo.known("a", ["k1"]) == {} and not memo.path.exists(), "looking makes no file"
    memo.add("a", {})
    assert not memo.path.exists(), "nor does nothing"
    answers = {"k1": {"x": 0.1 + 0.2, "n": None}, "k2": "ünïcode 'quotes'; drop table memo", "k3": [1, math.inf]}
    memo.add("a", answers)
    memo.add("b", {"k1": 7})
    assert memo.known("a", [*answers, "none"]) == answers and memo.known("a", ["k3"]) == {"k3": [1, math.inf]}
    assert memo.known("b", answers) == {"k1": 7} and memo.known("c", answers) == {}
    memo.add("a", {"k1": "again"})
    assert memo.known("a", answers) == answers | {"k1": "again"}
    memo.add("a", {"nan": math.nan})
    assert math.isnan(memo.known("a", ["nan"])["nan"])


def test_a_damaged_memo_is_one_line(tmp_path):
    (tmp_path/"m").write_text("nothing that a database would begin with, whatever its length may be")
    for use in (lambda m: m.known("a", ["k"]), lambda m: m.add("a", {"k": 1})):
        with pytest.raises(FoundIRError, match="delete it") as e: use(Memo(tmp_path/"m"))
        assert "\n" not in str(e.value)


def test_a_value_that_is_no_json_leaves_the_memo_as_it_was(tmp_path):
    memo = Memo(tmp_path/"m")
    with pytest.raises(TypeError): memo.add("a", {"k": 1, "l": object()})
    assert memo.known("a", ["k", "l"]) == {}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_every_item_has_its_answer(num_workers):
    found = dict(work_through(math.factorial, range(40), num_workers))
    assert found == {n: math.factorial(n) for n in range(40)}
    assert list(work_through(math.sqrt, [], num_workers)) == []


def test_workers_are_other_processes_with_the_works_own_state():
    pids = {answer for _, answer in work_through(_Slow(0.02), range(12), 2)}
    assert os.getpid() not in pids and 1 <= len(pids) <= 2


class _Slow:
    def __init__(self, seconds): self.seconds = seconds
    def __call__(self, item): time.sleep(self.seconds); return os.getpid()


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_exception_of_the_work_is_raised_here(num_workers):
    with pytest.raises(ValueError, match="math domain|nonnegative"): list(work_through(math.sqrt, [4, -1], num_workers))


def test_a_worker_that_dies_is_one_line():
    with pytest.raises(FoundIRError, match="fewer than 2"): list(work_through(os._exit, [3], 2))
    with pytest.raises(FoundIRError, match="expected 0"): list(work_through(math.sqrt, [1], -1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_only_what_is_missing_is_asked_and_the_order_is_the_items(tmp_path, num_workers):
    memo = Memo(tmp_path/"m")
    memo.add("sqrt", {"b": "from the memo", "elsewhere": 1})
    found = remembered(math.sqrt, {"c": 9, "b": 4, "a": 1}, "sqrt", memo, num_workers)
    assert list(found.items()) == [("c", 3), ("b", "from the memo"), ("a", 1)]
    assert memo.known("sqrt", ["a", "b", "c", "elsewhere"]) == {"a": 1, "b": "from the memo", "c": 3, "elsewhere": 1}
    assert remembered(math.sqrt, {"a": 1}, "sqrt") == {"a": 1}, "without a memo"


def test_what_was_found_before_an_interruption_is_kept(tmp_path):
    memo, asked = Memo(tmp_path/"m"), []
    def work(n):
        asked.append(n)
        if n == 100 and len(asked) == 101: raise KeyboardInterrupt
        return n
    items = {str(n): n for n in range(130)}
    with pytest.raises(KeyboardInterrupt): remembered(work, items, "w", memo)
    assert len(memo.known("w", items)) == 100
    assert remembered(work, items, "w", memo) == {str(n): n for n in range(130)}
    assert len(asked) == 131, "the one that was interrupted is asked again"


class _Powers:
    "Of several, those that are asked for."
    def __call__(self, asked): return [asked[0] ** (i + 1) for i in asked[1]]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_several_are_asked_at_once_each_for_what_it_lacks(tmp_path, num_workers):
    memo = Memo(tmp_path/"m")
    memo.add("first", {"a": "known"})
    memo.add("second", {"a": "known", "b": "known"})
    items = {"c": 4, "b": 3, "a": 2}
    found = all_remembered(_Powers(), items, ["first", "second"], memo, num_workers, keep=lambda answer: answer != 16)
    assert [list(f.items()) for f in found] == [[("c", 4), ("b", 3), ("a", "known")],
                                                [("c", 16), ("b", "known"), ("a", "known")]]
    assert memo.known("first", items) == {"a": "known", "b": 3, "c": 4} and "c" not in memo.known("second", items)


def test_a_memo_that_holds_no_json_or_cant_be_written_is_one_line(tmp_path):
    import sqlite3
    memo = Memo(tmp_path / "m.sqlite")
    memo.add("a", {"k": 1})
    with sqlite3.connect(memo.path) as base: base.execute("update memo set answer = '{'")
    with pytest.raises(FoundIRError, match="delete it"): memo.known("a", ["k"])
    (tmp_path / "folder").mkdir()
    with pytest.raises(FoundIRError, match="allow writing"): Memo(tmp_path / "folder").add("a", {"k": 1})
