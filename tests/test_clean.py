"Cleaning: each measure against a known cause, verdicts, the manual word, and whole indexes."
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st

from foundir_v2.clean import (Judge, Quality, REVIEW, Statistics, Threshold, blockiness, centre, clean, detail, judge,
                              light, make_thresholds, noise, read_manual)
from foundir_v2.core import FoundIRError, generator, load_image, repo_root, save_image
from foundir_v2.degrade import degrade, upsample_lq
from foundir_v2.index import ACCEPTED, REJECTED


@pytest.fixture(scope="module")
def photo():
    from foundir_v2.core import load_image
    return load_image(repo_root()/"data/photos/grace_hopper.jpg")[:, 60:316, 120:376]


def randn(x, seed=0): return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=8, deadline=None)
@given(st.floats(2, 25), st.integers(0, 99))
def test_noise_of_a_known_deviation_is_estimated(sigma, seed):
    ramp = torch.linspace(0.3, 0.7, 128).expand(3, 128, 128)
    assert noise((ramp + randn(ramp, seed) * sigma / 255).clamp(0, 1)) == pytest.approx(sigma, rel=0.1, abs=0.1)


def test_grey_texture_is_not_noise():
    texture = (0.5 + 0.1 * randn(torch.empty(1, 128, 128))).expand(3, 128, 128).clamp(0, 1)
    assert noise(texture) < 0.1 < 20 < noise((0.5 + 0.1 * randn(torch.empty(3, 128, 128))).clamp(0, 1))


def test_detail_falls_when_the_finest_scale_is_removed_and_ignores_contrast(photo):
    blurred = torch.nn.functional.avg_pool2d(photo[None], 3, 1, 1)[0]
    assert detail(blurred) < 0.85 * detail(photo)
    assert detail(upsample_lq(degrade(photo, "sr_x2", 0), photo.shape[-2:])) < 0.48 < detail(photo)
    assert detail(photo * 0.5 + 0.2) == pytest.approx(detail(photo), rel=1e-3)
    assert math.isnan(detail(torch.full((3, 16, 16), 0.5)))


def test_blocks_are_seen_wherever_the_grid_lies(photo):
    coarse = torch.nn.functional.avg_pool2d(photo[None], 8)[0].repeat_interleave(8, -1).repeat_interleave(8, -2)
    blocky = 0.5 * photo + 0.5 * coarse
    assert all(blockiness(blocky[:, dy:dy + 128, dx:dx + 128]) > 1.3 * blockiness(photo)
               for dy, dx in ((0, 0), (3, 5), (7, 1)))


def test_light_is_what_it_says():
    x = torch.zeros(3, 10, 20)
    x[..., :10] = 0.6
    found = light(x)
    assert found["clipped"] == 0.5 and found["brightness"] == pytest.approx(0.6, abs=1e-5) and found["black_level"] == 0
    assert light(x * 0.5 + 0.4)["black_level"] == pytest.approx(0.4, abs=1e-5) and light(x * 0.5 + 0.4)["clipped"] == 0


@pytest.mark.parametrize("size", [(1, 1), (15, 300), (16, 16), (17, 33)])
def test_statistics_of_any_size_have_every_measure(size):
    found = Statistics()(torch.rand(3, *size, generator=torch.Generator().manual_seed(0)))
    assert tuple(found) == Statistics.measures and found["short_side"] == min(size)
    assert all(math.isfinite(v) for v in found.values()) == (min(size) >= 16)


def test_judges_name_their_measures_and_quality_refuses_full_reference_metrics(photo):
    for j in (Statistics(), Quality(["piqe"])): assert isinstance(j, Judge) and tuple(j(photo)) == tuple(j.measures)
    assert math.isnan(Quality(["niqe"])(photo)["niqe"])
    with pytest.raises(FoundIRError, match="reference"): Quality(["ssim"])


@pytest.mark.parametrize("review, reject, values", [
    (4, 6, {3.9: ACCEPTED, 4: REVIEW, 5.9: REVIEW, 6: REJECTED, 100: REJECTED, math.nan: ACCEPTED}),
    (0.5, 0.4, {0.6: ACCEPTED, 0.5: REVIEW, 0.41: REVIEW, 0.4: REJECTED, 0.0: REJECTED, math.nan: ACCEPTED}),
])
def test_the_order_of_the_limits_gives_the_direction(review, reject, values):
    for value, expected in values.items(): assert Threshold("m", review, reject).verdict(value) == expected, value


def test_the_worst_verdict_counts_and_every_reason_is_given():
    thresholds = [Threshold("noise", 4, 6), Threshold("detail", 0.5, 0.4), Threshold("piqe", 70, 75)]
    assert judge({"noise": 1, "detail": 0.7, "piqe": 20}, thresholds) == (ACCEPTED, "")
    verdict, reason = judge({"noise": 5, "detail": 0.3, "piqe": 20}, thresholds)
    assert verdict == REJECTED and "noise 5" in reason and "above 4" in reason and "detail 0.3" in reason
    assert "below 0.4" in reason and "piqe" not in reason
    assert judge({"noise": 5, "detail": 0.7, "piqe": 20}, thresholds)[0] == REVIEW


@pytest.mark.parametrize("limits, words", [
    ({"noize": [1, 2]}, "choose from"), ({"noise": 3}, "two numbers"), ({"noise": [1, 2, 3]}, "two numbers"),
    ({"noise": [2, 2]}, "different"), ({"noise": [1, math.nan]}, "different")])
def test_wrong_limits_are_refused(limits, words):
    with pytest.raises(FoundIRError, match=words): make_thresholds(limits, [Statistics()])


@pytest.fixture
def index(tmp_path, photo):
    pictures = {"good": photo, "blurred": degrade(photo, "defocus_blur", 1), "dark": degrade(photo, "low_light", 1),
                "noisy": degrade(photo, "gaussian_noise", 1)}
    for name, x in pictures.items(): save_image(x, tmp_path/f"{name}.png")
    rows = [dict(photo=n, path=f"{n}.png", split="train", verdict=ACCEPTED, reason="", caption="x") for n in pictures]
    return pd.DataFrame(rows + [
        dict(photo="broken", path="nowhere.png", split="train", verdict=REJECTED, reason="truncated", caption="")])


LIMITS = {"detail": [0.52, 0.48], "noise": [4, 6], "brightness": [0.55, 0.5]}


def test_degraded_copies_are_rejected_with_the_right_reason_and_the_clean_one_is_accepted(index, tmp_path):
    judges = [Statistics()]
    table = clean(index, judges, make_thresholds(LIMITS, judges), tmp_path).set_index("photo")
    assert table.verdict.to_dict() == {"good": ACCEPTED, "blurred": REJECTED, "dark": REJECTED, "noisy": REJECTED,
                                       "broken": REJECTED}
    assert table.reason["good"] == "" and "detail" in table.reason["blurred"] and "brightness" in table.reason["dark"]
    assert "noise" in table.reason["noisy"]
    assert table.reason["broken"] == "truncated" and table.loc["broken", list(Statistics.measures)].isna().all()


def test_cleaning_keeps_rows_and_columns_and_does_not_change_its_input(index, tmp_path):
    before = index.copy()
    table = clean(index, [Statistics()], [], tmp_path)
    assert index.equals(before) and list(table.photo) == list(index.photo)
    assert set(table.columns) == set(index.columns) | set(Statistics.measures) and table.caption.equals(index.caption)
    assert (table.verdict[:-1] == ACCEPTED).all(), "no thresholds, no objections"


def test_a_window_limits_what_is_measured_but_not_the_size(index, tmp_path):
    judges = [Statistics()]
    table = clean(index[:1], judges, make_thresholds({"short_side": [255, 127]}, judges), tmp_path, window=64)
    assert table.short_side[0] == 256 and table.verdict[0] == ACCEPTED
    from foundir_v2.core import load_image
    assert table.detail[0] == pytest.approx(detail(centre(load_image(tmp_path/"good.png"), 64)))


def test_a_human_overrules_in_both_directions_and_a_broken_file_stays_out(index, tmp_path):
    path = tmp_path/"manual.csv"
    path.write_text("photo,verdict,reason\ngood,rejected,watermark\nblurred,accepted,meant to be soft\n"
                    "broken,accepted,I like it\n")
    judges = [Statistics()]
    manual = read_manual(path, list(index.photo))
    table = clean(index, judges, make_thresholds(LIMITS, judges), tmp_path, manual=manual).set_index("photo")
    assert (table.verdict["good"], table.reason["good"]) == (REJECTED, "manual: watermark")
    assert table.verdict["blurred"] == ACCEPTED and table.verdict["dark"] == REJECTED
    assert table.verdict["broken"] == REJECTED


@pytest.mark.parametrize("text, words", [
    (None, "no manual verdicts"),
    ("photo,verdict\na,accepted\n", "reason"),
    ("photo,verdict,reason\nb,accepted,\n", "unknown photos: b"),
    ("photo,verdict,reason\na,fine,\n", "choose from")])
def test_a_wrong_manual_table_is_refused(tmp_path, text, words):
    if text: (tmp_path/"m.csv").write_text(text)
    with pytest.raises(FoundIRError, match=words): read_manual(tmp_path/"m.csv", ["a"])


def test_a_folder_is_no_manual_table(tmp_path):
    with pytest.raises(FoundIRError, match="no manual verdicts.*directory"): read_manual(tmp_path, ["a"])


def test_nobody_looked_is_an_empty_table(): assert read_manual(None, ["a"]) == {}


@pytest.mark.parametrize("size, window, expected", [
    ((10, 20), 8, (8, 8)), ((10, 20), 16, (10, 16)), ((3, 3), 8, (3, 3))])
def test_the_window_is_the_middle(size, window, expected):
    x = torch.arange(3 * size[0] * size[1]).reshape(3, *size).float()
    y = centre(x, window)
    assert y.shape[1:] == expected
    top, left = (size[0] - expected[0]) // 2, (size[1] - expected[1]) // 2
    assert torch.equal(y, x[:, top:top + expected[0], left:left + expected[1]])


class Haze:
    "A judge of one's own."
    name, measures = "haze", ("veil",)

    def __call__(self, image): return {"veil": float(image.amin(0).mean())}


def test_a_judge_of_ones_own(photo):
    thresholds = make_thresholds({"veil": [.6, .75]}, [Haze()])
    class Unmeasured:
        name = "nothing"
        def __call__(self, image): return {}
    assert isinstance(Haze(), Judge) and not isinstance(Unmeasured(), Judge)
    assert judge(Haze()(photo), thresholds)[0] == ACCEPTED and judge(Haze()(photo * .3 + .7), thresholds)[0] == REJECTED


@pytest.mark.parametrize("pair", ["46", ["a", "b"], [None, 6], [1]])
def test_limits_that_are_no_pair_of_numbers_are_refused(pair):
    with pytest.raises(FoundIRError, match="must be two numbers"): make_thresholds({"noise": pair}, [Statistics()])


@pytest.mark.parametrize("window", [8, 0, -5])
def test_a_window_too_small_to_measure_is_refused(window):
    with pytest.raises(FoundIRError, match="at least 16"):
        clean(pd.DataFrame(columns=["photo", "path", "verdict", "reason"]), [Statistics()], [], window=window)


@pytest.mark.parametrize("rows, words", [
    ("a,rejected,rain\na,accepted,fine\n", "twice"),
    ("a,rejected,it rains, hard\n", "in quotes")])
def test_manual_verdicts_that_contradict_or_break_are_refused(tmp_path, rows, words):
    (tmp_path / "manual.csv").write_text("photo,verdict,reason\n" + rows)
    with pytest.raises(FoundIRError, match=words): read_manual(tmp_path / "manual.csv", ["a"])


def test_what_the_index_admitted_is_read_whatever_its_size(tmp_path, monkeypatch):
    from foundir_v2 import clean as cl
    from foundir_v2.data import Photos
    save_image(torch.rand(3, 40, 40), tmp_path / "a.png")
    monkeypatch.setattr(cl.load_image, "__defaults__", (100, 1.0))  # as if 1600 pixels were too many
    with pytest.raises(FoundIRError): cl.load_image(tmp_path / "a.png")
    index = pd.DataFrame([dict(photo="a", path="a.png", verdict="", reason="")])
    assert clean(index, [Statistics()], [], tmp_path).verdict.tolist() == [ACCEPTED]
    assert Photos(tmp_path)("a.png").shape == (3, 40, 40)


def test_a_file_that_became_unreadable_is_rejected_and_the_others_go_on(index, tmp_path):
    from foundir_v2.memo import Memo
    from foundir_v2.targets import file_hash
    hashes = [file_hash(p) if (p := tmp_path/path).exists() else "" for path in index.path]
    whole = (tmp_path/"blurred.png").read_bytes()
    (tmp_path/"noisy.png").unlink()
    (tmp_path/"blurred.png").write_bytes(whole[:300])
    memo, judges = Memo(tmp_path/"memo"), [Statistics()]
    for columns in ({"sha256": hashes}, {}):
        table = clean(index.assign(**columns), judges, [], tmp_path, manual={"noisy": (ACCEPTED, "manual: fine")},
                      memo=memo).set_index("photo")
        assert table.verdict.to_dict() == {"good": ACCEPTED, "blurred": REJECTED, "dark": ACCEPTED, "noisy": REJECTED,
                                           "broken": REJECTED}
        assert "noisy.png" in table.reason["noisy"] and str(tmp_path) not in "".join(table.reason)
        assert table.loc["noisy", list(Statistics.measures)].isna().all() and "unreadable" not in table
    (tmp_path/"blurred.png").write_bytes(whole)
    table = clean(index.assign(sha256=hashes), judges, [], tmp_path, memo=memo).set_index("photo")
    assert table.verdict["blurred"] == ACCEPTED and table.detail["blurred"] > 0, "its failure wasn't kept"


def test_a_picture_is_decoded_once_for_all_judges_and_all_its_pairs(tmp_path, monkeypatch):
    from foundir_v2 import clean as cl
    from foundir_v2.identify import Traces
    from foundir_v2.memo import Memo
    for i in range(2): save_image(torch.rand(3, 80, 96, generator=generator("twice", i)), tmp_path/f"{i}.png")
    rows = [dict(photo=f"p{k}", path=f"{k % 2}.png", lq=f"lq{k}.png", verdict="", reason="") for k in range(6)]
    read, judges, memo = [], [Statistics(), Traces(), Haze()], Memo(tmp_path/"memo")
    monkeypatch.setattr(cl, "load_image", lambda path, **k: read.append(path) or load_image(path))
    table = clean(pd.DataFrame(rows), judges[:1], [], tmp_path, memo=memo)
    assert len(read) == 2 and table.noise.nunique() == 2
    both = clean(pd.DataFrame(rows), judges, [], tmp_path, memo=memo)
    assert len(read) == 4, "two judges are new: one more look at each picture"
    pd.testing.assert_frame_equal(both[table.columns], table)
    alone = clean(pd.DataFrame(rows[:1]), judges, [], tmp_path)
    pd.testing.assert_frame_equal(alone, both[:1])
    assert clean(pd.DataFrame(rows), judges, [], tmp_path, memo=memo).equals(both) and len(read) == 5


def test_what_a_human_says_of_a_ground_truth_holds_for_all_its_pairs(tmp_path):
    save_image(torch.rand(3, 80, 96), tmp_path/"a.png"); save_image(torch.rand(3, 80, 96), tmp_path/"b.png")
    files = dict.fromkeys(("one", "two", "three", "torn"), "a.png") | {"b": "b.png"}
    rows = [dict(photo=n, path=p, verdict="", reason="") for n, p in files.items()]
    rows[3] |= dict(verdict=REJECTED, reason=REJECTED)
    manual = {"one": (REJECTED, "manual: soft"), "three": (ACCEPTED, "manual: fine")}
    for said in ({"one": manual["one"]}, manual):
        table = clean(pd.DataFrame(rows), [Statistics()], [], tmp_path, manual=said).set_index("photo")
        assert table.verdict["two"] == (REJECTED if said != manual else ACCEPTED) and table.verdict["b"] == ACCEPTED
        assert table.verdict["one"] == REJECTED and table.reason["torn"] == REJECTED, "ingestion's stays"
