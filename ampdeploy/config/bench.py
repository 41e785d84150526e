"""What is measured, and for how long."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ampdeploy.config.checks import as_floats, positive
from ampdeploy.errors import ConfigError

ENERGY_SECONDS = 30.0  # NVML looks at some GPUs a quarter of the time only: short runs lie


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Latency, throughput and memory, baseline and pruned interleaved.

    Times are for all loads together.
    """

    batch_sizes: tuple[int, ...] = (1, 8)
    min_runs: int = 30
    """Timed runs of each model at each batch size, at least."""
    max_seconds: float = 20.0
    """Time spent timing per batch size, both models together, once `min_runs` is reached."""
    loads: int = 6
    """Times that both files are opened anew, because each load of a file has a speed of its own;
    5 or more show how far, and the intervals then include it."""
    throughput_seconds: float = 8.0
    """Time spent counting throughput per batch size, both models together; 0: not counted."""
    in_flight: int = 2
    """Batches under way at once while throughput is counted."""
    threads: int | None = None
    """CPU threads of the runtime; None: its default."""
    energy_seconds: float | None = None
    """Each model runs for this long while its energy is measured, `ENERGY_SECONDS` at least; None:
    that long where there is a meter; 0: energy is not measured."""

    def __post_init__(self) -> None:
        as_floats(self, "max_seconds", "throughput_seconds", "energy_seconds")
        positive(self, "min_runs", "max_seconds", "loads", "in_flight")
        if self.throughput_seconds:
            positive(self, "throughput_seconds")
        if self.threads is not None:
            positive(self, "threads")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch sizes {self.batch_sizes}: give sizes of 1 or more.")
        check_energy_seconds(self.energy_seconds)


def check_energy_seconds(seconds: float | None) -> None:
    """Refuse a measurement of energy that is too short to mean anything.

    Raises:
        ConfigError: It is neither 0 nor `ENERGY_SECONDS` or more.
    """
    if seconds is not None and seconds != 0 and not ENERGY_SECONDS <= seconds < math.inf:
        raise ConfigError(
            f"energy seconds is {seconds:g}; a meter needs {ENERGY_SECONDS:g} s or more to say "
            "anything, and 0 leaves energy out."
        )
