"""Intervals decide, and nothing else passes unseen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ampdeploy.errors import ArtifactError
from ampdeploy.gate.finding import POINT, Status, Value, decide, samples_to_settle
from ampdeploy.gate.units import RATIO
from ampdeploy.report.result import Interval


def of(number, low=None, high=None, samples=100, **more):
    return Value(number=number, low=low, high=high, samples=samples, sample="pairs", **more)


def status(value, limit, *, at_most):
    return decide("rule", "", value, limit=limit, at_most=at_most, unit=RATIO).status


@pytest.mark.parametrize(
    ("limit", "at_most", "expected"),
    [
        (0.80, True, Status.PASS),
        (0.77, True, Status.PASS),  # the end itself is within
        (0.76, True, Status.UNDECIDED),
        (0.74, True, Status.UNDECIDED),
        (0.73, True, Status.UNDECIDED),
        (0.72, True, Status.FAIL),
        (0.72, False, Status.PASS),
        (0.73, False, Status.PASS),
        (0.74, False, Status.UNDECIDED),
        (0.77, False, Status.UNDECIDED),
        (0.80, False, Status.FAIL),
    ],
)
def test_the_whole_interval_must_be_on_one_side(limit, at_most, expected):
    assert status(of(0.75, 0.73, 0.77), limit, at_most=at_most) is expected


@pytest.mark.parametrize(
    ("low", "high", "limit", "at_most", "expected"),
    [
        # Nothing bounds it from below: it may be too low, whatever the limit is.
        (None, 0.77, 0.10, False, Status.UNDECIDED),
        (None, 0.77, 0.74, False, Status.UNDECIDED),
        (None, 0.77, 0.75, False, Status.UNDECIDED),
        (None, 0.77, 0.76, False, Status.UNDECIDED),
        (None, 0.77, 0.77, False, Status.UNDECIDED),
        (None, 0.77, 0.78, False, Status.FAIL),
        (None, 0.77, 0.77, True, Status.PASS),
        (None, 0.77, 0.76, True, Status.UNDECIDED),
        (None, 0.77, 0.10, True, Status.UNDECIDED),
        # Nothing bounds it from above.
        (0.73, None, 0.90, True, Status.UNDECIDED),
        (0.73, None, 0.75, True, Status.UNDECIDED),
        (0.73, None, 0.73, True, Status.UNDECIDED),
        (0.73, None, 0.72, True, Status.FAIL),
        (0.73, None, 0.73, False, Status.PASS),
        (0.73, None, 0.74, False, Status.UNDECIDED),
        (0.73, None, 0.90, False, Status.UNDECIDED),
    ],
)
def test_a_missing_end_is_no_limit_to_the_value(low, high, limit, at_most, expected):
    value = of(0.75, low, high, note="100 pairs; about 200 would give the other end")
    found = decide("r", "", value, limit=limit, at_most=at_most, unit=RATIO)
    assert found.status is expected
    assert (found.ci95_low, found.ci95_high) == (low, high)
    if expected is not Status.UNDECIDED:
        assert "the whole 95% interval is" in found.reason


def test_what_is_undecided_for_a_missing_end_says_what_would_give_it():
    value = of(0.75, None, 0.77, note="180 images; about 368 would give the lower end")
    found = decide("r", "", value, limit=0.7, at_most=False, unit=RATIO)
    assert found.measured == "0.750 [–, 0.770]"
    assert found.reason == (
        "the 95% interval has no lower end: 180 images; about 368 would give the lower end"
    )
    assert found.samples_to_settle is None
    # On the side that has its end, more samples may bring that within the limit, and so a fail.
    found = decide("r", "", value, limit=0.76, at_most=False, unit=RATIO)
    assert found.samples_to_settle == pytest.approx(400, abs=1)
    value = of(0.75, 0.73, None, note="few")
    found = decide("r", "", value, limit=0.8, at_most=True, unit=RATIO)
    assert found.measured == "0.750 [0.730, –]"
    assert found.reason == "the 95% interval has no upper end: few"


def test_an_interval_of_the_report_keeps_the_end_that_it_has():
    why = "few"
    for low, high in ((0.7, 0.8), (None, 0.8), (0.7, None), (None, None)):
        ends = {"ci95_low": low, "ci95_high": high}
        missing = {name: why for name, end in ends.items() if end is None}
        value = Value.of(Interval(value=0.75, **ends, why=missing), 20, "images")
        assert (value.low, value.high) == (low, high)
        assert value.broken is (low is None and high is None)
        assert value.note == (why if missing else "")


def test_a_point_decides_and_says_that_it_is_one():
    for number, expected in ((0.75, Status.PASS), (0.750001, Status.FAIL)):
        value = Value(number=number, note=POINT)
        found = decide("rule", "", value, limit=0.75, at_most=True, unit=RATIO)
        assert found.status is expected
        assert "no interval" in found.reason
        assert found.samples_to_settle is None


def test_a_lost_interval_is_no_point():
    found = decide(
        "r", "", of(0.1, broken=True, note="3 pairs"), limit=0.75, at_most=True, unit=RATIO
    )
    assert found.status is Status.NOT_MEASURED
    assert "3 pairs" in found.reason


def test_what_was_not_measured_never_passes():
    for at_most in (True, False):
        value = Value.missing("no meter")
        found = decide("r", "", value, limit=0.5, at_most=at_most, unit=RATIO)
        assert found.status is Status.NOT_MEASURED
        assert found.reason == "no meter"


@pytest.mark.parametrize(
    "value",
    [
        of(math.nan),
        of(0.5, math.nan, 0.6),
        of(0.5, 0.4, math.inf),
        of(0.5, 0.6, 0.4),
        of(0.5, None, math.nan),
        of(math.nan, None, 0.6),
        of(0.5, -math.inf, None),
    ],
)
def test_a_number_that_nothing_measures_is_refused(value):
    with pytest.raises(ArtifactError, match="damaged"):
        status(value, 0.9, at_most=True)


def test_the_estimate_scales_with_the_square_of_the_distance():
    # The upper end is 0.02 away and must come within 0.01: four times the samples.
    needed, text = samples_to_settle(of(0.75, 0.73, 0.77), 0.76)
    assert needed == pytest.approx(400, abs=1)
    assert "400 pairs" in text
    assert "as likely as not" in text
    # Beyond the limit, the lower end counts.
    needed, _ = samples_to_settle(of(0.75, 0.72, 0.76), 0.74)
    assert needed == pytest.approx(900, abs=1)


@pytest.mark.parametrize("limit", [0.75, 0.7500001])
def test_a_value_at_the_limit_is_not_sent_measuring(limit):
    needed, text = samples_to_settle(of(0.75, 0.73, 0.77), limit)
    assert needed is None
    assert "more than a million pairs" in text
    assert "practically at the limit" in text


def test_the_estimate_holds_up_in_a_simulation():
    """Means of n normal draws: at the estimated n, about half the runs are decided (the end of the
    interval then lies on the limit, on average), and at twice that, most."""
    rng = np.random.default_rng(0)
    true, sigma, limit, n = 0.75, 0.05, 0.76, 50

    def run(count):
        draws = rng.normal(true, sigma, count)
        half = 1.96 * draws.std(ddof=1) / math.sqrt(count)
        return of(draws.mean(), draws.mean() - half, draws.mean() + half, samples=count)

    half = 1.96 * sigma / math.sqrt(n)
    needed, _ = samples_to_settle(of(true, true - half, true + half, samples=n), limit)
    share = [
        np.mean([status(run(count), limit, at_most=True) is Status.PASS for _ in range(2000)])
        for count in (n, needed, 2 * needed)
    ]
    assert share[0] < 0.4
    assert 0.45 < share[1] < 0.55
    assert share[2] > 0.75
