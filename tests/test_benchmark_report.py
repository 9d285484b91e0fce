"The benchmark's report: the numbers of the CSV in every form, names escaped, and a page that works in a browser."
import html
import re
import shutil
import subprocess

import pandas as pd
import pytest
import torch
from bs4 import BeautifulSoup

from foundir_v2 import cli
from foundir_v2.benchmark import DIGITS, beside_published, published, results_table
from foundir_v2.benchmark_report import benchmark_page, extreme_rows, figure_html, ranks_beside, scatter
from foundir_v2.core import FoundIRError, generator, save_image
from foundir_v2.iqa import metric
from foundir_v2.trials import COLUMNS

BROWSER = next(filter(None, map(shutil.which, ("chromium-headless-shell", "chromium", "google-chrome"))), None)
NAME = "50 % of a_b & c|d <$x^2*>"
PROBE = """<script>
const told = [], scene = document.querySelector("section"), find = what => scene.querySelector(what);
told.push(document.querySelectorAll("section").length, find(".over").alt, find(".under").alt);
find("input").value = "25"; find("input").dispatchEvent(new Event("input"));
told.push(find(".frame").style.getPropertyValue("--at"));
Promise.all([...document.images].filter(i => !i.hidden).map(i => i.decode())).then(() => {
  told.push([...document.images].every(i => i.hidden || i.naturalWidth > 0));
  told.push(getComputedStyle(document.querySelector("td.best")).fontWeight);
  document.body.dataset.told = JSON.stringify(told); });
</script>"""


def made(methods=("input", NAME), images=3):
    "Results of two paired sets and one without ground truths; the last picture of the first has no value."
    g, rows = generator("report"), []
    for dataset, metrics in (("nh_haze", ("psnr", "ssim")), ("dense_haze", ("psnr", "ssim")), ("polyu", ("piqe",))):
        for i in range(images):
            for m in methods:
                for name in metrics:
                    value = float(torch.rand(1, generator=g)) * (1 if name == "ssim" else 30)
                    lost = (dataset, i) == ("nh_haze", images - 1)
                    rows.append((dataset, f"{i}.png", m, name, float("nan") if lost else value, "broken" * lost))
    return pd.DataFrame(rows, columns=list(COLUMNS))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    "The command itself, on a miniature, with two methods of which one is called as badly as can be."
    root = tmp_path_factory.mktemp("run")
    for folder in ("NH-HAZE", "Dense-HAZE"):
        for i in range(3):
            x = torch.rand(3, 6, 8, generator=generator(folder, i))
            x = torch.nn.functional.interpolate(x[None], (48, 64), mode="bicubic")[0].clamp(0, 1)
            below = ("hazy/", "GT/") if folder == "Dense-HAZE" else ("", "")
            save_image(x * .5 + .4, root / f"sets/{folder}/{below[0]}{i}_hazy.png")
            save_image(x, root / f"sets/{folder}/{below[1]}{i}_GT.png")
    assert cli.main(["benchmark", "--datasets", str(root / "sets"), "--methods", "input=bicubic", f"{NAME}=levels",
                     "--metrics", "psnr,ssim", "--out", str(root / "out"), "--keep"]) == 0
    return root / "out"


def words(summary):
    "(dataset, metric, method) -> the mean as it is printed."
    return {(r.dataset, r.metric, r.method): f"{r.value:.{DIGITS.get(r.metric, 4)}f}" for r in summary.itertuples()}


def test_the_numbers_of_every_form_are_those_of_the_csv(run):
    summary, paper = pd.read_csv(run / "summary.csv"), published()
    mine = words(summary)
    theirs = words(paper[paper.dataset.isin(summary.dataset) & paper.metric.isin(summary.metric)])
    methods = ["input", NAME, *dict.fromkeys(m for *_, m in theirs)]
    rows = [(d, m) for d in summary.dataset.unique() for m in ("psnr", "ssim")]
    expected = [[{**mine, **theirs}[(*row, method)] for method in methods] for row in rows]
    assert len(mine) == 8 and len(theirs) == 4 * (len(methods) - 2)

    text = (run / "table.md").read_text()
    found = [re.split(r"(?<!\\)\|", line)[3:-1] for line in text.splitlines()[2:]]
    assert [[re.sub(r"[*]|</?u>", "", cell).strip() for cell in row] for row in found] == expected
    assert "here: 50 % of a\\_b & c\\|d \\<$x^2\\*\\>" in text and "paper: FoundIR-v2" in text

    text = (run / "table.tex").read_text()
    found = [line.split(" & ")[2:] for line in text.splitlines() if re.search(r"(PSNR|SSIM) \$", line)]
    assert [[re.sub(r"\\(textbf|underline)\{([^}]*)\}", r"\2", c).removesuffix(r" \\") for c in row]
            for row in found] == expected
    assert r"50 \% of a\_b \& c|d <\$x\textasciicircum 2*>" in text
    assert not re.search(r"(?<!\\)[%_]", text.split("\n", 1)[1])

    page = BeautifulSoup((run / "report.html").read_text(), "html.parser")
    table = page.find(id="T_results")
    found = [[cell.text for cell in row.find_all("td")] for row in table.tbody.find_all("tr")]
    assert found == expected and NAME in [h.text for h in table.find_all("th")]
    marked = {kind: sum(kind in c["class"] for c in table.find_all("td")) for kind in ("best", "second", "paper")}
    assert marked["best"] == (run / "table.md").read_text().count("**") // 2 >= 8 and marked["paper"] == len(theirs)


def test_each_source_has_its_own_best(run):
    both = beside_published(pd.read_csv(run / "summary.csv"))
    tables = ranks_beside(both)
    assert list(tables["among the methods measured here"].index.sort_values()) == sorted(["input", NAME])
    assert {"input", NAME, "FoundIR-v2 (paper)"} <= set(tables["with the paper's"].index)
    more = both[both.source == "here"].assign(metric="piqe", source="here")  # of which the paper prints none here
    wider = ranks_beside(pd.concat([both, more], ignore_index=True))
    assert wider["with the paper's"].equals(tables["with the paper's"])
    assert set(tables["with the paper's"].comparisons) == {4}
    row = results_table(both).splitlines()[2]
    assert row.count("**") == 4, "one here, one in the paper"


def test_what_the_numbers_depend_on_is_printed(run):
    page = BeautifulSoup((run / "report.html").read_text(), "html.parser").get_text("\n")
    for told in ("RGB, 8 bits, whole", "luminance, 11x11", "pyiqa", "torch", "3 of 3", "levels"): assert told in page
    methods, metrics = (pd.read_csv(run / f"{name}.csv", index_col=0) for name in ("methods", "metrics"))
    assert methods.restorer.to_dict() == {"input": "bicubic", NAME: "levels"}
    assert metrics.definition["psnr"] == metric("psnr").note
    about = benchmark_page(made(("input", "model")), {"input": "bicubic", "model": "pipeline:tiny"})
    assert "num_inference_steps: 1" in about and re.search("tiny [0-9a-f]{12}; base [0-9a-f]{12}", about)


def test_pictures_without_a_value_are_counted_and_have_their_reason():
    page = benchmark_page(made(), {"input": "bicubic", NAME: "levels"})
    text = BeautifulSoup(page, "html.parser").get_text("|")
    assert "2 of 3" in text and "3 of 3" in text and "broken" in text and "<section>" not in page
    assert "PIQE" in text and html.escape(NAME) in page and "<$x" not in page
    alone = benchmark_page(made(("input",)), {"input": "bicubic"})
    assert "takes two methods" in alone and 'class="data row0 col0 best"' not in alone


def test_the_figure_has_a_dot_for_each_picture_and_the_same_bytes_each_time():
    table = made(images=5)
    fig = scatter(table, "dense_haze", "input")
    (first, second) = (ax.collections[0].get_offsets() for ax in fig.axes)
    wide = table[table.dataset == "dense_haze"].pivot(index="image", columns=["metric", "method"], values="value")
    assert first.tolist() == wide["psnr"][["input", NAME]].to_numpy().tolist() and len(second) == 5
    assert figure_html(fig, "<a>") == figure_html(scatter(table, "dense_haze", "input"), "<a>")
    with pytest.raises(FoundIRError, match="two methods"): scatter(table, "dense_haze", "nobody")


def test_the_worst_come_first():
    table = made(images=9)
    for name, dataset in (("psnr", "dense_haze"), ("piqe", "polyu")):
        rows, values = extreme_rows(table, dataset, NAME, name, 2)[NAME], table[table.dataset == dataset]
        values = values[(values.method == NAME) & (values.metric == name)].value
        worst, best = (values.min(), values.max())[::1 if name == "psnr" else -1]
        assert rows.iloc[0] == worst and rows.iloc[2] == best and len(rows) == 4


@pytest.mark.skipif(BROWSER is None, reason="no headless Chromium here: apt-get install chromium-headless-shell")
def test_the_page_works_in_a_browser(run, tmp_path):
    page, path = (run / "report.html").read_text(), tmp_path / "page.html"
    assert not re.search(r"https?:|src=\"(?!data:)", page), "whole in itself"
    path.write_text(page.replace("</html>", PROBE + "</html>"))
    done = subprocess.run([BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
                           "--virtual-time-budget=5000", "--dump-dom", path.as_uri()], capture_output=True, text=True,
                          timeout=120)
    told = re.search(r'data-told="([^"]*)"', done.stdout)
    assert told, done.stdout[-500:] + done.stderr[-2000:]
    assert html.unescape(html.unescape(told[1])) == f'[6,"input","{NAME}","25%",true,"700"]'
    assert "Uncaught" not in done.stderr and "Refused" not in done.stderr, done.stderr


def test_a_run_without_any_value_has_a_page_with_the_reasons():
    table = made().assign(value=float("nan"), reason="can't be loaded: <no memory>")
    text = benchmark_page(table, {"input": "bicubic", NAME: "levels"})
    assert "no values" in text and "can&#x27;t be loaded" in text or "can't be loaded: &lt;no memory&gt;" in text
