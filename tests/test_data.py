import pickle
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader

from foundir_v2.core import FoundIRError, generator, hash_seed, load_image, save_image
from foundir_v2.data import (RestorationDataset, View, collate, draw_view, halvings, look, look_at,
                             reference_items, size_conditions, stored_pair)
from foundir_v2.degrade import crop_to_multiple, degrade, upsample_lq
from foundir_v2.index import fit_pair
from foundir_v2.reading import Photos, cut, halve
from foundir_v2.tasks import BENCHMARK, SUBTASKS, VARIANTS, by_category, narrow, paired_task, subtask

TASKS = {"denoise": ["gaussian_noise", "jpeg"], "weather": ["haze"], "sr": ["sr_x2", "sr_x4"]}
SIZES = dict(a=(70, 90), b=(120, 64), c=(66, 66), d=(80, 100))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for name, (h, w) in SIZES.items():
        coarse = torch.rand(1, 3, h // 6, w // 6, generator=generator(name))
        save_image(torch.nn.functional.interpolate(coarse, (h, w), mode="bilinear")[0], folder / f"{name}.png")
    return folder


@pytest.fixture(scope="module")
def manifest():
    splits = dict(a="train", b="train", c="reference", d="reference")
    return pd.DataFrame([dict(photo=n, path=f"{n}.png", lq="", task="", split=splits[n], width=w, height=h,
                              caption=f"photo {n}") for n, (h, w) in SIZES.items()])


@pytest.fixture(scope="module")
def dataset(manifest, root): return RestorationDataset(manifest, "train", TASKS, crop=32, root=root)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k]
                                        for k in a)


DRAWS = [(task, i, 100 * t + 10 * i + s) for t, task in enumerate(TASKS) for i in range(2) for s in range(4)]


def test_samples_have_the_promised_fields(dataset):
    assert dataset.lengths == {"denoise": 2, "weather": 2, "sr": 2}
    seen = set()
    for draw in DRAWS:
        s = dataset[draw]
        assert s["lq"].shape == s["gt"].shape == (3, 32, 32) and s["lq"].dtype == s["gt"].dtype == torch.float32
        assert 0 <= s["lq"].min() and s["lq"].max() <= 1 and not torch.equal(s["lq"], s["gt"])
        assert s["task"] == draw[0] and s["subtask"] in TASKS[draw[0]] and s["caption"] == f"photo {'ab'[draw[1]]}"
        assert s["original_size"].tolist() == list(SIZES["ab"[draw[1]]]) and s["target_size"].tolist() == [32, 32]
        seen.add(s["subtask"])
    assert seen == {"gaussian_noise", "jpeg", "haze", "sr_x2", "sr_x4"}


def test_a_sample_is_a_pure_function_of_the_draw(dataset, manifest, root):
    first = [dataset[d] for d in DRAWS]
    torch.manual_seed(5)
    fresh = RestorationDataset(manifest, "train", TASKS, crop=32, root=root, cache=0)
    assert all(same(a, fresh[d]) for a, d in reversed(list(zip(first, DRAWS))))
    assert all(same(a, pickle.loads(pickle.dumps(dataset))[d]) for a, d in zip(first[:3], DRAWS))
    assert len({a["gt"].sum().item() for a in first}) == len(first), "draws repeat each other"


def test_without_variety_samples_are_what_they_always_were(manifest, root):
    "Stored before there was any; pixels up to a rounding that another CPU may do otherwise."
    stored = np.load(Path(__file__).parent / "data/samples.npz")
    options = dict(crop=16, root=root, recoloured=0.5)
    plain = RestorationDataset(manifest, "train", TASKS, **options)
    today = dict(variety=0.0, clean_share=0.0, scale_range=(0.5, 1.0))
    spelt = RestorationDataset(manifest, "train", TASKS, **today, **options)
    for key in stored.files:
        task, index, seed, name, which = key.split("_")
        sample = plain[task, int(index), int(seed)]
        changed = np.abs((sample[which] * 255).round().numpy() - stored[key].astype(float))
        assert sample["subtask"].replace("_", "-") == name and changed.max() <= 1 and (changed > 0).mean() < 0.01, key
        assert same(sample, spelt[task, int(index), int(seed)])


def test_variety_draws_variants_and_leaves_the_crop(manifest, root):
    make = lambda share: RestorationDataset(manifest, "train", by_category(), crop=16, root=root, variety=share)
    plain, half, full = map(make, (0, 0.5, 1))
    varied = 0
    for task in plain.tasks:
        for seed in range(40):
            a, b, c = (ds[task, 0, seed] for ds in (plain, half, full))
            assert torch.equal(a["gt"], c["gt"]) and not torch.equal(a["lq"], c["lq"]) and same(c, full[task, 0, seed])
            assert c["subtask"] in {v.name for v in VARIANTS[a["subtask"]]} and c["task"] == task
            assert same(b, a) or same(b, c)
            varied += same(b, c)
    assert 70 <= varied <= 130
    drawn = {full["lowlight", 0, s]["subtask"] for s in range(150)}
    assert drawn == {v.name for n in by_category()["lowlight"] for v in VARIANTS[n]}


def test_a_variant_can_be_a_task_of_its_own(manifest, root):
    own = RestorationDataset(manifest, "train", {"mist": ["haze:depths"]}, crop=16, root=root, variety=1)
    assert {own["mist", 0, s]["subtask"] for s in range(5)} == {"haze:depths"}
    item = reference_items(manifest, "reference", ["low_light:screens"], 1, 48, 7, root=root)[0]
    assert item.subtask is VARIANTS["low_light"][1]


def test_a_share_of_the_samples_needs_nothing_in_every_task(manifest, root):
    options = dict(crop=32, root=root, recoloured=0.5)
    make = lambda share: RestorationDataset(manifest, "train", TASKS, clean_share=share, **options)
    some, every = make(0.3), make(1)
    counts, exact = dict.fromkeys(TASKS, 0), 0
    for task in TASKS:
        for seed in range(60):
            s, clean = some[task, 0, seed], every[task, 0, seed]
            assert clean["subtask"] == "clean"
            assert clean["task"] == task
            assert same(clean, every[task, 0, seed])
            assert torch.equal(s["gt"], clean["gt"])
            error = (clean["lq"] - clean["gt"]).abs()
            assert error.square().mean() < 3e-3
            assert torch.allclose(clean["lq"] * 255, (clean["lq"] * 255).round(), atol=1e-3), "not what a file holds"
            exact += (error.max() <= 0.5 / 255 + 1e-6).item()
            if s["subtask"] == "clean": assert same(s, clean)
            counts[task] += s["subtask"] == "clean"
    assert all(8 <= n <= 30 for n in counts.values()) and 110 <= exact <= 160


def test_all_scales_from_the_whole_photograph_to_the_pixel():
    sides = torch.tensor([draw_view(1600, 1200, 128, (0, 1.0), 1, generator("scale", i)).side for i in range(2000)])
    assert sides.min() < 130 and sides.max() > 1190 and sides.max() <= 1200
    octaves = [((sides >= low) & (sides < 2 * low)).float().mean() for low in (128, 256, 512)]
    assert all(0.27 < share < 0.35 for share in octaves), "scales are not alike"
    assert all(draw_view(100, 90, 90, (0, 1.0), 1, generator("s", i)).side == 90 for i in range(5))
    assert max(draw_view(600, 600, 128, (0, 0.5), 1, generator("s", i)).side for i in range(50)) > 500
    assert min(draw_view(600, 600, 128, (0, 0.5), 1, generator("s", i)).side for i in range(50)) >= 255


def test_shrinking_far_starts_from_a_kept_half_and_looks_the_same(manifest, root):
    coarse = torch.rand(1, 3, 40, 40, generator=generator("large"))
    photo = (torch.nn.functional.interpolate(coarse, (640, 640), mode="bicubic")[0].clamp(0, 1) * 255).round().byte()
    halves = [photo]
    while len(halves) < 5: halves.append(halve(halves[-1]))
    assert [h.shape[1] for h in halves] == [640, 320, 160, 80, 40] and halve(photo[:, :5, :7]).shape == (3, 2, 3)
    used = []
    def level(window, k): used.append(k); return cut(halves[k], window)
    for side, k in ((64, 0), (128, 0), (129, 1), (256, 1), (257, 2), (640, 3)):
        view = View(640 - side, 0, side, 64, side % 2 == 0)
        a, b = look_at(level, view), look(photo, view)
        assert used[-1] == k == halvings(view) and a.shape == (3, 64, 64)
        if k == 0: assert torch.equal(a, b)
        elif side % 2**k == 0: assert -10 * torch.log10((a - b).square().mean()) > 35
    photos, fresh = Photos(root), Photos(root, cache=0)
    assert photos("a.png", 1) is photos("a.png", 1)
    assert torch.equal(photos("a.png", 1), fresh("a.png", 1))
    assert torch.equal(photos("a.png", 1), halve(photos("a.png")))


def test_whole_photographs_as_crops_do_not_depend_on_the_cache(manifest, root):
    options = dict(crop=16, root=root, scale_range=(0, 1), variety=0.5, clean_share=0.1)
    kept, read = (RestorationDataset(manifest, "train", TASKS, cache=c, **options) for c in (10**9, 0))
    assert all(same(kept[d], read[d]) and kept[d]["lq"].shape == (3, 16, 16) for d in DRAWS)


def test_workers_give_what_the_main_process_gives(dataset):
    batches = [DRAWS[:5], DRAWS[5:10]]
    with_workers = list(DataLoader(dataset, batch_sampler=batches, num_workers=2, collate_fn=collate))
    for batch, draws in zip(with_workers, batches):
        assert torch.equal(batch["lq"], torch.stack([dataset[d]["lq"] for d in draws]))
        assert batch["subtask"] == [dataset[d]["subtask"] for d in draws]
    assert batch["original_size"].shape == (5, 2) and batch["caption"][0].startswith("photo")


def test_the_gt_is_a_window_of_the_photograph(manifest, root):
    plain = RestorationDataset(manifest, "train", {"weather": ["haze"]}, crop=32, root=root, scale_range=(1, 1))
    photo = load_image(root / "a.png")
    for seed in range(6):
        s = plain["weather", 0, seed]
        top, left = s["crop_top_left"].tolist()
        window = photo[:, top:top + 32, left:left + 32]
        assert torch.allclose(s["gt"], window, atol=1e-6) or torch.allclose(s["gt"], window.flip(-1), atol=1e-6)


def test_other_colours_keep_the_shapes_and_come_before_the_damage(manifest, root):
    plain, coloured, half = (RestorationDataset(manifest, "train", {"denoise": ["gaussian_noise"]}, crop=32, root=root,
                                                recoloured=share) for share in (0, 1, 0.5))
    changed = 0
    for seed in range(60):
        a, b, c = (ds["denoise", 0, seed] for ds in (plain, coloured, half))
        assert same(b, coloured["denoise", 0, seed]) and b["crop_top_left"].tolist() == a["crop_top_left"].tolist()
        assert 0 <= b["gt"].min() and b["gt"].max() <= 1
        inside = (b["gt"] > 0) & (b["gt"] < 1)
        if inside.all(): torch.testing.assert_close(b["gt"].mean(0), a["gt"].mean(0))  # the mean of the channels stays
        changed += not torch.equal(c["gt"], a["gt"])
        assert torch.equal(c["gt"], a["gt"]) or torch.equal(c["gt"], b["gt"])
    assert 15 <= changed <= 45


def test_views_fit_vary_and_respect_the_grid():
    for multiple in (1, 4):
        views = [draw_view(61, 200, 32, (0.25, 1.0), multiple, generator("v", i)) for i in range(400)]
        assert all(v.top >= 0 and v.top + v.side <= 61 and v.left + v.side <= 200 and v.side >= 32
                   and v.top % multiple == v.left % multiple == 0 for v in views)
        assert {v.flip for v in views} == {True, False} and max(v.side for v in views) >= 60 - multiple
        assert max(v.left for v in views) > 130
    assert draw_view(32, 32, 32, (0.1, 1), 1, generator("v"))[:3] == (0, 0, 32)


def test_shrinking_keeps_the_content_in_place():
    ramp = torch.linspace(0, 1, 100).expand(3, 100, 100)
    x = look(ramp, View(10, 20, 64, 32, False))
    assert torch.allclose(x[:, 5:-5, 5:-5], ((20 + 2 * torch.arange(32.0) + 0.5) / 99).expand(3, 32, 32)[:, 5:-5, 5:-5],
                          atol=2e-3)
    assert torch.equal(look(ramp, View(10, 20, 64, 32, True)), x.flip(-1))
    assert torch.allclose(look((ramp * 255).round().byte(), View(0, 0, 50, 50, False)), ramp[:, :50, :50], atol=3e-3)


def test_size_conditions_count_shrunk_pixels():
    c = size_conditions(400, 600, View(100, 40, 256, 128, False))
    assert {k: v.tolist() for k, v in c.items()} == dict(
        original_size=[400, 600], crop_top_left=[50, 20], target_size=[128, 128])


@pytest.mark.parametrize("top, left", [(0, 0), (32, 56), (40, 64)])
def test_a_small_stored_lq_is_aligned_with_its_gt(root, top, left):
    gt = crop_to_multiple(load_image(root / "d.png"), 4)
    lq = degrade(gt, "sr_x4", 0)
    photo, stored = (lambda window, k, x=x: cut(x, window) for x in (gt, lq))
    for seed in range(6):
        view = View(top, left, 36, 36, seed % 2 == 0)
        a, b = stored_pair(photo, stored, 4, lq.shape[1:], view, seed)
        assert torch.allclose(a, look(upsample_lq(lq, gt.shape[1:], hash_seed("enlarge", seed)), view), atol=1e-5)
        assert torch.equal(b, look(gt, view))


def with_pairs(manifest, root):
    save_image(degrade(load_image(root / "a.png"), "haze", 3), root / "a_haze.png")
    save_image(degrade(load_image(root / "d.png"), "sr_x4", 3), root / "d_small.png")
    rows = manifest.to_dict("records")
    return pd.DataFrame([rows[0] | dict(photo="p", lq="a_haze.png", task="haze"),
                         rows[3] | dict(photo="q", lq="d_small.png", task="sr", split="train"),
                         rows[1],
                         rows[3] | dict(photo="r", lq="d_small.png", task="sr_x4")])


def test_stored_pairs_serve_their_task_only(manifest, root):
    ds = RestorationDataset(with_pairs(manifest, root), "train", TASKS, crop=32, root=root)
    assert ds.lengths == {"denoise": 1, "weather": 2, "sr": 2}
    hazy = ds["weather", 0, 4]
    assert hazy["subtask"] == "haze" and not torch.equal(hazy["lq"], hazy["gt"])
    photo, stored = load_image(root / "a.png"), load_image(root / "a_haze.png")
    top, left = hazy["crop_top_left"].tolist()
    for name, x in (("gt", photo), ("lq", stored)):
        window = x[:, top:top + 32, left:left + 32]
        assert torch.allclose(hazy[name], window, atol=1e-6) or torch.allclose(hazy[name], window.flip(-1), atol=1e-6)
    assert ds["sr", 0, 1]["lq"].shape == (3, 32, 32) and ds["denoise", 0, 1]["caption"] == "photo b"


@pytest.mark.parametrize("change, match", [
    (dict(tasks={}), "no tasks"),
    (dict(tasks={"weather": []}), "'weather' has neither photographs nor pairs"),
    (dict(tasks={"weather": None}), "list of sub-tasks"),
    (dict(tasks={"weather": "haze"}), "list of sub-tasks"),
    (dict(tasks={"weather": ["fog"]}), "unknown sub-task 'fog'"),
    (dict(split="validation"), "validation.*train"),
    (dict(crop=65), None),
    (dict(crop=71), "a is 90x70, too small.*2 such"),
    (dict(crop=63), None),
    (dict(crop=0), "at least 1"),
    (dict(scale_range=(0, 0)), "scale_range"),
    (dict(scale_range=(-0.1, 1)), "scale_range"),
    (dict(variety=-0.1), "variety=-0.1"),
    (dict(clean_share=2), "clean_share=2"),
    (dict(scale_range=(0.5, 1.5)), "scale_range"),
    (dict(scale_range=(1, 0.5)), "scale_range"),
    (dict(recoloured=1.1), "recoloured=1.1")])
def test_what_cannot_work_is_refused_at_once(manifest, root, change, match):
    options = dict(split="train", tasks=TASKS, crop=32, root=root) | change
    if match is None:
        assert RestorationDataset(manifest, **options)["sr", 0, 0]["lq"].shape[1:] == 2 * (options["crop"],)
    else:
        with pytest.raises(FoundIRError, match=match): RestorationDataset(manifest, **options)


def test_bad_draws_and_pairs_are_refused(dataset, manifest, root):
    with pytest.raises(FoundIRError, match="mist.*denoise"): dataset["mist", 0, 0]
    with pytest.raises(IndexError, match="2 rows"): dataset["sr", 2, 0]
    table = with_pairs(manifest, root)
    with pytest.raises(FoundIRError, match="pair p .*'haze'.*not among"):
        RestorationDataset(table, "train", {"sr": ["sr_x4"]}, crop=32, root=root)
    with pytest.raises(FoundIRError, match="'denoise' has neither"):
        RestorationDataset(table[:2], "train", TASKS, crop=32, root=root)


def test_reference_items_are_fixed_and_independent_of_their_company(manifest, root):
    together = reference_items(manifest, "reference", ["haze", "sr_x4", "jpeg"], 3, 48, 7, root=root)
    alone = reference_items(manifest, "reference", [SUBTASKS["sr_x4"]], 2, 48, 7, root=root)
    for a, b in zip(together[3:5], alone):
        assert torch.equal(a.lq, b.lq) and torch.equal(a.gt, b.gt) and torch.equal(a.input, b.input)
        assert (a.photo, a.seed) == (b.photo, b.seed)
    assert [x.subtask.name for x in together] == ["haze"] * 3 + ["sr_x4"] * 3 + ["jpeg"] * 3
    assert all({x.photo for x in together[i:i + 3]} == {"c", "d"} for i in (0, 3, 6))
    assert len({x.seed for x in together}) == 9
    assert all(x.gt.shape == x.input.shape == (3, 48, 48)
               and x.lq.shape == (3, 48 // x.subtask.scale, 48 // x.subtask.scale) for x in together)
    assert all(x.caption == f"photo {x.photo}" for x in together)
    assert reference_items(
        manifest.assign(caption=float("nan")), "reference", ["haze"], 1, 48, 7, root=root)[0].caption == ""
    other = reference_items(manifest, "reference", ["haze"], 1, 48, 8, root=root)[0]
    assert not torch.equal(other.gt, together[0].gt)
    for x in together:
        assert torch.equal(x.lq, degrade(x.gt, x.subtask, x.seed)) and torch.equal(x.input, upsample_lq(x.lq, (48, 48)))


def test_stored_pairs_come_first_as_reference_items(manifest, root):
    item = reference_items(with_pairs(manifest, root), "reference", ["sr_x4"], 1, 48, 0, root=root)[0]
    assert item.photo == "r" and item.lq.shape == (3, 12, 12)
    assert -10 * torch.log10(((item.input - item.gt) ** 2).mean()) > 18, "LQ and GT are not aligned"
    with pytest.raises(FoundIRError, match="neither photographs nor pairs for haze"):
        reference_items(with_pairs(manifest, root), "reference", ["haze"], 1, 48, 0, root=root)


def test_impossible_reference_items_are_refused(manifest, root):
    with pytest.raises(FoundIRError, match="multiple of sr_x4's scale 4: choose 48"):
        reference_items(manifest, "reference", ["sr_x4"], 1, 50, 0, root=root)
    with pytest.raises(FoundIRError, match="too small"):
        reference_items(manifest, "reference", ["haze"], 1, 128, 0, root=root)
    with pytest.raises(FoundIRError, match="per_subtask"):
        reference_items(manifest, "reference", ["haze"], 0, 48, 0, root=root)
    with pytest.raises(FoundIRError, match="unknown sub-task"):
        reference_items(manifest, "reference", ["fog"], 1, 48, 0, root=root)


def test_the_default_tasks_work(manifest, root):
    ds = RestorationDataset(manifest, "train", by_category(), crop=32, root=root)
    assert {ds[t, 0, s]["subtask"] for t in ds.tasks for s in range(40)} == set(BENCHMARK)
    assert all(subtask(n).category == t for t in ds.tasks for n in ds.tasks[t])


def test_one_small_photograph_is_left_out_and_told(manifest, root, caplog):
    caplog.set_level("WARNING", "foundir_v2.data")
    ds = RestorationDataset(manifest, "train", TASKS, crop=66, root=root)
    assert caplog.messages == ["train: 1 of 2 pictures left out, smaller than 68 pixels: b"]
    assert ds.lengths == {"denoise": 1, "weather": 1, "sr": 1}
    assert all(ds[task, 0, seed]["caption"] == "photo a" for task in TASKS for seed in range(3))
    caplog.clear()
    RestorationDataset(manifest, "train", TASKS, crop=64, root=root)
    many = pd.concat([manifest] + [manifest[1:2].assign(photo=f"s{i}", width=9) for i in range(7)])
    RestorationDataset(many, "train", TASKS, crop=60, root=root)
    assert caplog.messages == ["train: 7 of 9 pictures left out, smaller than 60 pixels: s0, s1, s2, s3, s4, ..."]
    with pytest.raises(FoundIRError, match="c is 66x66, too small"):
        reference_items(manifest, "reference", ["haze"], 1, 72, 0, root=root)


@pytest.mark.parametrize("up", [False, True])
@pytest.mark.parametrize("scale", [2, 4])
def test_a_gt_that_is_no_multiple_is_cropped(root, tmp_path, up, scale):
    "298x199, as the published sets have them: the small LQ was made by rounding down or up."
    g = generator("odd")
    coarse = torch.rand(1, 3, 25, 38, generator=g)
    gt = torch.nn.functional.interpolate(coarse, (199, 298), mode="bicubic")[0].clamp(0, 1)
    more = [(-n) % scale if up else 0 for n in gt.shape[1:]]
    padded = torch.nn.functional.pad(gt[None], (0, more[1], 0, more[0]), mode="replicate")[0]
    save_image(gt, tmp_path / "gt.png")
    save_image(degrade(padded, f"sr_x{scale}", 0), tmp_path / "lq.png")
    row = dict(photo="odd", path="gt.png", lq="lq.png", task=f"sr_x{scale}", split="train", width=298, height=199)
    ds = RestorationDataset(pd.DataFrame([row]), "train", {"sr": [f"sr_x{scale}"]}, crop=48, root=tmp_path)
    places = set()
    for seed in range(60):
        s = ds["sr", 0, seed]
        assert s["lq"].shape == s["gt"].shape == (3, 48, 48) and s["original_size"].tolist() == [199, 298]
        places.add(tuple(s["crop_top_left"].tolist()))
        error = (s["lq"] - s["gt"]).square().mean()
        moved = min((s["lq"].roll((dy, dx), (1, 2)) - s["gt"])[:, 2:-2, 2:-2].square().mean()
                    for dy, dx in ((0, scale), (0, -scale), (scale, 0), (-scale, 0)))
        assert error < moved, "not aligned"
    assert all(t % scale == left % scale == 0 for t, left in places)
    assert max(t for t, _ in places) > 120 and max(left for _, left in places) > 220
    test = pd.DataFrame([row | dict(split="test")])
    item = reference_items(test, "test", [f"sr_x{scale}"], 1, 96, 0, root=tmp_path)[0]
    assert item.gt.shape == (3, 96, 96) and item.lq.shape == (3, 96 // scale, 96 // scale)


@pytest.mark.parametrize("lq_size, found", [
    ((199, 298), (1, 199, 298)),
    ((49, 74), (4, 49, 74)),
    ((50, 75), (4, 49, 74)),
    ((50, 74), (4, 49, 74)),
    ((99, 149), (2, 99, 149)),
    ((66, 99), (3, 66, 99)),
    ((200, 298), None),
    ((298, 199), None),
    ((199, 149), None),
    ((48, 74), None),
    ((51, 75), None),
    ((400, 600), None)])
def test_which_sizes_make_a_pair(lq_size, found):
    if found: assert fit_pair((199, 298), lq_size) == found
    else:
        with pytest.raises(FoundIRError, match=f"LQ is {lq_size[1]}x{lq_size[0]}, GT 298x199"):
            fit_pair((199, 298), lq_size)


def test_a_pair_that_is_none_is_named_when_it_is_drawn(manifest, root):
    save_image(torch.rand(3, 31, 50), root / "other.png")
    row = manifest.to_dict("records")[0] | dict(lq="other.png", task="haze")
    ds = RestorationDataset(pd.DataFrame([row]), "train", {"weather": ["haze"]}, crop=32, root=root)
    with pytest.raises(FoundIRError, match="task 'weather'.*such as a: sizes: LQ is 50x31, GT 90x70"):
        ds["weather", 0, 0]
    with pytest.raises(FoundIRError, match="the pair a: sizes: LQ is 50x31, GT 90x70"):
        reference_items(pd.DataFrame([row]), "train", ["haze"], 1, 32, 0, root=root)
    save_image(torch.rand(3, 17, 22), root / "other.png")
    ds = RestorationDataset(pd.DataFrame([row]), "train", {"weather": ["haze"]}, crop=69, root=root)
    with pytest.raises(FoundIRError, match="the pair a: both show 88x68 pixels.*crops of 69"): ds["weather", 0, 0]


def test_a_task_may_live_on_pairs_alone(manifest, root):
    table = with_pairs(manifest, root)
    film = table[:1].assign(photo="f", task="old_film")
    tasks = {"weather": ["haze"], "film": ["rain"], "old_film": []}
    ds = RestorationDataset(pd.concat([table[table.task != "sr"], film]), "train", tasks, crop=32, root=root)
    assert ds.lengths == {"weather": 2, "film": 1, "old_film": 1}
    s = ds["old_film", 0, 3]
    named = dict(task="", subtask="", photo="")
    assert s["subtask"] == s["task"] == "old_film" and same(s | named, ds["weather", 0, 3] | named)
    assert not torch.equal(s["lq"], s["gt"])


def test_pairs_and_photographs_share_a_task(manifest, root):
    ds = RestorationDataset(with_pairs(manifest, root), "train", {"weather": ["haze"], "sr": ["sr_x4"]}, crop=32,
                            root=root, variety=1, clean_share=0.3, recoloured=1)
    stored = [ds["weather", 0, s] for s in range(20)]
    made = [ds["weather", 1, s] for s in range(20)]
    assert {s["subtask"] for s in stored} == {"haze"}, "stored pairs are what they are"
    names = {s["subtask"] for s in made}
    assert names <= {"clean", "haze:depths", "haze:phone"} and len(names) > 1
    batch = collate([stored[0], made[0]])
    assert batch["lq"].shape == (2, 3, 32, 32)


def test_samples_and_items_may_be_of_one_severity(manifest, root):
    def stays(severity):
        one = narrow("low_light", severity)
        ds = RestorationDataset(manifest, "train", {"lowlight": [one]}, crop=32, root=root)
        items = reference_items(manifest, "reference", [one], 2, 48, 0, root=root)
        samples = [ds["lowlight", 0, seed] for seed in range(5)]
        assert {s["subtask"] for s in samples} == {"low_light"}
        return [float(x.mean()) for x in (*(s["lq"] for s in samples), *(i.lq for i in items))]
    for mild, severe in zip(stays("mild"), stays("severe")): assert mild > 1.1 * severe


def test_no_pair_may_also_be_nan(manifest, root, dataset):
    merged = RestorationDataset(manifest.assign(lq=float("nan")), "train", TASKS, crop=32, root=root)
    assert same(merged[DRAWS[0]], dataset[DRAWS[0]])
    assert len(reference_items(manifest.assign(lq=None), "reference", ["haze"], 2, 32, 0, root)) == 2


def test_a_reference_pair_of_a_whole_category_is_refused(manifest, root):
    pair = manifest.iloc[[2]].assign(lq="d.png", task="weather")
    with pytest.raises(FoundIRError, match="name its sub-task"):
        reference_items(pd.concat([manifest, pair]), "reference", ["haze"], 1, 32, 0, root)
    # a pair nobody asks for
    assert len(reference_items(pd.concat([manifest, pair.assign(task="underwater")]), "reference", ["haze"], 1, 32, 0,
                               root)) == 1


def test_reference_items_of_stored_pairs_alone_are_pairs_of_their_own_scale(manifest, root):
    "Photographs of the split are no items of a task that has no recipe."
    table = with_pairs(manifest, root)
    far = [manifest.iloc[3].to_dict() | dict(photo=p, lq=lq, task="underwater", split="reference")
           for p, lq in (("u", "d.png"), ("v", "d_small.png"))]
    table = pd.concat([table, manifest.iloc[[2]].assign(split="reference"), pd.DataFrame(far)])
    items = reference_items(table, "reference", ["underwater", "haze"], 4, 48, 0, root=root)
    own, hazy = items[:4], items[4:]
    assert {i.photo for i in own} == {"u", "v"} and "u" not in {i.photo for i in hazy}
    assert {i.photo: (i.subtask.scale, tuple(i.lq.shape)) for i in own} == {
        "u": (1, (3, 48, 48)), "v": (4, (3, 12, 12))}
    assert all(i.subtask.name == i.subtask.category == "underwater" and i.gt.shape == (3, 48, 48) for i in own)
    same = reference_items(table, "reference", [paired_task("underwater")], 4, 48, 0, root=root)
    assert all(torch.equal(a.lq, b.lq) and a.seed == b.seed for a, b in zip(own, same))
    with pytest.raises(FoundIRError, match="size 50 is not a multiple of underwater's scale 4"):
        reference_items(table, "reference", ["underwater"], 4, 50, 0, root=root)
    with pytest.raises(FoundIRError, match="'train' has no pairs for underwater"):
        reference_items(table, "train", ["underwater"], 1, 32, 0, root=root)
    with pytest.raises(FoundIRError, match="unknown sub-task 'underwatr'"):
        reference_items(table, "reference", ["underwatr"], 1, 32, 0, root=root)
    with pytest.raises(FoundIRError, match="no pairs for haze"):  # a recipe of that name doesn't count
        reference_items(table, "reference", [paired_task("haze")], 1, 32, 0, root=root)
