"The contact sheet: order, escaping, decisions that come back, and the report's tables."
import json, math, re, shutil, subprocess
from html.parser import HTMLParser

import pandas as pd
import pytest
import torch

from foundir_v2.clean import REVIEW, Statistics, Threshold, clean, make_thresholds, read_manual
from foundir_v2.contact import (before_after_cleaning, contact_sheet, most_suspicious, objections, suspicion,
                                write_contact_sheet)
from foundir_v2.core import save_image
from foundir_v2.index import ACCEPTED, REJECTED, inspect
from foundir_v2.listing import Entry

NAMES = ["a name with spaces", "Größe 日本.x", 'quo"te\'s', "<img src=x onerror=alert(1)>",
         "</script><script>alert(1)</script>", "comma, and & amp;", "{braces}", "back\\slash\u2028line"]
THRESHOLDS = [Threshold("noise", 4, 6), Threshold("detail", .52, .48)]


class Page(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.photos, self.tags, self.attributes, self.text, self.data, self._in = [], [], set(), "", "", None
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes |= {name for name, _ in attributes}
        if tag == "figure": self.photos.append(dict(attributes)["data-photo"])
        self._in = dict(attributes).get("id") or tag

    def handle_data(self, data):
        if self._in == "earlier": self.data += data
        self.text += data


@pytest.fixture(scope="module")
def judged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sheet")
    for i, _ in enumerate(NAMES):
        g = torch.Generator().manual_seed(i)
        x = torch.rand(3, 8, 8, generator=g).repeat_interleave(8, 1).repeat_interleave(8, 2)
        save_image((x + torch.randn(x.shape, generator=g) * i / 255).clamp(0, 1), folder/f"{i}.png")
    index = pd.DataFrame([inspect(Entry(n, f"{folder}/{i}.png", "train"), folder) for i, n in enumerate(NAMES)]
                         + [inspect(Entry("torn", f"{folder}/none.png", "train"), folder)])
    judges = [Statistics()]
    thresholds = make_thresholds({"noise": [4, 6]}, judges)
    return clean(index, judges, thresholds, folder), thresholds, folder


def test_suspicion_is_one_scale_for_both_directions():
    assert suspicion({"noise": 5, "detail": .9}, THRESHOLDS) == pytest.approx(.5)
    assert suspicion({"noise": 0, "detail": .48}, THRESHOLDS) == pytest.approx(1)
    assert suspicion({"noise": math.nan, "detail": .52}, THRESHOLDS) == 0
    assert suspicion({"noise": math.nan, "detail": math.nan}, THRESHOLDS) == -math.inf


def test_the_most_suspicious_come_first_and_torn_files_not_at_all(judged):
    table, thresholds, folder = judged
    order = most_suspicious(table, thresholds)
    assert list(order.suspicion) == sorted(order.suspicion, reverse=True) and "torn" not in set(order.photo)
    assert Page(contact_sheet(table, thresholds, folder)).photos == list(order.photo)
    assert Page(contact_sheet(table, thresholds, folder, most=2)).photos == list(order.photo[:2])


def test_no_name_reason_or_title_gets_out_of_its_place(judged):
    table, thresholds, folder = judged
    table = table.assign(reason=[f"because </figure><script>{n}" for n in table.photo])
    manual = {n: (REJECTED, f"manual: {n}") for n in NAMES}
    page = Page(contact_sheet(table, thresholds, folder, manual, title="<script>\"title'"))
    assert set(page.photos) == set(NAMES)
    assert page.tags.count("script") == 2 and page.tags.count("figure") == page.tags.count("img") == len(NAMES)
    assert not {"onerror", "onload", "onclick"} & page.attributes
    assert json.loads(page.data) == {n: [REJECTED, n] for n in NAMES}


def test_the_page_needs_nothing_beside_it(judged, tmp_path):
    table, thresholds, folder = judged
    page = contact_sheet(table, thresholds, folder)
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page) and "://" not in page
    write_contact_sheet(page, tmp_path/"reports"/"sheet.html")
    assert (tmp_path/"reports"/"sheet.html").read_text(encoding="utf-8") == page


@pytest.mark.skipif(not shutil.which("node"), reason="runs the page's program, which needs Node.js")
def test_what_the_page_saves_is_what_the_cleaning_reads(judged, tmp_path):
    table, thresholds, folder = judged
    manual = {n: (verdict, f"manual: {n}, \"so\"") for n, verdict in zip(NAMES, [ACCEPTED, REJECTED, REVIEW] * 3)}
    page = contact_sheet(table, thresholds, folder, manual)
    data, program = re.findall(r"<script[^>]*>(.*?)</script>", page, re.S)
    stub = f"""const element = {{textContent: {json.dumps(data)}, dataset: {{key: 'x'}}, value: ''}};
    globalThis.document = {{querySelector: () => element, querySelectorAll: () => [], getElementById: () => element,
                            addEventListener: () => null}};
    {program}
    process.stdout.write(csv());"""
    stub = stub.replace("document.getElementById('count').textContent =", "const ignored =")
    saved = subprocess.run(["node", "-e", stub], capture_output=True, check=True).stdout
    (tmp_path/"manual.csv").write_bytes(saved)
    assert read_manual(tmp_path/"manual.csv", NAMES) == manual


def test_objections_are_counted_by_measure():
    table = pd.DataFrame({"noise": [5, 7, 9, 0, math.nan], "detail": [.5, .4, .9, .9, .9]})
    found = objections(table, THRESHOLDS)
    assert found[REVIEW].to_dict() == {"noise": 1, "detail": 1}
    assert found[REJECTED].to_dict() == {"noise": 2, "detail": 1}
    assert found["it alone"].to_dict() == {"noise": 1, "detail": 0}
    assert objections(table, []).empty


def test_before_and_after():
    table = pd.DataFrame({"noise": [1., 2, 30], "verdict": [ACCEPTED, REVIEW, REJECTED]})
    found = before_after_cleaning(table, ["noise"])
    assert found.loc["noise", ("all 3", "median")] == 2 and found.loc["noise", ("kept 2", "median")] == 1.5


def test_a_file_of_several_rows_is_shown_once(judged):
    table, thresholds, folder = judged
    twice = pd.concat([table, table.assign(photo=table.photo + " again")], ignore_index=True)
    shown = [Page(contact_sheet(t, thresholds, folder)).photos for t in (table, twice)]
    assert shown[0] == shown[1]


def test_a_pair_that_was_cropped_has_a_card(judged, tmp_path):
    "A row's size is what its pair has in common; the file is larger."
    _, thresholds, folder = judged
    save_image(torch.rand(3, 63, 65), tmp_path / "gt.png"); save_image(torch.rand(3, 15, 16), tmp_path / "lq.png")
    row = inspect(Entry("pair", str(tmp_path / "gt.png"), "train", str(tmp_path / "lq.png"), "sr_x4"), tmp_path)
    assert (row["width"], row["height"]) == (64, 60)
    table = clean(pd.DataFrame([row]), [Statistics()], thresholds, tmp_path)
    assert Page(contact_sheet(table, thresholds, tmp_path)).photos == ["pair"]
