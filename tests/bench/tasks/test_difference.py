"""The interval of a paired difference: known cases, and how often it is right."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.tasks.difference import paired_difference


def test_paired_difference_of_known_outcomes():
    right, wrong = np.ones(50, bool), np.zeros(50, bool)
    lost = paired_difference(right, wrong)
    assert (lost.value, lost.ci95_low) == (-1, -1)
    assert -0.95 < lost.ci95_high < -0.85
    half = np.arange(50) % 2 == 0
    change = paired_difference(half, ~half)  # as many gained as lost
    assert change.value == 0
    assert change.ci95_low < 0 < change.ci95_high


@pytest.mark.parametrize("images", [10, 100, 1000])
def test_no_change_in_a_few_images_is_not_proof_of_no_change(images):
    """The chance of no change in n images is 5% when 3 / n of all images change."""
    right = np.ones(images, bool)
    none = paired_difference(right, right)
    assert none.value == 0
    assert 1 / (images + 2) <= none.ci95_high <= 4 / images
    assert none.ci95_low == pytest.approx(-none.ci95_high, abs=1.5 / images)


def test_scores_that_are_no_hits_are_resampled_as_they_are():
    rng = np.random.default_rng(0)
    baseline = rng.random(400)
    pruned = baseline - 0.1 + 0.02 * rng.standard_normal(400)
    found = paired_difference(baseline, pruned)
    assert found.value == pytest.approx(-0.1, abs=0.005)
    assert found.ci95_high - found.ci95_low == pytest.approx(4 * 0.02 / 20, rel=0.15)
    same = paired_difference(baseline, baseline)
    assert (same.ci95_low, same.ci95_high) == (0, 0)


@pytest.mark.parametrize(
    ("images", "lost", "gained"),
    [(180, 0.05, 0.05), (180, 0.06, 0.02), (180, 0.01, 0.0), (17, 0.1, 0.1), (1000, 0.004, 0.002)],
)
def test_the_interval_holds_the_truth_in_about_95_of_100_runs(images, lost, gained):
    rng = np.random.default_rng(1)
    runs, held = 400, 0
    for run in range(runs):
        draw = rng.random(images)
        baseline = (draw < lost) | (draw > 0.5)
        pruned = ((draw >= lost) & (draw > 0.5)) | ((draw >= lost) & (draw < lost + gained))
        found = paired_difference(baseline, pruned, seed=run)
        held += found.ci95_low <= gained - lost <= found.ci95_high
    assert 0.92 <= held / runs <= 1


def test_without_imaginary_images_a_rare_change_would_be_missed(monkeypatch):
    monkeypatch.setattr("ampdeploy.bench.tasks.difference.PSEUDO_COUNTS", {-1: 0, 0: 0, 1: 0})
    rng = np.random.default_rng(1)
    held = 0
    for run in range(200):
        baseline = np.ones(180)
        found = paired_difference(baseline, (rng.random(180) >= 0.01).astype(float), seed=run)
        held += found.ci95_low <= -0.01 <= found.ci95_high
    assert held / 200 < 0.9
