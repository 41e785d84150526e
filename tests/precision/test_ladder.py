"""The search for FP32 islands, on made-up losses: it ends, and it ends with the least it found."""

from __future__ import annotations

import random

import pytest

from ampdeploy.precision.compare import Agreement, Judgement
from ampdeploy.precision.graph import KINDS
from ampdeploy.precision.ladder import LADDER, OUTSIDE, WHOLE, find_islands

BAR = 0.999
RESIDUAL, POINTWISE, BOTH, ATTENTION, LINEAR, _ = LADDER


def seen(cosine: float, not_finite: int = 0) -> Agreement:
    return Agreement(
        vectors=10,
        cosine_min=cosine,
        cosine_p1=cosine,
        cosine_mean=cosine,
        error_p99=max(2 - 2 * cosine, 0.0) ** 0.5,
        not_finite=not_finite,
    )


class Network:
    """Loses cosine block by block: `losses[block][kind]` for every kind that is FP16."""

    def __init__(self, losses, *, gains=None, outside=0.0):
        self.losses = losses
        self.gains = gains or {}
        self.outside = outside
        self.asked = []

    def __call__(self, islands):
        self.asked.append(dict(islands))
        lost, blocks = 0.0, {}
        for block, kinds in enumerate(self.losses):
            lost *= self.gains.get(block, 1.0)
            lost += sum(v for k, v in kinds.items() if k not in islands.get(block, ()))
            blocks[block] = seen(1 - lost)
        if OUTSIDE not in islands:
            lost += self.outside
        return Judgement(blocks=blocks, outputs={"features": seen(1 - lost)})


def test_what_passes_is_left_alone():
    network = Network([{"linear": 1e-4}, {"pointwise": 1e-4}])
    assert find_islands(network, BAR)[0] == {}
    assert len(network.asked) == 1


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({"residual": 0.01}, RESIDUAL),
        ({"pointwise": 0.01}, POINTWISE),
        ({"residual": 0.01, "pointwise": 0.01}, BOTH),
        ({"attention": 0.01}, ATTENTION),
        ({"linear": 0.01}, LINEAR),
        ({"linear": 0.01, "attention": 0.01}, WHOLE),
    ],
)
def test_the_first_rung_that_is_enough(losses, expected):
    network = Network([{}, losses, {}])
    islands, judgement = find_islands(network, BAR)
    assert islands == {1: expected}
    assert judgement.passes(BAR)


def test_a_block_that_only_amplifies_leaves_the_island_where_the_loss_is():
    """Block 2 fails even in FP32, because of what block 0 hands it, which passes by itself."""
    network = Network([{"residual": 8e-4}, {}, {"linear": 1e-3}], gains={2: 1.5})
    islands, judgement = find_islands(network, BAR)
    assert judgement.passes(BAR)
    assert islands[0] == RESIDUAL
    assert len(network.asked) < 40


def test_an_output_that_fails_alone_is_mended_where_most_is_lost():
    network = Network([{"linear": 2e-4}, {"pointwise": 7e-4}, {}], outside=4e-4)
    islands, judgement = find_islands(network, BAR)
    assert judgement.passes(BAR)
    assert islands == {1: POINTWISE}


def test_stem_and_head_are_the_last_resort():
    islands, judgement = find_islands(Network([{}, {}], outside=0.01), BAR)
    assert judgement.passes(BAR)
    assert islands == {OUTSIDE: RESIDUAL}  # any kind will do in this network


def test_islands_that_later_ones_made_unnecessary_are_taken_back():
    """Block 0 fails first; the whole block 1 alone would have been enough for the output."""
    network = Network([{"residual": 0.01}, {"linear": 0.01}], gains={1: 0.0})
    islands, judgement = find_islands(network, BAR)
    assert judgement.passes(BAR)
    assert islands == {1: LINEAR}


def test_what_cannot_be_mended_ends_with_everything_tried():
    network = Network([{"beyond": 0.01}, {"beyond": 0.01}])
    islands, judgement = find_islands(network, BAR)
    assert not judgement.passes(BAR)
    assert islands == {0: WHOLE, 1: WHOLE, OUTSIDE: WHOLE}


@pytest.mark.parametrize("seed", range(30))
def test_it_ends_on_any_network(seed):
    rng = random.Random(seed)
    depth = rng.randint(1, 6)
    kinds = [*KINDS, "beyond"]
    losses = [
        {rng.choice(kinds): 10 ** rng.uniform(-5, -2) for _ in range(rng.randint(0, 3))}
        for _ in range(depth)
    ]
    gains = {block: rng.choice([0.0, 0.5, 1.0, 2.0]) for block in range(depth)}
    network = Network(losses, gains=gains, outside=rng.choice([0.0, 1e-3]))
    islands, judgement = find_islands(network, BAR)
    everything = dict.fromkeys([*range(depth), OUTSIDE], WHOLE)
    # Found whenever it exists at all: more FP32 never makes this network worse.
    tried = len(network.asked)
    assert judgement.passes(BAR) == network(everything).passes(BAR)
    assert tried <= 2 * (depth + 1) * (len(LADDER) + 1) + 1
    assert set(islands) <= {*range(depth), OUTSIDE}
