"""From the pruned model to what is shipped: export, precision, engine."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ampdeploy.config.checks import as_floats, one_of, positive
from ampdeploy.errors import ConfigError

PRECISIONS = ("fp32", "fp16")
# Targets that build an engine: what they compute in is what the graph says.
ENGINE_TARGETS = ("trt", "trt-rtx")
PORTABLE = ("none", "version", "same-cc", "ampere-plus")
ALL_SIZES_UP_TO = 16


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """ONNX export and its numerical check."""

    opset: int = 18
    """18 has one LayerNormalization per norm and is read by every TensorRT in scope."""
    verify_batches: tuple[int, ...] = (1, 2, 5)
    """Batch sizes at which PyTorch and ONNX Runtime are compared on real images."""
    max_relative_diff: float = 1e-3
    """Largest difference allowed in any output element, in units of that output's RMS.

    DINOv2-S on photographs differs by 2e-5; a tanh GELU, a LayerNorm epsilon of 1e-5 and weights
    rounded to FP16 by 7e-3 and more."""
    min_cosine: float = 0.99999
    """Smallest cosine allowed between corresponding vectors."""

    def __post_init__(self) -> None:
        if self.opset < 18:
            raise ConfigError(
                f"opset {self.opset} splits LayerNorm into pieces that overflow in FP16. "
                "Use 18 or newer."
            )
        if not 0 < self.max_relative_diff < math.inf:
            raise ConfigError(
                f"max relative diff is {self.max_relative_diff}; it must be a number above 0."
            )
        if not self.verify_batches or min(self.verify_batches) < 1:
            raise ConfigError(f"verify batches {self.verify_batches}: give sizes of 1 or more.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Typing the ONNX graph to FP16, and how right it must be."""

    precision: str = "fp32"
    """``fp16``, or ``fp32``: the graph as it was exported."""
    min_cosine_p1: float = 0.999
    """First percentile of the cosine to PyTorch's float32 features, of CLS and of patches, over
    held-out images. Below it the graph is repaired, or refused."""
    headroom: float = 4.0
    """A tensor whose largest value on the calibration images, times this, leaves the range of
    FP16 (65504) stays FP32: other images reach further."""

    def __post_init__(self) -> None:
        as_floats(self, "min_cosine_p1", "headroom")
        one_of("precision", self.precision, PRECISIONS)
        if not 0 < self.min_cosine_p1 <= 1:
            raise ConfigError(
                f"min cosine p1 is {self.min_cosine_p1}; it must be above 0 and at most 1."
            )
        if not 1 <= self.headroom < math.inf:
            raise ConfigError(f"headroom is {self.headroom}; it must be 1 or more.")


def sizes_to_test(batch: tuple[int, ...]) -> tuple[int, ...]:
    """Batch sizes that an engine with this profile is tested at.

    Known bugs are of one size alone, so all of the small ones; above `ALL_SIZES_UP_TO` the doubles
    of each other, and what the profile names.

    Args:
        batch: Smallest, usual and largest.
    """
    smallest, _, largest = batch
    sizes = {*batch, *range(smallest, min(largest, ALL_SIZES_UP_TO) + 1)}
    size = 2 * ALL_SIZES_UP_TO
    while size < largest:
        if size > smallest:
            sizes.add(size)
        size *= 2
    return tuple(sorted(sizes))


def _check_profile(batch: tuple[int, ...]) -> None:
    """Refuse what are no smallest, usual and largest batch.

    Raises:
        ConfigError: Says which number is wrong.
    """
    text = ",".join(map(str, batch))
    wanted = "Give smallest, usual and largest, e.g. 1,1,8."
    if len(batch) != 3:
        raise ConfigError(
            f"--engine-batch {text}: that is {len(batch)} number{'s' * (len(batch) != 1)}, not 3. "
            f"{wanted}"
        )
    smallest, usual, largest = batch
    for what, size in (("smallest", smallest), ("usual", usual), ("largest", largest)):
        if size < 1:
            raise ConfigError(
                f"--engine-batch {text}: the {what} batch is {size}; it must be 1 or more. {wanted}"
            )
    for what, size, least, than in (
        ("usual", usual, "smallest", smallest),
        ("largest", largest, "usual", usual),
    ):
        if size < than:
            raise ConfigError(
                f"--engine-batch {text}: the {what} batch, {size}, is below the {least}, {than}. "
                f"{wanted}"
            )


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Building a TensorRT engine from the typed graph."""

    batch: tuple[int, ...] = (1, 1, 8)
    """Smallest, usual and largest batch: the profile that tactics are chosen for."""
    portable: str = "none"
    """Where else the engine may run: ``none``, a newer TensorRT (``version``), GPUs of the same
    compute capability (``same-cc``), or any desktop GPU from Ampere on (``ampere-plus``)."""
    when: str = "now"
    """``now``, or ``deferred``: the engine is built on the device, from the bundle."""
    strip_weights: bool = False
    """Leave the weights out of the plan; opening it takes the ONNX file beside it."""
    memory_limit_bytes: int | None = None
    """What the builder may take; None: what is free, less a reserve."""
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX only: the GPUs to build for, e.g. ``8.9``; empty: its default."""

    def __post_init__(self) -> None:
        one_of("portability", self.portable, PORTABLE)
        one_of("time to build the engine", self.when, ("now", "deferred"))
        _check_profile(self.batch)
        if self.memory_limit_bytes is not None:
            positive(self, "memory_limit_bytes")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise ConfigError(
                    f"compute capability {capability!r}: give major and minor, e.g. 8.9."
                )
