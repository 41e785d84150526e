"""`bench.json` as types: all that was measured of a baseline and a pruned artifact."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ampdeploy.bench.latency import PairTimes
from ampdeploy.bench.memory import MemoryResult
from ampdeploy.bench.throughput import PairThroughput
from ampdeploy.report.result import Energy, Explained, Telemetry


@dataclass(frozen=True, kw_only=True)
class EnergyResult(Energy):
    """Energy of one model's runs."""

    joules_per_image: float


@dataclass(frozen=True, kw_only=True)
class BenchResult(Explained):
    """The content of `bench.json`. Batch sizes are string keys, as JSON wants them."""

    host: dict[str, Any]
    device: str | None
    """``cpu`` or ``cuda``."""
    memory: dict[str, MemoryResult] | None
    """Per role, at the largest batch size."""
    latency: dict[str, PairTimes] | None
    """Per batch size: end to end."""
    compute: dict[str, PairTimes] | None
    """Per batch size: the device's part of the calls of `latency`."""
    cuda_graph: dict[str, PairTimes] | None
    """As `compute`, launched as one CUDA graph."""
    throughput: dict[str, PairThroughput] | None
    energy: dict[str, EnergyResult] | None
    """Per role."""
    telemetry: Telemetry | None
    not_timed: dict[str, str]
    """Batch size that was asked for -> why the engine does not take it."""


MEASUREMENTS = ("memory", "latency", "compute", "cuda_graph", "throughput", "energy", "telemetry")


def nothing_measured(host: dict[str, Any], why: str) -> BenchResult:
    """All of it null, for one reason."""
    missing = ("device", *MEASUREMENTS)
    return BenchResult(
        host=host, **dict.fromkeys(missing), not_timed={}, why=dict.fromkeys(missing, why)
    )
