"""The difference of two models on the same images, with its interval. numpy only."""

from __future__ import annotations

import numpy as np

from ampdeploy.report.result import Interval

RESAMPLES = 2000
# Imaginary images added to hits and misses: gained, lost, and the same twice over. Where no image
# changed, resampling alone would claim a difference of exactly 0 from a handful of images.
PSEUDO_COUNTS = {-1: 0.5, 0: 1.0, 1: 0.5}


def paired_difference(baseline: np.ndarray, pruned: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean score of pruned minus baseline, with a bootstrap 95% interval over images.

    The interval is about other query images of the same kind. The bank, and a probe trained on it,
    are taken as given; in leave-one-out every image is also in the others' bank, which makes it a
    little too narrow.

    Scores that are hits and misses get half an image gained, half an image lost and one unchanged
    added before resampling (Agresti and Min 2005, Statistics in Medicine 24, 729-740): without
    them, n images of which none changed would give [0, 0], when about 3 in n changing is not
    excluded. Scores that are neither, such as average precision, are resampled as they are.

    Args:
        baseline: (N,) of each image, in [0, 1]; booleans are hits.
        pruned: (N,), the same images in the same order.
        seed: Of the resampling.
    """
    difference = pruned.astype(np.float64) - baseline.astype(np.float64)
    rng = np.random.default_rng(seed)
    if np.isin(baseline, (0, 1)).all() and np.isin(pruned, (0, 1)).all():
        means = _resample_counts(difference, rng)
    else:
        means = _resample_images(difference, rng)
    low, high = np.percentile(means, [2.5, 97.5])
    value = float(difference.mean())
    # All images gained or lost: the imaginary ones must not push the value out of its interval.
    return Interval(value=value, ci95_low=min(value, float(low)), ci95_high=max(value, float(high)))


def _resample_counts(difference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Means of resampled hits and misses: only how many gained and lost matters."""
    counts = np.array([(difference == change).sum() + n for change, n in PSEUDO_COUNTS.items()])
    total = counts.sum()
    drawn = rng.multinomial(int(total), counts / total, size=RESAMPLES)
    means: np.ndarray = drawn @ np.array(list(PSEUDO_COUNTS)) / total
    return means


def _resample_images(difference: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    n = len(difference)
    return np.array([difference[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)])
