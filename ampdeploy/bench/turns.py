"""Two models that take turns, until they are warm and then until there are enough calls."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

TimedByAll = Callable[[int], tuple[float, ...]]
"""Runs a model on the input buffer of that number; returns milliseconds by several clocks at once,
the first of which decides when it is warm."""

WINDOW_PAIRS = 3
WINDOW_SECONDS = 0.1  # three calls of a fast model would end before the clocks have risen
WINDOWS = 3  # that must agree
# Where the machine is warm and only the files were opened anew: one window, for their memory and
# kernels. What it leaves unsettled is a difference between loads, and in their interval.
REOPENED_SECONDS = 0.5
STABLE_WITHIN = 0.05  # spread of the medians of the windows, relative
WARMUP_SHARE = 0.5  # of max_seconds, at most

# A slow model is given up on before `min_runs` after this many times max_seconds.
HARD_CAP_FACTOR = 6.0


class Pairs:
    """Runs both models on the next buffer, turn and turn about; `first` (0 or 1) begins."""

    def __init__(
        self, baseline: TimedByAll, pruned: TimedByAll, buffers: int, first: int = 0
    ) -> None:
        self._models = (baseline, pruned)
        self._buffers = buffers
        self._first = first
        self.done = 0

    def next(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Milliseconds by each clock, of (baseline, pruned) on one buffer."""
        # An even number of buffers must shift each round, or each would have one fixed order.
        shift = 0 if self._buffers % 2 else self.done // self._buffers
        buffer = (self.done + shift) % self._buffers
        first = (self.done + self._first) % 2
        took: list[tuple[float, ...]] = [(), ()]
        for index in (first, 1 - first):
            took[index] = self._models[index](buffer)
        self.done += 1
        return took[0], took[1]


def run_in(pairs: Pairs) -> float:
    """A warm-up of files that were opened anew on a warm machine. Returns its seconds."""
    start = time.perf_counter()
    while pairs.done < WINDOW_PAIRS or time.perf_counter() - start < REOPENED_SECONDS:
        pairs.next()
    return time.perf_counter() - start


def warm_up(pairs: Pairs, limit_s: float) -> tuple[float, bool]:
    """Run until three windows agree. Returns (seconds, whether they did)."""
    start = time.perf_counter()
    medians: list[np.ndarray] = []
    while True:
        window: list[tuple[float, float]] = []  # by the first clock
        window_start = time.perf_counter()
        while len(window) < WINDOW_PAIRS or time.perf_counter() - window_start < WINDOW_SECONDS:
            dense, slim = pairs.next()
            window.append((dense[0], slim[0]))
            elapsed = time.perf_counter() - start
            if elapsed > limit_s:
                return elapsed, False
        medians.append(np.median(window, axis=0))
        if windows_agree(medians):
            return elapsed, True


def windows_agree(medians: list[np.ndarray]) -> bool:
    """Whether the last three windows' medians (each of both models) are within a few percent."""
    if len(medians) < WINDOWS:
        return False
    last = np.stack(medians[-WINDOWS:])
    return bool(np.all(np.ptp(last, axis=0) <= STABLE_WITHIN * last.min(axis=0)))


def timed(pairs: Pairs, min_runs: int, max_seconds: float) -> tuple[np.ndarray, float, bool]:
    """Samples (n, 2, clocks) in ms, seconds, and whether the hard cap cut them short."""
    samples: list[tuple[tuple[float, ...], tuple[float, ...]]] = []
    start = time.perf_counter()
    while True:
        samples.append(pairs.next())
        elapsed = time.perf_counter() - start
        enough = len(samples) >= min_runs
        capped = not enough and elapsed >= HARD_CAP_FACTOR * max_seconds
        if capped or (enough and elapsed >= max_seconds):
            return np.array(samples), elapsed, capped
