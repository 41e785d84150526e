"""All that is measured of a baseline and a pruned artifact: one call for `build` and `bench`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import BASELINE, PRUNED, PairTimes, measure_clocks
from ampdeploy.bench.memory import measure_memory
from ampdeploy.bench.power import measure_energy
from ampdeploy.bench.result import BenchResult, EnergyResult
from ampdeploy.bench.telemetry import Watch
from ampdeploy.bench.throughput import PairThroughput, measure_throughput
from ampdeploy.config import BenchConfig
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.errors import AmpDeployError
from ampdeploy.progress import log
from ampdeploy.report.result import Telemetry
from ampdeploy.targets.base import ENGINE_SUFFIXES, Target, get_target

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
    latency: dict[str, PairTimes] = {}
    compute: dict[str, PairTimes] = {}
    throughput: dict[str, PairThroughput] = {}
    why: dict[str, str] = {}
    with (
        target.open(files[0], threads=config.threads) as dense,
        target.open(files[1], threads=config.threads) as slim,
    ):
        pair = {BASELINE: dense, PRUNED: slim}
        with Watch(dense.device) as watch:
            for size in sizes:
                log.info("        timing batch %d", size)
                times = measure_clocks(
                    pair,
                    images,
                    batch_size=size,
                    min_runs=config.min_runs,
                    max_seconds=config.max_seconds,
                )
                latency[str(size)] = times.end_to_end
                if times.compute is not None:
                    compute[str(size)] = times.compute
                if config.throughput_seconds:
                    throughput[str(size)] = measure_throughput(
                        pair,
                        images,
                        batch_size=size,
                        seconds=config.throughput_seconds,
                        in_flight=config.in_flight,
                    )
        energy, why_no_energy = measure_energy(
            pair, images, batch_size=max(sizes), seconds=config.energy_seconds
        )
        if why_no_energy is not None:
            why["energy"] = why_no_energy
        if not compute:
            why["compute"] = dense.why_no_compute_clock
        if not throughput:
            why["throughput"] = "not asked for: its time was set to 0 seconds"
        return _Times(
            device=dense.device,
            latency=latency,
            compute=compute or None,
            throughput=throughput or None,
            energy=energy,
            telemetry=watch.result(),
            why=why,
        )


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
    try:
        with (
            graphed.open(files[0], threads=config.threads) as dense,
            graphed.open(files[1], threads=config.threads) as slim,
        ):
            for size in sizes:
                log.info("        timing batch %d as a CUDA graph", size)
                times = measure_clocks(
                    {BASELINE: dense, PRUNED: slim},
                    images,
                    batch_size=size,
                    min_runs=config.min_runs,
                    max_seconds=GRAPH_SHARE * config.max_seconds,
                ).compute
                assert times is not None  # whoever launches graphs has the GPU's clock
                clock = f"{times.timing.clock}; launched as one CUDA graph"
                timing = dataclasses.replace(times.timing, clock=clock)
                found[str(size)] = dataclasses.replace(times, timing=timing)
    except AmpDeployError as error:
        # The engine has just run without: what cannot be captured is no reason to lose the rest.
        log.warning("        not timed as a CUDA graph: %s", error)
        return None, f"it failed: {error}"
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
