"""One model's operators with their times: what every runtime's profiler is turned into."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ampdeploy.explain.places import Place
from ampdeploy.explain.result import Work


@dataclass(frozen=True, kw_only=True)
class Timed:
    """An operator, or what an engine made of several, with the time of every call."""

    name: str
    op_type: str
    place: Place
    work: Work
    ms: np.ndarray
    """(runs,)"""


@dataclass(frozen=True, kw_only=True)
class ProfiledModel:
    """All operators of one model, in the order in which they run."""

    operators: tuple[Timed, ...]
    run_ms: np.ndarray
    """(runs,) whole calls under the profiler."""
    latency_ms: np.ndarray
    """(runs,) whole calls without it, turn and turn about with the other model."""
    fused: dict[str, int]
    """Operators that the runtime put in place of others -> how many."""
    widths: dict[int, int]
    """Block -> hidden width of its MLP."""
    token_width: int
    """Width of the tokens; 0 when it is not known."""
    tokens: int
    """Rows of the MLP's matrices: tokens of all images of the call."""

    fused_attention: int
    """Blocks whose attention is one operator."""

    def total_ms(self, *kinds: str) -> float:
        """Median over the calls of the time inside operators of `kinds`; without any, of all."""
        chosen = [o.ms for o in self.operators if not kinds or o.place.kind in kinds]
        return float(np.median(np.sum(chosen, axis=0))) if chosen else 0.0
