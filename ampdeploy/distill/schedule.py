"""Rates of every step, and which parameters decay. Steps count from 0."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from ampdeploy.config import DistillConfig
from ampdeploy.errors import DataError
from ampdeploy.progress import log

# `DistillConfig.base_lr` is the rate at this batch size.
BASE_BATCH = 256


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How long a run is, and the rates of its steps (AMP, appendix; the recipe of DINOv2)."""

    steps_per_epoch: int
    steps: int
    warmup_steps: int
    peak_lr: float
    weight_decay_start: float
    weight_decay_end: float

    def lr(self, step: int) -> float:
        """Linear from ``peak / warmup`` to the peak, then half a cosine to 0 at `steps`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        return self.peak_lr * _half_cosine(done)

    def weight_decay(self, step: int) -> float:
        """Half a cosine from the start value to the end value at `steps`; no warm-up."""
        left = _half_cosine(step / self.steps)
        return self.weight_decay_end + (self.weight_decay_start - self.weight_decay_end) * left


def _half_cosine(done: float) -> float:
    """1 at 0, 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))


def plan_schedule(config: DistillConfig, images: int) -> Schedule:
    """The schedule of `config` on a training folder of `images` images.

    Raises:
        DataError: They do not fill one batch.
    """
    steps_per_epoch = images // config.batch_size
    if steps_per_epoch == 0:
        raise DataError(
            f"distillation has {images} training images, fewer than one batch of "
            f"{config.batch_size}. Give more images or lower the batch size."
        )
    steps = config.epochs * steps_per_epoch
    warmup = round(config.warmup_epochs * steps_per_epoch)
    # A run that ends while still warming up never sees the cosine's small rates, where most of
    # the gain of a short run is.
    if warmup > steps // 2:
        log.warning(
            "  warm-up of %g epochs is more than half of %d; it is cut to %d of %d steps",
            config.warmup_epochs,
            config.epochs,
            steps // 2,
            steps,
        )
        warmup = steps // 2
    return Schedule(
        steps_per_epoch=steps_per_epoch,
        steps=steps,
        warmup_steps=warmup,
        peak_lr=config.base_lr * config.batch_size / BASE_BATCH,
        weight_decay_start=config.weight_decay,
        weight_decay_end=config.weight_decay_end,
    )


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """`model`'s parameters in two AdamW groups: those that decay, then those that do not.

    Only the matrices of linears and convolutions decay. Biases, norms, LayerScale, CLS and
    register tokens and position embeddings are offsets and gains, which decay would pull towards
    zero for no gain in generalisation.
    """
    matrices = {
        id(module.weight) for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    parameters = list(model.parameters())
    return [
        {"params": [p for p in parameters if id(p) in matrices], "decays": True},
        {"params": [p for p in parameters if id(p) not in matrices], "decays": False},
    ]
