"""How a way's features agree with PyTorch's float32 on the same images."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ampdeploy.precision.compare import agreement
from benchmarks.gpu.ways import Opened


def judge(
    opened: Opened, images: np.ndarray, reference: dict[str, np.ndarray], batch: int
) -> dict[str, Any]:
    """Agreement of every output (CLS or pooled, and patches), over all images.

    Args:
        opened: Takes batches of `batch` images only.
        images: (N, 3, S, S); the last batch is filled up with the first images.
        reference: Output name -> float32 values for `images`.
        batch: Images per call.

    Returns:
        Output name -> cosine min, p1, mean over its vectors, and how many values are not finite.
    """
    parts: dict[str, list[np.ndarray]] = {}
    for start in range(0, len(images), batch):
        chosen = np.arange(start, start + batch) % len(images)
        for name, value in opened.features(np.ascontiguousarray(images[chosen])).items():
            parts.setdefault(name, []).append(value)
    return {
        name: dataclasses.asdict(agreement(np.concatenate(parts[name])[: len(images)], expected))
        for name, expected in reference.items()
    }
