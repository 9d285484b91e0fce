import pickle
import struct
import zlib

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from foundir_v2 import reading
from foundir_v2.core import ImageError, generator, load_image
from foundir_v2.data import RestorationDataset, collate
from foundir_v2.reading import Photos, Window, cut, halve, halved_window, read, shorten, size_of

H, W = 275, 419


def noisy_picture(h=H, w=W, seed=0):
    g = generator("picture", seed)
    coarse = torch.nn.functional.interpolate(torch.rand(1, 3, 9, 13, generator=g), (h, w), mode="bicubic")[0]
    x = (coarse + 0.05 * torch.randn(coarse.shape, generator=g)).clamp(0, 1)
    return Image.fromarray((x * 255).round().byte().permute(1, 2, 0).numpy())


def turned(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def see_through(im):
    im = im.convert("RGBA")
    im.putalpha(im.convert("L"))
    return im


FORMS = {
    **{f"{name}.jpg": (lambda im: im, dict(quality=90, subsampling=s, progressive=p))
       for name, s, p in (("444", 0, False), ("422", 1, False), ("420", 2, False), ("progressive", 2, True))},
    "restart.jpg": (lambda im: im, dict(quality=90, restart_marker_blocks=7)),
    "grey.jpg": (lambda im: im.convert("L"), {}),
    "cmyk.jpg": (lambda im: im.convert("CMYK"), {}),
    "turned.jpg": (lambda im: im, dict(exif=turned(6))),
    "upside_down.png": (lambda im: im, dict(exif=turned(3))),
    "rgb.png": (lambda im: im, {}),
    "palette.png": (lambda im: im.quantize(64), {}),
    "alpha.png": (see_through, {}),
    "one_colour_shines_through.png": (lambda im: im, dict(transparency=(10, 20, 30))),
    "16_bits.png": (lambda im: Image.fromarray(np.array(im.convert("L")).astype(np.uint16) * 257), {}),
    "strips.tif": (lambda im: im, dict(strip_size=3 * W * 16)),
    "packed.tif": (lambda im: im, dict(compression="tiff_lzw")),
    "exact.webp": (lambda im: im, dict(lossless=True)),
    "plain.bmp": (lambda im: im, {})}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("forms")
    for name, (change, options) in FORMS.items(): change(noisy_picture()).save(folder / name, **options)
    return folder


def decoded(path): return (load_image(path) * 255).round().byte()


def some_window(height, width, *seed):
    u = torch.rand(4, generator=generator("window", *seed)).tolist()
    h, w = 1 + int(u[0] * height), 1 + int(u[1] * width)
    return Window(int(u[2] * (height - h + 1)), int(u[3] * (width - w + 1)), h, w)


def level(whole, k):
    for _ in range(k): whole = halve(whole)
    return whole


@pytest.mark.parametrize("name", FORMS)
def test_a_window_is_what_decoding_halving_and_cutting_give(files, name):
    path, whole = files / name, decoded(files / name)
    assert size_of(path) == tuple(whole.shape[1:])
    for k in range(6):
        full = level(whole, k)
        assert torch.equal(read(path, None, k), full)
        windows = [some_window(*full.shape[1:], name, k, i) for i in range(8)]
        last = full.shape[1] - 1
        ends = [Window(max(end - 3, 0), 0, min(end, 3), full.shape[2])
                for end in (1, 8, 15, 16, 31, 32, 33, 64, 160) if end < last]
        for window in windows + ends + [Window(last, full.shape[2] - 1, 1, 1)]:
            assert torch.equal(read(path, window, k), cut(full, window)), (k, window)


@pytest.mark.parametrize("name", [n for n in FORMS if n.endswith(".jpg") or n == "rgb.png"])
def test_draft_mode_is_near_and_gives_any_window_the_same_pixels(files, name):
    path, whole = files / name, decoded(files / name)
    for k in range(6):
        near, full = read(path, None, k, draft=True), level(whole, k)
        assert near.shape == full.shape
        if k < 2 or name in ("rgb.png", "turned.jpg"): assert torch.equal(near, full)
        else: assert -10 * torch.log10(((near.float() - full.float()) / 255).square().mean()) > 35
        for i in range(6):
            window = some_window(*full.shape[1:], name, k, i)
            assert torch.equal(read(path, window, k, draft=True), cut(near, window)), (k, window)


def with_chunk(data, kind, content, before=b"IEND"):
    at = data.index(before) - 4
    return data[:at] + struct.pack(">I", len(content)) + kind + content + struct.pack(
        ">I", zlib.crc32(kind + content)) + data[at:]


def rotated_exif(): return turned(6).tobytes().removeprefix(b"Exif\0\0")


PNGS = {  # what a PNG may hold besides its pixels -> is it plain?
    "nothing": (lambda d: d, True),
    "text": (lambda d: with_chunk(d, b"tEXt", b"Software\0by hand"), True),
    "gamma": (lambda d: with_chunk(d, b"gAMA", struct.pack(">I", 45455), b"IDAT"), True),
    "turned": (lambda d: with_chunk(d, b"eXIf", rotated_exif(), b"IDAT"), False),
    "turned, told at the end": (lambda d: with_chunk(d, b"eXIf", rotated_exif()), False),
    "metadata of an editor": (lambda d: with_chunk(d, b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0<x/>"), False),
    "one colour shines through": (lambda d: with_chunk(d, b"tRNS", bytes(6), b"IDAT"), False),
    "end is missing": (lambda d: d[:-12], False),
    "cut": (lambda d: d[:len(d) // 2], False)}


@pytest.mark.parametrize("name", PNGS)
def test_pngs_are_read_alike_with_and_without_libspng(files, tmp_path, monkeypatch, name):
    pytest.importorskip("imagecodecs")
    change, plain = PNGS[name]
    (path := tmp_path / "a.png").write_bytes(change((files / "rgb.png").read_bytes()))
    assert reading.is_plain_png(bytearray(path.read_bytes())) == plain
    windows = [(None, 0), (Window(3, 5, 9, 7), 0), (Window(60, 0, 30, 90), 1)]
    def answers():
        found = []
        for window, halved in windows:
            try: found.append(read(path, window, halved))
            except ImageError as e: found.append(str(e))
        return found
    with_it = answers()
    monkeypatch.setattr(reading, "spng_decode", None)
    for a, b in zip(with_it, answers(), strict=True): assert torch.equal(a, b) if torch.is_tensor(a) else a == b
    if name == "cut": assert "truncated" in with_it[0]
    elif "missing" not in name: assert torch.equal(with_it[0], decoded(path))


def test_damage_that_only_one_decoder_minds_changes_nothing(files, tmp_path, monkeypatch):
    pytest.importorskip("imagecodecs")
    data = bytearray((files / "rgb.png").read_bytes())
    end = data.index(b"IDAT") + 4 + int.from_bytes(data[data.index(b"IDAT") - 4:data.index(b"IDAT")])
    data[end] ^= 1  # a wrong checksum, of which Pillow takes no notice
    (path := tmp_path / "a.png").write_bytes(data)
    asked, real = [], reading.spng_decode
    monkeypatch.setattr(reading, "spng_decode", lambda d: asked.append(1) or real(d))
    assert torch.equal(read(path, Window(3, 5, 9, 7)), cut(decoded(files / "rgb.png"), Window(3, 5, 9, 7))) and asked


def count_rows(monkeypatch):
    "How many rows every decoded picture has."
    rows, opened, decode = [], Image.open, reading.spng_decode
    def spy(data):
        im = opened(data)
        rows.append(im.height)
        return im
    def spng(data):
        rows.append(int.from_bytes(data[20:24]))
        return decode(data)
    monkeypatch.setattr(reading.Image, "open", spy)
    if decode: monkeypatch.setattr(reading, "spng_decode", spng)
    return rows


def test_rows_below_the_window_are_not_decoded(files, monkeypatch):
    for name in ("420.jpg", "progressive.jpg", "rgb.png"):
        with monkeypatch.context() as m:
            rows = count_rows(m)
            read(files / name, Window(40, 100, 50, 50))
            assert rows[0] == H and rows[1] <= 90 + 32


def interlaced_png(pixels):
    "Adam7, which Pillow reads and doesn't write."
    h, w, _ = pixels.shape
    passes = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    raw = b"".join(b"\0" + row.tobytes() for t, l, dy, dx in passes for row in pixels[t::dy, l::dx])
    number = struct.Struct(">I").pack
    def chunk(kind, data): return number(len(data)) + kind + data + number(zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", w, h, 8, 2, 0, 0, 1)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def test_pictures_stored_in_passes_are_read_whole(tmp_path):
    pixels = np.array(noisy_picture(40, 56))
    (tmp_path / "a.png").write_bytes(interlaced_png(pixels))
    whole = torch.from_numpy(pixels).permute(2, 0, 1)
    assert torch.equal(read(tmp_path / "a.png"), whole)
    assert torch.equal(read(tmp_path / "a.png", Window(3, 5, 9, 7)), cut(whole, Window(3, 5, 9, 7)))
    shorten(data := bytearray(interlaced_png(pixels)), 12)
    assert data == interlaced_png(pixels)


def test_shortening_touches_only_what_it_knows(files):
    for name in ("strips.tif", "exact.webp", "plain.bmp"):
        data = bytearray((files / name).read_bytes())
        before = bytes(data)
        shorten(data, 10)
        assert data == before
    data = bytearray((files / "rgb.png").read_bytes())
    shorten(data, H + 5)
    assert data == (files / "rgb.png").read_bytes(), "made longer"


def test_damage_is_told_and_files_are_never_changed(files, tmp_path):
    before = {name: (files / name).read_bytes() for name in FORMS}
    for name in ("420.jpg", "rgb.png", "strips.tif"):
        (tmp_path / name).write_bytes(before[name][:len(before[name]) // 3])
        with pytest.raises(ImageError, match=f"can't read .*{name}"): read(tmp_path / name)
        with pytest.raises(ImageError, match=f"can't read .*{name}"): read(tmp_path / name, Window(H - 9, 0, 9, 9))
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.png").write_text("no picture")
    for name in ("empty.jpg", "text.png"):
        for f in (read, size_of):
            with pytest.raises(ImageError, match=name): f(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="none.png"): read(tmp_path / "none.png", Window(0, 0, 1, 1))
    for window in (Window(H - 4, 0, 5, 5), Window(0, W - 4, 5, 5), Window(-1, 0, 5, 5)):
        with pytest.raises(ImageError, match=f"rgb.png.*{W}x{H}.*index it again"): read(files / "rgb.png", window)
    assert before == {name: (files / name).read_bytes() for name in FORMS}


def test_little_is_asked_for_a_small_window_of_a_far_half():
    asked, whole = [], torch.zeros(3, 640, 960, dtype=torch.uint8)
    def part(window): asked.append(window); return cut(whole, window)
    assert halved_window(part, (640, 960), Window(30, 40, 8, 8), 3).shape == (3, 8, 8)
    assert asked[0].height * asked[0].width < 0.03 * 640 * 960


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    for i in range(24): noisy_picture(120 + i, 150, i).save(folder / f"{i}.{'jpg' if i % 2 else 'png'}")
    return folder


NAMES = [f"{i}.{'jpg' if i % 2 else 'png'}" for i in range(24)]


@pytest.mark.parametrize("cache", [0, 70_000, 400_000, 10**9])
@pytest.mark.parametrize("draft", [False, True])
def test_what_is_kept_has_a_limit_and_changes_nothing(pool, cache, draft):
    photos = Photos(pool, cache, draft)
    for i in range(300):
        n, k = (7 * i) % 24, (i // 3) % 4
        window = some_window((120 + n) >> k, 150 >> k, "kept", i)
        assert torch.equal(photos.window(NAMES[n], window, k), read(pool / NAMES[n], window, k, draft))
        kept = [x for pictures in photos._kept.values() for x in pictures.values()]
        assert sum(x.untyped_storage().nbytes() for x in kept) == photos.held <= cache


def test_halves_take_the_place_of_whole_photographs(pool, monkeypatch):
    photos = Photos(pool, 24 * 30 * 37 * 3 + 70_000)  # quarter-sized ones of all, and one whole
    for k in (0, 2):
        for name in NAMES: photos.window(name, Window(0, 0, 5, 5), k)
    assert len(photos._kept[2]) == 24 and len(photos._kept[0]) <= 1
    monkeypatch.setattr(reading, "read", None)
    for name in NAMES: photos.window(name, Window(1, 2, 5, 5), 2)
    assert len(pickle.dumps(photos)) < 1000


def test_full_is_full(pool, monkeypatch):
    "What will not be kept is never decoded whole again."
    photos, asked = Photos(pool, 70_000), []
    real = reading.read
    monkeypatch.setattr(reading, "read", lambda *args: asked.append(args[1]) or real(*args))
    for i in range(60): photos.window(NAMES[i % 24], Window(0, 0, 5, 5))
    assert asked.count(None) == 2 and len(asked) >= 50
    asked.clear()
    drafted = Photos(pool, 55_000, draft=True)
    for i, k in enumerate((0, 2, 0, 0)): drafted.window(NAMES[i], Window(0, 0, 5, 5), k)
    assert [w is None for w in asked] == [True, True, False, False], "a whole photograph pushed out comes back"


class Held:
    "Bytes that the photographs of a data process hold after each of its samples."
    def __init__(self, dataset): self.dataset = dataset

    def __getitem__(self, draw):
        sample = self.dataset[draw]
        return sample | dict(held=self.dataset.photos.held, room=self.dataset.photos.room)


@pytest.mark.parametrize("draft", [False, True])
def test_spawned_workers_share_the_limit_and_give_the_same_bytes(pool, draft):
    rows = [dict(photo=n, path=n, lq="", task="", split="train", width=150, height=120 + i, caption="")
            for i, n in enumerate(NAMES)]
    options = dict(crop=16, root=pool, scale_range=(0, 1), cache=300_000, draft=draft)
    dataset = RestorationDataset(pd.DataFrame(rows), "train", {"denoise": ["gaussian_noise"]}, **options)
    batches = [[("denoise", (5 * b + i) % 24, 100 * b + i) for i in range(8)] for b in range(10)]
    here = list(DataLoader(Held(dataset), batch_sampler=batches, collate_fn=collate))
    loader = DataLoader(Held(dataset), batch_sampler=batches, collate_fn=collate, num_workers=2,
                        multiprocessing_context="spawn")
    there = list(loader)
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a["lq"], b["lq"]) and torch.equal(a["gt"], b["gt"])
        assert a["room"].unique().item() == 300_000 and b["room"].unique().item() == 150_000
    assert 0 < max(b["held"].max() for b in there) <= 150_000 < max(a["held"].max() for a in here) <= 300_000
