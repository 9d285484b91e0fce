"The catalogue of compared systems: rows that can be believed, what is missing is said, results are found."
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from foundir_v2.architectures import ARCHITECTURES
from foundir_v2.benchmark import published
from foundir_v2.core import FoundIRError
from foundir_v2.external import parse_template, placeholders
from foundir_v2.memo import Memo
from foundir_v2.restorers import make_restorer, parse_restorer, restorer_sources
from foundir_v2.systems import SYSTEMS, WAYS, SpandrelRestorer, System, catalogue, lacking, make_system, system
from foundir_v2.tasks import CATEGORIES, SUBTASKS
from foundir_v2.trials import method_id, run_trials

COMMANDS = [name for name, s in SYSTEMS.items() if s.runs == "command"]
X = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(0))
PROGRAM = """
import re, sys
from pathlib import Path
from PIL import Image
given, kind, source, target, size, result, prefix = sys.argv[1:8]
files = sorted(Path(source).iterdir()) if kind == "folder" else [Path(source)]
for path in files:
    out = Path(target) if kind == "file" else Path(target, result.format(name=path.stem).replace("*", prefix) + ".png")
    out.parent.mkdir(parents=True, exist_ok=True)
    Image.open(path).resize(tuple(map(int, size.split("x")))).save(out)
"""


def test_every_system_of_the_paper_has_a_row():
    titles = {s.title for s in SYSTEMS.values()}
    assert set(published().method) - {"FoundIR-v2"} <= titles and {"HYPIR", "GPT-5"} <= titles
    assert len(titles) == len(SYSTEMS)


@pytest.mark.parametrize("name", SYSTEMS)
def test_a_row_is_complete(name):
    s = SYSTEMS[name]
    assert re.fullmatch("[a-z0-9-]+", name) and all((s.title, s.paper, s.source, s.code, s.weights, s.tasks))
    assert s.runs in WAYS and bool(s.command) == (s.runs == "command")
    assert re.fullmatch(r"[0-9a-f]{7} \d{4}-\d\d-\d\d", s.read) or s.runs == "api", "which files say so"
    assert set(s.words) <= {*SUBTASKS, *CATEGORIES} and placeholders(s.result) == {"name"}
    assert s.architecture in ARCHITECTURES if s.runs == "native" else not s.architecture
    assert (s.runs in ("spandrel", "native")) <= ("weights" in s.paths)
    if s.runs == "folder": assert s.setup, "why there is no command"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_template_runs_and_its_result_is_found(name, tmp_path):
    "With a program of our own in the place of the system's, which writes where the system is said to write."
    s = SYSTEMS[name]
    words = parse_template(s.command, ["python", *s.paths])
    named = set().union(*map(placeholders, words))
    assert words[0] == "{python}" and set(s.paths) <= named and ("task" in named) == bool(s.words)
    (tmp_path / "program.py").write_text(PROGRAM)
    task = next((t for t in s.words if t in SUBTASKS), "low_light" if "lowlight" in s.words else "motion_blur")
    size = "x".join(str(side * SUBTASKS[task].scale) for side in (24, 16))
    kind = "file" if "output" in named else "folder"
    source, target = ("{input}", "{output}") if kind == "file" else ("{inputs}", "{outputs}")
    told = " ".join(sorted(f"{{{n}}}" for n in named - {"input", "output", "inputs", "outputs"}))
    result = s.result.replace("{name}", "{{name}}")
    words = ["{python}", "program.py", told, kind, source, target, size, result, "a" if "*" in result else ""]
    SYSTEMS["stand-in"] = s._replace(command=shlex.join(words))
    try:
        options = {"folder": str(tmp_path), "python": sys.executable, "paths": {k: f"/weights/{k}" for k in s.paths}}
        made = make_system("stand-in", options)
        made.prepare([])
        assert made(X, subtask=task).shape[-2:] == X.shape[-2:]
    finally: del SYSTEMS["stand-in"]


def test_what_is_missing_is_said(tmp_path, monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    table = catalogue()
    assert list(table.index) == list(SYSTEMS) and (table.missing != "").all() and not table.tried.any()
    assert table.published["diffuir"] == 60 and table.published["maxim"] == 0
    assert "OPENAI_API_KEY" in table.missing["gpt-5"] and "clone of github.com/cswry/SeeSR" in table.missing["seesr"]
    (tmp_path / "Real-ESRGAN").mkdir()
    (tmp_path / "SeeSR").mkdir()
    here = catalogue(tmp_path)
    assert here.missing["real-esrgan"] == "" and "folder" not in here.missing["seesr"].split(" ")[0]
    assert "paths.dape (DAPE.pth)" in here.missing["seesr"] and len(here) == len(table)
    assert lacking("real-esrgan", {"folder": "nowhere"}) == ["folder (there is no nowhere)"]
    monkeypatch.setitem(SYSTEMS, "new", System("New", "-", "a/b", "-", "-", "-", "folder"))
    assert "folder:INPUTS,RESULTS" in catalogue().missing["new"], "a row from outside"


@pytest.mark.parametrize("spec, options, words", [
    ("system:nonsense", {}, "unknown system 'nonsense': choose from promptir"), ("system:", {}, "unknown restorer"),
    ("system:seesr", {"path": {}}, "it takes folder, python, paths"), ("system:seesr", {"timeout": -1}, "timeout")])
def test_mistakes_are_refused_early(spec, options, words):
    with pytest.raises(FoundIRError, match=re.escape(words)): parse_restorer(spec, options)


def test_mistakes_that_depend_on_the_machine(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    for spec, options, words in (("system:supir", {}, "lacks folder"), ("system:diffuir", {}, "a run by hand"),
                                 ("system:gpt-5", {}, "lacks model"), ("system:bsrgan", {}, "paths.weights"),
                                 ("system:supir", {"paths": {"weights": "x"}}, "has no paths.weights"),
                                 ("system:bsrgan", {"paths": {"weights": "none.pth"}}, "no weights at none.pth")):
        with pytest.raises(FoundIRError, match=re.escape(words)) as e: make_restorer(spec, options)
        assert "\n" not in str(e.value)


def test_an_unavailable_system_is_rows_with_the_reason(tmp_path):
    from foundir_v2.core import save_image
    for side in ("hazy", "GT"): save_image(X, tmp_path / f"sets/1_{side}.png")
    rows = run_trials({"nh_haze": tmp_path / "sets"}, {"a": "system:supir", "b": "system:diffuir", "c": "bicubic"},
                      Memo(tmp_path / "m.sqlite"), ["psnr"])
    assert rows.value.notna().tolist() == [False, False, True]
    assert "clone of github.com/Fanghua-Yu/SUPIR" in rows.reason[0] and "a run by hand" in rows.reason[1]


def test_a_task_that_a_system_does_not_know_is_refused(tmp_path):
    (tmp_path / "demo.py").touch()
    made = make_system("restormer", {"folder": str(tmp_path), "python": sys.executable})
    with pytest.raises(FoundIRError, match="no word for low_light: its tasks are"): made(X, subtask="low_light")
    own = make_system("restormer", {"folder": str(tmp_path), "tasks": {"lowlight": "Dark"}})
    assert own.tasks == {"lowlight": "Dark"}
    assert restorer_sources("system:restormer", {"folder": str(tmp_path)})[0] == [tmp_path / "demo.py"]


def test_weights_in_a_file(tmp_path):
    from spandrel.architectures.ESRGAN import ESRGAN
    torch.manual_seed(0)
    torch.save(ESRGAN(num_filters=4, num_blocks=1, scale=4).state_dict(), tmp_path / "BSRGAN.pth")
    spandrel = make_restorer(f"spandrel:{tmp_path / 'BSRGAN.pth'}")
    named = make_system("bsrgan", {"paths": {"weights": str(tmp_path / "BSRGAN.pth")}})
    for task, side in (("sr_x4", 4), ("sr_x2", 2), ("haze", 1)):
        x = spandrel(X, subtask=task)
        assert x.shape == (3, 16 * side, 24 * side) and torch.equal(x, named(X, subtask=task))
        assert x.min() >= 0 and x.max() <= 1 and torch.isfinite(x).all()


@pytest.mark.parametrize("content, words", [(None, "no weights at"), (b"", "can't read"), (b"x" * 100, "can't read")])
def test_files_without_a_network(tmp_path, content, words):
    if content is not None: (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(FoundIRError, match=words) as e: SpandrelRestorer(tmp_path / "a.pth", "cpu")
    assert "\n" not in str(e.value)


def test_weights_run_no_code(tmp_path):
    class Trap:
        def __reduce__(self): return Path.touch, (tmp_path / "trapped",)
    torch.save({"params": Trap()}, tmp_path / "a.pth")
    with pytest.raises(FoundIRError, match="can't read"): SpandrelRestorer(tmp_path / "a.pth", "cpu")
    assert not (tmp_path / "trapped").exists()


def test_without_spandrel_the_rest_goes_on():
    code = ("import sys; sys.modules['spandrel'] = None\nfrom foundir_v2.systems import *\n"
            "print(lacking('bsrgan', {'paths': {'weights': 'x'}}), len(catalogue()))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "the package spandrel" in done.stdout, done.stderr[-500:]


def test_a_changed_template_is_another_method(monkeypatch):
    before = method_id("system:supir"), method_id("system:seesr")
    monkeypatch.setitem(SYSTEMS, "supir", SYSTEMS["supir"]._replace(command="{python} x {inputs} {outputs}"))
    monkeypatch.setitem(SYSTEMS, "seesr", SYSTEMS["seesr"]._replace(weights="another licence"))
    assert method_id("system:supir") != before[0] and method_id("system:seesr") == before[1]


def test_a_system_is_looked_up():
    assert system("da-clip").title == "DA-CLIP"
