"""Features of two classes or more that can be told apart, or not, as wanted."""

from __future__ import annotations

import numpy as np

from ampdeploy.bench.tasks import Evidence


def clusters(
    per_class: int, *, classes: int = 3, width: int = 8, noise: float = 0.05, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Points around the first unit vectors: features (classes * per_class, width) and labels."""
    labels = np.repeat(np.arange(classes), per_class)
    spread = np.random.default_rng(seed).standard_normal((len(labels), width)) * noise
    return (np.eye(classes, width)[labels] + spread).astype(np.float32), labels


def evidence(
    queries: np.ndarray,
    labels: np.ndarray,
    *,
    pruned: np.ndarray | None = None,
    bank: np.ndarray | None = None,
    bank_pruned: np.ndarray | None = None,
    bank_labels: np.ndarray | None = None,
    patch_means: np.ndarray | None = None,
) -> Evidence:
    """Of a baseline, and of a pruned model that is the same unless given."""

    def both(baseline, other):
        return {"baseline": baseline, "pruned": baseline if other is None else other}

    top = max(int(labels.max()), -1 if bank_labels is None else int(bank_labels.max()))
    return Evidence(
        queries=both(queries, pruned),
        query_labels=labels,
        bank=None if bank is None else both(bank, bank_pruned),
        bank_labels=bank_labels,
        classes=tuple(f"class{number:03d}" for number in range(top + 1)),
        patch_means=None if patch_means is None else both(patch_means, None),
    )
