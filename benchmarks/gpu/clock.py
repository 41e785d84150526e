"""Dense and pruned timed against each other, by the clock that a way of running brings itself."""

from __future__ import annotations

from typing import Any

import numpy as np

from ampdeploy.bench.latency import Timed, time_pairs
from ampdeploy.report.codec import to_plain

# Three windows must fit in, however little time the timed calls are given.
MIN_WARMUP_SECONDS = 1.0


def measure_pair(
    dense: Timed,
    pruned: Timed,
    *,
    clock: str,
    buffers: int,
    seconds: float,
    min_runs: int,
    rng: np.random.Generator,
) -> dict[str, Any]:
    """Time two models against each other; see `ampdeploy.bench.latency.time_pairs`.

    Returns:
        ``dense`` and ``pruned`` (p50, p90, p99, mean, min, max, n, in milliseconds), ``ratio``
        (pruned / dense medians with its 95% interval), and ``timing``, how it was done.
    """
    times = time_pairs(
        dense,
        pruned,
        clock=clock,
        buffers=buffers,
        min_runs=min_runs,
        max_seconds=seconds,
        what=clock,
        rng=rng,
        min_warmup_seconds=MIN_WARMUP_SECONDS,
    )
    return {
        "dense": to_plain(times.baseline),
        "pruned": to_plain(times.pruned),
        "ratio": to_plain(times.ratio),
        "timing": to_plain(times.timing),
    }
