"""Intervals: from how many pairs on, and of differences."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.intervals import difference_of_medians, ratio_of_medians


@pytest.mark.parametrize("interval_of", [ratio_of_medians, difference_of_medians])
def test_an_interval_needs_twenty_pairs(interval_of):
    times = np.random.default_rng(0).uniform(1, 2, (2, 20))
    few, enough = interval_of(*times[:, :19]), interval_of(*times)
    assert few.ci95_low is None
    assert few.why["ci95_low"] == "19 pairs of timed calls; an interval needs 20"
    assert enough.ci95_low < enough.value < enough.ci95_high


def test_a_difference_of_medians_is_the_second_less_the_first():
    first = 1 + 0.01 * np.random.default_rng(0).standard_normal(40)
    found = difference_of_medians(first, first + 0.5)
    assert found.value == pytest.approx(0.5)
    assert found.ci95_low == pytest.approx(0.5)
    assert found.ci95_high == pytest.approx(0.5)
