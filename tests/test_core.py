"Pictures in and out, seeds, devices, safe writes."
import contextlib, errno, os, random, subprocess, sys, tempfile
from pathlib import Path

import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from PIL import Image

from foundir_v2.core import (
    DiskFullError, FoundIRError, ImageError, Restorer, atomic_write, autocast, from_pil, generator, hash_seed,
    load_alpha, load_image, pick_device, pick_dtype, repo_root, save_image, seed_everything, to_pil)


def picture(h=20, w=30, c=3, seed=0):
    "Smooth colours, so that JPEG stays close."
    g = np.random.default_rng(seed).uniform(40, 210, (2, 2, c)).astype(np.uint8)
    return np.array(Image.fromarray(g).resize((w, h), Image.Resampling.BICUBIC))


def as_tensor(x): return torch.from_numpy(np.array(x)).permute(2, 0, 1) / 255


@contextlib.contextmanager
def unprivileged():
    "Root may write everywhere: drop to another user for the block."
    if os.geteuid() != 0: yield; return
    os.seteuid(65534)
    try: yield
    finally: os.seteuid(0)


@contextlib.contextmanager
def open_folder():
    "A temporary folder that every user may enter and write."
    with tempfile.TemporaryDirectory() as d: os.chmod(d, 0o777); yield Path(d)


def one_line(e, *names):
    text = str(e.value)
    assert "\n" not in text and all(str(n) in text for n in names), text


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation):
    stored = picture()
    exif = Image.Exif(); exif[0x0112] = orientation
    Image.fromarray(stored).save(tmp_path / "x.png", exif=exif)
    upright = {1: stored, 2: stored[:, ::-1], 3: stored[::-1, ::-1], 4: stored[::-1], 5: stored.swapaxes(0, 1),
               6: np.rot90(stored, -1), 7: np.rot90(stored, 2).swapaxes(0, 1), 8: np.rot90(stored)}[orientation]
    assert torch.equal(load_image(tmp_path / "x.png"), as_tensor(upright))


def test_exif_orientation_of_jpeg(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    Image.fromarray(picture()).save(tmp_path / "x.jpg", exif=exif)
    assert load_image(tmp_path / "x.jpg").shape == (3, 30, 20)


def test_alpha_is_composited_or_kept(tmp_path):
    rgba = picture(c=4); rgba[..., 3] = np.linspace(0, 255, 30).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "x.png")
    rgb, a = as_tensor(rgba[..., :3]), as_tensor(rgba[..., 3:])
    assert torch.equal(load_image(tmp_path / "x.png", background=None), rgb)
    assert torch.equal(load_alpha(tmp_path / "x.png"), a)
    assert torch.allclose(load_image(tmp_path / "x.png"), rgb * a + 1 - a)
    save_image(rgb, tmp_path / "y.png", alpha=a)
    assert (np.asarray(Image.open(tmp_path / "y.png")) == rgba).all()


def test_palette_with_transparency(tmp_path):
    Image.fromarray(picture()).quantize(8).save(tmp_path / "x.png", transparency=0)
    alpha = load_alpha(tmp_path / "x.png")
    assert alpha.shape == (1, 20, 30) and set(alpha.unique().tolist()) == {0.0, 1.0}
    assert (load_image(tmp_path / "x.png")[:, alpha[0] == 0] == 1).all()


@pytest.mark.parametrize("mode", ["L", "P", "1", "LA", "RGBA", "CMYK", "YCbCr"])
def test_every_mode_is_three_channels(tmp_path, mode):
    im = Image.fromarray(picture()).convert(mode)
    name = tmp_path / ("x.tiff" if mode in ("CMYK", "YCbCr") else "x.png")
    im.save(name)
    x = load_image(name)
    assert x.shape == (3, 20, 30) and x.dtype == torch.float32 and 0 <= x.min() and x.max() <= 1 and x.is_contiguous()
    assert torch.allclose(x, as_tensor(im.convert("RGB")))


def test_cmyk_jpeg(tmp_path):
    Image.fromarray(picture()).convert("CMYK").save(tmp_path / "x.jpg", quality=100)
    with Image.open(tmp_path / "x.jpg") as im: assert im.mode == "CMYK"
    assert (load_image(tmp_path / "x.jpg") - as_tensor(picture())).abs().max() < 0.05


def test_16_bit_grey_keeps_its_precision(tmp_path):
    x = np.arange(600, dtype=np.uint16).reshape(20, 30) * 100
    Image.fromarray(x).save(tmp_path / "x.png")
    got = load_image(tmp_path / "x.png")
    assert torch.equal(got, (torch.from_numpy(x.astype(np.float32)) / 65535).expand(3, -1, -1))
    assert len(got.unique()) == 600


def test_16_bit_colour(tmp_path):
    "Pillow can't write 16-bit RGB, so the file is written by hand: one row of two pixels."
    import struct, zlib
    pixels = [(65535, 32768, 0), (257, 0, 65535)]
    raw = b"\0" + b"".join(struct.pack(">HHH", *p) for p in pixels)
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "x.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b""))
    want = torch.tensor(pixels).T[:, None] / 65535
    assert (load_image(tmp_path / "x.png") - want).abs().max() < 1 / 255


def test_one_pixel(tmp_path):
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "x.png")
    assert torch.allclose(load_image(tmp_path / "x.png").flatten(), torch.tensor([1, 0, 0.2]))


def test_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    frames[0].save(tmp_path / "x.gif", save_all=True, append_images=frames[1:])
    assert torch.equal(load_image(tmp_path / "x.gif")[:, 0, 0], torch.tensor([1.0, 0, 0]))


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tiff", ".bmp", ".gif"])
def test_truncated_files(tmp_path, suffix):
    path = tmp_path / f"cut{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(path)
    data = path.read_bytes()
    for n in (len(data) // 2, 30, 3):
        path.write_bytes(data[:n])
        with pytest.raises(ImageError) as e: load_image(path)
        one_line(e, path)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_damaged_files_never_raise_anything_else(data):
    import io
    out = io.BytesIO()
    Image.fromarray(picture()).save(out, data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])))
    raw = bytearray(out.getvalue())
    for i in data.draw(st.lists(st.integers(0, len(raw) - 1), min_size=1, max_size=8)):
        raw[i] = data.draw(st.integers(0, 255))
    with tempfile.NamedTemporaryFile() as f:
        f.write(raw); f.flush()
        try: x = load_image(f.name, max_pixels=10_000)
        except ImageError as e: assert "\n" not in str(e) and f.name in str(e)
        else: assert x.shape[0] == 3 and torch.isfinite(x).all()


def test_what_is_not_a_picture(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("hello")
    Image.fromarray(np.ones((3, 3), np.float32)).save(tmp_path / "float.tiff")
    for name in ("empty.jpg", "text.jpg", "float.tiff", ""):
        with pytest.raises(ImageError) as e: load_image(tmp_path / name)
        one_line(e, tmp_path / name)
    with pytest.raises(FileNotFoundError) as e: load_image(tmp_path / "none.png")
    one_line(e, "none.png")


def test_unreadable_file():
    with open_folder() as d:
        save_image(torch.rand(3, 4, 4), d / "x.png")
        os.chmod(d / "x.png", 0)
        with unprivileged(), pytest.raises(PermissionError) as e: load_image(d / "x.png")
        one_line(e, d / "x.png")


def test_decompression_bomb(tmp_path, recwarn):
    "A tiny file of 400 million pixels is refused before it is decoded; so is anything above a limit of one's own."
    import struct, zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b""))
    with pytest.raises(ImageError, match="more than 89,478,485 pixels") as e: load_image(tmp_path / "bomb.png")
    one_line(e, "bomb.png")
    save_image(torch.zeros(3, 10, 10), tmp_path / "x.png")
    with pytest.raises(ImageError, match="more than 99 pixels"): load_image(tmp_path / "x.png", max_pixels=99)
    assert load_image(tmp_path / "x.png", max_pixels=100).shape == (3, 10, 10)
    assert not [w for w in recwarn if "DecompressionBomb" in w.category.__name__]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 99))
def test_png_round_trip(h, w, seed):
    x = torch.randint(0, 256, (3, h, w), generator=generator("png", seed)) / 255
    with tempfile.TemporaryDirectory() as d: assert torch.equal(load_image(save_image(x, Path(d) / "x.PNG")), x)
    assert torch.equal(from_pil(to_pil(x)), x)


def test_values_are_clamped_and_rounded():
    x = torch.tensor([-0.5, 0.0, 0.4999 / 255, 0.5001 / 255, 1.0, 7.0]).expand(3, 1, -1)
    assert (from_pil(to_pil(x))[0, 0] * 255).tolist() == [0, 0, 0, 1, 255, 255]
    assert to_pil(x.bfloat16().requires_grad_()).size == (6, 1)


def test_jpeg_is_written_at_quality_95(tmp_path):
    x = as_tensor(picture(64, 64))
    save_image(x, tmp_path / "x.jpg")
    to_pil(x).save(tmp_path / "y.jpg", quality=95)
    assert (tmp_path / "x.jpg").read_bytes() == (tmp_path / "y.jpg").read_bytes()


def test_save_refuses_what_it_can_not_write(tmp_path):
    x = torch.rand(3, 4, 4)
    cases = [
        (x[None], "a.png", {}, "(1, 3, 4, 4)"), (x[:1], "a.png", {}, "(1, 4, 4)"), (x / 0, "a.png", {}, "infinite"),
        (x, "a.bmp", {}, ".webp"), (x, "a", {}, ".png"), (x, "a.jpg", dict(alpha=x[:1]), "transparency")]
    for image, name, kw, word in cases:
        with pytest.raises(FoundIRError) as e: save_image(image, tmp_path / name, **kw)
        one_line(e, word)
    assert not list(tmp_path.iterdir())


def test_read_only_folder():
    with open_folder() as d:
        save_image(torch.zeros(3, 4, 4), d / "old.png")
        before = (d / "old.png").read_bytes()
        os.chmod(d, 0o555)
        for name in ("old.png", "new.png", "deeper/new.png"):
            with unprivileged(), pytest.raises(PermissionError) as e: save_image(torch.ones(3, 4, 4), d / name)
            one_line(e, d / name, "choose a folder")
        os.chmod(d, 0o777)
        assert [p.name for p in d.iterdir()] == ["old.png"] and (d / "old.png").read_bytes() == before


def test_folder_in_the_place_of_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(PermissionError): save_image(torch.zeros(3, 4, 4), tmp_path / "file/x.png")
    (tmp_path / "x.png").mkdir()
    with pytest.raises(OSError): save_image(torch.zeros(3, 4, 4), tmp_path / "x.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "x.png"]


def test_atomic_write_keeps_the_old_file_and_its_suffix(tmp_path):
    path = tmp_path / "new/x.tar"
    with atomic_write(path) as tmp:
        assert tmp.suffix == ".tar" and tmp.parent == path.parent and not path.exists()
        tmp.write_text("one")
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error):
            with atomic_write(path) as tmp: tmp.write_text("tw"); raise error
    assert path.read_text() == "one" and os.listdir(path.parent) == ["x.tar"]


@pytest.mark.parametrize("name", [
    "漢" * 80 + ".png", "é" * 125 + ".tar", "x" * 251 + ".png", "a." + "漢" * 80, "." + "x" * 254])
def test_names_as_long_as_the_file_system_allows(tmp_path, name):
    with atomic_write(tmp_path / name) as tmp: tmp.write_text("one")
    assert (tmp_path / name).read_text() == "one" and os.listdir(tmp_path) == [name]
    with pytest.raises(PermissionError, match="shorter name"):
        with atomic_write(tmp_path / f"{name}{'y' * (256 - len(os.fsencode(name)))}"): pass


def test_a_full_disk_is_named(tmp_path):
    (tmp_path / "x.png").write_text("old")
    for code in (errno.ENOSPC, errno.EDQUOT):
        with pytest.raises(DiskFullError, match="x.png: make room") as e:
            with atomic_write(tmp_path / "x.png") as outer, atomic_write(outer): raise OSError(code, os.strerror(code))
        assert "\n" not in str(e.value) and os.listdir(tmp_path) == ["x.png"]
        assert (tmp_path / "x.png").read_text() == "old"
    with pytest.raises(OSError, match="Input/output"):
        with atomic_write(tmp_path / "x.png"): raise OSError(errno.EIO, os.strerror(errno.EIO))


def test_file_and_folder_reach_the_disk(tmp_path, monkeypatch):
    "The file before the rename, the folder after it."
    import foundir_v2.core as core
    events, replace = [], os.replace
    monkeypatch.setattr(core, "sync", lambda path: events.append(Path(path).name))
    monkeypatch.setattr(core.os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    with atomic_write(tmp_path / "x.png") as tmp: pass
    assert events == [tmp.name, "rename", tmp_path.name]


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.txt"; path.write_text("old")
    code = (f"import os, signal\nfrom foundir_v2.core import atomic_write\nwith atomic_write({str(path)!r}) as t:\n"
            "    t.write_text('ne'); os.kill(os.getpid(), signal.SIGKILL)")
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root(Path(__file__).parent)).returncode == -9
    assert path.read_text() == "old"


def test_hash_seed_is_the_same_everywhere():
    "Pinned: changing these values changes every degradation, crop and noise of earlier runs."
    assert hash_seed("degrade", "haze", 17) == 6925271429732539278
    code = "from foundir_v2.core import hash_seed; print(hash_seed('degrade', 'haze', 17))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                         env=os.environ | {"PYTHONHASHSEED": "7"}, cwd=repo_root(Path(__file__).parent))
    assert int(out.stdout) == hash_seed("degrade", "haze", 17)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.one_of(st.integers(-2**70, 2**70), st.text(max_size=5)), max_size=4).map(tuple), min_size=2,
                max_size=20, unique_by=repr))
def test_different_parts_give_different_seeds(parts):
    seeds = [hash_seed(*p) for p in parts]
    assert len(set(seeds)) == len(parts) and all(0 <= s < 2**63 for s in seeds)


def test_seeds_refuse_floats_and_none():
    for bad in (0.5, None, b"x", torch.ones(2)):
        with pytest.raises(TypeError): hash_seed(bad)


def test_generator_and_seed_everything():
    a, b, c = (torch.randn(4, generator=generator(*p)) for p in (("x", 1), ("x", 1), ("x", 2)))
    assert torch.equal(a, b) and not torch.equal(a, c)
    draws = []
    for _ in range(2):
        seed_everything(5); draws.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert draws[0] == draws[1]


def test_devices():
    assert pick_device("cpu") == torch.device("cpu") == pick_device(torch.device("cpu"))
    assert pick_device().type == (
        torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu")
    for bad in ("gpu", "", "cuda:999", None, 3.5):
        with pytest.raises(FoundIRError): pick_device(bad)


def test_precision():
    assert pick_dtype("bfloat16") == torch.bfloat16 and pick_dtype("auto", "cpu") in (torch.float32, torch.bfloat16)
    with pytest.raises(FoundIRError, match="float32"): pick_dtype("fp8")
    x = torch.ones(2, 2)
    with autocast("cpu", torch.bfloat16): assert (x @ x).dtype == torch.bfloat16
    with autocast("cpu", torch.float32): assert (x @ x).dtype == torch.float32


def test_repo_root(tmp_path):
    root = repo_root(Path(__file__).parent)
    assert (root / "settings.ini").exists() and repo_root(root / "nbs") == root
    with pytest.raises(FoundIRError, match="settings.ini"): repo_root(tmp_path)


def test_restorer_protocol():
    class R:
        name = "twice"
        def __call__(self, lq, *, subtask=None, seed=0): return lq
    assert isinstance(R(), Restorer) and not isinstance(object(), Restorer)


def test_core_stays_light():
    "The wheel's core must work without the extras."
    code = ("import sys, foundir_v2.core; bad = {'pandas', 'matplotlib', 'pyiqa', 'diffusers', "
            "'fastcore'} & set(sys.modules); sys.exit(str(bad) if bad else 0)")
    assert subprocess.run([sys.executable, "-c", code], cwd=repo_root(Path(__file__).parent)).returncode == 0
