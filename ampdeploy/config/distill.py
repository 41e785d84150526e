"""Training the pruned model against the dense one."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ampdeploy.config.checks import as_paths, one_of, positive
from ampdeploy.errors import ConfigError
from ampdeploy.models.registry import recipe_of


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The published recipe (AMP, section 3.5 and appendix); `epochs` 0 skips it.

    The defaults are those of DINOv2; `for_model` knows the other families'.
    """

    epochs: int = 0
    images: Path | None = None
    """Training folder, labels not used; None: the calibration folder, all of it."""
    batch_size: int = 32
    base_lr: float = 7.5e-6
    """Learning rate at batch 256; it scales linearly with the batch."""
    warmup_epochs: float = 1.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    min_scale: float = 0.05
    """Smallest area of RandomResizedCrop."""
    strong_augment: bool = True
    """Colour jitter, greyscale, blur and solarise."""
    clip_grad_norm: float = 3.0
    checkpoint_seconds: float = 300.0
    """Time between saved trainer states, 13 GB each for DINOv2-g; 0: after every step."""
    device: str = "auto"
    """``auto``: CUDA if there is one, else CPU."""
    autocast: str = "auto"
    """``auto`` (bfloat16 on CUDA, none on CPU), ``bfloat16`` or ``none``."""
    seed: int = 0

    def __post_init__(self) -> None:
        as_paths(self, "images")
        positive(self, "batch_size", "base_lr", "clip_grad_norm")
        one_of("autocast", self.autocast, ("auto", "bfloat16", "none"))
        if self.epochs < 0 or self.warmup_epochs < 0:
            raise ConfigError(
                f"epochs is {self.epochs} and warmup epochs {self.warmup_epochs}; "
                "neither can be negative."
            )
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise ConfigError(f"checkpoint seconds is {self.checkpoint_seconds}; give 0 or more.")
        if not 0 < self.min_scale <= 1:
            raise ConfigError(f"min scale is {self.min_scale}; it is an area fraction in (0, 1].")

    @classmethod
    def for_model(cls, name: str, **options: Any) -> DistillConfig:
        """What AMP publishes for the model `name`, but for the `options` given."""
        recipe = recipe_of(name)
        published = {
            "base_lr": recipe.base_lr,
            "min_scale": recipe.min_scale,
            "strong_augment": recipe.strong_augment,
        }
        return cls(**{**published, **options})
