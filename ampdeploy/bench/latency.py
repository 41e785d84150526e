"""Latency of two models, interleaved: A B, B A, A B ... in one run on the same images.

A machine's clocks and neighbours drift; two separate runs measure that drift too. Here each pair
of calls sees the same machine, and the ratio comes with an interval. Where a model's weights and
buffers come to lie when it is opened makes it a percent faster or slower for as long as it is open,
which no call tells; so `ampdeploy bench` opens both several times (Kalibera and Jones, "Rigorous
benchmarking in reasonable time", ISMM 2013, https://doi.org/10.1145/2464157.2464160).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ampdeploy.bench.intervals import ratio_of_calls, ratio_over_loads
from ampdeploy.bench.intervals import ratio_of_medians as ratio_of_medians
from ampdeploy.bench.turns import (
    HARD_CAP_FACTOR,
    WARMUP_SHARE,
    Pairs,
    TimedByAll,
    run_in,
    timed,
    warm_up,
)
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
    """Median of pruned / median of baseline; with several loads their geometric mean."""
    timing: Timing


@dataclass(frozen=True, kw_only=True)
class ClockedTimes:
    """Two models timed against each other by two clocks in the same calls."""

    end_to_end: PairTimes
    compute: PairTimes | None
    """None: a runner has no clock for it."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Times of two models while both were open once."""

    samples_ms: np.ndarray
    """(pairs, 2 models, clocks), in the order in which they ran."""
    clocks: tuple[str, ...]
    """What each measures, in words."""
    buffers: int
    warmup_pairs: int
    warmup_seconds: float
    warmup_stable: bool
    seconds: float
    capped: bool


def measure_interleaved(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    min_runs: int = 30,
    max_seconds: float = 20.0,
    seed: int = 0,
) -> PairTimes:
    """Time models that are open already, end to end; see `measure_load`.

    Its interval knows nothing of what another load of the same files would give: `ampdeploy bench`
    opens them several times, and joins the loads.
    """
    load = measure_load(
        runners,
        images,
        batch_size=batch_size,
        min_runs=min_runs,
        max_seconds=max_seconds,
        seed=seed,
    )
    ratio = functools.partial(ratio_of_calls, rng=np.random.default_rng(seed))
    return _joined([load], ratio)[0]


def measure_load(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    min_runs: int = 30,
    max_seconds: float = 20.0,
    warmup_seconds: float | None = None,
    reopened: bool = False,
    first: int = 0,
    seed: int = 0,
) -> Load:
    """Time "baseline" and "pruned" against each other at one batch size.

    Warms up until successive windows agree, then times pairs of calls for `max_seconds`, and on
    until there are `min_runs` pairs. Models so slow that this takes more than `HARD_CAP_FACTOR`
    times `max_seconds` are stopped there; the result then has fewer pairs and says so (`capped`).

    Args:
        runners: Open runners under the keys "baseline" and "pruned".
        images: (N, 3, S, S) float32 real images, at least two, preprocessed.
        batch_size: Images per call; images repeat within a batch when N is smaller.
        min_runs: Timed calls of each model, at least.
        max_seconds: Time for the timed calls, both models together, once `min_runs` is reached.
        warmup_seconds: For the warm-up at most; None: half of `max_seconds`.
        reopened: The machine is warm, and only the files are new.
        first: 1: the pruned model begins.
        seed: Of the images' order.

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
    batches = make_batches(images, batch_size, np.random.default_rng(seed))
    clocks = [CLOCK]
    compute_clocks = {runner.compute_clock for runner in runners.values()}
    if len(compute_clocks) == 1:  # of two that differ, a ratio would compare unlike things
        clocks += [clock for clock in compute_clocks if clock is not None]
    return time_load(
        *(_by_clocks(runners[role], batches, len(clocks)) for role in MODELS),
        clocks=clocks,
        buffers=len(batches),
        min_runs=min_runs,
        max_seconds=max_seconds,
        warmup_seconds=WARMUP_SHARE * max_seconds if warmup_seconds is None else warmup_seconds,
        reopened=reopened,
        first=first,
        what=f"batch {batch_size}",
    )


def join_clocks(loads: Sequence[Load]) -> ClockedTimes:
    """`join_loads` by name: end to end, and compute where the runners have a clock for it.

    Args:
        loads: Of `measure_load`, at one batch size.
    """
    found = join_loads(loads)
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
    """Time two models that are ready, by one clock, as one load.

    Args:
        baseline: Runs the dense model on the input buffer of that number; returns milliseconds.
        pruned: The same of the pruned model.
        clock: What the two measure, in words.
        buffers: As `time_load` takes it, like the others.
        min_runs: Pairs at least.
        max_seconds: For the timed calls of both together.
        what: Which measurement this is, for warnings.
        rng: Of the bootstrap.
        min_warmup_seconds: Time that the warm-up may take, however short `max_seconds` is.
    """
    load = time_load(
        lambda buffer: (baseline(buffer),),
        lambda buffer: (pruned(buffer),),
        clocks=(clock,),
        buffers=buffers,
        min_runs=min_runs,
        max_seconds=max_seconds,
        warmup_seconds=max(min_warmup_seconds, WARMUP_SHARE * max_seconds),
        what=what,
    )
    return _joined([load], functools.partial(ratio_of_calls, rng=rng))[0]


def time_load(
    baseline: TimedByAll,
    pruned: TimedByAll,
    *,
    clocks: Sequence[str],
    buffers: int,
    min_runs: int,
    max_seconds: float,
    warmup_seconds: float,
    what: str,
    reopened: bool = False,
    first: int = 0,
) -> Load:
    """Time two models turn and turn about, whatever the clocks are that they bring.

    Args:
        baseline: Runs the dense model on the input buffer of that number; returns milliseconds,
            one per clock.
        pruned: The same of the pruned model.
        clocks: What each measures, in words.
        buffers: Different inputs to rotate through.
        min_runs: Pairs at least; given up on after `HARD_CAP_FACTOR` times `max_seconds`.
        max_seconds: For the timed calls of both together, once there are `min_runs` pairs.
        warmup_seconds: For the warm-up at most.
        what: Which measurement this is, for warnings.
        reopened: The machine is warm, and only the files are new: no long warm-up.
        first: 1: the pruned model begins.

    Returns:
        The times by each of `clocks`, all of the same calls.
    """
    cold = Pairs(baseline, pruned, buffers, first)
    warmed, stable = (run_in(cold), True) if reopened else warm_up(cold, warmup_seconds)
    if not stable:
        log.warning(
            "  latency at %s did not settle within %.0f s of warm-up; the machine may be busy or "
            "throttling",
            what,
            warmed,
        )
    # Another one: however many pairs warmed up, `first` begins.
    pairs = Pairs(baseline, pruned, buffers, first)
    samples_ms, seconds, capped = timed(pairs, min_runs, max_seconds)
    if capped:
        log.warning(
            "  %s: stopped after %d of %d runs, at the limit of %.0f s",
            what,
            len(samples_ms),
            min_runs,
            HARD_CAP_FACTOR * max_seconds,
        )
    return Load(
        samples_ms=samples_ms,
        clocks=tuple(clocks),
        buffers=buffers,
        warmup_pairs=cold.done,
        warmup_seconds=warmed,
        warmup_stable=stable,
        seconds=seconds,
        capped=capped,
    )


def join_loads(loads: Sequence[Load]) -> tuple[PairTimes, ...]:
    """Statistics over all loads, by each clock; the interval of the ratio is over the loads.

    Args:
        loads: Of the same two files by the same clocks; one at least.
    """
    return _joined(loads, ratio_over_loads)


def _joined(
    loads: Sequence[Load], ratio: Callable[[Sequence[np.ndarray]], Interval]
) -> tuple[PairTimes, ...]:
    samples = np.concatenate([load.samples_ms for load in loads])
    return tuple(
        PairTimes(
            baseline=summarise(samples[:, 0, index]),
            pruned=summarise(samples[:, 1, index]),
            ratio=ratio([load.samples_ms[:, :, index] for load in loads]),
            timing=Timing(
                clock=clock,
                order=ORDER,
                loads=len(loads),
                warmup_pairs=sum(load.warmup_pairs for load in loads),
                warmup_seconds=sum(load.warmup_seconds for load in loads),
                warmup_stable=all(load.warmup_stable for load in loads),
                pairs=len(samples),
                seconds=sum(load.seconds for load in loads),
                capped=any(load.capped for load in loads),
                buffers=loads[0].buffers,
            ),
        )
        for index, clock in enumerate(loads[0].clocks)
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
