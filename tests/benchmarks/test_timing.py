"""The noise that intervals are tried on, and what is made of repeated runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from benchmarks.timing.coverage import simulate
from benchmarks.timing.noise import Noise, draw, fit
from benchmarks.timing.repeat import HEAVIER, SAME, summary, with_interval


def rng(seed=0):
    return np.random.default_rng(seed)


def test_loads_are_drawn_with_a_speed_of_their_own():
    loads = draw(Noise(load=0.05), 100, 5, 1.1, rng())
    assert [load.shape for load in loads] == [(20, 2)] * 5
    ratios = []
    for load in loads:
        assert np.ptp(load, axis=0) == pytest.approx(0)  # no other noise
        ratios.append(load[0, 1] / load[0, 0])
    assert len(set(ratios)) == 5
    still = draw(Noise(), 100, 5, 1.1, rng())
    assert np.concatenate(still) == pytest.approx(np.tile([1.0, 1.1], (100, 1)))


def test_fitting_finds_the_jitter_and_what_loads_do():
    noise = Noise(jitter=0.02, load=0.03)
    found = [fit(draw(noise, 2000, 40, 1.0, rng(seed))) for seed in range(5)]
    assert np.median([f.jitter for f in found]) == pytest.approx(0.02, rel=0.15)
    assert np.median([f.load for f in found]) == pytest.approx(0.03, rel=0.25)
    alike = fit(draw(dataclasses.replace(noise, load=0.0), 2000, 40, 1.0, rng()))
    assert alike.load < 0.003


def test_fitting_takes_enough_calls():
    with pytest.raises(ValueError, match="record 200"):
        fit(draw(Noise(jitter=0.02), 160, 4, 1.0, rng()))
    # A spread of one stretch is none, and would pass for loads that are all alike.
    with pytest.raises(ValueError, match="fewer than 30 pairs"):
        fit(draw(Noise(jitter=0.02), 400, 20, 1.0, rng()))


def test_only_the_interval_over_loads_sees_what_loads_do():
    noise = Noise(jitter=0.01, load=0.02)
    over_loads = simulate(noise, 100, 150, "over_loads")
    bootstrap = simulate(noise, 100, 150, "bootstrap")
    assert 0.89 <= over_loads["coverage"] <= 0.99
    assert bootstrap["coverage"] < 0.75
    calm = simulate(Noise(jitter=0.03), 190, 100, "over_loads")
    assert 0.89 <= calm["coverage"] <= 1.0
    assert calm["told_apart"] > 0.95


def test_intervals_follow_from_the_loads():
    ratios = [1.02, 0.99, 1.03, 1.0, 1.01, 0.98]
    found = with_interval({"kind": SAME, "load_ratios": ratios})
    assert found["value"] == pytest.approx(np.exp(np.log(ratios).mean()))
    assert found["ci95_low"] < found["value"] < found["ci95_high"]


def row(kind, low, value, high, single):
    return {
        "kind": kind, "ci95_low": low, "value": value, "ci95_high": high, "single_load": single,
        "warmup_stable": value < 1.05,
    }  # fmt: skip


def test_summary_counts_what_the_intervals_say():
    rows = [
        row(SAME, 0.98, 1.00, 1.02, [0.99, 1.01]),
        row(SAME, 1.01, 1.02, 1.03, [1.01, 1.02]),
        row(SAME, 0.95, 0.97, 0.99, [0.96, 0.98]),
        row(HEAVIER, 1.02, 1.05, 1.08, [1.03, 1.06]),
        row(HEAVIER, 0.99, 1.04, 1.09, [1.02, 1.06]),
    ]
    found = summary(rows)
    same, heavier = found[SAME], found[HEAVIER]
    assert (same["runs"], same["contains_1"], same["above_1"], same["below_1"]) == (3, 1, 1, 1)
    assert same["single_load"]["contains_1"] == 1
    assert same["rms_error"] == pytest.approx(np.sqrt((0.02**2 + 0.03**2) / 3))
    assert (heavier["above_1"], heavier["contains_1"]) == (1, 1)
    assert heavier["single_load"]["above_1"] == 2
    assert heavier["median_ratio"] == pytest.approx(1.045)
    assert heavier["contains_median_ratio"] == 2
    assert heavier["unsettled_warm_ups"] == 1
