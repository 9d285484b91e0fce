"Published networks as restorers: the right one for each damage, any size of picture, and one in small from end to end."
import hashlib, io, json, tarfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from foundir_v2 import networks
from foundir_v2.core import FoundIRError, Restorer
from foundir_v2.evaluate import evaluate
from foundir_v2.networks import NETWORKS, Enlarger, Maxim, load_maxim, load_published, maxim_task, padded
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
    assert {"maxim", "maxim-deblurring", "realesrgan", "realsr"} <= set(NETWORKS)
    for name in NETWORKS: assert isinstance(load_published(name), Restorer)
    assert load_published("maxim-enhancement").task == "enhancement" and load_published("realsr").name == "realsr"
    for wrong in ("network:", "network:maxime"):
        with pytest.raises(FoundIRError, match="network"): make_restorer(wrong)


def test_making_one_reads_nothing(monkeypatch):
    monkeypatch.setattr(networks, "read_release", lambda *a: pytest.fail("the archive was opened"))
    for name in NETWORKS: make_restorer(f"network:{name}")
