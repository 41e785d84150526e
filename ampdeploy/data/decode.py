"""One image file in, 8-bit RGB out, or a reason why not."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ampdeploy.errors import DataError

# Formats by content, whatever the suffix says. An explicit list, because Pillow also knows formats
# that start other programs (EPS runs Ghostscript) or fetch other files.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")

# Pillow's own warning threshold, held here as a refusal; 270 MB as RGB. A few kilobytes of PNG can
# claim more than a machine's memory.
MAX_PIXELS = 89_478_485

# An uncompressed 16-bit RGBA image of MAX_PIXELS fits; whole files are read to be hashed.
MAX_FILE_BYTES = 1 << 30

# Beyond it a centre crop sees under 1/32 of the image, and resizing the short side to the model's
# input makes the long side so long that a 1 x 100,000 strip would need gigabytes.
MAX_ASPECT_RATIO = 32

# Decoders that give mode "I" only for 16-bit samples, scaled to 0..65535.
_SIXTEEN_BIT_I = ("PNG", "PPM")

_ALPHA_MODES = ("RGBA", "RGBa", "LA", "La", "PA")


class UnreadableImageError(DataError):
    """A file that is not an image this tool can use."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot use image {path}: {reason}.")
        self.path = path
        self.reason = reason
        """What is wrong with the file, without its name."""

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[Path, str]]:
        # Pickled when a DataLoader worker raises it.
        return type(self), (self.path, self.reason)


def open_rgb(path: Path) -> Image.Image:
    """Decode an image file to 8-bit RGB, upright.

    EXIF rotation is applied, transparency is composited on white, greyscale (8 and 16 bit),
    palette and CMYK are converted, and of several frames the first is taken.

    Raises:
        UnreadableImageError: Missing, not permitted, not an image, damaged, truncated, larger than
            `MAX_PIXELS`, more elongated than `MAX_ASPECT_RATIO`, or of a pixel type with no
            defined range.
    """
    return decode_rgb(read_bytes(path), path)


def read_bytes(path: Path) -> bytes:
    """The content of a regular file of at most `MAX_FILE_BYTES`.

    Raises:
        UnreadableImageError: It cannot be read, or is not a file, empty, or too large.
    """
    try:
        # Non-blocking, so that a named pipe called x.jpg is refused below and not waited for.
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with open(descriptor, "rb") as handle:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode):
                raise UnreadableImageError(path, "it is not a regular file")
            if facts.st_size > MAX_FILE_BYTES:
                raise UnreadableImageError(
                    path, f"it has {facts.st_size:,} bytes, more than {MAX_FILE_BYTES:,}"
                )
            data = handle.read()
    except OSError as error:
        raise UnreadableImageError(path, (error.strerror or str(error)).lower()) from error
    if not data:
        raise UnreadableImageError(path, "the file is empty")
    return data


def decode_rgb(data: bytes, path: Path) -> Image.Image:
    """Decode the content of an image file; see `open_rgb`.

    Args:
        data: The file's bytes.
        path: Where they come from, for messages.

    Raises:
        UnreadableImageError: As `open_rgb`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _check_size(image, path)  # from the header, before any pixel is decoded
            return upright_rgb(image, path)
    except UnreadableImageError:
        raise
    except Image.UnidentifiedImageError as error:
        kinds = ", ".join(FORMATS)
        raise UnreadableImageError(path, f"not an image, or damaged ({kinds} tried)") from error
    except Exception as error:
        # Deliberately broad: on damaged bytes Pillow's decoders raise OSError, SyntaxError,
        # ValueError, struct.error, IndexError, ... and all of them say the same: a bad file.
        raise UnreadableImageError(path, str(error).rstrip(".") or type(error).__name__) from error


def upright_rgb(image: Image.Image, path: Path) -> Image.Image:
    """An image as `open_rgb` gives it: upright, on white, 8 bits.

    Args:
        image: Of any mode; opened from a file, or made.
        path: Where it comes from, for messages.

    Raises:
        UnreadableImageError: A pixel type with no defined range.
    """
    image.load()  # a TIFF is turned by Pillow itself when it is loaded
    return _to_rgb(ImageOps.exif_transpose(image), image.format or "", path)


def _check_size(image: Image.Image, path: Path) -> None:
    width, height = image.size
    if min(width, height) < 1:
        raise UnreadableImageError(path, f"its size is {width} x {height} pixels")
    if width * height > MAX_PIXELS:
        raise UnreadableImageError(
            path, f"{width} x {height} pixels are more than {MAX_PIXELS:,} in total"
        )
    if max(width, height) > MAX_ASPECT_RATIO * min(width, height):
        raise UnreadableImageError(
            path, f"{width} x {height} pixels is more elongated than {MAX_ASPECT_RATIO}:1"
        )


def _to_rgb(image: Image.Image, file_format: str, path: Path) -> Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and file_format in _SIXTEEN_BIT_I):
        return _from_sixteen_bit(image).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnreadableImageError(
            path,
            f"32-bit pixels (mode {image.mode}) have no defined white; store it with 8 or 16 bits",
        )
    if image.mode in _ALPHA_MODES or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_sixteen_bit(image: Image.Image) -> Image.Image:
    """0..65535 to 0..255; Pillow's own conversion clips, which turns nearly everything white."""
    wide = np.asarray(image).astype(np.uint32)
    return Image.fromarray(((wide + 128) // 257).astype(np.uint8))
