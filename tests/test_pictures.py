"Pictures: every form, every depth, kept as small as they came, and crops beyond their borders."
import numpy as np, pytest, torch
from PIL import Image
from foundir_v2.core import FoundIRError, ImageError, load_alpha, load_image
from foundir_v2.pictures import (
    as_float, as_images, crop, load_pixels, pad_to_multiple, padded_size, save_picture, stored_images, to_integers)


def noise(c, h, w, seed=0): return torch.rand(c, h, w, generator=torch.Generator().manual_seed(seed))

@pytest.mark.parametrize("size", [(1, 1), (1, 9), (7, 5), (64, 33)])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bits_go_through_a_file_unchanged(tmp_path, size, alpha):
    x, a = noise(3, *size), noise(1, *size, seed=1) if alpha else None
    save_picture(x, tmp_path / "a.png", a, bits=16)
    back = load_pixels(tmp_path / "a.png", background=None)
    assert back.dtype == torch.uint16 and torch.equal(back.int(), (x * 65535).round().int())
    # a file that others read
    with Image.open(tmp_path / "a.png") as im: im.load(); assert im.mode == ("RGBA" if alpha else "RGB")
    assert torch.allclose(load_image(tmp_path / "a.png", background=None), x, atol=1.01 / 255)
    if alpha:
        assert torch.allclose(load_alpha(tmp_path / "a.png"), a, atol=1.01 / 255)
        torch.testing.assert_close(load_pixels(tmp_path / "a.png"), a * x + 1 - a, atol=1e-4, rtol=0)


def test_eight_bits_equal_load_image(tmp_path):
    for mode, suffix in (("RGB", "png"), ("RGB", "jpg"), ("L", "png"), ("P", "png"), ("1", "png"), ("CMYK", "jpg"),
                         ("RGBA", "png"), ("LA", "png")):
        path = tmp_path / f"{mode}.{suffix}"
        Image.fromarray((noise(3, 9, 7).permute(1, 2, 0).numpy() * 255).astype(np.uint8)).convert(mode).save(path)
        stored = load_pixels(path)
        assert stored.dtype == (torch.float32 if mode in ("RGBA", "LA") else torch.uint8)
        torch.testing.assert_close(as_float(stored), load_image(path), atol=1e-6, rtol=0)


def test_sixteen_bit_greyscale(tmp_path):
    grey = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    x = load_pixels(tmp_path / "g.png")
    assert x.dtype == torch.uint16 and x.shape == (3, 16, 16) and np.array_equal(x[1].numpy(), grey)
    torch.testing.assert_close(as_float(x), load_image(tmp_path / "g.png"), atol=1e-6, rtol=0)


def test_orientation_is_followed_at_every_depth(tmp_path):
    exif = Image.Exif(); exif[0x0112] = 6
    array = (noise(3, 5, 8).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    Image.fromarray(array).rotate(90, expand=True).save(tmp_path / "turned.png", exif=exif)
    assert np.array_equal(load_pixels(tmp_path / "turned.png").permute(1, 2, 0).numpy(), array)
    (x,) = stored_images(Image.open(tmp_path / "turned.png"))
    assert np.array_equal(x.permute(1, 2, 0).numpy(), array)


def test_pictures_stay_small():
    array = (noise(3, 9, 7).permute(1, 2, 0).numpy() * 255).astype(np.uint8)
    for form in (array, Image.fromarray(array), torch.from_numpy(array).permute(2, 0, 1)):
        assert stored_images(form)[0].dtype == torch.uint8
    x = noise(3, 9, 7)
    assert stored_images(x)[0].data_ptr() == x.data_ptr()
    assert stored_images(array.astype(np.uint16))[0].dtype == torch.uint16
    assert all(y.dtype == torch.float32 for y in as_images([array, x]))


def test_refusals(tmp_path):
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "f.tif")
    for name in ("empty.png", "f.tif"):
        with pytest.raises(ImageError, match=name): load_pixels(tmp_path / name)
    with pytest.raises(FileNotFoundError): load_pixels(tmp_path / "none.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "large.png")
    with pytest.raises(ImageError, match="more than 100 pixels"): load_pixels(tmp_path / "large.png", max_pixels=100)
    with pytest.raises(FoundIRError, match="16 bits"): save_picture(noise(3, 2, 2), tmp_path / "a.webp", bits=16)
    with pytest.raises(FoundIRError, match="8 or 16"): save_picture(noise(3, 2, 2), tmp_path / "a.png", bits=12)
    with pytest.raises(FoundIRError, match="NaN"):
        save_picture(torch.full((3, 2, 2), float("nan")), tmp_path / "a.png", bits=16)
    assert not (tmp_path / "a.png").exists()


def test_integers_round_and_clamp():
    x = torch.tensor([-1.0, 0, 0.5, 1, 2]).view(1, 1, 5).expand(3, 1, 5)
    assert to_integers(x)[0, :, 0].tolist() == [0, 0, 128, 255, 255]
    assert to_integers(x, 16)[0, :, 2].tolist() == [0, 0, 32768, 65535, 65535]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.float32])
def test_a_crop_is_the_crop_of_the_padded_picture(dtype):
    x = (noise(3, 5, 9) * 255).to(dtype)
    padded = pad_to_multiple(x.float(), 16)
    assert padded.shape == (3, *padded_size((5, 9), 16))
    assert torch.equal(padded[:, :5, 9:], padded[:, :5, [7, 6, 5, 4, 3, 2, 1]])
    assert torch.equal(padded[:, 5:8], padded[:, [3, 2, 1]])
    for window in ((0, 0, 16, 16), (4, 8, 12, 8), (1, 2, 3, 4), (0, 0, 1, 16)):
        top, left, h, w = window
        assert torch.equal(crop(x, *window).float(), padded[:, top : top + h, left : left + w])
