"""Photographs that every scikit-image wheel ships, as a second set of images to judge on.

Nothing like the drawings that calibrate: people, animals, textures, microscopy, astronomy, streets
and pages. Of each the whole and its four quadrants, so that there are enough views for a
percentile and for neighbours.
"""

from __future__ import annotations

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ampdeploy.artifacts import sha256_file, sha256_json
from ampdeploy.data.decode import open_rgb
from ampdeploy.data.transforms import eval_transform
from ampdeploy.errors import DataError
from ampdeploy.models.spec import ModelSpec
from ampdeploy.optional import require

PHOTOGRAPHS = (
    "astronaut.png",
    "brick.png",
    "camera.png",
    "cell.png",
    "chelsea.png",
    "clock_motion.png",
    "coffee.png",
    "coins.png",
    "grass.png",
    "gravel.png",
    "hubble_deep_field.jpg",
    "ihc.png",
    "moon.png",
    "motorcycle_left.png",
    "page.png",
    "retina.jpg",
    "rocket.jpg",
)
VIEWS = 5


def photograph_paths() -> list[Path]:
    """The files, in the order of `PHOTOGRAPHS`.

    Raises:
        MissingDependencyError: scikit-image is not installed.
        DataError: Its wheel has not got one of them.
    """
    package = require("skimage", needed_by="judging on photographs").__file__
    assert package is not None
    paths = [Path(package).parent / "data" / name for name in PHOTOGRAPHS]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"this scikit-image ships no {', '.join(missing)}. Install 0.22 or newer from a wheel."
        )
    return paths


def photographs_sha256() -> str:
    """Identity of the photographs and of the views taken of them."""
    return sha256_json([VIEWS, [sha256_file(path) for path in photograph_paths()]])


def views(image: Image.Image) -> list[Image.Image]:
    """The whole image and its four quadrants, row by row."""
    width, height = image.size
    x, y = width // 2, height // 2
    boxes = [(0, 0, x, y), (x, 0, width, y), (0, y, x, height), (x, y, width, height)]
    return [image, *(image.crop(box) for box in boxes)]


def load_photographs(spec: ModelSpec) -> Tensor:
    """All views, preprocessed for the model: (`VIEWS` * number of photographs, 3, S, S)."""
    transform = eval_transform(spec)
    return torch.stack(
        [transform(view) for path in photograph_paths() for view in views(open_rgb(path))]
    )
