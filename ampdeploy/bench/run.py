"""All that is measured of a baseline and a pruned artifact: one call for `build` and `bench`."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import (
    BASELINE,
    MODELS,
    PRUNED,
    Load,
    PairTimes,
    join_clocks,
    measure_load,
)
from ampdeploy.bench.memory import measure_memory
from ampdeploy.bench.power import measure_energy
from ampdeploy.bench.result import BenchResult, EnergyResult
from ampdeploy.bench.telemetry import Watch
from ampdeploy.bench.throughput import (
    WINDOWS,
    Counted,
    PairThroughput,
    count_windows,
    join_windows,
)
from ampdeploy.bench.turns import HARD_CAP_FACTOR, WARMUP_SHARE
from ampdeploy.config import BenchConfig
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.errors import AmpDeployError
from ampdeploy.progress import log
from ampdeploy.report.result import Telemetry
from ampdeploy.targets.base import ENGINE_SUFFIXES, Runner, Target, get_target

OPENING_SECONDS = 1.0  # that each load is given on top, to open and run in both files
GRAPH_SHARE = 0.25  # of max_seconds: the same engine once more, only launched in another way


def measure_pair(
    target: str, baseline: Path, pruned: Path, images: np.ndarray, config: BenchConfig
) -> BenchResult:
    """Measure both artifacts on one target.

    Memory first, each in a fresh process, then times, interleaved in this one: end to end and
    compute in the same calls while the machine's sensors are watched, throughput, energy, and
    compute again with CUDA graphs.

    Args:
        target: Name of the target that runs both.
        baseline: The dense model's artifact.
        pruned: The pruned model's.
        images: (N, 3, S, S) float32 real images, preprocessed.
        config: Batch sizes, runs and threads.
    """
    sizes, not_timed = sizes_to_time(config.batch_sizes, (baseline, pruned))
    for left_out, why_not in not_timed.items():
        log.warning("batch %s is not timed: %s", left_out, why_not)
    largest = max(sizes)
    memory = {
        role: measure_memory(target, artifact, batch_size=largest, threads=config.threads)
        for role, artifact in ((BASELINE, baseline), (PRUNED, pruned))
    }
    opened = get_target(target)
    files = (baseline, pruned)
    times = _measure_times(opened, files, images, sizes, config)
    graph, why_no_graph = _measure_graphs(opened, files, images, sizes, config)
    why = dict(times.why)
    if why_no_graph is not None:
        why["cuda_graph"] = why_no_graph
    return BenchResult(
        host=host_facts(),
        device=times.device,
        memory=memory,
        latency=times.latency,
        compute=times.compute,
        cuda_graph=graph,
        throughput=times.throughput,
        energy=times.energy,
        telemetry=times.telemetry,
        not_timed=not_timed,
        why=why,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Times:
    """Per batch size; None with a why, as in `BenchResult`."""

    device: str
    latency: dict[str, PairTimes]
    compute: dict[str, PairTimes] | None
    throughput: dict[str, PairThroughput] | None
    energy: dict[str, EnergyResult] | None
    telemetry: Telemetry
    why: dict[str, str]


def _measure_times(
    target: Target,
    files: tuple[Path, Path],
    images: np.ndarray,
    sizes: Sequence[int],
    config: BenchConfig,
) -> _Times:
    times: dict[str, list[Load]] = {str(size): [] for size in sizes}
    counted: dict[str, list[Counted]] = {str(size): [] for size in sizes}
    budget = _Budget(config, sizes)
    why: dict[str, str] = {}
    with ExitStack() as watching:
        for load in range(config.loads):
            with _open_pair(target, files, config, load) as pair:
                dense = pair[BASELINE]
                if not load:
                    watch = watching.enter_context(Watch(dense.device))
                for size in budget.sizes():
                    log.info("        timing batch %d, load %d of %d", size, load + 1, config.loads)
                    with budget.spent_on(size):
                        times[str(size)].append(_time_load(pair, images, size, config, load))
                        if config.throughput_seconds:
                            found = _count_load(pair, images, size, config, load)
                            counted[str(size)].append(found)
                if load == config.loads - 1 or not budget.sizes():
                    watching.close()  # what follows is not timed
                    energy, why_no_energy = measure_energy(
                        pair, images, batch_size=max(sizes), seconds=config.energy_seconds
                    )
                    break
    if why_no_energy is not None:
        why["energy"] = why_no_energy
    joined = {size: join_clocks(budget.mark(size, loads)) for size, loads in times.items()}
    compute = {size: both.compute for size, both in joined.items() if both.compute is not None}
    if not compute:
        why["compute"] = dense.why_no_compute_clock
    if not config.throughput_seconds:
        why["throughput"] = "not asked for: its time was set to 0 seconds"
    return _Times(
        device=dense.device,
        latency={size: both.end_to_end for size, both in joined.items()},
        compute=compute or None,
        throughput={size: join_windows(loads) for size, loads in counted.items()}
        if config.throughput_seconds
        else None,
        energy=energy,
        telemetry=watch.result(),
        why=why,
    )


class _Budget:
    """Seconds of each batch size: a model so slow that they are gone is opened less often."""

    def __init__(self, config: BenchConfig, sizes: Sequence[int]) -> None:
        timed = config.max_seconds + config.throughput_seconds
        seconds = HARD_CAP_FACTOR * timed + OPENING_SECONDS * config.loads
        self._left = dict.fromkeys(sizes, seconds)
        self._loads = config.loads

    def sizes(self) -> list[int]:
        """Batch sizes that have time for another load."""
        return [size for size, left in self._left.items() if left > 0]

    @contextmanager
    def spent_on(self, size: int) -> Iterator[None]:
        """What is done inside counts."""
        start = time.perf_counter()
        yield
        self._left[size] -= time.perf_counter() - start

    def mark(self, size: str, loads: list[Load]) -> list[Load]:
        """`loads`, as cut short if there are fewer than were asked for."""
        if len(loads) == self._loads:
            return loads
        log.warning("  batch %s: out of time after %d of %d loads", size, len(loads), self._loads)
        return [*loads[:-1], dataclasses.replace(loads[-1], capped=True)]


@contextmanager
def _open_pair(
    target: Target, files: tuple[Path, Path], config: BenchConfig, load: int
) -> Iterator[dict[str, Runner]]:
    """Both models, opened by turns in this order and the other: of two copies of one model in ONNX
    Runtime, the one opened second was 1% faster."""
    with ExitStack() as stack:
        order = list(zip(MODELS, files, strict=True))
        opened = {
            role: stack.enter_context(target.open(path, threads=config.threads))
            for role, path in (order if load % 2 == 0 else reversed(order))
        }
        yield {role: opened[role] for role in MODELS}


def _time_load(
    pair: Mapping[str, Runner],
    images: np.ndarray,
    size: int,
    config: BenchConfig,
    load: int,
) -> Load:
    """One load's part of the time."""
    return measure_load(
        pair,
        images,
        batch_size=size,
        min_runs=-(-config.min_runs // config.loads),
        max_seconds=config.max_seconds / config.loads,
        warmup_seconds=WARMUP_SHARE * config.max_seconds,
        reopened=load > 0,
        first=load % 2,
        seed=load,
    )


def _count_load(
    pair: Mapping[str, Runner], images: np.ndarray, size: int, config: BenchConfig, load: int
) -> Counted:
    return count_windows(
        pair,
        images,
        batch_size=size,
        seconds=config.throughput_seconds / config.loads,
        window_seconds=config.throughput_seconds / (2 * WINDOWS),
        in_flight=config.in_flight,
        first=load % 2,
        seed=load,
    )


def measure_loads(
    target: Target,
    files: tuple[Path, Path],
    images: np.ndarray,
    sizes: Sequence[int],
    config: BenchConfig,
) -> dict[str, list[Load]]:
    """Latency of two files alone, opened as often as `config` says.

    Args:
        target: Opens both.
        files: The dense model's and the pruned one's.
        images: (N, 3, S, S) float32 real images, preprocessed.
        sizes: Images per call.
        config: Runs, time and loads.

    Returns:
        Per batch size the loads.
    """
    loads: dict[str, list[Load]] = {str(size): [] for size in sizes}
    budget = _Budget(config, sizes)
    for load in range(config.loads):
        if not budget.sizes():
            break
        with _open_pair(target, files, config, load) as pair:
            for size in budget.sizes():
                with budget.spent_on(size):
                    loads[str(size)].append(_time_load(pair, images, size, config, load))
    return {size: budget.mark(size, found) for size, found in loads.items()}


def _measure_graphs(
    target: Target,
    files: tuple[Path, Path],
    images: np.ndarray,
    sizes: Sequence[int],
    config: BenchConfig,
) -> tuple[dict[str, PairTimes] | None, str | None]:
    """Compute times with CUDA graphs, or why there are none."""
    graphed = target.with_cuda_graph()
    if graphed is None:
        return None, f"target {target.name}: {target.why_no_cuda_graph}"
    found: dict[str, PairTimes] = {}
    log.info("        timing as a CUDA graph")
    shorter = dataclasses.replace(config, max_seconds=GRAPH_SHARE * config.max_seconds)
    try:
        measured = measure_loads(graphed, files, images, sizes, shorter)
    except AmpDeployError as error:
        # The engine has just run without: what cannot be captured is no reason to lose the rest.
        log.warning("        not timed as a CUDA graph: %s", error)
        return None, f"it failed: {error}"
    for size, loads in measured.items():
        times = join_clocks(loads).compute
        assert times is not None  # whoever launches graphs has the GPU's clock
        clock = f"{times.timing.clock}; launched as one CUDA graph"
        found[size] = dataclasses.replace(
            times, timing=dataclasses.replace(times.timing, clock=clock)
        )
    return found, None


def sizes_to_time(
    asked: Sequence[int], files: Sequence[Path]
) -> tuple[tuple[int, ...], dict[str, str]]:
    """The batch sizes that all `files` take, and why not the others.

    An engine takes those of its profile, which a known bug of its TensorRT may have made narrower
    than was asked for. Where it takes none of `asked`, it is timed at what it was tuned for.

    Args:
        asked: Batch sizes to time.
        files: Artifacts; engines have their manifests beside them.

    Returns:
        Sizes to time, one at least; size -> why it is left out.
    """
    engines = [path for path in files if path.suffix in ENGINE_SUFFIXES]
    if not engines:
        return tuple(asked), {}
    profiles = [read_manifest(path).profiles[0] for path in engines]
    smallest = max(profile.min[0] for profile in profiles)
    largest = min(profile.max[0] for profile in profiles)
    takes = f"{smallest} to {largest}" if smallest < largest else f"{largest}"
    inside = tuple(size for size in asked if smallest <= size <= largest)
    why = f"the engine was built for batches of {takes}"
    return inside or (profiles[-1].opt[0],), {str(n): why for n in asked if n not in inside}
