"""Two things timed turn and turn about, so that a busy machine disturbs both alike."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from ampdeploy.bench.intervals import ratio_of_medians
from ampdeploy.report.result import Interval

WARMUP_PAIRS = 3


def run_pairs(first: Callable[[], object], second: Callable[[], object], pairs: int) -> np.ndarray:
    """Run both `WARMUP_PAIRS` + `pairs` times, alternating which goes first.

    Returns:
        (pairs, 2) milliseconds, without the warm-up.
    """
    samples_ms = np.empty((WARMUP_PAIRS + pairs, 2))
    for index, row in enumerate(samples_ms):
        for which in (index % 2, 1 - index % 2):
            start = time.perf_counter_ns()
            (first, second)[which]()
            row[which] = (time.perf_counter_ns() - start) / 1e6
    return samples_ms[WARMUP_PAIRS:]


def ratio(samples_ms: np.ndarray) -> Interval:
    """Median of the second / median of the first, with a 95% interval.

    Args:
        samples_ms: (pairs, 2), as `run_pairs` gives them; above 0.
    """
    rng = np.random.default_rng(0)
    return ratio_of_medians(samples_ms[:, 0], samples_ms[:, 1], rng=rng)


def spread(samples_ms: np.ndarray) -> tuple[float, ...]:
    """(p90 - p10) / p50 of each column."""
    low, middle, high = np.percentile(samples_ms, [10, 50, 90], axis=0)
    return tuple(float(value) for value in (high - low) / middle)
