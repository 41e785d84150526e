"""Latency of two models, interleaved: A B, B A, A B ... in one run on the same images.

A machine's clocks and neighbours drift; two separate runs measure that drift too. Here each pair
of calls sees the same machine, and the ratio comes with an interval.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ampdeploy.bench.intervals import ratio_of_medians as ratio_of_medians
from ampdeploy.bench.turns import HARD_CAP_FACTOR, WARMUP_SHARE, Pairs, TimedByAll, timed, warm_up
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

MIN_FOR_P99 = 500  # below, p99 is decided by fewer than five calls


@dataclass(frozen=True, kw_only=True)
class PairTimes:
    """Two models timed against each other."""

    baseline: LatencyStats
    pruned: LatencyStats
    ratio: Interval
    """Median of pruned / median of baseline."""
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class ClockedTimes:
    """Two models timed against each other by two clocks in the same calls."""

    end_to_end: PairTimes
    compute: PairTimes | None
    """None: a runner has no clock for it."""


def measure_interleaved(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    min_runs: int = 30,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> PairTimes:
    """`measure_clocks`, of which only end to end is kept."""
    return measure_clocks(
        runners,
        images,
        batch_size=batch_size,
        min_runs=min_runs,
        max_seconds=max_seconds,
        seed=seed,
    ).end_to_end


def measure_clocks(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    min_runs: int = 30,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> ClockedTimes:
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
    check_roles(runners)
    if batch_size < 1 or min_runs < 1 or max_seconds <= 0:
        raise ConfigError(
            f"batch size {batch_size}, min runs {min_runs}, max seconds {max_seconds}: "
            "all must be above 0."
        )
    rng = np.random.default_rng(seed)
    batches = make_batches(images, batch_size, rng)
    clocks = [CLOCK]
    compute_clocks = {runner.compute_clock for runner in runners.values()}
    if len(compute_clocks) == 1:  # of two that differ, a ratio would compare unlike things
        clocks += [clock for clock in compute_clocks if clock is not None]
    found = time_clocks(
        *(_by_clocks(runners[role], batches, len(clocks)) for role in MODELS),
        clocks=clocks,
        buffers=len(batches),
        min_runs=min_runs,
        max_seconds=max_seconds,
        what=f"batch {batch_size}",
        rng=rng,
    )
    return ClockedTimes(end_to_end=found[0], compute=found[1] if len(found) > 1 else None)


def check_roles(runners: Mapping[str, Runner]) -> None:
    """Refuse what is not one baseline and one pruned model.

    Raises:
        ConfigError: Other keys.
    """
    if set(runners) != set(MODELS):
        raise ConfigError(f"runners are {sorted(runners)}; give exactly {' and '.join(MODELS)}.")


def _by_clocks(runner: Runner, batches: list[np.ndarray], clocks: int) -> TimedByAll:
    def timed(buffer: int) -> tuple[float, ...]:
        took = runner.run_timed(batches[buffer])
        if clocks == 1:
            return (took.end_to_end_ms,)
        assert took.compute_ms is not None  # both runners have the clock
        return took.end_to_end_ms, took.compute_ms

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
    """`time_clocks` by one clock.

    Args:
        baseline: Runs the dense model on the input buffer of that number; returns milliseconds.
        pruned: The same of the pruned model.
        clock: What the two measure, in words.
        buffers: As `time_clocks` takes it, like the others.
        min_runs: Pairs at least.
        max_seconds: For the timed calls of both together.
        what: Which measurement this is, for warnings.
        rng: Of the bootstrap.
        min_warmup_seconds: Time that the warm-up may take, however short `max_seconds` is.
    """
    return time_clocks(
        lambda buffer: (baseline(buffer),),
        lambda buffer: (pruned(buffer),),
        clocks=(clock,),
        buffers=buffers,
        min_runs=min_runs,
        max_seconds=max_seconds,
        what=what,
        rng=rng,
        min_warmup_seconds=min_warmup_seconds,
    )[0]


def time_clocks(
    baseline: TimedByAll,
    pruned: TimedByAll,
    *,
    clocks: Sequence[str],
    buffers: int,
    min_runs: int,
    max_seconds: float,
    what: str,
    rng: np.random.Generator,
    min_warmup_seconds: float = 0.0,
) -> tuple[PairTimes, ...]:
    """Time two models turn and turn about, whatever the clocks are that they bring.

    Args:
        baseline: Runs the dense model on the input buffer of that number; returns milliseconds,
            one per clock.
        pruned: The same of the pruned model.
        clocks: What each measures, in words.
        buffers: Different inputs to rotate through.
        min_runs: Pairs at least; given up on after `HARD_CAP_FACTOR` times `max_seconds`.
        max_seconds: For the timed calls of both together, once there are `min_runs` pairs.
        what: Which measurement this is, for warnings.
        rng: Of the bootstrap.
        min_warmup_seconds: Time that the warm-up may take, however short `max_seconds` is.

    Returns:
        The times by each of `clocks`, all of the same calls.
    """
    pairs = Pairs(baseline, pruned, buffers)
    limit = max(min_warmup_seconds, WARMUP_SHARE * max_seconds)
    warmup_seconds, stable = warm_up(pairs, limit)
    warmup_pairs = pairs.done
    if not stable:
        log.warning(
            "  latency at %s did not settle within %.0f s of warm-up; the machine may be busy or "
            "throttling",
            what,
            warmup_seconds,
        )
    samples_ms, seconds, capped = timed(pairs, min_runs, max_seconds)
    if capped:
        log.warning(
            "  %s: stopped after %d of %d runs, at the limit of %.0f s",
            what,
            len(samples_ms),
            min_runs,
            HARD_CAP_FACTOR * max_seconds,
        )
    return tuple(
        PairTimes(
            baseline=summarise(samples_ms[:, 0, index]),
            pruned=summarise(samples_ms[:, 1, index]),
            ratio=ratio_of_medians(samples_ms[:, 0, index], samples_ms[:, 1, index], rng=rng),
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
        for index, clock in enumerate(clocks)
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
