"""Images per second with several batches in flight, of two models that take turns.

Each batch in flight has a thread, which gives its runner one batch after the other. On a GPU one
batch's copies then run beside another's computation; on a CPU one batch's serial parts do. The
models take turns by windows (A B, B A, A B ...), because two models at once would share the device.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from ampdeploy.bench.intervals import mean_of_turns, rates_over_loads
from ampdeploy.bench.latency import BASELINE, MODELS, PRUNED, check_roles, make_batches
from ampdeploy.errors import ConfigError
from ampdeploy.report.result import Interval, ThroughputTiming
from ampdeploy.targets.base import Runner

WINDOWS = 8  # of each model, of all the time there is: one is a sixteenth of it


@dataclass(frozen=True, kw_only=True)
class PairThroughput:
    """Images per second of both models at one batch size."""

    baseline: float
    """Geometric mean over the windows of a load, and over the loads: `ratio` is exactly
    pruned / baseline."""
    pruned: float
    ratio: Interval
    """Pruned / baseline."""
    timing: ThroughputTiming


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Windows of two models while both were open once."""

    rates: np.ndarray
    """(windows, 2 models), images per second."""
    in_flight: int
    seconds: float


def count_windows(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    seconds: float,
    in_flight: int = 2,
    window_seconds: float | None = None,
    first: int = 0,
    seed: int = 0,
) -> Counted:
    """Count what both models get done at one batch size, in windows by turns.

    A window lasts until its time is up and each thread has finished a call, so with slow models
    windows are longer and fewer; one of each model is always made.

    Args:
        runners: Open runners under the keys "baseline" and "pruned".
        images: (N, 3, S, S) float32 real images, at least two, preprocessed.
        batch_size: Images per call.
        seconds: For all windows of both and the calls that warm up, unless one round takes longer.
        in_flight: Batches under way at once.
        window_seconds: Of one window; None: so that `WINDOWS` of each model fit.
        first: 1: the pruned model is made ready first, and begins.
        seed: Of the images' order.

    Raises:
        ConfigError: Other keys in `runners`, or a number that is not above 0.
        DataError: Fewer than two different images, or constant ones.
        AmpDeployError: The images do not fit the models, or memory ran out.
    """
    check_roles(runners)
    if batch_size < 1 or in_flight < 1 or seconds <= 0:
        raise ConfigError(
            f"batch size {batch_size}, {in_flight} in flight, {seconds} seconds: all must be "
            "above 0."
        )
    batches = make_batches(images, batch_size, np.random.default_rng(seed))
    if window_seconds is None:
        window_seconds = seconds / (2 * WINDOWS)
    rates: list[tuple[float, float]] = []
    with ExitStack() as opened, ThreadPoolExecutor(in_flight) as threads:
        turns = (first, 1 - first)
        made = {
            index: _Team(_workers(runners[MODELS[index]], in_flight, opened), batches, threads)
            for index in turns
        }
        start = time.perf_counter()
        for index in turns:
            made[index].window(0.0)  # memory and kernels of every runner, not to be counted
        counting = time.perf_counter()
        round_seconds = 0.0
        while not rates or time.perf_counter() - start + round_seconds <= seconds:
            round_start = time.perf_counter()
            rate = [0.0, 0.0]
            for index in turns if len(rates) % 2 == 0 else reversed(turns):
                rate[index] = made[index].window(window_seconds)
            rates.append((rate[0], rate[1]))
            round_seconds = time.perf_counter() - round_start
        counted = time.perf_counter() - counting
    return Counted(rates=np.array(rates), in_flight=in_flight, seconds=counted)


def join_windows(loads: Sequence[Counted]) -> PairThroughput:
    """Throughput over all loads.

    Args:
        loads: Of `count_windows`, of the same two models at one batch size; one at least.
    """
    rates = np.concatenate([load.rates for load in loads])
    seconds = sum(load.seconds for load in loads)
    logs = np.array([np.log(load.rates).mean(axis=0) for load in loads])
    means = dict(zip(MODELS, np.exp(mean_of_turns(logs)), strict=True))
    return PairThroughput(
        baseline=float(means[BASELINE]),
        pruned=float(means[PRUNED]),
        ratio=rates_over_loads([load.rates for load in loads]),
        timing=ThroughputTiming(
            in_flight=loads[0].in_flight,
            loads=len(loads),
            windows=len(rates),
            window_seconds=seconds / (2 * len(rates)),
            seconds=seconds,
        ),
    )


def _workers(runner: Runner, count: int, opened: ExitStack) -> list[Runner]:
    return [runner, *(opened.enter_context(runner.sibling()) for _ in range(count - 1))]


class _Team:
    """Runners of one model, each with a thread while a window lasts."""

    def __init__(
        self, runners: Sequence[Runner], batches: Sequence[np.ndarray], threads: ThreadPoolExecutor
    ) -> None:
        self._runners = runners
        self._batches = batches
        self._threads = threads

    def window(self, seconds: float) -> float:
        """Images per second: the sum over threads, each over its own time to its last call's end.

        A common end would count the wait for the slowest thread as the work of all.
        """
        together = threading.Barrier(len(self._runners))
        results = [
            self._threads.submit(self._work, index, seconds, together)
            for index in range(len(self._runners))
        ]
        return sum(result.result() for result in results)

    def _work(self, index: int, seconds: float, together: threading.Barrier) -> float:
        runner, batches = self._runners[index], self._batches
        together.wait()
        start = time.perf_counter()
        images, elapsed, turn = 0, 0.0, index  # threads begin at different batches
        while not images or elapsed < seconds:
            batch = batches[turn % len(batches)]
            runner.run(batch)
            images += len(batch)
            elapsed = time.perf_counter() - start
            turn += 1
        return images / elapsed
