"DA-CLIP: the controller's rules, the published layout, the margin, and the judge, on a small random model."
import pickle

import pytest
import torch
from torch import nn

from foundir_v2.clean import Judge, clean, make_thresholds
from foundir_v2.core import FoundIRError, save_image
from foundir_v2.daclip import CLEAN_WORDS, WORDS, DaCLIP, DaCLIPJudge, Controller, daclip_config, load_daclip, margins
from open_clip import CLIP, get_model_config

SMALL = dict(embed_dim=32, vision_cfg=dict(image_size=32, layers=3, width=64, patch_size=8),
             text_cfg=dict(context_length=77, vocab_size=49408, width=64, heads=1, layers=1))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return DaCLIP(CLIP(**SMALL)).eval()


@pytest.fixture
def pictures(): return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("daclip")/"small.pt"
    torch.save({"epoch": 1, "state_dict": DaCLIP(CLIP(**SMALL)).state_dict()}, path)
    return path


@torch.no_grad()
def test_an_untrained_controller_leaves_clip_as_it_was(model, pictures):
    content, degradation = model.encode_image(pictures)
    assert torch.equal(content, model.clip.encode_image(pictures, normalize=True))
    assert torch.allclose(content, degradation, atol=1e-6), "the controller is a copy"
    assert content.norm(dim=1) == pytest.approx([1, 1], abs=1e-5)


@torch.no_grad()
def test_controls_enter_in_reversed_order_and_hooks_are_gone_afterwards(model, pictures):
    zeros, blocks = model.visual_control.transformer.zero_modules, model.visual.transformer.resblocks
    nn.init.constant_(zeros[2].bias, 1.)  # the controller's last block …
    seen = []
    handle = blocks[1].register_forward_hook(lambda m, inputs, output: seen.append(inputs[0]))
    model.encode_image(pictures)
    model.clip.encode_image(pictures)
    handle.remove()
    assert torch.allclose(seen[0] - 1, seen[1], atol=1e-5), "… is added to what the first block says"
    assert not any(b._forward_hooks for b in blocks)


@torch.no_grad()
def test_the_degradation_does_not_depend_on_the_zero_modules(model, pictures):
    before = model.encode_image(pictures)[1]
    for p in model.visual_control.transformer.zero_modules.parameters(): nn.init.normal_(p)
    assert torch.equal(model.encode_image(pictures)[1], before)


def test_the_layout_is_the_published_one(model):
    keys = set(model.state_dict())
    tower = {k.removeprefix("visual.") for k in keys if k.startswith("visual.")}
    assert {f"clip.visual.{k}" for k in tower} <= keys
    control = {f"transformer.{k}" if k.startswith("transformer.") else k for k in tower}
    zero = {f"transformer.zero_modules.{i}.{n}" for i in range(3) for n in ("weight", "bias")}
    assert {k.removeprefix("visual_control.") for k in keys if k.startswith("visual_control.")} == control | zero
    assert {k for k in keys if not k.startswith(("clip.", "visual.", "visual_control."))} == {"logit_scale"}


@pytest.mark.parametrize("name, width, layers", [("ViT-B-32", 768, 12), ("ViT-L-14", 1024, 24)])
def test_the_published_sizes_are_told_from_the_shapes(name, width, layers):
    with torch.device("meta"): large = DaCLIP(CLIP(**get_model_config(name)))
    found, wanted = daclip_config(large.state_dict()), get_model_config(name)
    assert found["embed_dim"] == wanted["embed_dim"] and found["text_cfg"] == wanted["text_cfg"]
    assert found["vision_cfg"] == wanted["vision_cfg"] | {"head_width": 64}
    assert len(large.visual_control.transformer.zero_modules) == layers
    assert large.visual_control.transformer.zero_modules[0].weight.shape == (width, width)


@torch.no_grad()
@pytest.mark.parametrize("wrap", [lambda s: s, lambda s: {"state_dict": s},
                                  lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}])
def test_what_was_saved_is_read_back(model, pictures, tmp_path, wrap):
    for p in model.parameters(): p.add_(torch.randn_like(p) * .01)
    torch.save(wrap(model.state_dict()), tmp_path/"x.pt")
    again = load_daclip(tmp_path/"x.pt")
    assert all(map(torch.equal, again.encode_image(pictures), model.encode_image(pictures))) and not again.training


class Bomb:
    def __reduce__(self): return print, ("executed",)


def test_wrong_files_are_one_line_and_nothing_is_executed(tmp_path, capsys, model):
    (tmp_path/"bomb.pt").write_bytes(pickle.dumps({"state_dict": Bomb()}, protocol=2))
    torch.save({"weight": torch.zeros(2)}, tmp_path/"other.pt")
    torch.save({k: v for k, v in model.state_dict().items() if "zero_modules" not in k}, tmp_path/"lacking.pt")
    torch.save([1, 2], tmp_path/"list.pt")
    for name, words in (("none.pt", "no DA-CLIP weights"), ("bomb.pt", "tensors alone"),
                        ("other.pt", "not DA-CLIP"), ("lacking.pt", "not DA-CLIP"), ("list.pt", "not DA-CLIP")):
        with pytest.raises(FoundIRError, match=words) as e: load_daclip(tmp_path/name)
        assert "\n" not in str(e.value)
    assert "executed" not in capsys.readouterr().out
    with pytest.raises(FoundIRError, match="no DA-CLIP weights"): DaCLIPJudge(tmp_path/"none.pt")


def test_a_margin_is_against_the_best_clean_word():
    words, clean_words = torch.eye(5)[:2], torch.eye(5)[2:4]
    seen = margins(torch.tensor([[.8, 0, .6, 0, 0], [0, .6, 0, .8, 0], [0, 0, 0, 0, 1.]]), words, clean_words)
    assert seen[0].tolist() == pytest.approx([20, -60], abs=1e-3)
    assert seen[1].tolist() == pytest.approx([-80, -20], abs=1e-3) and seen[2].tolist() == [0, 0]


def test_the_judge_measures_and_its_name_is_that_of_the_weights(weights, tmp_path):
    judge = DaCLIPJudge(weights, "cpu")
    picture = torch.rand(3, 40, 50, generator=torch.Generator().manual_seed(0))
    said = judge(picture)
    assert isinstance(judge, Judge) and tuple(said) == judge.measures == tuple(f"daclip_{w}" for w in WORDS)
    assert DaCLIPJudge(weights, "cpu")(picture) == said != judge(picture.flip(1)) and len(CLEAN_WORDS) >= 1
    other = tmp_path/"other.pt"
    torch.save(load_daclip(weights).state_dict(), other)
    assert DaCLIPJudge(other, "cpu").name != judge.name


def test_a_margin_decides_in_the_cleaning(weights, tmp_path):
    import pandas as pd
    judge = DaCLIPJudge(weights, "cpu")
    for i in range(2):
        save_image(torch.rand(3, 40, 40, generator=torch.Generator().manual_seed(i)), tmp_path/f"{i}.png")
    index = pd.DataFrame([dict(photo=str(i), path=f"{i}.png", verdict="", reason="") for i in range(2)])
    table = clean(index, [judge], [], tmp_path)
    worst = table["daclip_hazy"].max()
    limits = {"daclip_hazy": [worst - 1e-3, worst + 1]} if table["daclip_hazy"].nunique() > 1 else {}
    table = clean(index, [judge], make_thresholds(limits, [judge]), tmp_path)
    assert sorted(table.verdict) == ["accepted", "review"] and "daclip_hazy" in "".join(table.reason)


def test_a_controller_copies():
    tower = CLIP(**SMALL).visual.transformer
    controller = Controller(tower)
    with torch.no_grad(): next(tower.parameters()).fill_(7)
    assert not (next(controller.transformer.parameters()) == 7).all()
    assert all(not p.any() for p in controller.zero_modules.parameters())
