"Scores of two measurements differ in the weights and in nothing else."
from dataclasses import replace

import pytest, torch

from foundir_v2 import score as sc
from foundir_v2.base import TINY_UNET, build_foundir_unet, new_base
from foundir_v2.core import FoundIRError, generator, save_image
from foundir_v2.index import build_manifest
from foundir_v2.inference import InferenceConfig, Recipe
from foundir_v2.pipeline import assemble
from foundir_v2.vae import PatchAutoencoderKL

TASKS = {"denoise": ["gaussian_noise", "jpeg"], "sr": ["sr_x2"]}


@pytest.fixture(scope="module")
def items(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for split in ("train", "reference"):
        for i in range(2):
            save_image(torch.nn.functional.interpolate(torch.rand(1, 3, 9, 9, generator=generator(split, i)),
                                                       size=(80, 80), mode="bicubic")[0].clamp(0, 1),
                       folder / f"{split}/{split}{i}.png")
    manifest = build_manifest(folder, root=folder)
    return lambda tasks=TASKS, **k: sc.reference_set(manifest, tasks,
                                                     **(dict(per_task=3, size=64, seed=0, root=folder) | k))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    base = new_base(PatchAutoencoderKL(channels=48, hidden=8, encoder_blocks=1, decoder_blocks=1),
                    dict(TINY_UNET, block_out_channels=(32, 32, 48), attention_head_dim=(2, 2, 2)))
    unet = build_foundir_unet(base, lq_norm_groups=0, moe_layers=1, moe_heads=4)
    torch.nn.init.normal_(unet.moe_projection.weight, std=.3)
    torch.nn.init.normal_(unet.lq_embedding.conv_out.weight, std=.3)
    one_step = InferenceConfig(num_inference_steps=1, guidance_scale=1, start="noise", tile_size=0)
    pipe = assemble(base, unet.eval(), Recipe(inference=one_step))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def restore(model):
    def run(items, batch=10, **options):
        each = zip(*((i.lq, i.subtask.scale, i.seed, i.caption) for i in items))
        return sc.restore_pictures(model, *each, batch=batch, **options)
    return run


def test_reference_set_is_fixed_and_balanced(items):
    a, b, c = items(), items(), items(seed=1)
    assert {t: len(v) for t, v in a.items()} == {"denoise": 3, "sr": 3}
    for t in a:
        assert all(torch.equal(x.lq, y.lq) and torch.equal(x.gt, y.gt) and x.seed == y.seed for x, y in zip(a[t], b[t]))
    assert any(not torch.equal(x.lq, y.lq) for x, y in zip(a["denoise"], c["denoise"]))
    assert all(x.input.shape == x.gt.shape == (3, 64, 64) for v in a.values() for x in v)
    assert len({x.seed for x in a["denoise"]}) == 3
    with pytest.raises(FoundIRError, match="reference_per_task=0"): items(per_task=0)


def test_many_subtasks_share_the_items(items):
    names = [f"task{i}" for i in range(14)]
    drawn = [sc.drawn_subtasks("weather", names, 10, seed) for seed in range(20)]
    assert all(len(set(d)) == 10 and d == sorted(d, key=names.index) for d in drawn)
    assert sc.drawn_subtasks("weather", names, 10, 3) == drawn[3] and len(set(map(tuple, drawn))) > 10
    assert {n for d in drawn for n in d} == set(names) and sc.drawn_subtasks("weather", names, 14, 0) == names
    assert all(len(some) == 1 for some in items(per_task=1).values())


def test_psnr_is_that_of_pyiqa():
    from foundir_v2.iqa import score
    for s in (0., .02, .3):
        gt = torch.rand(3, 48, 48, generator=generator(1))
        x = (gt + s * torch.randn(gt.shape, generator=generator(2))).clamp(0, 1)
        assert sc.psnr(x, gt) == pytest.approx(score("psnr", x, gt), abs=1e-3)


def test_lower_is_better_metrics_are_negated():
    gt = torch.rand(3, 64, 64, generator=generator(3))
    assert sc.item_score(gt.flip(2), gt, "piqe") < 0
    with pytest.raises(FoundIRError, match="beauty"): sc.item_score(gt, gt, "beauty")


def test_scores_do_not_depend_on_batches_or_ranks(items, restore):
    sets, metrics = items(), {"denoise": "psnr", "sr": "psnr"}
    whole = sc.score_items(restore, sets, metrics)
    near = lambda scores: all(scores[t] == pytest.approx(whole[t], abs=1e-3) for t in sets)
    assert near(sc.score_items(restore, sets, metrics, batch_size=2))
    values = [v for rank in (0, 1) for v in sc.item_scores(restore, sets, metrics, rank=rank, world_size=2)]
    assert near(sc.score_items(restore, sets, metrics, rank=0, world_size=2, gather=lambda _: values))


def test_every_item_has_its_score(items):
    sets = items()
    scores = sc.score_items(lambda some: [i.input for i in some], sets, {"denoise": "psnr", "sr": "psnr"})
    for t, v in sets.items(): assert scores[t] == pytest.approx([sc.psnr(i.input, i.gt) for i in v], abs=1e-4)
    perfect = sc.score_items(lambda some: [i.gt for i in some], sets, {"denoise": "psnr", "sr": "psnr"})
    assert all(v == pytest.approx([80] * len(sets[t]), abs=.1) for t, v in perfect.items())


def test_restoration_depends_on_picture_and_seed_only(items, restore):
    some = [*items()["denoise"], *items()["sr"]]
    whole = restore(some)
    close = lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert all(x.shape == i.gt.shape and 0 <= x.min() and x.max() <= 1 for x, i in zip(whole, some))
    for i in (1, 4): assert close(restore(some[i:i + 1])[0], whole[i]), "alone, and among others of another size"
    assert not close(restore([replace(some[1], seed=9)])[0], whole[1])
    assert not close(restore([replace(some[1], lq=some[2].lq)])[0], whole[1])
    assert not close(restore(some[1:2], num_inference_steps=3)[0], whole[1])


def test_what_is_scored_follows_the_settings_of_the_model(items, model, restore):
    "Text, guidance, colour fix: given to the call, or stored with the model."
    from foundir_v2.restorers import PipelineRestorer
    some = [replace(items()[task][0], caption="a boat on a lake") for task in TASKS]
    before, plain = {k: v for k, v in model.config.items() if k.startswith("default_")}, restore(some)
    text, fix = dict(prompt="caption"), dict(color_fix="wavelet")
    changes = dict(guidance=dict(text, guidance_scale=5.0), text=text, fix=fix)
    results = {}
    for name, options in changes.items():
        scored = results[name] = restore(some, **options)
        evaluated = PipelineRestorer(model, **options)
        for x, y, i in zip(scored, plain, some):
            assert not torch.allclose(x, y, atol=1e-4), (name, "changes the score")
            same = evaluated(i.lq, subtask=i.subtask, seed=i.seed, caption=i.caption)
            torch.testing.assert_close(same, x, atol=1e-4, rtol=0)
    assert not torch.allclose(results["guidance"][0], results["text"][0], atol=1e-4)
    model.register_to_config(default_guidance_scale=5.0, default_prompt="caption")
    try:
        for x, y in zip(restore(some), results["guidance"]): assert torch.equal(x, y)
    finally: model.register_to_config(**before)


def test_the_encoder_is_read_at_any_size(model):
    x = torch.rand(2, 3, 17, 30, generator=generator(4))
    y = sc.read_encoder(model.unet, model.vae, x)
    assert y.shape == x.shape and 0 <= y.min() and y.max() <= 1 and not y.requires_grad
    torch.testing.assert_close(sc.read_encoder(model.unet, model.vae, x[1:])[0], y[1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("restored", [torch.rand(1, 1, 1), torch.full((3, 64, 64), float("nan"))])
def test_a_picture_that_cannot_be_scored_is_refused(restored):
    with pytest.raises(FoundIRError, match="finite numbers of shape"):
        sc.item_score(restored, torch.rand(3, 64, 64), "psnr")


def test_scores_of_one_rank_alone_are_no_mean(items):
    with pytest.raises(FoundIRError, match="gather"):
        sc.score_items(lambda some: [i.input for i in some], items(), dict.fromkeys(TASKS, "psnr"), rank=0,
                       world_size=2)


def test_a_task_without_sub_tasks_is_scored_on_its_pairs(items, tmp_path):
    with pytest.raises(FoundIRError, match="'reference' has no pairs for denoise"): items(tasks={"denoise": []})
    for split, n in (("train", 1), ("reference", 2)):
        for i in range(n):
            gt = torch.rand(3, 80, 80, generator=generator(split, i))
            for kind, x in (("GT", gt), ("LQ", gt / 2)): save_image(x, tmp_path / f"{split}/murky/{kind}/{i}.png")
    manifest = build_manifest(tmp_path, root=tmp_path)
    found = sc.reference_set(manifest, {"murky": []}, per_task=3, size=64, root=tmp_path)["murky"]
    assert len(found) == 3 and {i.photo for i in found} == set(manifest.photo[manifest.split == "reference"])
    assert all(torch.allclose(i.lq, i.gt / 2, atol=.01) and i.subtask.name == "murky" for i in found)
    assert len(sc.score_items(lambda some: [i.input for i in some], {"murky": found}, {"murky": "psnr"})["murky"]) == 3


def test_missing_metric_or_items_are_refused(items):
    with pytest.raises(FoundIRError, match="sr has no score metric"): sc.score_items(list, items(), {"denoise": "psnr"})
    with pytest.raises(FoundIRError, match="denoise has no reference items"):
        sc.score_items(list, {"denoise": []}, {"denoise": "psnr"})
