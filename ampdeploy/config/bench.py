"""What is measured, and for how long."""

from __future__ import annotations

from dataclasses import dataclass

from ampdeploy.config.checks import as_floats, positive
from ampdeploy.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Latency and memory, baseline and pruned interleaved."""

    batch_sizes: tuple[int, ...] = (1, 8)
    min_runs: int = 30
    """Timed runs of each model at each batch size, at least."""
    max_seconds: float = 20.0
    """Time spent timing per batch size, both models together, once `min_runs` is reached."""
    threads: int | None = None
    """CPU threads of the runtime; None: its default."""

    def __post_init__(self) -> None:
        as_floats(self, "max_seconds")
        positive(self, "min_runs", "max_seconds")
        if self.threads is not None:
            positive(self, "threads")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch sizes {self.batch_sizes}: give sizes of 1 or more.")
