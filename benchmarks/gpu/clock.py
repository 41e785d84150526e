"""Dense and pruned timed turn and turn about on the same inputs, until the clock has settled.

The same method as `ampdeploy.bench.latency`, with a clock that each way of running brings itself.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from ampdeploy.bench.latency import (
    HARD_CAP_FACTOR,
    ORDER,
    WARMUP_SHARE,
    WINDOW_PAIRS,
    WINDOW_SECONDS,
    ratio_of_medians,
    summarise,
    windows_agree,
)
from ampdeploy.report.codec import to_plain

# Three windows must fit in, however little time the timed calls are given.
MIN_WARMUP_SECONDS = 1.0

Timed = Callable[[int], float]
"""Runs one model on the input buffer of that number; returns milliseconds."""


class _Pairs:
    """Both models on the next buffer, alternating which goes first."""

    def __init__(self, dense: Timed, pruned: Timed, buffers: int) -> None:
        self._models = (dense, pruned)
        self._buffers = buffers
        self.done = 0

    def next(self) -> tuple[float, float]:
        # An even number of buffers must shift each round, or each would have one fixed order.
        shift = 0 if self._buffers % 2 else self.done // self._buffers
        buffer = (self.done + shift) % self._buffers
        first = self.done % 2
        took = [0.0, 0.0]
        for index in (first, 1 - first):
            took[index] = self._models[index](buffer)
        self.done += 1
        return took[0], took[1]


def measure_pair(
    dense: Timed,
    pruned: Timed,
    *,
    clock: str,
    buffers: int,
    seconds: float,
    min_runs: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Time two models against each other.

    Args:
        dense: The baseline.
        pruned: The candidate.
        clock: What the two measure, in words.
        buffers: Different inputs to rotate through.
        seconds: For the timed calls of both together, once there are `min_runs` pairs.
        min_runs: Pairs at least; given up on after `HARD_CAP_FACTOR` times `seconds`.
        rng: Of the bootstrap.

    Returns:
        ``dense`` and ``pruned`` (p50, p90, p99, mean, min, max, n, in milliseconds), ``ratio``
        (pruned / dense medians with its 95% interval), and ``timing``, how it was done.
    """
    pairs = _Pairs(dense, pruned, buffers)
    warmup_s, stable = _warm_up(pairs, max(MIN_WARMUP_SECONDS, WARMUP_SHARE * seconds))
    warmup_pairs = pairs.done
    samples: list[tuple[float, float]] = []
    start = time.perf_counter()
    while True:
        samples.append(pairs.next())
        elapsed = time.perf_counter() - start
        capped = len(samples) < min_runs and elapsed >= HARD_CAP_FACTOR * seconds
        if capped or (len(samples) >= min_runs and elapsed >= seconds):
            break
    both = np.array(samples)
    return {
        "dense": to_plain(summarise(both[:, 0])),
        "pruned": to_plain(summarise(both[:, 1])),
        "ratio": to_plain(ratio_of_medians(both[:, 0], both[:, 1], rng=rng)),
        "timing": {
            "clock": clock,
            "order": ORDER,
            "warmup_pairs": warmup_pairs,
            "warmup_seconds": warmup_s,
            "warmup_stable": stable,
            "pairs": len(samples),
            "seconds": elapsed,
            "capped": capped,
            "buffers": buffers,
        },
    }


def _warm_up(pairs: _Pairs, limit_s: float) -> tuple[float, bool]:
    """Run until three windows agree. Returns (seconds, whether they did)."""
    start = time.perf_counter()
    medians: list[np.ndarray] = []
    while True:
        window: list[tuple[float, float]] = []
        window_start = time.perf_counter()
        while len(window) < WINDOW_PAIRS or time.perf_counter() - window_start < WINDOW_SECONDS:
            window.append(pairs.next())
            elapsed = time.perf_counter() - start
            if elapsed > limit_s:
                return elapsed, False
        medians.append(np.median(window, axis=0))
        if windows_agree(medians):
            return elapsed, True
