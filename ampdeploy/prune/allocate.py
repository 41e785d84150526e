"""Global allocation: where the budget costs least.

Every block has a curve of error against width. Their sum is least at an exact total, by dynamic
programming over the blocks: no convexity is needed and nothing is rounded afterwards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ampdeploy.prune.budget import Budget


def allocate(curves: Sequence[np.ndarray], budget: Budget) -> list[int]:
    """Widths of least total error whose sum is within half a grid step of `budget.neurons`.

    Where no sum is that near (blocks at their limits), the nearest one counts.

    Args:
        curves: Per block, (H + 1,) error with k neurons kept, as `select.error_curve` gives it.
        budget: The total, the grid and the limits.

    Returns:
        Per block, its width.
    """
    choices = [budget.choices(block) for block in range(len(budget.hidden))]
    unit = math.gcd(*(width for widths in choices for width in widths))
    size = sum(budget.hidden) // unit + 1
    best = np.full(size, np.inf)
    best[0] = 0.0
    picks = []
    for widths, curve in zip(choices, curves, strict=True):
        reached = np.full(size, np.inf)
        pick = np.zeros(size, dtype=np.int64)
        for width in widths:
            offset = width // unit
            candidate = best[: size - offset] + curve[width]
            # Widths ascend, so at equal error the wider one replaces the narrower.
            better = candidate <= reached[offset:]
            better &= np.isfinite(candidate)
            reached[offset:][better] = candidate[better]
            pick[offset:][better] = width
        best = reached
        picks.append(pick)
    reachable = np.flatnonzero(np.isfinite(best))
    distance = np.abs(reachable * unit - budget.neurons)
    # Dense widths off the grid make sums between the grid's. The very nearest would force blocks to
    # stay dense; within half a step all meet the budget, and of those the cheapest is taken.
    near = reachable[distance <= max(distance.min(), budget.multiple / 2)]
    total = int(min(near, key=lambda position: (best[position], -position)))
    result = []
    for pick in reversed(picks):
        width = int(pick[total])
        result.append(width)
        total -= width // unit
    return result[::-1]
