"""Latency and memory of a baseline and a pruned artifact: one call for `build` and `bench`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import BASELINE, PRUNED, measure_interleaved
from ampdeploy.bench.memory import measure_memory
from ampdeploy.bench.result import BenchResult
from ampdeploy.config import BenchConfig
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.progress import log
from ampdeploy.targets.base import ENGINE_SUFFIXES, get_target


def measure_pair(
    target: str, baseline: Path, pruned: Path, images: np.ndarray, config: BenchConfig
) -> BenchResult:
    """Measure both artifacts on one target.

    Memory first, each in a fresh process, then latency, interleaved in this one.

    Args:
        target: Name of the target that runs both.
        baseline: The dense model's artifact.
        pruned: The pruned model's.
        images: (N, 3, S, S) float32 real images, preprocessed.
        config: Batch sizes, runs and threads.
    """
    sizes, not_timed = sizes_to_time(config.batch_sizes, (baseline, pruned))
    for left_out, why in not_timed.items():
        log.warning("batch %s is not timed: %s", left_out, why)
    largest = max(sizes)
    memory = {
        role: measure_memory(target, artifact, batch_size=largest, threads=config.threads)
        for role, artifact in ((BASELINE, baseline), (PRUNED, pruned))
    }
    latency = {}
    opened = get_target(target)
    with (
        opened.open(baseline, threads=config.threads) as dense,
        opened.open(pruned, threads=config.threads) as slim,
    ):
        for size in sizes:
            log.info("        timing batch %d", size)
            latency[str(size)] = measure_interleaved(
                {BASELINE: dense, PRUNED: slim},
                images,
                batch_size=size,
                min_runs=config.min_runs,
                max_seconds=config.max_seconds,
            )
        device = dense.device
    missing = ("compute", "cuda_graph", "throughput", "energy", "telemetry")
    return BenchResult(
        host=host_facts(),
        device=device,
        memory=memory,
        latency=latency,
        not_timed=not_timed,
        **dict.fromkeys(missing),
        why=dict.fromkeys(missing, "not measured yet"),
    )


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
