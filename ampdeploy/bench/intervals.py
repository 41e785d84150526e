"""Ratios of two models with 95% intervals that hold on a machine that drifts.

How often they hold is measured in benchmarks/timing/coverage.py and repeat.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ampdeploy.report.result import Interval

MIN_FOR_INTERVAL = 20  # pairs: with 10, "95%" intervals hold 85% of the time
MIN_LOADS = 5  # of both files: with fewer, Student's t explodes
RESAMPLES = 2000
RESAMPLE_CHUNK = 100  # resamples at once; bounds memory

Z = 1.959963984540054  # the normal distribution's 97.5th percentile


def ratio_over_loads(loads_ms: Sequence[np.ndarray]) -> Interval:
    """Pruned / baseline of the medians of calls, with a 95% interval that includes what loads do.

    Each time that the files are opened gives a ratio of its own, and these are independent of each
    other, whatever disturbs the calls within one. The value is their geometric mean, the interval
    Student's t over their logarithms, with the effect of who was opened first taken out: see
    `mean_of_turns`. Of 100 runs with two copies of a model it held in 98; t that left the order in
    held in all, and was a fifth wider (benchmarks/timing/repeat.py). Around the ratio of the
    medians of all calls, which is another number, t holds less often than it says.

    Fewer than `MIN_LOADS` cannot show how loads differ, and calls within a load do not show it at
    all: then there is no interval.

    Args:
        loads_ms: Per load (pairs, 2): milliseconds of baseline and pruned, in order; the models
            were opened by turns in this order and the other.
    """
    medians = np.array([np.median(load, axis=0) for load in loads_ms])
    return _of_loads(np.log(medians[:, 1] / medians[:, 0]))


def ratio_of_calls(
    loads_ms: Sequence[np.ndarray], rng: np.random.Generator | None = None
) -> Interval:
    """`ratio_of_medians` over all calls: of models that are open already, about this load alone.

    Args:
        loads_ms: As for `ratio_over_loads`.
        rng: Draws the resamples; None: one with seed 0.
    """
    together = np.concatenate(loads_ms)
    return ratio_of_medians(together[:, 0], together[:, 1], rng=rng)


def ratio_of_medians(
    baseline_ms: np.ndarray, pruned_ms: np.ndarray, *, rng: np.random.Generator | None = None
) -> Interval:
    """Median(pruned) / median(baseline) with a bootstrap 95% interval.

    Pairs are resampled together, in circular blocks of successive pairs: what disturbs one call
    often disturbs the next, and resampling them one by one would give an interval that is too
    narrow (Politis & Romano, 1992).

    Args:
        baseline_ms: (n,) timed calls in the order in which they ran, paired with `pruned_ms`.
        pruned_ms: (n,)
        rng: Draws the resamples; None: one with seed 0, so that the same times give the same.
    """
    return _of_medians(baseline_ms, pruned_ms, np.divide, rng)


def difference_of_medians(
    baseline_ms: np.ndarray, pruned_ms: np.ndarray, *, rng: np.random.Generator | None = None
) -> Interval:
    """Median(pruned) - median(baseline) in ms, as `ratio_of_medians`."""
    return _of_medians(baseline_ms, pruned_ms, np.subtract, rng)


def _of_medians(
    baseline_ms: np.ndarray,
    pruned_ms: np.ndarray,
    compare: np.ufunc,
    rng: np.random.Generator | None,
) -> Interval:
    rng = rng or np.random.default_rng(0)
    value = float(compare(np.median(pruned_ms), np.median(baseline_ms)))
    n = len(baseline_ms)
    if n < MIN_FOR_INTERVAL:
        return _no_interval(
            value, f"{n} pairs of timed calls; an interval needs {MIN_FOR_INTERVAL}"
        )
    length = block_pairs(n)
    offsets = np.arange(length)
    found: list[np.ndarray] = []
    for _ in range(RESAMPLES // RESAMPLE_CHUNK):
        starts = rng.integers(0, n, size=(RESAMPLE_CHUNK, -(-n // length), 1))
        chosen = ((starts + offsets) % n).reshape(RESAMPLE_CHUNK, -1)[:, :n]
        slim, dense = (np.median(ms[chosen], axis=1) for ms in (pruned_ms, baseline_ms))
        found.append(compare(slim, dense))
    low, high = np.percentile(np.concatenate(found), [2.5, 97.5])
    return Interval(value=value, ci95_low=float(low), ci95_high=float(high))


def block_pairs(n: int) -> int:
    """Successive pairs that are resampled together, of `n`: about n^(1/3)."""
    return max(1, round(n ** (1 / 3)))


def rates_over_loads(loads: Sequence[np.ndarray]) -> Interval:
    """Pruned / baseline of the rates, as `ratio_over_loads`.

    Args:
        loads: Per load (windows, 2): rates of baseline and pruned.
    """
    return _of_loads(np.array([np.log(load[:, 1] / load[:, 0]).mean() for load in loads]))


def mean_of_turns(values: np.ndarray) -> np.ndarray:
    """Mean over loads that took turns in who comes first: what comes first counts half.

    Args:
        values: (loads, ...) in order.
    """
    if len(values) == 1:
        return np.asarray(values[0])
    return np.asarray((values[::2].mean(axis=0) + values[1::2].mean(axis=0)) / 2)


def _of_loads(logs: np.ndarray) -> Interval:
    """`mean_of_turns` (loads,) with Student's t of what is left: a constant and the order are two
    parameters of a least-squares fit."""
    n = len(logs)
    middle = float(mean_of_turns(logs))
    value = math.exp(middle)
    if n < MIN_LOADS:
        return _no_interval(
            value,
            f"{n} load{'s' if n > 1 else ''} of both files; an interval needs {MIN_LOADS}",
        )
    turns = (logs[::2], logs[1::2])
    left = sum(float(np.sum((turn - turn.mean()) ** 2)) for turn in turns) / (n - 2)
    variance = left * sum(1 / len(turn) for turn in turns) / 4
    reach = math.exp(student_t(n - 2) * math.sqrt(variance))
    return Interval(value=value, ci95_low=value / reach, ci95_high=value * reach)


def _no_interval(value: float, reason: str) -> Interval:
    why = {"ci95_low": reason, "ci95_high": reason}
    return Interval(value=value, ci95_low=None, ci95_high=None, why=why)


def student_t(freedom: int) -> float:
    """The 97.5th percentile of Student's t, to 0.2% from 3 degrees of freedom on.

    Cornish-Fisher expansion, Abramowitz & Stegun 26.7.5: numpy has no quantiles, and a device
    needs no SciPy for this one.

    Raises:
        ValueError: Below 3, where the expansion is off.
    """
    if freedom < 3:
        raise ValueError(f"{freedom} degrees of freedom; the expansion holds from 3 on")
    z, v = Z, freedom
    return (
        z
        + (z**3 + z) / (4 * v)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * v**3)
        + (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * v**4)
    )
