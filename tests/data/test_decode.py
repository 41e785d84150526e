"""Every odd kind of file: decoded to the right pixels, or refused with the reason."""

from __future__ import annotations

import os
import pickle
import random

import numpy as np
import pytest
from PIL import Image

from ampdeploy.data import decode
from ampdeploy.data.decode import UnreadableImageError, open_rgb
from ampdeploy.errors import DataError
from tests.data.samples import BLUE, RED, halves, noise, png_header

WHITE = (255, 255, 255)
LOSSY = 12  # of 255: JPEG at quality 95, and its chroma at half resolution


def assert_pixel(image: Image.Image, where: tuple[int, int], expected, tolerance: int = 0) -> None:
    assert image.mode == "RGB"
    seen = image.getpixel(where)
    assert max(abs(a - b) for a, b in zip(seen, expected, strict=True)) <= tolerance, seen


@pytest.mark.parametrize("suffix", ["png", "bmp", "tif", "ppm", "webp"])
def test_lossless_formats_keep_every_pixel(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    noise(1).save(path, **({"lossless": True} if suffix == "webp" else {}))
    assert np.array_equal(np.asarray(open_rgb(path)), np.asarray(noise(1)))


def test_content_decides_not_the_suffix(tmp_path):
    path = tmp_path / "really_a_png.jpg"
    halves().save(path, format="PNG")
    assert_pixel(open_rgb(path), (2, 2), RED)


def test_rgba_is_composited_on_white(tmp_path):
    image = Image.new("RGBA", (8, 8), (*RED, 255))
    image.putpixel((0, 0), (*RED, 0))
    image.putpixel((1, 0), (0, 0, 0, 127))
    image.save(tmp_path / "a.png")
    decoded = open_rgb(tmp_path / "a.png")
    assert_pixel(decoded, (0, 0), WHITE)
    assert_pixel(decoded, (1, 0), (128, 128, 128))
    assert_pixel(decoded, (5, 5), RED)


def test_grey_with_alpha(tmp_path):
    image = Image.new("LA", (8, 8), (90, 255))
    image.putpixel((0, 0), (90, 0))
    image.save(tmp_path / "a.png")
    decoded = open_rgb(tmp_path / "a.png")
    assert_pixel(decoded, (0, 0), WHITE)
    assert_pixel(decoded, (4, 4), (90, 90, 90))


def test_palette_with_a_transparent_entry(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([*BLUE, *RED])
    image.putpixel((0, 0), 0)
    image.save(tmp_path / "a.png", transparency=0)
    decoded = open_rgb(tmp_path / "a.png")
    assert_pixel(decoded, (0, 0), WHITE)
    assert_pixel(decoded, (4, 4), RED)


def test_rgb_with_a_transparent_colour(tmp_path):
    halves().save(tmp_path / "a.png", transparency=BLUE)
    decoded = open_rgb(tmp_path / "a.png")
    assert_pixel(decoded, (2, 2), RED)
    assert_pixel(decoded, (46, 2), WHITE)


@pytest.mark.parametrize(("mode", "value"), [("1", 255), ("L", 77)])
def test_grey(tmp_path, mode, value):
    Image.new(mode, (8, 8), value).save(tmp_path / "a.png")
    assert_pixel(open_rgb(tmp_path / "a.png"), (3, 3), (value,) * 3)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path, suffix):
    wide = np.array([[0, 128, 300, 32768], [40000, 65535, 257, 1000]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    if suffix == "pgm":
        path.write_bytes(b"P5 4 2 65535\n" + wide.astype(">u2").tobytes())
    else:
        Image.fromarray(wide).save(path)
    grey = np.asarray(open_rgb(path))[..., 0]
    assert grey.tolist() == np.round(wide / 257).astype(int).tolist()


@pytest.mark.parametrize("mode", ["I", "F"])
def test_32_bit_pixels_are_refused(tmp_path, mode):
    Image.new(mode, (8, 8), 70000).save(tmp_path / "a.tif")
    with pytest.raises(UnreadableImageError, match="no defined white"):
        open_rgb(tmp_path / "a.tif")


def test_cmyk_jpeg(tmp_path):
    halves().convert("CMYK").save(tmp_path / "a.jpg", quality=95)
    decoded = open_rgb(tmp_path / "a.jpg")
    assert_pixel(decoded, (4, 4), RED, LOSSY)
    assert_pixel(decoded, (44, 4), BLUE, LOSSY)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_exif_orientation_6_is_turned_clockwise(tmp_path, suffix):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / f"a.{suffix}"
    lossless = {"quality": 95} if suffix == "jpg" else {"lossless": True}
    halves((48, 32)).save(path, exif=exif, **lossless)
    decoded = open_rgb(path)
    assert decoded.size == (32, 48)
    assert_pixel(decoded, (16, 4), RED, LOSSY)  # the left is now the top
    assert_pixel(decoded, (16, 44), BLUE, LOSSY)


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff", "mpo"])
def test_first_of_several_frames(tmp_path, kind):
    path = tmp_path / ("a.jpg" if kind == "mpo" else f"a.{kind}")
    frames = [Image.new("RGB", (8, 8), colour) for colour in (RED, BLUE, WHITE)]
    options = {"lossless": True} if kind == "webp" else {}
    frames[0].save(path, format=kind, save_all=True, append_images=frames[1:], **options)
    with Image.open(path) as check:
        assert check.n_frames == 3
    assert_pixel(open_rgb(path), (4, 4), RED, LOSSY if kind == "mpo" else 0)


def test_bomb_is_refused_from_its_header(tmp_path):
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    with pytest.raises(UnreadableImageError, match=r"pixels"):
        open_rgb(tmp_path / "bomb.png")


def test_bomb_is_refused_when_pillow_would_not(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # what many programs do
    (tmp_path / "bomb.png").write_bytes(png_header(60_000, 60_000))
    with pytest.raises(UnreadableImageError, match="60000 x 60000 pixels are more than"):
        open_rgb(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 33), (660, 20)])
def test_strips_are_refused(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(UnreadableImageError, match="more elongated than 32:1"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 32), (640, 20)])
def test_small_and_narrow_images_up_to_the_limit_are_fine(tmp_path, size):
    Image.new("RGB", size, RED).save(tmp_path / "a.png")
    assert open_rgb(tmp_path / "a.png").size == size


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif"])
@pytest.mark.parametrize("kept", [0.6, 0.02])
def test_truncated_files_are_refused(tmp_path, suffix, kept):
    path = tmp_path / f"a.{suffix}"
    noise(1, (64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UnreadableImageError) as caught:
        open_rgb(path)
    assert path.name in str(caught.value)


def test_text_named_jpg(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404 not found</html>")
    with pytest.raises(UnreadableImageError, match="not an image"):
        open_rgb(tmp_path / "a.jpg")


def test_postscript_is_never_handed_to_ghostscript(tmp_path):
    halves().save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="not an image"):
        open_rgb(tmp_path / "a.jpg")


def test_empty_file(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UnreadableImageError, match="the file is empty"):
        open_rgb(tmp_path / "a.jpg")


def test_missing_file_broken_link_and_folder(tmp_path):
    (tmp_path / "link.jpg").symlink_to(tmp_path / "nowhere.jpg")
    (tmp_path / "folder.jpg").mkdir()
    for name, reason in [
        ("nowhere.jpg", "no such file"),
        ("link.jpg", "no such file"),
        ("folder.jpg", "is a directory"),
    ]:
        with pytest.raises(UnreadableImageError, match=reason):
            open_rgb(tmp_path / name)


@pytest.mark.timeout(20)
def test_named_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UnreadableImageError, match="not a regular file"):
        open_rgb(tmp_path / "a.jpg")


def test_not_permitted(tmp_path, monkeypatch):
    """root may read everything, so the refusal comes from a patched `os.open`."""
    halves().save(tmp_path / "a.png")

    def refuse(path, flags):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(decode.os, "open", refuse)
    with pytest.raises(UnreadableImageError, match="permission denied"):
        open_rgb(tmp_path / "a.png")


def test_file_size_limit(tmp_path, monkeypatch):
    halves().save(tmp_path / "a.png")
    monkeypatch.setattr(decode, "MAX_FILE_BYTES", 10)
    with pytest.raises(UnreadableImageError, match="more than 10"):
        open_rgb(tmp_path / "a.png")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # it says what it saw, and goes on
def test_damaged_bytes_give_an_image_or_the_one_error(tmp_path):
    """Whatever the bytes, nothing else escapes."""
    rng = random.Random(0)
    refused = []
    for suffix in ("jpg", "png", "gif", "webp", "tif", "bmp"):
        path = tmp_path / f"a.{suffix}"
        halves().save(path)
        content = path.read_bytes()
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 8)):
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
            path.write_bytes(damaged)
            try:
                assert open_rgb(path).mode == "RGB"
            except UnreadableImageError as error:
                refused.append(error.reason)
    assert len(refused) > 60
    assert all(refused)


def test_error_names_file_and_reason_and_survives_pickling(tmp_path):
    error = UnreadableImageError(tmp_path / "a.jpg", "the file is empty")
    again = pickle.loads(pickle.dumps(error))
    assert isinstance(again, DataError)
    assert str(again) == f"cannot use image {tmp_path / 'a.jpg'}: the file is empty."
    assert again.reason == "the file is empty"
