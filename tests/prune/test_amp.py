"""The binary search on known curves, and the suffix-only search against the naive one."""

from __future__ import annotations

import copy

import pytest
import torch

from ampdeploy.config import PruneConfig
from ampdeploy.prune.amp import narrowest_width, search
from ampdeploy.prune.block_inputs import BlockInputs
from ampdeploy.prune.criterion import CRITERIA, batched
from ampdeploy.prune.slim import slim, top_neurons
from tests.mlp_kinds import SIZE, make


@pytest.mark.parametrize("right_width", [24, 48, 408, 768, 1512])
def test_monotone_curve_gives_the_narrowest_width_that_passes(right_width):
    width, value, tried = narrowest_width(1536, 6, 0.0, lambda w: float(right_width - w))
    assert width == right_width
    assert value == 0.0
    assert len(tried) == 6
    assert all(w % 24 == 0 for w, _ in tried)


def test_nothing_passes_keeps_the_full_width_and_no_value():
    width, value, tried = narrowest_width(1536, 6, 0.5, lambda _w: 1.0)
    assert (width, value) == (1536, None)
    assert [w for w, _ in tried] == [768, 1152, 1344, 1440, 1488, 1512]


def test_nan_is_never_accepted():
    width, value, _ = narrowest_width(64, 6, 1e9, lambda _w: float("nan"))
    assert (width, value) == (64, None)


@pytest.mark.parametrize("seed", range(20))
def test_non_monotone_curve_only_ever_returns_a_width_that_passed(seed):
    generator = torch.Generator().manual_seed(seed)
    curve = torch.rand(65, generator=generator).tolist()
    width, value, _ = narrowest_width(64, 6, 0.4, lambda w: curve[w])
    if value is None:
        assert width == 64
    else:
        assert value == curve[width] <= 0.4


def test_narrow_block_stops_when_the_grid_is_used_up():
    width, _, tried = narrowest_width(3, 6, 0.0, lambda w: float(2 - w))
    assert width == 2
    assert [w for w, _ in tried] == [1, 2]


def naive_search(model, images, scores, config):
    """The procedure as published: the whole network for every candidate, masks by slimming."""
    criterion = CRITERIA[config.criterion]
    hidden = [site.hidden for site in model.spec.sites]
    widths = list(hidden)

    def value_of(widths):
        candidate = copy.deepcopy(model)
        slim(candidate, [top_neurons(s, w) for s, w in zip(scores, widths, strict=True)])
        with torch.no_grad():
            features = candidate(images).features
        return batched(criterion, features, config.inv_temperature, config.batch_size)

    baseline = value_of(widths)
    for block in reversed(range(len(widths))):
        left, right, accepted = 0, hidden[block], None
        for _ in range(config.steps):
            middle = (left + right) // 2
            if middle in (left, right):
                break
            value = value_of([*widths[:block], middle, *widths[block + 1 :]])
            if value <= baseline + config.threshold:
                right, accepted = middle, value
            else:
                left = middle
        widths[block] = right
        baseline = baseline if accepted is None else accepted
    return widths, baseline


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_mixed_rope"])
def test_suffix_only_search_finds_what_the_naive_one_finds(kind, criterion):
    model = make(kind)
    images = torch.randn(8, 3, SIZE, SIZE)
    config = PruneConfig(criterion=criterion, batch_size=4, threshold=0.003, steps=4)
    generator = torch.Generator().manual_seed(3)
    scores = [torch.rand(site.hidden, generator=generator) for site in model.spec.sites]
    expected_widths, expected_value = naive_search(model, images, scores, config)
    result = search(model, images.split(3), scores, config, images=8)
    assert [len(kept) for kept in result.kept] == expected_widths
    assert result.final_value == pytest.approx(expected_value, abs=1e-5)
    assert [site.hidden for site in model.spec.sites] == expected_widths
    # Every candidate is on record, last block first.
    assert len(result.candidates) == 3 * config.steps
    assert [c.block for c in result.candidates] == [2] * 4 + [1] * 4 + [0] * 4
    assert all(c.accepted == (c.value <= c.limit) for c in result.candidates)
    # 2 blocks of prefix, then the dense value (1), then 4 candidates of 1, 2 and 3 blocks.
    assert result.block_forwards_per_image == 2 + 1 + 4 * (1 + 2 + 3)


@pytest.mark.parametrize("states_that_fit", [1, 2, 3, 5, 6])
def test_block_inputs_are_right_at_every_memory_budget(states_that_fit, tiny_model):
    images = torch.randn(4, 3, 160, 160)
    with torch.no_grad():
        state = tiny_model.stem(images)
        expected = []
        for index in range(6):
            expected.append(state.tokens)
            state = tiny_model.run_block(index, state)
        budget = state.tokens.nbytes * states_that_fit
        inputs = BlockInputs(tiny_model, images.split(2), 4, budget)
        for block in reversed(range(6)):
            got = torch.cat([s.tokens for s in inputs.take(block)])
            torch.testing.assert_close(got, expected[block])
