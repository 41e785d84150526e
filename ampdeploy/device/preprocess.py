"""From pictures to what a model takes, with Pillow and numpy alone: a device has no torch.

The same numbers as timm's evaluation transform, to the bit: `timm.data.transforms_factory`,
`transforms_imagenet_eval`. Images, as arrays: H height, W width, S side of the model's input.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ampdeploy.device.engine.onnx_types import metadata
from ampdeploy.errors import ArtifactError, ConfigError, DataError
from ampdeploy.optional import require

if TYPE_CHECKING:
    from PIL.Image import Image

# What says how images are prepared, besides their size: in an ONNX file's metadata, in a bundle,
# in an installation and in an engine's manifest.
FIELDS = ("mean", "std", "crop_pct", "crop_mode", "interpolation")

CROP_MODES = ("center", "squash", "border")
_INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos")


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How the images of one model are prepared; the meaning of each is that of `ModelSpec`."""

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop_pct: float
    crop_mode: str
    interpolation: str

    def __post_init__(self) -> None:
        for what, value, known in (
            ("crop mode", self.crop_mode, CROP_MODES),
            ("interpolation", self.interpolation, _INTERPOLATIONS),
        ):
            if value not in known:
                raise ConfigError(f"{what} {value!r} is not known here: {', '.join(known)} are.")

    def __call__(self, picture: Path | str | Image | np.ndarray) -> np.ndarray:
        """One picture, ready for the model.

        Args:
            picture: A file, a Pillow image, or an array (H, W, 3) of uint8, RGB.

        Returns:
            (3, S, S) float32.

        Raises:
            DataError: It is no such picture.
            MissingDependencyError: Pillow is not installed.
        """
        image = _rgb(picture)
        if self.crop_mode == "border":
            image = self._bordered(image)
        else:
            image = _centre(self._scaled(image), self.image_size)
        pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / np.float32(255)
        mean, std = (np.array(v, dtype=np.float32).reshape(3, 1, 1) for v in (self.mean, self.std))
        return np.ascontiguousarray((pixels - mean) / std)

    @property
    def _scale_to(self) -> int:
        return math.floor(self.image_size / self.crop_pct)

    def _scaled(self, image: Image) -> Image:
        side = self._scale_to
        if self.crop_mode == "squash":
            return self._resized(image, side, side)
        width, height = image.size
        # As torchvision: the long side is cut, not rounded.
        if width <= height:
            return self._resized(image, side, int(side * height / width))
        return self._resized(image, int(side * width / height), side)

    def _resized(self, image: Image, width: int, height: int) -> Image:
        pil = require("PIL.Image", needed_by="preparing images")
        return image.resize((width, height), getattr(pil.Resampling, self.interpolation.upper()))

    def _bordered(self, image: Image) -> Image:
        """All of the picture, on a square of the mean colour."""
        side, size = self._scale_to, self.image_size
        ratio = max(extent / side for extent in image.size)
        width, height = (round(extent / ratio) for extent in image.size)
        image = self._resized(image, width, height)
        pil = require("PIL.Image", needed_by="preparing images")
        square = (max(width, size), max(height, size))
        canvas: Image = pil.new("RGB", square, tuple(round(255 * value) for value in self.mean))
        canvas.paste(image, (max(size - width, 0) // 2, max(size - height, 0) // 2))
        return _centre(canvas, size)


def _centre(image: Image, size: int) -> Image:
    left, top = (round((extent - size) / 2) for extent in image.size)
    return image.crop((left, top, left + size, top + size))


def _rgb(picture: Path | str | Image | np.ndarray) -> Image:
    pil = require("PIL.Image", needed_by="preparing images")
    if isinstance(picture, Path | str):
        from ampdeploy.data.decode import open_rgb

        return open_rgb(Path(picture))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise DataError(
                f"an array of shape {picture.shape} and type {picture.dtype} is no picture. Give "
                "uint8 of shape (height, width, 3), in the order red, green, blue."
            )
        made: Image = pil.fromarray(picture)
        return made
    if not isinstance(picture, pil.Image):
        raise DataError(
            f"{type(picture).__name__} is no picture. Give a path, a Pillow image, or a uint8 "
            "array of shape (height, width, 3)."
        )
    from ampdeploy.data.decode import upright_rgb

    return upright_rgb(picture, Path(getattr(picture, "filename", "") or "a Pillow image"))


def preprocessing_of(onnx: Path) -> dict[str, Any]:
    """What an exported graph says of its images: `FIELDS`; empty where it says nothing.

    Raises:
        ArtifactError: The file is missing or damaged.
    """
    said = metadata(onnx)
    if any(name not in said for name in FIELDS):
        return {}
    texts = ("crop_mode", "interpolation")
    return {name: said[name] if name in texts else json.loads(said[name]) for name in FIELDS}


def read_preprocessing(facts: dict[str, Any], image_size: int, *, where: Path) -> Preprocessing:
    """The same as a `Preprocessing`.

    Args:
        facts: `FIELDS`, of a manifest or an ONNX file.
        image_size: Side of the square input, pixels.
        where: Where they were read.

    Raises:
        ArtifactError: Some are missing.
    """
    missing = [name for name in FIELDS if name not in facts]
    if missing:
        raise ArtifactError(
            f"{where} does not say how its images are prepared ({', '.join(missing)}). Use a file "
            "that ampdeploy exported, or prepare the images yourself."
        )
    values: dict[str, Any] = {name: facts[name] for name in FIELDS}
    values |= {name: tuple(facts[name]) for name in ("mean", "std")}
    return Preprocessing(image_size=image_size, **values)
