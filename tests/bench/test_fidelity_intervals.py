"""Intervals of fidelity hold as often as they promise, also where images differ a lot."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest

from ampdeploy.bench import fidelity_intervals as intervals
from ampdeploy.bench.accuracy import knn_agreement
from ampdeploy.bench.fidelity_intervals import (
    MIN_IMAGES,
    draws_for_low_end,
    of_clustered_percentile,
    of_mean,
    of_neighbours,
    of_percentile,
    ranks_around,
)

PATCH_SPREAD = 0.6  # of the logarithm of a patch's loss within its image


def chance_of(counts, draws, share=0.01):
    return sum(math.comb(draws, k) * share**k * (1 - share) ** (draws - k) for k in counts)


def in_range(hits, expected):
    """Whether so many hits are what comes of a chance, within three standard deviations."""
    return abs(np.mean(hits) - expected) <= 3 * math.sqrt(expected * (1 - expected) / len(hits))


def holds(interval, truth):
    low = -math.inf if interval.ci95_low is None else interval.ci95_low
    return low <= truth <= interval.ci95_high


def patch_cosines(rng, images, patches, spread):
    """Losses that are skewed, and differ between images by `spread` in their logarithm."""
    logs = spread * rng.standard_normal((images, 1))
    logs = logs + PATCH_SPREAD * rng.standard_normal((images, patches))
    return (1 - 0.02 * np.exp(logs)).astype(np.float32)


def percentile_of_patches(spread):
    return 1 - 0.02 * math.exp(2.3263478740408408 * math.hypot(spread, PATCH_SPREAD))


def agreeing(rng, images, *, kinds):
    """Images of so many kinds, their features in two models, and how to compare some of them."""
    middles = np.random.default_rng(1).standard_normal((kinds, 16))
    dense = middles[rng.integers(0, kinds, images)] + 0.7 * rng.standard_normal((images, 16))
    slim = dense + 0.6 * rng.standard_normal((images, 16))
    return lambda rows: knn_agreement(dense[rows], slim[rows], k=5)


@pytest.mark.parametrize("draws", [1, 3, 50, 367, 368, 1000])
def test_ranks_are_the_narrowest_that_hold(draws):
    low, high = ranks_around(draws)
    assert (low > 0) == (draws >= 368)
    # Too few draws below the percentile for the lower one to be there, or too many for the upper.
    assert chance_of(range(low), draws) <= 0.025 < chance_of(range(low + 1), draws)
    above = chance_of(range(high), draws)
    assert above >= 0.975
    assert high == 1 or chance_of(range(high - 1), draws) < 0.975


def test_ranks_of_many_draws_can_be_told():
    low, high = ranks_around(50_000)
    half = 1.96 * math.sqrt(50_000 * 0.01 * 0.99)
    assert low == pytest.approx(500 - half, abs=2)
    assert high == pytest.approx(500 + half, abs=2)


def test_too_few_images_bound_the_percentile_from_one_side():
    values = np.linspace(0.5, 1, 368)
    assert draws_for_low_end() == 368
    whole = of_percentile(values)
    assert (whole.ci95_low, whole.ci95_high) == (0.5, values[8])
    few = of_percentile(values[:367])
    assert few.ci95_low is None
    assert few.why == {"ci95_low": "367 images; about 368 would give the lower end"}
    assert few.ci95_high == values[8]
    for n in (1, 2, 3):
        found = of_percentile(values[:n])
        assert found.ci95_high >= found.value


def test_the_percentile_over_images_holds_as_often_as_its_ranks_say():
    rng = np.random.default_rng(0)
    draws = 400
    low, high = ranks_around(draws)
    expected = chance_of(range(low, high), draws)
    assert 0.95 <= expected < 0.97
    truth = 1 - 0.02 * math.log(100)  # 1 of 100 losses is larger
    found = [of_percentile(1 - 0.02 * rng.exponential(size=draws)) for _ in range(1000)]
    assert in_range([holds(interval, truth) for interval in found], expected)
    below = chance_of(range(low), draws)
    assert in_range([interval.ci95_low > truth for interval in found], below)


def test_a_skewed_mean_holds_95_times_of_100():
    rng = np.random.default_rng(0)
    found = [of_mean(1 - 0.02 * rng.exponential(size=100), seed=i) for i in range(200)]
    assert in_range([holds(interval, 0.98) for interval in found], 0.95)


def test_the_mean_over_patches_of_images_holds_95_times_of_100():
    rng = np.random.default_rng(0)
    truth = 1 - 0.02 * math.exp((0.6**2 + PATCH_SPREAD**2) / 2)
    found = []
    for seed in range(150):
        cosines = patch_cosines(rng, 100, 16, 0.6)
        found.append(of_mean(cosines.mean(axis=1, dtype=np.float64), seed=seed))
    assert in_range([holds(interval, truth) for interval in found], 0.95)


@pytest.mark.parametrize("spread", [0.0, 0.6, 1.0])
def test_the_percentile_over_patches_holds_however_much_images_differ(spread):
    rng = np.random.default_rng(0)
    truth = percentile_of_patches(spread)
    hits, low_misses, alone = [], [], []
    for _ in range(300):
        cosines = patch_cosines(rng, 180, 64, spread)
        found = of_clustered_percentile(cosines)
        hits.append(holds(found, truth))
        low_misses.append(found.ci95_low is not None and found.ci95_low > truth)
        # As if every patch were an image.
        alone.append(holds(of_percentile(cosines.ravel()), truth))
    # At least 95 of 100, within three standard deviations; more where few images matter.
    assert np.mean(hits) >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / 300)
    assert np.mean(low_misses) <= 0.025 + 3 * math.sqrt(0.025 * 0.975 / 300)
    if spread:
        assert np.mean(alone) < 0.7
    else:
        assert in_range(hits, 0.95)


@pytest.mark.parametrize(("kinds", "expected"), [(5, 0.95), (30, 0.92)])
def test_shared_neighbours_hold_nearly_as_often(kinds, expected):
    """With two images of a kind, which images are drawn matters more for half as many."""
    rng = np.random.default_rng(0)
    images, found = 60, []
    for seed in range(100):
        agreement = agreeing(rng, images, kinds=kinds)
        value = agreement(np.arange(images))
        found.append(of_neighbours(value, agreement, images=images, k=5, seed=seed))
    truth = np.mean([interval.value for interval in found])
    assert in_range([holds(interval, truth) for interval in found], expected)
    spread = np.std([interval.value for interval in found])
    widths = [interval.ci95_high - interval.ci95_low for interval in found]
    assert np.mean(widths) == pytest.approx(2 * 1.96 * spread, rel=0.25)


def test_few_images_with_all_the_low_patches_give_no_lower_end():
    rng = np.random.default_rng(0)
    cosines = (1 - 0.01 * rng.random((200, 64))).astype(np.float32)
    both = of_clustered_percentile(cosines)
    assert both.ci95_low < both.value < both.ci95_high
    assert both.ci95_high - both.ci95_low < 0.0001
    cosines[:3] -= 0.5
    few = of_clustered_percentile(cosines)
    assert few.ci95_low is None
    draws = int(few.why["ci95_low"].split(" are worth ")[1].split()[0])
    assert 50 < draws < 368
    needed = math.ceil(200 * 368 / draws)
    assert f"about {needed} images would give the lower end" in few.why["ci95_low"]
    assert few.ci95_high > 0.9  # where the others are


def test_equal_cosines_are_no_trouble():
    found = of_clustered_percentile(np.ones((400, 4), np.float32))
    assert (found.ci95_low, found.value, found.ci95_high) == (1, 1, 1)
    assert of_mean(np.full(30, 0.5)).ci95_low == 0.5


def test_where_all_neighbours_agree_some_need_not():
    found = of_neighbours(1.0, lambda rows: 1.0, images=100, k=5)
    assert (found.value, found.ci95_high) == (1, 1)
    assert 0.98 < found.ci95_low < 1
    none = of_neighbours(0.0, lambda rows: 0.0, images=100, k=5)
    assert none.ci95_low == 0 < none.ci95_high < 0.02
    torn = of_neighbours(1.0, lambda rows: float(rows[0] % 2), images=100, k=5)
    assert 0 < torn.ci95_low < 0.9


def test_halves_of_many_images_are_no_larger_than_they_must_be():
    sizes = []

    def agreement(rows):
        sizes.append(len(np.unique(rows)))
        return 0.5

    of_neighbours(0.5, agreement, images=50_000, k=5)
    assert set(sizes) == {intervals.MOST_OF_A_HALF}


@pytest.mark.parametrize(
    ("find", "needed"),
    [
        (lambda n: of_mean(np.ones(n)), MIN_IMAGES),
        (lambda n: of_clustered_percentile(np.ones((n, 4))), MIN_IMAGES),
        (lambda n: of_neighbours(1.0, lambda rows: 1.0, images=n, k=3), MIN_IMAGES),
        (lambda n: of_neighbours(1.0, lambda rows: 1.0, images=n, k=5), 22),
    ],
)
def test_too_few_images_give_no_interval_and_say_so(find, needed):
    lost = find(needed - 1)
    assert lost.lost
    assert lost.value == 1
    assert lost.why_open == f"{needed - 1} images; an interval needs {needed}"
    assert find(needed).ci95_high == 1


def test_resampling_in_chunks_is_as_good(monkeypatch):
    values = 1 - np.random.default_rng(0).exponential(size=100)
    whole = of_mean(values)
    monkeypatch.setattr(intervals, "DRAWS_AT_ONCE", 700)
    chunks = of_mean(values)
    width = whole.ci95_high - whole.ci95_low
    assert chunks.ci95_low == pytest.approx(whole.ci95_low, abs=0.1 * width)
    assert chunks.ci95_high == pytest.approx(whole.ci95_high, abs=0.1 * width)


def test_memory_of_a_whole_validation_set_is_bounded():
    cosines = np.random.default_rng(0).random((50_000, 256), np.float32)
    tracemalloc.start()
    of_clustered_percentile(cosines)
    of_mean(cosines[:, 0].astype(np.float64))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2.5 * cosines.nbytes
