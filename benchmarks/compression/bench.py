"""What a method is, and the bench it works at: one calibration set, shared work done once."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ampdeploy.config import PruneConfig
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.budget import Budget
from ampdeploy.prune.slim import slim
from benchmarks.compression.meter import Cost, Meter

Maker = Callable[["Bench"], Any]


@dataclass(frozen=True, kw_only=True)
class Part:
    """Work that does not depend on the size: done once per seed, charged to every row."""

    name: str
    make: Maker
    metered: bool = True
    """False: the method charges for it in its own way (`Pruned.charged`)."""


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """What a method returns."""

    model: VisionModel
    """Physically slim."""
    charged: Cost = field(default_factory=Cost)
    """Work that was done outside this call."""


@dataclass(frozen=True, kw_only=True)
class Method:
    """One row of the comparison."""

    name: str
    """For `--methods` and the JSON."""
    label: str
    """For tables and plots."""
    prune: Callable[[Bench, Budget], Pruned]
    parts: tuple[Part, ...] = ()
    seeded: bool = True
    """The result depends on the seed: by its images or its random numbers."""
    exact: bool = True
    """Meets the size asked for. False: it can only come near."""


class Bench:
    """The dense model, the calibration images of one seed, and what was computed from them."""

    def __init__(
        self,
        *,
        dense: VisionModel,
        images: Tensor,
        seed: int,
        first_seed: int,
        config: PruneConfig,
        budgets: dict[float, Budget],
        notes: Path,
        identities: dict[int, str],
    ) -> None:
        """Nothing is computed yet.

        Args:
            dense: The model; never changed, methods work on `copy()`.
            images: (N, 3, S, S) on the CPU, N a multiple of ``config.batch_size``.
            seed: Of the calibration sample and of everything random.
            first_seed: The seed whose search decides the thresholds of AMP.
            config: Criterion, temperature, batch sizes and grid; no budget.
            budgets: By cut, every size of this comparison.
            notes: Folder in which a method may keep what took long.
            identities: By seed, the hash of everything that such notes depend on.
        """
        self.dense = dense
        self.images = images
        self.seed = seed
        self.first_seed = first_seed
        self.config = config
        self.budgets = budgets
        self.notes = notes
        self.identities = identities
        self._made: dict[str, tuple[Any, Cost]] = {}

    @property
    def device(self) -> torch.device:
        return next(self.dense.parameters()).device

    def copy(self) -> VisionModel:
        """A dense model that may be changed."""
        return copy.deepcopy(self.dense)

    def slim(self, kept: list[Tensor]) -> VisionModel:
        """A copy with only the `kept` neurons of each block, and nothing else changed."""
        return slim(self.copy(), kept)

    def micro_batches(self) -> list[Tensor]:
        """The images as `config.micro_batch_size` at a time."""
        return list(self.images.split(self.config.micro_batch_size))

    def meter(self) -> Meter:
        """A meter of this model's blocks."""
        return Meter(type(self.dense.blocks[0]), self.device)

    def make(self, part: Part) -> Cost:
        """Make sure that `part` is there; what it cost when it was made."""
        if part.name not in self._made:
            if part.metered:
                with self.meter() as meter:
                    value = part.make(self)
                self._made[part.name] = (value, meter.cost)
            else:
                self._made[part.name] = (part.make(self), Cost())
        return self._made[part.name][1]

    def get(self, part: Part) -> Any:
        """A part that the method declared, so that it was made before."""
        return self._made[part.name][0]

    def run(self, method: Method, budget: Budget) -> tuple[VisionModel, Cost]:
        """Prune to `budget`, and all that it took, parts included."""
        cost = Cost()
        for part in method.parts:
            cost = cost.then(self.make(part))
        with self.meter() as meter:
            pruned = method.prune(self, budget)
        return pruned.model, cost.then(pruned.charged).then(meter.cost)
