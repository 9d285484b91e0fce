"A page of sliders: whole in itself, and working in a browser where there is one."
import html
import re
import shutil
import subprocess

import pytest
import torch

from foundir_v2.core import FoundIRError, generator
from foundir_v2.sliders import slider_page, write_slider_page

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
PROBE = """<script>
const told = [], scene = document.querySelectorAll("section")[1], find = what => scene.querySelector(what);
const change = (what, value, event) => { find(what).value = value; find(what).dispatchEvent(new Event(event)); };
const source = name => [...scene.querySelectorAll("img[data-name]")].find(i => i.dataset.name === name).src;
told.push(find(".over").alt, find(".under").alt, find(".over").src === source("input"));
change("input", "25", "input"); told.push(find(".frame").style.getPropertyValue("--at"));
change(".left", "a <b>", "change"); told.push(find(".over").alt, find(".over").src === source("a <b>"));
find(".over").decode().then(() => { told.push(find(".over").naturalWidth, find(".frame").clientWidth > 0);
  document.body.dataset.told = JSON.stringify(told); });
</script>"""


def scenes():
    pictures = torch.rand(6, 3, 24, 32, generator=generator("sliders"))
    return {"first": {"input": pictures[0], "restored": pictures[1]},
            'two "<&"': {"input": pictures[2], "a <b>": pictures[3], "restored": pictures[4], "z": pictures[5]}}


def test_the_page_is_whole(tmp_path):
    path = write_slider_page(tmp_path / "new/page.html", scenes(), "A & B", note="<note>")
    page = path.read_text()
    assert page.count("data:image/jpeg;base64,") == 6 and not re.search(r"https?:|src=\"(?!data:)", page)
    assert "A &amp; B" in page and "&lt;note&gt;" in page and "two &quot;&lt;&amp;&quot;" in page
    assert slider_page(scenes(), "A & B", note="<note>") == page, "equal pictures give equal bytes"
    other = slider_page({"x": {"mine": torch.zeros(3, 8, 8), "theirs": torch.ones(3, 8, 8)}}, "t")
    assert re.findall(r"<option selected>(\w+)", other) == ["mine", "theirs"], "the first and the last"


@pytest.mark.parametrize("wrong, words", [
    ({}, "no scenes"), ({"x": {"input": torch.zeros(3, 8, 8)}}, "x: a slider needs two pictures, got 1"),
    ({"x": {"a": torch.zeros(3, 8, 8), "b": torch.zeros(3, 8, 9)}}, "x: the pictures differ in size")])
def test_what_can_not_be_compared_is_refused(wrong, words, tmp_path):
    with pytest.raises(FoundIRError, match=words): write_slider_page(tmp_path / "p.html", wrong, "t")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here: apt-get install chromium-headless-shell")
def test_sliders_work_in_a_browser(tmp_path):
    path = write_slider_page(tmp_path / "page.html", scenes(), "t")
    path.write_text(path.read_text().replace("</html>", PROBE + "</html>"))
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           "--virtual-time-budget=5000", "--dump-dom", path.as_uri()], capture_output=True, text=True,
                          timeout=120)
    told = re.search(r'data-told="([^"]*)"', done.stdout)
    assert told, done.stdout[-500:] + done.stderr[-2000:]
    assert html.unescape(told[1]) == '["input","restored",true,"25%","a <b>",true,32,true]'
    assert "Uncaught" not in done.stderr and "Refused" not in done.stderr, done.stderr
