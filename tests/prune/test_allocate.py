"""The allocation against every combination of widths there is."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import Budget


def make_budget(hidden, neurons, *, multiple=8, minimum=8):
    return Budget(
        neurons=neurons, params=0, hidden=tuple(hidden), multiple=multiple, minimum=minimum
    )


def random_curves(hidden, seed, *, convex):
    """Falling to 0 at the dense width; if not convex, in jumps of any size."""
    generator = np.random.default_rng(seed)
    curves = []
    for width in hidden:
        steps = generator.exponential(size=width) * generator.uniform(0.1, 10)
        if convex:
            steps = np.sort(steps)
        curves.append(np.concatenate([np.cumsum(steps)[::-1], [0.0]]))
    return curves


def brute_force(curves, budget):
    """(total, error) of the best combination by the docstring of `allocate`."""
    choices = [budget.choices(block) for block in range(len(budget.hidden))]
    found = [
        (sum(widths), sum(curve[w] for curve, w in zip(curves, widths, strict=True)))
        for widths in itertools.product(*choices)
    ]
    distances = [abs(total - budget.neurons) for total, _ in found]
    limit = max(min(distances), budget.multiple / 2)
    near = [pair for pair, distance in zip(found, distances, strict=True) if distance <= limit]
    return min(near, key=lambda pair: (pair[1], -pair[0]))


@pytest.mark.parametrize("convex", [True, False])
@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed, convex):
    generator = np.random.default_rng(seed)
    # Every other case has dense widths off the grid, as SwiGLU's often are.
    hidden = generator.integers(2, 6, size=4) * 8 + (generator.integers(0, 8, 4) * (seed % 2))
    budget = make_budget(
        hidden.tolist(),
        float(generator.uniform(32, hidden.sum())),
        minimum=int(generator.choice([3, 8, 16])),
    )
    curves = random_curves(budget.hidden, seed, convex=convex)
    widths = allocate(curves, budget)
    assert all(width in budget.choices(block) for block, width in enumerate(widths))
    total, error = brute_force(curves, budget)
    assert sum(widths) == total
    found = sum(curve[w] for curve, w in zip(curves, widths, strict=True))
    assert found == pytest.approx(error, rel=1e-12)


@pytest.mark.parametrize("seed", range(30))
def test_the_total_is_within_half_a_grid_step(seed):
    generator = np.random.default_rng(100 + seed)
    multiple = int(generator.choice([8, 16, 64]))
    hidden = generator.integers(multiple, 6 * multiple, size=12).tolist()
    budget = make_budget(hidden, 0.0, multiple=multiple, minimum=1)
    least = sum(budget.choices(block)[0] for block in range(12))
    neurons = float(generator.uniform(least, sum(hidden)))
    budget = make_budget(hidden, neurons, multiple=multiple, minimum=1)
    widths = allocate(random_curves(hidden, seed, convex=True), budget)
    assert abs(sum(widths) - neurons) <= multiple / 2


def test_dense_widths_off_the_grid_do_not_keep_blocks_dense():
    # 24 blocks of 2730: only sums of certain blocks at their dense width come within a neuron.
    hidden = [2730] * 24
    budget = make_budget(hidden, 0.5 * sum(hidden), multiple=64, minimum=64)
    curves = random_curves(hidden, 4, convex=True)
    widths = allocate(curves, budget)
    assert all(width % 64 == 0 for width in widths)
    assert abs(sum(widths) - budget.neurons) <= 32


def test_of_two_sums_equally_near_the_larger_is_taken():
    budget = make_budget([32, 32], 36)  # between 32 and 40
    widths = allocate(random_curves([32, 32], 0, convex=True), budget)
    assert sum(widths) == 40


@pytest.mark.parametrize("neurons", [24, 90.0, 1000])
def test_the_ends_of_the_range(neurons):
    hidden = [32, 32, 26]
    widths = allocate(random_curves(hidden, 1, convex=True), make_budget(hidden, neurons))
    assert widths == ([8, 8, 8] if neurons == 24 else hidden)


def test_a_free_block_gives_everything_and_a_dear_one_nothing():
    hidden = [64, 64, 64]
    curves = random_curves(hidden, 2, convex=True)
    curves[0] = np.zeros(65)
    curves[2] = curves[2] * 1e6
    widths = allocate(curves, make_budget(hidden, 64 + 64 + 8))
    assert widths == [8, 64, 64]


def test_forty_blocks_of_the_largest_model_are_quick():
    # DINOv2-g: 40 blocks of 4096, on a grid of 16.
    hidden = [4096] * 40
    budget = make_budget(hidden, 0.6 * sum(hidden), multiple=16, minimum=16)
    widths = allocate(random_curves(hidden, 3, convex=True), budget)
    assert abs(sum(widths) - budget.neurons) <= 8
