"""What `ampdeploy explain` found, as types.

Units are in the names; ratios are pruned / baseline.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from ampdeploy.report.result import Explained, Interval

# Kinds of operator, in the order of a block. What a kind does not hold is in `REST`.
PATCH_EMBEDDING = "patch embedding"
NORM = "norm"
QKV = "attention qkv"
SCORES = "attention scores"
PROJ = "attention proj"
FC1 = "mlp fc1"
GATE = "mlp gate"
MLP_ELEMENTWISE = "mlp elementwise"
FC2 = "mlp fc2"
ELEMENTWISE = "elementwise"
MIXED = "fused across kinds"
REST = "rest"
KINDS = (
    PATCH_EMBEDDING, NORM, QKV, SCORES, PROJ, FC1, GATE, MLP_ELEMENTWISE, FC2, ELEMENTWISE, MIXED,
    REST,
)  # fmt: skip
MLP_KINDS = (FC1, GATE, MLP_ELEMENTWISE, FC2)


@dataclass(frozen=True, kw_only=True)
class Work:
    """What some operators have to do for one call."""

    flops: int = 0
    """2 * multiply-accumulates of matrix products and convolutions."""
    bytes: int = 0
    """Inputs, weights and outputs of every operator, each counted once per operator."""
    operators: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            flops=self.flops + other.flops,
            bytes=self.bytes + other.bytes,
            operators=self.operators + other.operators,
        )


@dataclass(frozen=True, kw_only=True)
class Cell(Explained):
    """A part of both models: one kind of operator, one block, one kind in one block, or all."""

    block: int | None
    """None: outside the blocks, or all of them; see `scope`."""
    kind: str | None
    """None: all kinds."""
    scope: str
    """``cell``, ``kind``, ``block`` or ``all``."""
    baseline: Work
    pruned: Work
    baseline_ms: float
    """Median over the profiled calls of the time inside these operators."""
    pruned_ms: float
    measured: Interval | None
    """Time ratio with its 95% interval."""
    predicted: float | None
    """Time ratio by the model of `Explanation.model`."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the machine reached in two probes through the same runtime, with as many threads."""

    flops_per_s: float
    bytes_per_s: float
    how: str


@dataclass(frozen=True, kw_only=True)
class WidthProbe:
    """The two matrix products of an MLP, timed alone at two widths, turn and turn about."""

    width: int
    blocks: tuple[int, ...]
    """Blocks that have this width; empty: it was made up for comparison."""
    other_width: int
    ms: float
    other_ms: float
    ratio: Interval
    """Time at `other_width` / time at `width`."""
    pairs: int


@dataclass(frozen=True, kw_only=True)
class ActivationProbe:
    """An activation that runs as several operators, timed alone against the runtime's own one."""

    width: int
    ms: float
    fused_ms: float
    ratio: Interval
    """Time of the one / time of the several."""
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence with the numbers that it rests on, each of them measured or counted."""

    code: str
    says: str
    numbers: dict[str, Any]

    def __post_init__(self) -> None:
        if not any(isinstance(n, int | float) for n in self.numbers.values()):
            raise ValueError(f"finding {self.code!r} has no number behind it")


@dataclass(frozen=True, kw_only=True)
class Explanation(Explained):
    """Predicted against measured, and what follows."""

    target: str
    baseline_file: str
    pruned_file: str
    batch: int
    threads: int | None
    """None: the runtime's own choice."""
    runs: int
    """Profiled calls of each model, turn and turn about."""
    model: str
    """How times are predicted, in words."""
    clock: str
    """How operators are timed, in words."""
    machine: Machine | None
    latency_baseline_ms: float
    """Median of one call, without the profiler."""
    latency_pruned_ms: float
    latency: Interval
    """Ratio of these."""
    latency_spread: tuple[float, ...]
    """(p90 - p10) / p50 of the calls of baseline and pruned: how quiet the machine was."""
    total: Cell
    kinds: tuple[Cell, ...]
    blocks: tuple[Cell, ...]
    cells: tuple[Cell, ...]
    widths: tuple[tuple[int, int, int], ...]
    """(block, hidden width of the baseline, of the pruned)."""
    fused: dict[str, dict[str, int]]
    """Model -> operators that the runtime put in place of others, and how many."""
    width_probes: tuple[WidthProbe, ...] | None
    activation_probe: ActivationProbe | None
    findings: tuple[Finding, ...]
    host: dict[str, Any] = field(default_factory=dict)
