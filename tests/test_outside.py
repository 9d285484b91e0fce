"The out-of-distribution benchmark: fixed, foreign to training, the same everywhere, and what is published of it."
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from foundir_v2.core import FoundIRError, save_image
from foundir_v2.degrade import OPERATORS, degrade, srgb_to_linear
from foundir_v2.evaluate import COLUMNS
from foundir_v2.index import build_manifest
from foundir_v2.iqa import score
from foundir_v2.outside import (CLEAN, LIT, RECIPES, Recipe, damage, fingerprint, lit, night, outside_items,
                                outside_metrics, recipes, whole, window)
from foundir_v2.restorers import make_restorer
from foundir_v2.stages import import_closure, imported_modules, notebook_source
from foundir_v2.tasks import CATEGORIES, SUBTASKS

ROOT = Path(__file__).resolve().parents[1]
TRAINING = [ROOT/"nbs/pipeline/train.ipynb"]


def picture(seed, h=48, w=64):
    coarse = torch.rand(1, 3, 6, 8, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(coarse, size=(h, w), mode="bicubic").clamp(0, 1)[0] * 255).round() / 255


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(4): save_image(picture(i, 50 + i, 71), folder/f"p{i}.png")
    rows = [dict(photo=f"p{i}", path=f"p{i}.png", split="test", width=71, height=50 + i, lq="") for i in range(4)]
    return pd.DataFrame(rows), folder


@pytest.fixture(scope="module")
def benchmark():
    return outside_items(build_manifest("data", root=ROOT), ROOT)


def test_training_neither_imports_nor_names_the_library():
    closure = {m for notebook in TRAINING for m in import_closure(notebook_source(notebook), ROOT)}
    assert {f"foundir_v2/{m}.py" for m in ("tasks", "degrade", "data", "train")} <= closure
    assert "foundir_v2/outside.py" not in closure
    for path in [*(ROOT/m for m in closure), ROOT/"foundir_v2/pretrain.py", *TRAINING]:
        assert "albumentations" not in path.read_text(encoding="utf-8"), (
            f"{path.name} names the other benchmark's library")
        if path.suffix == ".py": assert "outside" not in imported_modules(path.read_text(encoding="utf-8"))


def test_no_recipe_uses_a_training_operator_and_training_refuses_the_recipes():
    for version in RECIPES.values():
        assert not {t.name for r in version.values() for t in r.recipe} & set(OPERATORS)
        assert not set(version) & set(SUBTASKS)
    motion = recipes(1)["outside_motion"]
    with pytest.raises(FoundIRError, match="unknown operator 'MotionBlur'"): degrade(picture(0), motion, seed=0)
    with pytest.raises(FoundIRError, match="unknown sub-task"): degrade(picture(0), "outside_motion", seed=0)


def test_the_recipes_of_version_1_are_frozen():
    digest = hashlib.sha256(repr(RECIPES[1]).encode()).hexdigest()[:16]
    assert digest == "eda80a5fe31e725d", "recipes never change: another choice is another version"


def test_the_pictures_of_version_1_are_frozen(benchmark):
    wanted = [.3121, .5934, .3863, .4797, .6041, .3611, .4800, .4357, .5796, .3664, .5117, .3294, .0875, .2222, .1133,
              .1713, .3038, .5666, .3128, .5933, .0973, .1624, .5934, .3863, .4795, .4357, .4494]
    assert [i.lq.mean().item() for i in benchmark] == pytest.approx(wanted, abs=1e-3)


OLDER = {"PYTHONHASHSEED": "7", "OPENCV_CPU_DISABLE": "AVX512_SKX,AVX2,FMA3", "ATEN_CPU_CAPABILITY": "default",
         "OPENCV_IPP": "disabled"}


@pytest.mark.parametrize("surroundings", [{}, OLDER], ids=["plain", "an older processor"])
def test_a_fresh_process_makes_the_same_bytes(benchmark, surroundings):
    code = f"""
import numpy, random, torch
from foundir_v2.index import build_manifest
from foundir_v2.outside import fingerprint, outside_items
numpy.random.seed(9); random.seed(9); torch.manual_seed(9); torch.set_num_threads({2 if surroundings else 1})
print(fingerprint(outside_items(build_manifest("data", root="."), ".")))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | surroundings)
    assert done.returncode == 0, done.stderr[-1500:]
    assert done.stdout.split() == [fingerprint(benchmark)]


def test_the_default_benchmark(benchmark):
    groups = [i.subtask.group for i in benchmark]
    assert {g: groups.count(g) for g in groups} == dict.fromkeys(CATEGORIES, 4) | {LIT: 2, CLEAN: 5}
    damaged = [i for i in benchmark if i.subtask.group in CATEGORIES]
    assert len(damaged) <= 20 and len({i.photo for i in damaged}) == 8, "all test photographs take part"
    for g in CATEGORIES:
        own = [i for i in damaged if i.subtask.group == g]
        assert len({i.photo for i in own}) == len({i.subtask.name for i in own}) == 4
    for i in benchmark:
        assert i.gt.shape[1] * i.gt.shape[2] <= 100_000 and i.gt.shape[1:] == i.input.shape[1:]
        assert [n * i.subtask.scale for n in i.lq.shape[1:]] == list(i.gt.shape[1:])
        assert torch.equal(i.lq, i.gt) == (i.subtask.group == CLEAN)


def test_no_item_depends_on_the_number_of_others(photos):
    manifest, root = photos
    key = lambda items: {(i.subtask.name, i.photo, i.seed): i.lq for i in items}
    few, many = (key(outside_items(manifest, root, per_category=n, clean=n, max_pixels=2048)) for n in (2, 9))
    assert set(few) < set(many) and all(torch.equal(few[k], many[k]) for k in few)
    assert len(many) == 9 * 5 + 2 + 9, "no two of them are the same"


def test_numbers_that_cannot_be_are_refused(photos):
    manifest, root = photos
    for wrong, words in [(dict(version=2), "choose from 1"), (dict(per_category=0), "per_category=0"),
                         (dict(clean=-1), "clean=-1"), (dict(max_pixels=100), "1024"),
                         (dict(split="reference"), "no row of split 'reference'")]:
        with pytest.raises(FoundIRError, match=words): outside_items(manifest, root, **wrong)
    quarter = recipes(1)["outside_area_x4"]
    with pytest.raises(FoundIRError, match="crop its sides to multiples of 4"):
        damage(picture(0, 50, 64), quarter, seed=0)
    with pytest.raises(FoundIRError, match="choose one of deblur"): Recipe("r", "sharpen", ())


@pytest.mark.parametrize("size, budget", [((50, 71), 10**6), ((50, 71), 2048), ((900, 40), 1200), ((33, 33), 1024)])
def test_a_picture_stays_whole_within_the_budget(size, budget):
    x = picture(0, *size)
    y = whole(x, budget)
    assert y.shape[1] % 4 == y.shape[2] % 4 == 0 and y.shape[1] * y.shape[2] <= budget
    ratio = min(1, (budget / (size[0] * size[1])) ** 0.5)
    for n, m in zip(size, y.shape[1:]): assert n * ratio - 5 < m <= n * ratio


def test_only_the_window_stays_bright_at_night():
    x = picture(1)
    lq, gt = lit(x, night)
    panes = window(*x.shape[1:])[0]
    assert torch.equal(lq[:, panes], gt[:, panes]) and torch.equal(gt[:, ~panes], x[:, ~panes])
    dark = srgb_to_linear(lq)[:, ~panes] / srgb_to_linear(x)[:, ~panes].clamp(min=1e-3)
    assert dark.max() < 0.2 and lq[:, panes].mean() > 0.7 and 0.02 < panes.float().mean() < 0.1
    assert (lq * 255 - (lq * 255).round()).abs().max() < 1e-3, "8 bits, as a file would hold"


def test_another_release_or_none_of_the_library_is_refused(monkeypatch):
    import albumentations
    assert os.environ["NO_ALBUMENTATIONS_UPDATE"] == "1", "no question to the network"
    monkeypatch.setattr(albumentations, "__version__", "3.0.0")
    fog, install = recipes(1)["outside_fog"], "pip install albumentations==2.0.8"
    with pytest.raises(FoundIRError, match=f"3.0.0.*{install}"): damage(picture(0), fog, seed=0)
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(FoundIRError, match=install): damage(picture(0), fog, seed=0)


def test_reading_the_recipes_needs_no_library():
    code = "import sys, foundir_v2.outside\nassert not {'albumentations', 'cv2'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_what_is_published():
    rows = []
    for name, shift in (("input", 0.0), ("ours", 1.0)):
        for k, task in enumerate(["outside_fog", "outside_fog", "outside_dim", "lit_night", "clean", "clean"]):
            item = (name, recipes(1)[task].category, task, f"p{k}", k)
            rows += [(*item, "psnr", 20 + k + shift), (*item, "stlpips", 0.5 - 0.05 * k)]
    tree = outside_metrics(pd.DataFrame(rows, columns=list(COLUMNS)), version=1)
    assert tree["out_of_distribution"]["weather"]["ours"] == {"psnr": 21.5, "stlpips": 0.475}
    assert list(tree["out_of_distribution"]) == ["weather", "lowlight"], "the groups that stand apart are no categories"
    part = tree["outside"]
    assert part["version"] == 1 and part["items"] == 3 and part["gain"]["lowlight"]["ours"]["psnr"] == [1.0, 1.0, 1.0]
    assert part["mean"]["input"]["psnr"] == pytest.approx((20.5 + 22) / 2), "lit scenes count for nothing in low light"
    assert part["clean"]["mean"]["ours"]["psnr"] == 25.5
    assert part["clean"]["worst"]["ours"] == {"psnr": 25.0, "stlpips": 0.3}
    assert part["lit"]["worst"]["input"]["psnr"] == 23


@pytest.fixture(scope="module")
def shipped(benchmark):
    restorer = make_restorer("pipeline:tiny")
    apart = [i for i in benchmark if i.subtask.group in (LIT, CLEAN)]
    return [(i, restorer(i.lq, subtask=i.subtask, seed=i.seed).clamp(0, 1)) for i in apart]


def test_the_shipped_model_brightens_a_dark_photograph_with_a_bright_patch(shipped):
    for item, restored in shipped:
        if item.subtask.group != LIT: continue
        panes = window(*item.gt.shape[1:])[0]
        assert restored[:, ~panes].mean() > 1.3 * item.lq[:, ~panes].mean(), item.subtask.name
        assert score("psnr", restored, item.gt) > score("psnr", item.lq, item.gt) + 1, item.subtask.name


def test_the_shipped_model_leaves_clean_photographs_alone(shipped):
    values = [score("psnr", restored, item.gt) for item, restored in shipped if item.subtask.group == CLEAN]
    assert sum(values) / len(values) >= 32 and min(values) >= 28, values
