"External commands and HTTP APIs as restorers: whatever they do wrong is one line, and is recorded by picture."
import base64
import io
import json
import os
import re
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from PIL import Image

from foundir_v2 import cli
from foundir_v2.cli_benchmark import read_methods
from foundir_v2.core import FoundIRError, generator, save_image
from foundir_v2.external import (ApiRestorer, CommandRestorer, check_api, command_files, parse_template, picture_in,
                                 run_command, task_word)
from foundir_v2.memo import Memo
from foundir_v2.restorers import make_restorer, parse_restorer, restorer_sources
from foundir_v2.trials import method_id, run_trials

SCRIPT = """
import os, sys
from pathlib import Path
from PIL import Image, ImageOps
source, target, mode, *rest = sys.argv[1:]
with open(Path(__file__).with_name("runs"), "a") as log: print(mode, *rest, file=log)
files = sorted(Path(source).iterdir()) if Path(source).is_dir() else [Path(source)]
for i, path in enumerate(files):
    out = Path(target, path.name) if Path(target).is_dir() else Path(target)
    if mode == "half" and i >= len(files) // 2: raise RuntimeError("out of\\nmemory")
    if mode == "garbage": out.write_bytes(b"no picture")
    elif mode == "small": Image.new("RGB", (5, 4)).save(out)
    elif mode == "nothing": print("all done")
    else: ImageOps.invert(Image.open(path)).save(out)
"""
X = torch.rand(3, 12, 16, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


@pytest.fixture
def script(tmp_path):
    folder = tmp_path / "a system"
    folder.mkdir()
    (folder / "run.py").write_text(SCRIPT)
    return folder


def command(script, mode, single=False, **options):
    places = "{input} {output}" if single else "{inputs} {outputs}"
    return CommandRestorer(f"'{sys.executable}' run.py {places} {mode}", "mine", script, **options)


def runs(script): return (script / "runs").read_text().splitlines()


def items(n, subtask="haze", **more):
    pictures = [torch.rand(3, 8, 8, generator=generator("items", i)).mul(255).round() / 255 for i in range(n)]
    return [SimpleNamespace(lq=x, subtask=subtask, seed=0, **more) for x in pictures]


@pytest.mark.parametrize("single", [True, False])
def test_a_command_restores_a_picture(script, single):
    "Eight bits there and back, through a folder with a blank in its name."
    assert (command(script, "invert", single)(X, subtask="haze") - (1 - X)).abs().max() < 1e-6


def test_a_batch_is_one_run_for_all(script):
    mine, some = command(script, "invert"), items(4)
    mine.prepare(iter(some + some[:1]))
    assert runs(script) == ["invert"]
    assert all((mine(i.lq, subtask="haze") - (1 - i.lq)).abs().max() < 1e-6 for i in some)
    assert runs(script) == ["invert"] and not list(Path(mine.kept.name).glob("*/input"))
    mine(X)
    assert len(runs(script)) == 2, "what was not prepared runs alone"
    place = Path(mine.kept.name)
    del mine
    assert not place.exists()


def test_a_batch_runs_once_for_each_value_that_it_names(script):
    mine = command(script, "invert {scale} {height} {caption} {task}")
    some = [*items(2, caption="it's; a 'cat'"), *items(1, "rain", caption=""), *items(1, "gaussian_noise", caption="")]
    mine.prepare(some)
    assert sorted(runs(script)) == ["invert 1 8  gaussian_noise", "invert 1 8  rain",
                                    "invert 1 8 it's; a 'cat' haze"], "no shell has seen the caption"
    mine(some[0].lq, subtask="haze", caption="it's; a 'cat'")
    assert len(runs(script)) == 3


def test_an_evaluation_runs_a_batch_once(script):
    from foundir_v2.evaluate import evaluate
    some = items(3)
    for k, i in enumerate(some): i.gt, i.photo = 1 - i.lq, f"photo {k}"
    table = evaluate(command(script, "invert"), iter(some), ["psnr"])
    assert len(table) == 3 and (table.value > 60).all() and runs(script) == ["invert"]


def test_half_of_a_batch_counts(script):
    mine, some = command(script, "half"), items(4)
    mine.prepare(some)
    for i in some[:2]: mine(i.lq, subtask="haze")
    for i in some[2:]:
        with pytest.raises(FoundIRError, match=r"mine: .*failed \(exit code 1\): memory$"): mine(i.lq, subtask="haze")
    assert len(runs(script)) == 1, "a failure isn't tried again within a run"


@pytest.mark.parametrize("mode, words", [
    ("half", "exit code 1"), ("garbage", "can't read its result as an image"), ("nothing", "wrote no result"),
    ("small", "has 5 x 4 pixels, expected 16 x 12")])
@pytest.mark.parametrize("single", [True, False])
def test_what_goes_wrong_is_one_line(script, mode, words, single):
    with pytest.raises(FoundIRError, match=words) as e: command(script, mode, single)(X)
    assert "\n" not in str(e.value) and "foundir-" not in str(e.value)


def test_results_by_another_name(script):
    writer = "import sys; from PIL import Image; [Image.open(sys.argv[1]).save(sys.argv[2] + n) for n in sys.argv[3:]]"
    mine = CommandRestorer(f"'{sys.executable}' -c '{writer}' {{input}} {{outputs}} /000000_out.webp",
                           result="{name}_out")
    assert mine(X).shape == X.shape
    both = CommandRestorer(f"'{sys.executable}' -c '{writer}' {{input}} {{outputs}} /000000.png /000000.bmp")
    with pytest.raises(FoundIRError, match="wrote 2 results"): both(X)


def alive(marker):
    return [p.pid for p in psutil.process_iter(["cmdline"]) if marker in " ".join(p.info["cmdline"] or [])]


@pytest.mark.parametrize("session", [False, True])
def test_a_command_that_sleeps_is_ended_with_its_children(tmp_path, session):
    marker = f"sleeper-{tmp_path.name}-{os.getpid()}"
    child = f"import time; time.sleep(120)  # {marker}"
    parent = (f"import subprocess, sys, time\nsubprocess.Popen([sys.executable, '-c', {child!r}], "
              f"start_new_session={session})\nopen({str(tmp_path / 'up')!r}, 'w').close()\ntime.sleep(120)")
    begin = time.monotonic()
    with pytest.raises(FoundIRError, match="was ended after 8 s"):
        run_command([sys.executable, "-c", parent], timeout=8)
    assert (tmp_path / "up").exists() and time.monotonic() - begin < 60
    for _ in range(100):
        if not alive(marker): break
        time.sleep(0.1)
    assert not alive(marker)


def test_what_a_command_leaves_behind_is_ended(tmp_path):
    marker = f"left-{tmp_path.name}-{os.getpid()}"
    child = f"import time; time.sleep(120)  # {marker}"
    parent = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    run_command([sys.executable, "-c", parent], timeout=60)
    for _ in range(100):
        if not alive(marker): break
        time.sleep(0.1)
    assert not alive(marker)


def test_a_command_does_not_see_who_we_are(monkeypatch, tmp_path):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "PYTHONPATH"): monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    code = "import os; assert os.environ['KEPT'] and not {'RANK', 'PYTHONPATH'} & set(os.environ)"
    run_command([sys.executable, "-c", code])


def test_trials_record_by_picture_and_ask_only_for_what_is_left(script, tmp_path):
    for k in range(4):
        for name, x in (("hazy", X.roll(k, 2)), ("GT", X)): save_image(x, tmp_path / f"sets/{k}_{name}.png")
    template = lambda mode: f"command:'{sys.executable}' run.py {{inputs}} {{outputs}} {mode}"
    methods = {"m": {"restorer": template("half"), "folder": str(script)}}
    run = lambda: run_trials({"nh_haze": tmp_path / "sets"}, methods, Memo(tmp_path / "m.sqlite"), ["psnr"])
    first, second = run(), run()
    assert first.value.notna().tolist() == [True, True, False, False] and "memory" in first.reason[3]
    assert second.value.notna().sum() == 3 and len(runs(script)) == 2, "the second run had two pictures to do"
    methods["m"]["restorer"] = template("invert")
    assert run().value.notna().all() and len(runs(script)) == 3
    run()
    assert len(runs(script)) == 3
    before = method_id(methods["m"])
    (script / "run.py").write_text(SCRIPT + "\n")
    assert method_id(methods["m"]) != before, "the script is a part of the method's name"


def test_the_command_line_takes_commands(script, tmp_path, capsys):
    for name in ("a_hazy", "a_GT"): save_image(X, tmp_path / f"sets/NH-HAZE/{name}.png")
    template = f"command:{sys.executable} run.py {{input}} {{output}} invert {'x' * 300}"
    spec = {"restorer": template, "folder": str(script)}
    assert cli.main(["benchmark", "--datasets", str(tmp_path / "sets"), "--methods", f"mine={json.dumps(spec)}",
                     "--metrics", "psnr", "--out", str(tmp_path / "out")]) == 0
    assert "mine" in capsys.readouterr().out
    assert restorer_sources(spec["restorer"], {"folder": str(script)})[0][-1] == script / "run.py"
    assert list(read_methods(["command:run --in={input} {output}"])) == ["command:run --in={input} {output}"]


@pytest.mark.parametrize("spec, options, words", [
    ("command:run {input}", {}, "needs {input} and {output}"), ("command:run {input} {output} {x}", {}, "unknown {x}"),
    ("command:run '{input} {output}", {}, "close its quotes"), ("command:run {inputs} {output}", {}, "needs"),
    ("command:run {input} {output}", {"timeout": 0}, "timeout"), ("command:", {}, "unknown restorer"),
    ("command:run {input} {output}", {"time": 1}, "it takes folder, timeout"),
    ("api:http://example.org", {"model": "m"}, "https"), ("api:https://u:p@example.org", {"model": "m"}, "https"),
    ("api:https://[", {"model": "m"}, "https"), ("api:https://example.org", {}, "name the model"),
    ("api:https://example.org", {"model": "m", "prompt": "{x}"}, "unknown {x}")])
def test_mistakes_are_refused_before_anything_runs(spec, options, words):
    with pytest.raises(FoundIRError, match=re.escape(words)) as e: parse_restorer(spec, options)
    assert "\n" not in str(e.value)


def test_mistakes_that_depend_on_the_machine(tmp_path):
    with pytest.raises(FoundIRError, match="no folder"): make_restorer("command:r {input} {output}", {"folder": "none"})
    with pytest.raises(FoundIRError, match="write {name} once"): CommandRestorer("r {input} {output}", result="x")
    with pytest.raises(FoundIRError, match="can't start 'no-such-program'"): run_command(["no-such-program"])
    with pytest.raises(FoundIRError, match="signal 9"):
        run_command([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"])
    assert command_files("python {input} " + "x" * 5000, {"folder": str(tmp_path)}) == []
    assert parse_template("a {{b}} {input} {output}")[1] == "{{b}}"


def test_words_for_tasks():
    words = {"haze": "fog", "weather": "rain"}
    assert [task_word(t, words) for t in ("haze", "snow", None)] == ["fog", "rain", ""]
    assert task_word("snow", {}) == "snow"
    with pytest.raises(FoundIRError, match="no word for low_light: its tasks are haze, weather"):
        task_word("low_light", words)


KEY = "sk-0123456789abcdef"


class Service(BaseHTTPRequestHandler):
    "Answers with what `script` holds, in turn: a status, and bytes or a function that makes them."
    script, heard = [], []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        Service.heard.append((self.path, self.headers.get("Authorization"), body))
        self.answer(*Service.script.pop(0))

    def do_GET(self):
        Service.heard.append((self.path, self.headers.get("Authorization"), b""))
        self.answer(*Service.script.pop(0))

    def answer(self, status, body, **headers):
        if status == 0: return self.server.gone.wait(30)  # and say nothing
        self.send_response(status)
        for name, value in headers.items(): self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args): pass


@pytest.fixture
def service(monkeypatch):
    monkeypatch.setenv("TEST_KEY", f" {KEY}\n")
    Service.script, Service.heard = [], []
    server = ThreadingHTTPServer(("127.0.0.1", 0), Service)
    server.gone = threading.Event()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.gone.set()
    server.shutdown()
    server.server_close()


def png(width, height):
    out = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 0)).save(out, "PNG")
    return out.getvalue()


def answer(**data): return json.dumps({"data": [data]}).encode()


def encoded(width, height): return answer(b64_json=base64.b64encode(png(width, height)).decode())


def api(url, **options):
    return ApiRestorer(f"{url}/edits", "painter-2", **dict(key_variable="TEST_KEY", wait=0, timeout=20) | options)


def test_the_form_of_a_request(service):
    Service.script = [(200, encoded(64, 64))]
    x = api(service, form={"quality": "high"}, prompt="mend the {task} of {caption}")(X, subtask="low_light",
                                                                                      caption="a {cat}")
    (path, key, body), = Service.heard
    fields = dict(re.findall(rb'name="(\w+)"\r\n\r\n(.*?)\r\n', body))
    assert fields == {b"model": b"painter-2", b"quality": b"high", b"prompt": b"mend the low light of a {cat}"}
    sent = Image.open(io.BytesIO(body[body.index(b"\x89PNG"):]))
    assert sent.size == (16, 12) and path == "/edits" and key == f"Bearer {KEY}"
    assert x.shape == X.shape and x[0].min() > 0.99 and x[1:].max() < 0.01, "resized to the size of the input"


def test_super_resolution_is_resized_to_its_size(service):
    Service.script = [(200, encoded(16, 12))]
    assert api(service)(X, subtask="sr_x2").shape == (3, 24, 32)


def test_a_result_elsewhere_is_fetched_without_the_key(service):
    Service.script = [(200, answer(url=f"{service}/result.png")), (200, png(16, 12))]
    assert api(service)(X).shape == X.shape
    assert [(path, key) for path, key, _ in Service.heard] == [("/edits", f"Bearer {KEY}"), ("/result.png", None)]


def test_busy_servers_are_asked_again(service):
    Service.script = [(429, b""), (503, b""), (200, encoded(16, 12))]
    assert api(service)(X).shape == X.shape and len(Service.heard) == 3
    assert len({body[-200:].split(b"--")[0] for _, _, body in Service.heard}) == 1, "the same request"
    Service.script = [(503, b"busy")] * 3
    with pytest.raises(FoundIRError, match="answered 503: busy"): api(service, retries=2)(X)
    assert not Service.script


@pytest.mark.parametrize("script, words", [
    ([(401, KEY.encode())], "refused the key in TEST_KEY"),
    ([(400, json.dumps({"error": {"message": f"bad\nsize {KEY}"}}).encode())], "answered 400: bad size …"),
    ([(200, b"<html>")], "can't read the answer as JSON"), ([(200, b"[" * 100_000)], "nested too deeply"),
    ([(200, b'{"data": []}')], "no data"), ([(200, answer(url="file:///etc/passwd"))], "no data"),
    ([(200, answer(b64_json="***"))], "isn't base64"), ([(200, answer(b64_json="bm8="))], "is no picture"),
    ([(302, b"")], "answered 302"), ([(0, b"")], "no answer within 1 s")])
def test_bad_answers_are_one_line_without_the_key(service, script, words):
    Service.script, timeout = list(script), 20 if script[0][0] else 1
    with pytest.raises(FoundIRError) as e: api(service, timeout=timeout, retries=0)(X)
    line = str(e.value)
    assert words in line and "\n" not in line and KEY not in line and len(line) < 700
    assert len(Service.heard) == 1 and e.value.__cause__ is None


def test_nobody_there(monkeypatch):
    monkeypatch.setenv("TEST_KEY", KEY)
    with pytest.raises(FoundIRError, match="^127.0.0.1: ") as e: api("http://127.0.0.1:9", retries=0)(X)
    assert KEY not in str(e.value) and "\n" not in str(e.value)


def test_keys_stay_where_they_are(monkeypatch):
    monkeypatch.delenv("TEST_KEY", raising=False)
    with pytest.raises(FoundIRError, match="no key for example.org: put it into the variable TEST_KEY"):
        api("https://example.org")
    with pytest.raises(FoundIRError) as e: check_api("https://example.org", {"model": "m", "key_variable": KEY})
    assert KEY not in str(e.value)
    monkeypatch.setenv("TEST_KEY", "two\nlines")
    with pytest.raises(FoundIRError, match="is no key"): api("https://example.org")
    monkeypatch.setenv("TEST_KEY", KEY)
    assert KEY not in repr(vars(api("https://example.org")))


def test_pictures_in_answers():
    assert picture_in(answer(b64_json="aGk=", url="https://x")) == b"hi"
    assert picture_in(answer(url="https://x")) == "https://x"
