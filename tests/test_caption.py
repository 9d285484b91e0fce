"""Captioners: none, sidecar files, tables and the shipped one, the shortening rule, a real vision-language model of
a few kilobytes, and the cache."""
import csv
import hashlib
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings, strategies as st

from foundir_v2.caption import (
    CAPTIONERS, PROMPT, CachedCaptioner, Captioner, CSVCaptioner, NoCaption, SeededChoice, SidecarCaptioner,
    VLMCaptioner, VLMConfig, captioner_choices, describe_all, make_captioner, read_captions, shipped_captions, shorten)
from foundir_v2.core import FoundIRError, save_image

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def pictures(tmp_path):
    for i, name in enumerate("ab"):
        save_image(torch.rand(3, 24, 30, generator=torch.Generator().manual_seed(i)), tmp_path/f"{name}.png")
    return tmp_path


def test_no_caption_needs_no_file(): assert NoCaption()("nowhere.png") == "" and isinstance(NoCaption(), Captioner)


def test_sidecar_reads_the_file_beside_the_picture_or_in_a_folder(pictures):
    (pictures/"a.txt").write_text("  ein  Käfer\nauf Gras ", encoding="utf-8")
    assert SidecarCaptioner()(pictures/"a.png") == "ein Käfer auf Gras"
    (pictures/"texts").mkdir()
    (pictures/"texts/a.caption").write_text("")
    assert SidecarCaptioner(".caption", pictures/"texts")(pictures/"a.png") == ""


def test_a_missing_or_binary_sidecar_is_an_error_not_an_empty_caption(pictures):
    with pytest.raises(FoundIRError, match="b.txt"): SidecarCaptioner()(pictures/"b.png")
    (pictures/"b.txt").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(FoundIRError, match="UTF-8"): SidecarCaptioner()(pictures/"b.png")
    with pytest.raises(FoundIRError, match="suffix"): SidecarCaptioner("txt")


sha256 = lambda path: hashlib.sha256(path.read_bytes()).hexdigest()


def table(path, *rows, columns=("photo", "sha256", "caption")):
    with open(path, "w", newline="", encoding="utf-8") as f: csv.writer(f).writerows([columns, *rows])
    return path


def test_a_table_goes_by_content_wherever_the_picture_lies(pictures):
    captioner = CSVCaptioner(table(pictures/"t.csv", ("a", sha256(pictures/"a.png"), "  a Käfer,\non grass "),
                                   ("b", sha256(pictures/"b.png"), "")))
    (pictures/"train").mkdir()
    moved = (pictures/"a.png").rename(pictures/"train/c.png")
    assert isinstance(captioner, Captioner) and captioner(moved) == "a Käfer, on grass"
    assert captioner(pictures/"b.png") == ""


def test_a_manifests_other_columns_their_order_a_mark_and_blank_lines_do_no_harm(pictures):
    text = f"caption,split,sha256,photo\n\na cat,train,{sha256(pictures/'a.png')},a\n\n"
    (pictures/"t.csv").write_text(text, encoding="utf-8-sig")
    assert CSVCaptioner(pictures/"t.csv")(pictures/"a.png") == "a cat"


def test_a_picture_without_a_row_is_an_error_or_has_the_empty_caption(pictures):
    file = table(pictures/"t.csv", ("a", sha256(pictures/"a.png"), "a cat"))
    with pytest.raises(FoundIRError, match="no row for .*b.png") as e: CSVCaptioner(file)(pictures/"b.png")
    assert "\n" not in str(e.value) and sha256(pictures/"b.png") in str(e.value)
    assert CSVCaptioner(file, strict=False)(pictures/"b.png") == ""


@pytest.mark.parametrize("photo, stale", [("b", True), ("train/b", True), ("other/b", False), ("ab", False)])
def test_a_stale_row_is_an_error_that_names_the_photograph(pictures, photo, stale):
    (pictures/"train").mkdir()
    moved = (pictures/"b.png").rename(pictures/"train/b.png")
    captioner = CSVCaptioner(table(pictures/"t.csv", (photo, sha256(pictures/"a.png"), "a cat")), strict=False)
    if not stale: assert captioner(moved) == ""; return
    with pytest.raises(FoundIRError, match=f"caption of {photo} was written for another picture") as e: captioner(moved)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("content, words", [
    (b"", "lacks the column photo"),
    (b"photo,caption\na,b\n", "lacks the column sha256"),
    (b"photo,sha256,caption\na," + b"0" * 64, "row 1: 2 cells"),
    (b"photo,sha256,caption\na," + b"0" * 64 + b",a cat, close\n", "row 1: 4 cells"),
    (b"photo,sha256,caption\na,12,x\n", "a: '12' is no sha256"),
    (b"photo,sha256,caption\na," + b"0" * 64 + b",x\na," + b"1" * 64 + b",y\n", "a: a second row"),
    (b"photo,sha256,caption\na," + b"0" * 64 + b",x\nb," + b"0" * 64 + b",y\n", "b: a second row"),
    (b"photo,sha256,caption\na," + b"0" * 64 + b',"open', "can't read"),
    (b"\xff\xfe\x00\x80", "UnicodeDecodeError"),
    (None, "FileNotFoundError"),
    ("folder", "IsADirectoryError")], ids=str)
def test_a_wrong_table_is_refused_in_one_line(tmp_path, content, words):
    if content == "folder": (tmp_path/"t.csv").mkdir()
    elif content is not None: (tmp_path/"t.csv").write_bytes(content)
    with pytest.raises(FoundIRError) as e: make_captioner(f"csv:{tmp_path}/t.csv", tmp_path)
    assert words in str(e.value) and "t.csv" in str(e.value) and "\n" not in str(e.value)


def test_tables_with_equal_captions_have_equal_names(pictures):
    one, two = (table(pictures/f"{n}.csv", ("a", "0" * 64, text)) for n, text in (("x", "a cat"), ("y", "a dog")))
    same = table(pictures/"z.csv", ("a", "0" * 64, "a cat"))
    names = [CSVCaptioner(one).name, CSVCaptioner(same).name, CSVCaptioner(two).name,
             CSVCaptioner(one, strict=False).name]
    assert names[0] == names[1] and len(set(names)) == 3


# ---------------------------------------------------------------- the shipped captions

SHIPPED = read_captions(shipped_captions())


def test_the_shipped_captions_are_those_of_the_photographs():
    from foundir_v2.fetch import PHOTOS
    assert {sha: photo for sha, (photo, _) in SHIPPED.items()} == {s.sha256: Path(s.file).stem for s in PHOTOS}
    assert len(SHIPPED) == 86
    if (ROOT/"data/SOURCES.csv").exists():
        rows = [r for r in csv.DictReader((ROOT/"data/SOURCES.csv").open(encoding="utf-8")) if r["split"]]
        assert {r["sha256"]: Path(r["file"]).stem for r in rows} == {sha: photo for sha, (photo, _) in SHIPPED.items()}


def test_the_shipped_captions_are_plain_sentences():
    captions = [caption for _, caption in SHIPPED.values()]
    assert len(set(captions)) == len(captions)
    for caption in captions:
        assert 15 <= len(caption.split()) <= 35 and caption.isascii() and caption.endswith("."), caption
        assert re.match("An? .*photograph|A light micrograph", caption), caption
        assert not re.search(r"blur|nois[ey]|haz[ey]|fog|grain|sharp|crisp|clean|compress|quality|resolution|in focus",
                             caption), caption
    assert all(b"\r" not in line for line in shipped_captions().read_bytes().splitlines(keepends=True))


def test_the_shipped_captions_fit_clips_text_encoder():
    from foundir_v2.base import assets_path, load_tokenizers
    for tokenizer in load_tokenizers(assets_path("base")):
        assert max(len(ids) for ids in tokenizer([caption for _, caption in SHIPPED.values()]).input_ids) < 77


def test_the_shipped_captions_reach_a_manifest_and_its_items():
    from foundir_v2.core import load_image
    from foundir_v2.data import reference_items
    from foundir_v2.index import add_captions
    import pandas as pd
    path = ROOT/"data/photos/chelsea.png"
    h, w = load_image(path).shape[1:]
    rows = pd.DataFrame(
        [dict(photo="chelsea", path="data/photos/chelsea.png", lq="", task="", split="reference", width=w, height=h)])
    described = add_captions(rows, make_captioner("shipped", ROOT/"nowhere"), ROOT)
    items = reference_items(described, "reference", ["haze", "sr_x4"], 1, 48, 0, ROOT)
    assert [x.caption for x in items] == [SHIPPED[sha256(path)][1]] * 2 and "tabby cat" in items[0].caption


def test_a_picture_of_ones_own_has_the_empty_caption_with_the_shipped_captioner(pictures):
    assert make_captioner("shipped", pictures)(pictures/"a.png") == ""


@pytest.mark.parametrize("text, expected", [
    ("The image features a dog. It runs! It is fast. End.", "a dog. It runs!"),
    ("The image features a dog", "a dog"),
    ("One two", "One two"), ("", ""), ("A tabby cat sits on a mat.", "A tabby cat sits on a mat."),
    ("A dog.", "A dog."), ("This image shows Rome. Sunny.", "Rome. Sunny."),
    ("The image shows f/2.8 optics. Is it sharp? Yes.", "f/2.8 optics. Is it sharp?"),
    ("The image\nfeatures  two\tlines. Second\nsentence. Third.", "two lines. Second sentence."),
])
def test_three_words_go_and_two_sentences_stay(text, expected): assert shorten(text) == expected


@settings(max_examples=30, deadline=None)
@given(st.text(alphabet="ab .!?\n", max_size=80), st.integers(0, 4), st.integers(1, 3))
def test_shortening_keeps_words_in_order_and_never_adds(text, drop, keep):
    for opening, rest in (("", text), ("The photo shows ", " ".join(text.split()) or "nothing")):
        out, words = shorten(opening + rest, 3 if opening else drop, keep), rest.split()
        assert out.split() == words[:len(out.split())] and (out or not words)


def config(folder, **changes):
    return VLMConfig(**(dict(model=str(folder), max_new_tokens=10, drop_words=0, temperature=1.0, top_p=1.0) | changes))


def test_a_vision_language_model_describes_reproducibly(tiny_vlm, pictures):
    folder, words = tiny_vlm
    first, again = VLMCaptioner(config(folder), "cpu"), VLMCaptioner(config(folder), "cpu")
    captions = [first(pictures/f"{n}.png") for n in "ab"]
    assert [again(pictures/f"{n}.png") for n in "ba"] == captions[::-1], "the order of the pictures doesn't matter"
    assert captions[0] != captions[1] and all(c and set(c.split()) <= words for c in captions)
    assert "ASSISTANT: <image>" not in captions[0] and PROMPT not in captions[0], "only the answer is kept"
    assert VLMCaptioner(config(folder, seed=1), "cpu")(pictures/"a.png") != captions[0]


def test_the_rule_and_the_budget_apply_to_the_models_answer(tiny_vlm, pictures):
    whole = VLMCaptioner(config(tiny_vlm[0], sentences=99), "cpu")(pictures/"a.png").split()
    assert 0 < len(whole) <= 10
    assert VLMCaptioner(config(tiny_vlm[0], sentences=99, drop_words=3), "cpu")(pictures/"a.png") == shorten(
        " ".join(whole), 3, 99)


def test_temperature_zero_is_greedy_and_independent_of_the_seed(tiny_vlm, pictures):
    a, b = (VLMCaptioner(config(tiny_vlm[0], temperature=0.0, seed=s), "cpu")(pictures/"a.png") for s in (0, 1))
    assert a == b


def test_the_global_random_state_is_left_alone(tiny_vlm, pictures):
    state = torch.random.get_rng_state()
    VLMCaptioner(config(tiny_vlm[0]), "cpu")(pictures/"a.png")
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_model_that_is_not_there_or_not_for_conversations_is_one_line(tiny_vlm, pictures, tmp_path):
    with pytest.raises(FoundIRError, match="no captions") as e:
        VLMCaptioner(config(tmp_path/"nothing"), "cpu")(pictures/"a.png")
    assert "\n" not in str(e.value)
    import shutil
    mute = tmp_path/"mute"
    shutil.copytree(tiny_vlm[0], mute)
    for p in mute.glob("chat_template*"): p.unlink()
    with pytest.raises(FoundIRError, match="chat template"): VLMCaptioner(config(mute), "cpu")(pictures/"a.png")


class Counting:
    def __init__(self, name="counting"): self.name, self.asked = name, []
    def __call__(self, path): self.asked.append(str(path)); return f"{self.name} {len(self.asked)}"


def test_the_cache_goes_by_content_and_captioner(pictures):
    asked = Counting()
    cached = CachedCaptioner(asked, pictures/"cache")
    assert cached.name == "counting" and [cached(pictures/"a.png") for _ in range(3)] == ["counting 1"] * 3
    assert len(asked.asked) == 1
    (pictures/"renamed.png").write_bytes((pictures/"a.png").read_bytes())
    assert cached(pictures/"renamed.png") == "counting 1" and cached(pictures/"b.png") == "counting 2"
    assert CachedCaptioner(Counting("other"), pictures/"cache")(pictures/"a.png") == "other 1"
    save_image(torch.zeros(3, 9, 9), pictures/"a.png")
    assert cached(pictures/"a.png") == "counting 3", "a changed picture is described again"


def test_a_damaged_cache_file_is_named_and_a_failure_leaves_none(pictures):
    cached = CachedCaptioner(Counting(), pictures/"cache")
    cached(pictures/"a.png")
    (kept,) = (pictures/"cache").iterdir()
    kept.write_text("no database, and long enough to be looked at")
    with pytest.raises(FoundIRError, match=kept.name): cached(pictures/"a.png")
    def fails(path): raise FoundIRError("no")
    fails.name = "fails"
    with pytest.raises(FoundIRError): CachedCaptioner(fails, pictures/"empty")(pictures/"a.png")
    assert not (pictures/"empty").exists()


def test_a_batch_gets_the_captions_that_each_picture_gets_alone(tiny_vlm, pictures):
    vlm = VLMCaptioner(config(tiny_vlm[0]), "cpu")
    assert vlm.describe([pictures/f"{n}.png" for n in "bab"]) == [vlm(pictures/f"{n}.png") for n in "bab"]


def test_a_row_draws_with_its_own_numbers_whatever_its_neighbours():
    scores = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    drawn = lambda rows, seeds: SeededChoice(seeds)(None, scores[rows]).argmax(1).tolist()
    together = drawn([0, 1, 2], [5, 6, 7])
    assert [drawn([i], [s])[0] for i, s in enumerate((5, 6, 7))] == together
    assert len({tuple(drawn([0, 1, 2], [s] * 3)) for s in range(20)}) > 10
    often = [SeededChoice([s])(None, torch.tensor([[0., 1.]])).argmax().item() for s in range(400)]
    assert sum(often) / 400 == pytest.approx(torch.tensor([0., 1.]).softmax(0)[1].item(), abs=.08)


class Batches:
    def __init__(self, stops_at=None): self.name, self.batches, self.stops_at = "batches", [], stops_at

    def describe(self, paths):
        if len(self.batches) == self.stops_at: raise KeyboardInterrupt
        self.batches.append([str(p) for p in paths])
        return [f"caption of {p}" for p in paths]


def test_batches_are_kept_as_they_come_and_a_stopped_run_goes_on(tmp_path):
    paths = []
    for i in range(7):
        save_image(torch.full((3, 8, 8), i / 10), tmp_path/f"{i}.png")
        paths.append(tmp_path/f"{i}.png")
    first = Batches(stops_at=2)
    with pytest.raises(KeyboardInterrupt): describe_all(CachedCaptioner(first, tmp_path/"cache"), paths, batch_size=2)
    second = Batches()
    found = describe_all(CachedCaptioner(second, tmp_path/"cache"), paths, batch_size=2)
    assert found == [f"caption of {p}" for p in paths]
    assert second.batches == [[str(p) for p in paths[4:6]], [str(paths[6])]], "the first four are known"
    assert describe_all(CachedCaptioner(Batches(stops_at=0), tmp_path/"cache"), paths) == found


def test_captioners_without_a_model_may_use_processes(pictures):
    for n in "ab": (pictures/f"{n}.txt").write_text(f"picture {n}")
    paths = [pictures/f"{n}.png" for n in "ab"]
    for captioner in (SidecarCaptioner(), CachedCaptioner(SidecarCaptioner(), pictures/"cache")):
        assert describe_all(captioner, paths, 2) == ["picture a", "picture b"]


@pytest.fixture
def seven(tmp_path):
    for i in range(7):
        x = torch.rand(3, 20 + i, 24, generator=torch.Generator().manual_seed(i))
        save_image(x, tmp_path/f"many/{i}.png")
    return sorted((tmp_path/"many").iterdir())


def test_processes_with_a_model_each_give_the_captions_of_one(tiny_vlm, seven, tmp_path):
    made = lambda name: CachedCaptioner(VLMCaptioner(config(tiny_vlm[0]), "cpu"), tmp_path/name)
    alone = describe_all(made("one"), seven, batch_size=2)
    here = made("two")
    here.captioner(seven[0])  # a model that is loaded here is not sent to the others
    assert describe_all(here, seven, num_workers=2, batch_size=2) == alone and len(set(alone)) > 4
    half = made("three")
    describe_all(half, seven[2:5], batch_size=3)
    assert describe_all(half, seven, num_workers=3, batch_size=1) == alone, "resumed by more processes"
    again = made("two")
    again.captioner.describe = None  # nobody is asked
    assert describe_all(again, seven, num_workers=2) == alone


def test_a_damaged_picture_costs_its_own_caption(tiny_vlm, seven, tmp_path):
    whole = [VLMCaptioner(config(tiny_vlm[0]), "cpu")(p) for p in seven]
    seven[3].write_bytes(seven[3].read_bytes()[:100])
    cached = CachedCaptioner(VLMCaptioner(config(tiny_vlm[0]), "cpu"), tmp_path/"cache")
    with pytest.raises(FoundIRError, match="can't read .*3.png"): describe_all(cached, seven, batch_size=4)
    known = cached.memo.known(cached.name, map(sha256, seven))
    assert known == {sha256(p): text for i, (p, text) in enumerate(zip(seven, whole)) if i != 3}


def test_a_model_is_held_once_per_accelerator(monkeypatch):
    import multiprocessing
    from foundir_v2.caption import device_here, processes_for
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    asked = {("cuda", 8): 4, ("cuda", 3): 3, ("cuda", 1): 0, ("cuda", 0): 0, ("cuda:2", 8): 0, ("cpu", 8): 8}
    assert {k: processes_for(torch.device(k[0]), k[1]) for k in asked} == asked
    assert device_here(torch.device("cuda")) == torch.device("cuda"), "in the main process, torch's own choice"
    taken = []
    for number in range(11, 15):
        process = multiprocessing.Process(name=f"SpawnProcess-{number}")
        monkeypatch.setattr(multiprocessing, "current_process", lambda process=process: process)
        taken.append(device_here(torch.device("cuda")).index)
        assert device_here(torch.device("cuda:1")) == torch.device("cuda:1")
        assert device_here(torch.device("cpu")) == torch.device("cpu")
    assert sorted(taken) == [0, 1, 2, 3]
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    assert processes_for(torch.device("mps"), 8) == 0


def test_workers_are_numbered_one_after_the_other():
    "What `device_here` relies on."
    from foundir_v2.memo import work_through
    names = {name for _, name in work_through(name_of_this_process, range(6), 3)}
    numbers = sorted(int(re.search(r"-(\d+)$", name)[1]) for name in names)
    assert numbers[-1] - numbers[0] < 3


def name_of_this_process(item):
    import multiprocessing
    return multiprocessing.current_process().name


def test_pictures_are_described_in_batches_from_a_shell(tiny_vlm, seven, tmp_path, capsys, monkeypatch):
    from foundir_v2.cli import main
    sizes, describe = [], VLMCaptioner.describe
    monkeypatch.setattr(VLMCaptioner, "describe", lambda self, paths: sizes.append(len(paths)) or describe(self, paths))
    seven[6].write_bytes(b"no picture")
    status = main(["caption", str(seven[0].parent), str(tmp_path/"out"), "--captioner", f"vlm:{tiny_vlm[0]}",
                   "--cache-dir", str(tmp_path/"cache"), "--device", "cpu", "--batch-size", "3"])
    told = capsys.readouterr()
    assert status == 2 and "6.png" in told.err and "Traceback" not in told.err
    texts = {p.stem: p.read_text().strip() for p in (tmp_path/"out").iterdir()}
    alone = make_captioner(f"vlm:{tiny_vlm[0]}", tmp_path/"other", "cpu")
    assert texts == {p.stem: alone(p) for p in seven[:6]} and sizes[:2] == [3, 3]


def test_names_of_models_with_other_settings_differ(tiny_vlm):
    names = {VLMCaptioner(config(tiny_vlm[0], **c), "cpu").name
             for c in ({}, {"prompt": "what is it"}, {"seed": 3}, {"temperature": 0.5})}
    assert len(names) == 4


def test_captioners_by_name(tmp_path):
    assert isinstance(make_captioner("none", tmp_path), NoCaption)
    assert make_captioner("sidecar:.cap", tmp_path).suffix == ".cap"
    vlm = make_captioner("vlm:some/model", tmp_path)
    assert isinstance(vlm, CachedCaptioner) and vlm.captioner.config.model == "some/model", (
        "made without loading anything")
    for wrong in ("", "clip", "vlm:", "vlm", "none:x", "none:", "csv", "csv:", "shipped:x", None):
        with pytest.raises(FoundIRError, match="unknown captioner") as e: make_captioner(wrong, tmp_path)
        assert captioner_choices() in str(e.value)


def test_the_choices_are_those_of_the_table_wherever_they_are_written(capsys):
    assert all(usage.partition(":")[0] == name for name, kind in CAPTIONERS.items() for usage in kind.usages)
    for file in (ROOT/"params.yaml", ROOT/"nbs/pipeline/manifest.ipynb"):
        assert f"# {captioner_choices()}" in file.read_text(encoding="utf-8"), file.name
    from foundir_v2 import cli
    for command in ("restore", "caption"):
        with pytest.raises(SystemExit): cli.main([command, "--help"])
        assert captioner_choices() in " ".join(capsys.readouterr().out.split()), command


def test_sidecars_of_two_folders_have_two_cache_entries(tmp_path):
    from PIL import Image
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in "xy": (tmp_path / name).mkdir(); (tmp_path / name / "a.txt").write_text(f"text {name}")
    texts = [CachedCaptioner(SidecarCaptioner(folder=tmp_path / name), tmp_path / "cache")(tmp_path / "a.png")
             for name in "xy"]
    assert texts == ["text x", "text y"]


def test_the_authors_json_lies_beside_their_pictures(tmp_path):
    from foundir_v2.caption import FoundIRv2Captioner
    captioner = make_captioner("foundir_v2", tmp_path)
    assert isinstance(captioner, FoundIRv2Captioner)
    file = tmp_path / "HQ_folder/x/json_folder/Task1/sub/a.json"  # the innermost HQ_folder counts
    picture = tmp_path / "HQ_folder/x/HQ_folder/Task1/sub/a.png"
    file.parent.mkdir(parents=True)
    file.write_text('{"caption": "The image features a boat. It is red. The sky is grey."}')
    assert captioner(picture) == shorten("The image features a boat. It is red. The sky is grey.") != ""
    for text, words in (("{", "expected JSON"), ('{"text": "a"}', "KeyError"), ("[1]", "TypeError"),
                        ('{"caption": 3}', "expected a text"), (None, "no caption")):
        if text is None: file.unlink()
        else: file.write_text(text)
        with pytest.raises(FoundIRError, match=words): captioner(picture)
    with pytest.raises(FoundIRError, match="not below a folder HQ_folder"): captioner(tmp_path / "b.png")
