"""Real image files and a small spec for the data tests."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
from PIL import Image

from ampdeploy.models.spec import ModelSpec

RED = (220, 30, 40)
BLUE = (20, 60, 200)


def halves(size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def noise(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Pixels that no other seed gives."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def fill(folder: Path, count: int, *, start: int = 0, suffix: str = "png") -> list[Path]:
    """`count` different small images in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"image{number:03d}.{suffix}" for number in range(start, start + count)]
    for number, path in enumerate(paths, start):
        noise(number).save(path)
    return paths


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds next to nothing: what a decompression bomb looks like."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        checksum = zlib.crc32(kind + body).to_bytes(4, "big")
        return len(body).to_bytes(4, "big") + kind + body + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    content = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000))
    return b"\x89PNG\r\n\x1a\n" + content + chunk(b"IEND", b"")


def make_spec(**changes) -> ModelSpec:
    """A spec with nothing but preprocessing in it: 24 pixels, cut out of 32."""
    facts = {
        "name": "sample",
        "timm_name": "sample",
        "licence": "none",
        "image_size": 24,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.2, 0.25, 0.5),
        "crop_pct": 0.75,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "pooling": "token",
        "feature_dim": 8,
        "num_prefix_tokens": 1,
        "has_patch_features": True,
        "sites": (),
    }
    return ModelSpec(**{**facts, **changes})
