"""Latency of two models, interleaved: A B, B A, A B ... in one run on the same images.

A machine's clocks and neighbours drift; two separate runs measure that drift too. Here each pair
of calls sees the same machine, and the ratio comes with an interval.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from ampdeploy.errors import ConfigError, DataError
from ampdeploy.progress import log
from ampdeploy.report.result import Interval, LatencyStats, Timing
from ampdeploy.targets.base import Runner

Timed = Callable[[int], float]
"""Runs a model on the input buffer of that number; returns milliseconds."""

BASELINE = "baseline"
PRUNED = "pruned"
MODELS = (BASELINE, PRUNED)

CLOCK = "end to end: host memory to host memory, one call at a time (time.perf_counter_ns)"
ORDER = "interleaved pairs on the same batch, alternating which model goes first"

BUFFERS = 4  # different batches in rotation, so that no call finds its own input in the cache

WINDOW_PAIRS = 3
WINDOW_SECONDS = 0.1  # three calls of a fast model would end before the clocks have risen
STABLE_WITHIN = 0.05  # spread of the medians of three windows, relative
WARMUP_SHARE = 0.5  # of max_seconds, at most

# A slow model is given up on before `min_runs` after this many times max_seconds.
HARD_CAP_FACTOR = 6.0

MIN_FOR_P99 = 500  # below, p99 is decided by fewer than five calls
MIN_FOR_INTERVAL = 10  # below, resampling the same few calls says nothing
RESAMPLES = 2000
RESAMPLE_CHUNK = 100  # resamples at once; bounds memory


@dataclass(frozen=True, kw_only=True)
class PairTimes:
    """Two models timed against each other."""

    baseline: LatencyStats
    pruned: LatencyStats
    ratio: Interval
    """Median of pruned / median of baseline."""
    timing: Timing


def measure_interleaved(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    min_runs: int = 30,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> PairTimes:
    """Time "baseline" and "pruned" against each other at one batch size.

    Warms up until three successive windows agree (for at most half of `max_seconds`), then times
    pairs of calls for `max_seconds`, and on until there are `min_runs` pairs. Models so slow that
    this takes more than `HARD_CAP_FACTOR` times `max_seconds` are stopped there; the result then
    has fewer pairs and says so (`timing.capped`).

    Args:
        runners: Open runners under the keys "baseline" and "pruned".
        images: (N, 3, S, S) float32 real images, at least two, preprocessed.
        batch_size: Images per call; images repeat within a batch when N is smaller.
        min_runs: Timed calls of each model, at least.
        max_seconds: Time for the timed calls, both models together, once `min_runs` is reached.
        seed: Of the images' order and of the bootstrap.

    Raises:
        ConfigError: Other keys in `runners`, or a size below 1.
        DataError: Fewer than two different images, or constant ones.
        AmpDeployError: The images do not fit the models.
    """
    if set(runners) != set(MODELS):
        raise ConfigError(f"runners are {sorted(runners)}; give exactly {' and '.join(MODELS)}.")
    if batch_size < 1 or min_runs < 1 or max_seconds <= 0:
        raise ConfigError(
            f"batch size {batch_size}, min runs {min_runs}, max seconds {max_seconds}: "
            "all must be above 0."
        )
    rng = np.random.default_rng(seed)
    batches = make_batches(images, batch_size, rng)
    return time_pairs(
        _host_to_host(runners[BASELINE], batches),
        _host_to_host(runners[PRUNED], batches),
        clock=CLOCK,
        buffers=len(batches),
        min_runs=min_runs,
        max_seconds=max_seconds,
        what=f"batch {batch_size}",
        rng=rng,
    )


def _host_to_host(runner: Runner, batches: list[np.ndarray]) -> Timed:
    def timed(buffer: int) -> float:
        start = time.perf_counter_ns()
        runner.run(batches[buffer])
        return (time.perf_counter_ns() - start) / 1e6

    return timed


def time_pairs(
    baseline: Timed,
    pruned: Timed,
    *,
    clock: str,
    buffers: int,
    min_runs: int,
    max_seconds: float,
    what: str,
    rng: np.random.Generator,
    min_warmup_seconds: float = 0.0,
) -> PairTimes:
    """Time two models turn and turn about, whatever the clock is that they bring.

    Args:
        baseline: Runs the dense model on the input buffer of that number; returns milliseconds.
        pruned: The same of the pruned model.
        clock: What the two measure, in words.
        buffers: Different inputs to rotate through.
        min_runs: Pairs at least; given up on after `HARD_CAP_FACTOR` times `max_seconds`.
        max_seconds: For the timed calls of both together, once there are `min_runs` pairs.
        what: Which measurement this is, for warnings.
        rng: Of the bootstrap.
        min_warmup_seconds: Time that the warm-up may take, however short `max_seconds` is.
    """
    pairs = _Pairs(baseline, pruned, buffers)
    limit = max(min_warmup_seconds, WARMUP_SHARE * max_seconds)
    warmup_seconds, stable = _warm_up(pairs, limit)
    warmup_pairs = pairs.done
    if not stable:
        log.warning(
            "  latency at %s did not settle within %.0f s of warm-up; the machine may be busy or "
            "throttling",
            what,
            warmup_seconds,
        )
    samples_ms, seconds, capped = _timed(pairs, min_runs, max_seconds)
    if capped:
        log.warning(
            "  %s: stopped after %d of %d runs, at the limit of %.0f s",
            what,
            len(samples_ms),
            min_runs,
            HARD_CAP_FACTOR * max_seconds,
        )
    return PairTimes(
        baseline=summarise(samples_ms[:, 0]),
        pruned=summarise(samples_ms[:, 1]),
        ratio=ratio_of_medians(samples_ms[:, 0], samples_ms[:, 1], rng=rng),
        timing=Timing(
            clock=clock,
            order=ORDER,
            warmup_pairs=warmup_pairs,
            warmup_seconds=warmup_seconds,
            warmup_stable=stable,
            pairs=len(samples_ms),
            seconds=seconds,
            capped=capped,
            buffers=buffers,
        ),
    )


def make_batches(images: np.ndarray, batch_size: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Up to `BUFFERS` different C-contiguous batches of real images.

    Args:
        images: (N, 3, S, S).
        batch_size: Images per batch.
        rng: Shuffles the images.

    Raises:
        DataError: Fewer than two images, or images without content.
    """
    if len(images) < 2:
        raise DataError(
            f"timing needs at least 2 different images to rotate, and there is {len(images)}. "
            "Give more images."
        )
    order = rng.permutation(len(images))
    count = min(BUFFERS, len(images))
    # Each batch starts somewhere else in the shuffled order, so no two are equal.
    starts = [i * len(images) // count for i in range(count)]
    steps = np.arange(batch_size)
    batches = [np.ascontiguousarray(images[order[(s + steps) % len(images)]]) for s in starts]
    if any(np.ptp(batch) == 0 for batch in batches):
        raise DataError(
            "the images to time with are constant, e.g. all zeros, which some kernels run faster. "
            "Give real images."
        )
    return batches


class _Pairs:
    """Runs both models on the next buffer, turn and turn about."""

    def __init__(self, baseline: Timed, pruned: Timed, buffers: int) -> None:
        self._models = (baseline, pruned)
        self._buffers = buffers
        self.done = 0

    def next(self) -> tuple[float, float]:
        """Milliseconds of (baseline, pruned) on one buffer."""
        # An even number of buffers must shift each round, or each would have one fixed order.
        shift = 0 if self._buffers % 2 else self.done // self._buffers
        buffer = (self.done + shift) % self._buffers
        first = self.done % 2
        took = [0.0, 0.0]
        for index in (first, 1 - first):
            took[index] = self._models[index](buffer)
        self.done += 1
        return took[0], took[1]


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


def windows_agree(medians: list[np.ndarray]) -> bool:
    """Whether the last three windows' medians (each of both models) are within a few percent."""
    if len(medians) < 3:
        return False
    last = np.stack(medians[-3:])
    return bool(np.all(np.ptp(last, axis=0) <= STABLE_WITHIN * last.min(axis=0)))


def _timed(pairs: _Pairs, min_runs: int, max_seconds: float) -> tuple[np.ndarray, float, bool]:
    """Samples (n, 2) in ms, seconds, and whether the hard cap cut them short."""
    samples: list[tuple[float, float]] = []
    start = time.perf_counter()
    while True:
        samples.append(pairs.next())
        elapsed = time.perf_counter() - start
        enough = len(samples) >= min_runs
        capped = not enough and elapsed >= HARD_CAP_FACTOR * max_seconds
        if capped or (enough and elapsed >= max_seconds):
            return np.array(samples), elapsed, capped


def summarise(samples_ms: np.ndarray) -> LatencyStats:
    """Percentiles of one model's timed calls (n,), in milliseconds; nothing is clipped."""
    n = len(samples_ms)
    why = {}
    if n < MIN_FOR_P99:
        why["p99"] = f"{n} timed calls; p99 needs {MIN_FOR_P99}"
    return LatencyStats(
        p50=float(np.percentile(samples_ms, 50)),
        p90=float(np.percentile(samples_ms, 90)),
        p99=None if why else float(np.percentile(samples_ms, 99)),
        mean=float(samples_ms.mean()),
        min=float(samples_ms.min()),
        max=float(samples_ms.max()),
        n=n,
        quantiles=tuple(float(q) for q in np.percentile(samples_ms, np.arange(0, 101, 5))),
        why=why,
    )


def ratio_of_medians(
    baseline_ms: np.ndarray, pruned_ms: np.ndarray, *, rng: np.random.Generator
) -> Interval:
    """Median(pruned) / median(baseline) with a bootstrap 95% interval.

    Pairs are resampled together, in circular blocks of about n^(1/3) successive pairs: what
    disturbs one call often disturbs the next, and resampling them one by one would give an
    interval that is too narrow (Politis & Romano, 1992).

    Args:
        baseline_ms: (n,) timed calls, paired with `pruned_ms`.
        pruned_ms: (n,)
        rng: Draws the resamples.
    """
    value = float(np.median(pruned_ms) / np.median(baseline_ms))
    n = len(baseline_ms)
    if n < MIN_FOR_INTERVAL:
        reason = f"{n} pairs of timed calls; an interval needs {MIN_FOR_INTERVAL}"
        why = {"ci95_low": reason, "ci95_high": reason}
        return Interval(value=value, ci95_low=None, ci95_high=None, why=why)
    length = max(1, round(n ** (1 / 3)))
    offsets = np.arange(length)
    ratios: list[np.ndarray] = []
    for _ in range(RESAMPLES // RESAMPLE_CHUNK):
        starts = rng.integers(0, n, size=(RESAMPLE_CHUNK, -(-n // length), 1))
        chosen = ((starts + offsets) % n).reshape(RESAMPLE_CHUNK, -1)[:, :n]
        ratios.append(np.median(pruned_ms[chosen], axis=1) / np.median(baseline_ms[chosen], axis=1))
    low, high = np.percentile(np.concatenate(ratios), [2.5, 97.5])
    return Interval(value=value, ci95_low=float(low), ci95_high=float(high))
