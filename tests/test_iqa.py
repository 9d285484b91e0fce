"Metrics: known values, directions, and what bad input or missing weights lead to."
import math
import subprocess
import sys
import threading
import time

import pytest
import torch
from hypothesis import given, settings, strategies as st

from foundir_v2 import iqa
from foundir_v2.core import FoundIRError, generator
from foundir_v2.iqa import HUB, METRICS, MetricUnavailable, Unscorable, metric, oriented, score

OFFLINE = [m.name for m in METRICS.values() if m.weights != HUB]


def picture(side=64, seed=0):
    "A smooth random picture, well inside [0, 1]."
    coarse = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").clamp(0.1, 0.9)[0]


def noisy(x, sigma, seed=1):
    return (x + sigma * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.005, 0.3), st.integers(1, 40), st.integers(1, 40))
def test_psnr_is_its_definition_on_rgb(error, height, width):
    x = torch.full((3, height, width), 0.5)
    y = x.clone()
    y[1] += error   # one channel off: a luminance PSNR would differ
    assert score("psnr", y, x) == pytest.approx(10 * math.log10(3 / error**2), abs=0.01)


def test_ssim_of_a_known_pair():
    "Constant pictures a and b: SSIM = (2ab + C1) / (a² + b² + C1), on full-range luminance rounded to 8 bits."
    a, b = 64, 191
    expected = (2 * a * b + (0.01 * 255) ** 2) / (a**2 + b**2 + (0.01 * 255) ** 2)
    assert (score("ssim", torch.full((3, 32, 32), 0.25), torch.full((3, 32, 32), 0.75))
            == pytest.approx(expected, abs=1e-4))


@pytest.mark.parametrize("name", ["psnr", "ssim", "stlpips"])
def test_full_reference_metrics_prefer_the_smaller_error(name):
    x = picture()
    mild, strong = score(name, noisy(x, 0.03), x), score(name, noisy(x, 0.2), x)
    assert oriented(name, score(name, x, x)) > oriented(name, mild) > oriented(name, strong)


@pytest.mark.parametrize("name", ["piqe", "niqe"])
def test_no_reference_metrics_see_strong_noise(name):
    from skimage import data
    x = torch.from_numpy(data.astronaut()).permute(2, 0, 1) / 255
    assert oriented(name, score(name, x)) > oriented(name, score(name, noisy(x, 0.1)))
    assert score(name, x) == score(name, x, noisy(x, 0.3)), "a reference must not matter"


def test_stlpips_uses_the_trained_weights():
    "Linear layers of LPIPS are non-negative only once trained; random ones give negative distances."
    assert all(layer.model[1].weight.min() >= 0
               for layer in iqa._create("stlpips", iqa._weights_file(metric("stlpips")), "cpu").net.lins)


def test_catalogue_agrees_with_pyiqa_about_direction_and_kind():
    from pyiqa.default_model_configs import DEFAULT_CONFIGS
    for m in METRICS.values():
        theirs = DEFAULT_CONFIGS[m.pyiqa_name]
        assert m.higher_is_better == (not theirs.get("lower_better", False)), m.name
        assert m.full_reference == (theirs["metric_mode"] == "FR"), m.name


@pytest.mark.parametrize("name", OFFLINE)
def test_values_lie_in_the_stated_range(name):
    x = picture(512 if name == "niqe" else 64)
    value = score(name, noisy(x, 0.15), x)
    assert METRICS[name].range[0] <= value <= METRICS[name].range[1]


def test_a_batch_gives_the_mean_of_its_pictures():
    x = picture()
    batch, reference = torch.stack([noisy(x, 0.05), noisy(x, 0.2)]), torch.stack([x, x])
    for name in ("psnr", "stlpips", "piqe"):
        assert score(name, batch, reference) == pytest.approx(
            (score(name, batch[0], x) + score(name, batch[1], x)) / 2, abs=1e-4)


def test_scores_are_floats_and_leave_no_graph():
    x = picture().requires_grad_()
    assert type(score("psnr", x, x.detach())) is float and x.grad is None


@pytest.mark.parametrize("name, image, reference, words", [
    ("pnsr", torch.rand(3, 32, 32), None, "choose from"),
    ("psnr", torch.rand(3, 32, 32), None, "reference"),
    ("psnr", torch.rand(3, 32, 32), torch.rand(3, 32, 31), "equal"),
    ("psnr", torch.rand(32, 32), torch.rand(32, 32), "(3, H, W)"),
    ("psnr", torch.rand(1, 32, 32), torch.rand(1, 32, 32), "(3, H, W)"),
    ("piqe", torch.rand(3, 32, 32) * 255, None, "clamp"),
    ("piqe", torch.full((3, 32, 32), float("nan")), None, "clamp"),
])
def test_bad_input_is_one_line_that_says_what_to_do(name, image, reference, words):
    with pytest.raises(FoundIRError, match=words.replace("(", r"\(").replace(")", r"\)")) as e:
        score(name, image, reference)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("name", [n for n in OFFLINE if METRICS[n].minimum > 1])
def test_too_small_is_refused_and_the_minimum_is_enough(name):
    side = METRICS[name].minimum
    with pytest.raises(Unscorable, match=str(side)): score(name, picture(side - 1), picture(side - 1))
    assert math.isfinite(score(name, noisy(picture(side), 0.05), picture(side)))


def test_niqe_of_a_blank_picture_is_unscorable_not_a_number():
    with pytest.raises(Unscorable, match="structure"): score("niqe", torch.full((3, 512, 512), 0.5))


def test_missing_weights_are_named_and_never_replaced_by_a_download(monkeypatch, tmp_path):
    monkeypatch.setenv("FOUNDIR_V2_WEIGHTS", str(tmp_path))
    for name in ("niqe", "stlpips"):
        with pytest.raises(MetricUnavailable, match="foundir-v2 data fetch"): iqa.prepare([name])


@pytest.mark.parametrize("name, content", [("stlpips", b""), ("stlpips", b"no pickle"), ("niqe", b"no mat file")])
def test_damaged_weights_are_refused(monkeypatch, tmp_path, name, content):
    (tmp_path/METRICS[name].weights).write_bytes(content)
    monkeypatch.setenv("FOUNDIR_V2_WEIGHTS", str(tmp_path))
    with pytest.raises(MetricUnavailable, match="data fetch"): iqa.prepare([name])


def test_stlpips_pickle_can_not_run_code(monkeypatch, tmp_path):
    class Evil:
        def __reduce__(self): return (open, (str(tmp_path/"touched"), "w"))
    torch.save({"x": Evil()}, tmp_path/METRICS["stlpips"].weights)
    monkeypatch.setenv("FOUNDIR_V2_WEIGHTS", str(tmp_path))
    with pytest.raises(MetricUnavailable): iqa.prepare(["stlpips"])
    assert not (tmp_path/"touched").exists()


@pytest.mark.parametrize("name", [m.name for m in METRICS.values() if m.weights == HUB])
def test_hub_metrics_without_a_network_fail_fast_and_say_what_works(monkeypatch, tmp_path, name, capsys):
    "With empty caches and no way out: an error without a minute of retries, and nothing printed."
    import pyiqa.utils.download_util as download
    from huggingface_hub import constants
    monkeypatch.setattr(iqa, "_hub_reachable", lambda: False)
    monkeypatch.setattr(download, "DEFAULT_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    def refuse(*args, **kwargs): raise OSError("no network in this test")
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    waits, sleep = [], time.sleep
    def wait(seconds):  # other threads, of libraries for instance, go on as before
        (waits.append if threading.current_thread() is threading.main_thread() else sleep)(seconds)
    monkeypatch.setattr("time.sleep", wait)
    iqa._create.cache_clear()
    with pytest.raises(MetricUnavailable, match="psnr, ssim, stlpips, piqe, niqe") as e: iqa.prepare([name])
    assert sum(waits) < 30 and name in str(e.value) and "\n" not in str(e.value)
    assert capsys.readouterr() == ("", "")
    assert constants.HF_HUB_OFFLINE is False or "HF_HUB_OFFLINE" in __import__("os").environ


def test_importing_the_module_does_not_import_pyiqa():
    import subprocess, sys
    code = "import sys, foundir_v2.iqa; print(sum(m.split('.')[0] == 'pyiqa' for m in sys.modules))"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "0")


def test_without_pyiqa_the_extra_is_named(monkeypatch):
    import sys
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    iqa._create.cache_clear()
    with pytest.raises(MetricUnavailable, match="metrics"): score("psnr", picture(), picture())
    iqa._create.cache_clear()


def test_a_picture_in_another_range_is_told_how_to_convert_it():
    with pytest.raises(FoundIRError, match="x / 2"): score("psnr", torch.rand(3, 32, 32) * 2 - 1, torch.rand(3, 32, 32))
    with pytest.raises(FoundIRError, match="must be"): score("psnr", torch.rand(0, 3, 32, 32), torch.rand(0, 3, 32, 32))


def test_transformers_llama_stays_its_own():
    "Some of pyiqa's networks put an older one in its place, of which no model that describes pictures can be made."
    run = """if True:
        from foundir_v2.iqa import _llama_as_it_was
        with _llama_as_it_was(): import pyiqa.archs.q_align.cmp_modelling_mplug_owl2
        from transformers.models.llama import modeling_llama as llama
        tiny = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
        model = llama.LlamaForCausalLM(llama.LlamaConfig(**tiny)).model
        print(*{part.__module__ for part in (model.config, model.layers[0].self_attn, model.forward)})"""
    out = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, check=True).stdout.split()
    assert out and all(module.startswith("transformers.models.llama.") for module in out)


def test_a_number_follows_its_protocol_and_no_other():
    "What else goes by the same names gives other numbers; the catalogue says which one is meant."
    import pyiqa
    a = torch.nn.functional.interpolate(torch.rand(1, 3, 64, 64, generator=generator("protocol")), (512, 512),
                                        mode="bicubic").clamp(0, 1)
    b = (a + .1 * torch.randn(a.shape, generator=generator("noise"))).clamp(0, 1)
    other = lambda name, **options: float(pyiqa.create_metric(name, device="cpu", **options)(b, a))
    assert score("psnr", b, a) == pytest.approx(float(-10 * ((a - b) ** 2).mean().log10()), abs=1e-3)
    assert other("psnry") > score("psnr", b, a) + .5 and "RGB" in METRICS["psnr"].note
    assert score("ssim", b, a) == pytest.approx(other("ssim", downsample=False, test_y_channel=True), abs=1e-6)
    assert other("ssim", downsample=True) > score("ssim", b, a) + .05 > other("ssimc") + .05
    dark = (b * .5, b)
    assert score("piqe", dark[0]) == pytest.approx(score("piqe", dark[1]), abs=.5), "darkness doesn't count"


def test_what_belongs_beside_a_number_is_told():
    told = iqa.metric_facts(METRICS)
    assert list(told) == list(METRICS) and all(all(row.values()) for row in told.values())
    assert told["stlpips"]["weights"].startswith("alex_shift_tolerant.pth ") and told["psnr"]["weights"] == "none"
    assert "no downsampling" in told["ssim"]["definition"] and "grid" in told["maniqa"]["definition"]
    assert told["piqe"]["better"] == "lower" and told["lpips"]["by"].startswith("pyiqa 0.")
    with pytest.raises(FoundIRError, match="unknown metric"): iqa.metric_facts(["pnsr"])
