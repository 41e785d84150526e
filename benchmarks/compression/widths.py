"""Which neurons stay, from scores, at exactly the same size for every method.

Every method is given one `Budget`, and meets the same number of hidden neurons on the same grid:
the whole number of grid steps that is nearest to the parameters asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ampdeploy.config import PruneConfig
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import Budget, plan_budget
from ampdeploy.prune.slim import top_neurons


def budget_for(model: VisionModel, config: PruneConfig) -> Budget:
    """The budget that `config` means for the dense `model`, on the grid of `config`.

    Raises:
        ConfigError: The MLPs do not hold that much.
    """
    assert config.width_multiple is not None  # the command line always gives one
    return plan_budget(model, config, multiple=config.width_multiple)


def uniform_widths(budget: Budget) -> list[int]:
    """The same share of every block, to the exact total: widths differ by at most a grid step.

    Blocks that get the extra step are spread evenly over the depth.
    """
    flat = [np.linspace(1, 0, hidden + 1) for hidden in budget.hidden]
    total = sum(allocate(flat, budget))
    dense = sum(budget.hidden)
    widths: list[int] = []
    given, seen = 0, 0
    for block, hidden in enumerate(budget.hidden):
        # Cumulative rounding: after each block the sum is as near to its share as the grid allows.
        seen += hidden
        wanted = total * seen / dense - given
        choices = budget.choices(block)
        widths.append(min(choices, key=lambda width: abs(width - wanted)))
        given += widths[-1]
    return widths


def uniform(scores: Sequence[Tensor], budget: Budget) -> list[Tensor]:
    """The highest scores (H,) of every block, the same share everywhere."""
    return [
        top_neurons(score, width)
        for score, width in zip(scores, uniform_widths(budget), strict=True)
    ]


def ranked(scores: Sequence[Tensor], budget: Budget) -> list[Tensor]:
    """The highest scores (H,) of all blocks together, each block's width on the grid.

    The sum of the scores that stay is the largest possible at this size.
    """
    curves = []
    for score in scores:
        ascending = score.double().sort().values
        lost = torch.cat([ascending.new_zeros(1), ascending.cumsum(0)])  # by neurons removed
        curves.append(lost.flip(0).numpy())
    return [
        top_neurons(score, width)
        for score, width in zip(scores, allocate(curves, budget), strict=True)
    ]
