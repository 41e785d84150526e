"""A typed graph against PyTorch in float32: per block and at the outputs.

Array legend: N images, B batch, T tokens, C width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ampdeploy.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What PyTorch computes in float32 for the images that judge."""

    images: np.ndarray
    """(N, 3, S, S), float32, normalised; real ones that calibration has not seen."""
    blocks: dict[int, np.ndarray]
    """Block -> tokens (N, T, C) that it hands on."""
    outputs: dict[str, np.ndarray]
    """Output name -> (N, C) or (N, T, C)."""

    def __post_init__(self) -> None:
        if not len(self.images):
            raise DataError("cannot judge precision without images: give at least one.")


# A cosine says nothing about length, and powers of two are put into these graphs. Two unit vectors
# of cosine c are sqrt(2 - 2c) apart; the slack is for lengths that differ a little as well.
ERROR_SLACK = 1.5
# The one vector in a hundred that the percentile leaves out may be this much worse: at a bar of
# 0.999, no cosine below 0.95.
WORST_SLACK = 50.0
TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How one tensor agrees with the reference, over all its vectors (last axis)."""

    vectors: int
    cosine_min: float
    cosine_p1: float
    cosine_mean: float
    error_p99: float
    """99th percentile of the length of the difference over that of the reference."""
    not_finite: int
    """Values that are NaN or infinite."""

    def fault(self, bar: float) -> str | None:
        """What is wrong with it, or None: finite, and as close as a cosine of `bar` in all but one
        vector of a hundred, in direction and in length; none of the rest is far off."""
        if self.not_finite:
            return f"{self.not_finite} values are NaN or infinite"
        if self.cosine_p1 < bar:
            return f"cosine p1 {self.cosine_p1:.6f}"
        if self.cosine_min < 1 - WORST_SLACK * (1 - bar):
            return f"smallest cosine {self.cosine_min:.4f}"
        if self.error_p99 > ERROR_SLACK * math.sqrt(2 - 2 * bar):
            return f"relative error p99 {self.error_p99:.2g} at cosine p1 {self.cosine_p1:.6f}"
        return None

    def passes(self, bar: float) -> bool:
        """Whether it has no `fault`."""
        return self.fault(bar) is None

    def __str__(self) -> str:
        if self.not_finite:
            return f"{self.not_finite} values are NaN or infinite"
        return f"cosine p1 {self.cosine_p1:.6f}, relative error p99 {self.error_p99:.2g}"


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A typed graph on all images."""

    blocks: dict[int, Agreement]
    outputs: dict[str, Agreement]

    def passes(self, bar: float) -> bool:
        """Whether every output does. Blocks only say where it goes wrong."""
        return all(agreement.passes(bar) for agreement in self.outputs.values())

    def first_failing(self, bar: float) -> int | None:
        """The first block whose tokens miss the bar; None: they all meet it."""
        return next((b for b, seen in self.blocks.items() if not seen.passes(bar)), None)

    def losses(self) -> dict[int, float]:
        """Block -> by how much the p1 cosine falls in it."""
        before, found = 1.0, {}
        for block, seen in self.blocks.items():
            found[block] = before - seen.cosine_p1
            before = seen.cosine_p1
        return found


def agreement(found: np.ndarray, expected: np.ndarray) -> Agreement:
    """Compare two arrays of vectors (..., C); vectors with values that are not finite count as 0.

    Args:
        found: What the typed graph computed.
        expected: The reference, finite, of the same shape.
    """
    a = found.reshape(-1, found.shape[-1]).astype(np.float64)
    b = expected.reshape(-1, expected.shape[-1]).astype(np.float64)
    finite = np.isfinite(a)
    whole = finite.all(axis=1)
    a = np.where(finite, a, 0.0)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.where(
        (a == b).all(axis=1), 1.0, (a * b).sum(axis=1) / np.where(norms == 0, 1.0, norms)
    )
    cosine = np.where(whole, np.minimum(cosine, 1.0), 0.0)
    lengths = np.linalg.norm(b, axis=1)
    error = np.linalg.norm(a - b, axis=1)
    error = np.where(lengths == 0, (error > 0).astype(float), error / np.maximum(lengths, TINY))
    return Agreement(
        vectors=len(cosine),
        cosine_min=float(cosine.min()),
        cosine_p1=float(np.percentile(cosine, 1)),
        cosine_mean=float(cosine.mean()),
        error_p99=float(np.percentile(error, 99)),
        not_finite=int((~finite).sum()),
    )


def judge(
    found: Mapping[str, np.ndarray], reference: Reference, names: dict[int, str]
) -> Judgement:
    """Agreement of everything that was watched.

    Args:
        found: Tensor name -> values for all images of the reference.
        reference: PyTorch's.
        names: Block -> name of its output tensor.
    """
    return Judgement(
        blocks={
            block: agreement(found[name], reference.blocks[block]) for block, name in names.items()
        },
        outputs={
            name: agreement(found[name], expected) for name, expected in reference.outputs.items()
        },
    )
