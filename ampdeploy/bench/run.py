"""Latency and memory of a baseline and a pruned artifact: one call for `build` and `bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import BASELINE, PRUNED, measure_interleaved
from ampdeploy.bench.memory import measure_memory
from ampdeploy.config import BenchConfig
from ampdeploy.progress import log
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import get_target


def measure_pair(
    target: str, baseline: Path, pruned: Path, images: np.ndarray, config: BenchConfig
) -> dict[str, Any]:
    """Measure both artifacts on one target.

    Memory first, each in a fresh process, then latency, interleaved in this one.

    Args:
        target: Name of the target that runs both.
        baseline: The dense model's artifact.
        pruned: The pruned model's.
        images: (N, 3, S, S) float32 real images, preprocessed.
        config: Batch sizes, runs and threads.

    Returns:
        Plain data: the host and device, memory (per role) at the largest batch size, and latency
        (per batch size).
    """
    largest = max(config.batch_sizes)
    memory = {
        role: to_plain(measure_memory(target, artifact, batch_size=largest, threads=config.threads))
        for role, artifact in ((BASELINE, baseline), (PRUNED, pruned))
    }
    latency = {}
    opened = get_target(target)
    with (
        opened.open(baseline, threads=config.threads) as dense,
        opened.open(pruned, threads=config.threads) as slim,
    ):
        for size in config.batch_sizes:
            log.info("        timing batch %d", size)
            result = measure_interleaved(
                {BASELINE: dense, PRUNED: slim},
                images,
                batch_size=size,
                min_runs=config.min_runs,
                max_seconds=config.max_seconds,
            )
            latency[str(size)] = {
                **to_plain(result),
                "throughput_img_s": result.throughput_img_s,
            }
        device = dense.device
    return {"host": host_facts(), "device": device, "memory": memory, "latency": latency}
