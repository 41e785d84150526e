"""Against an older report: like with like, or not at all."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest

from ampdeploy.errors import ConfigError
from ampdeploy.gate import regression
from ampdeploy.gate.finding import EXACT, POINT, Status, Value
from ampdeploy.gate.gate import GateConfig, run_gate
from ampdeploy.gate.rules import parse_rule
from ampdeploy.report.result import Interval, Spread
from tests.report.samples import (
    bare_report,
    few_images,
    fidelity,
    sample_report,
    whole_report,
    with_ratio,
)
from tests.report.test_compare import other_speed


def tight(report, **ratios):
    """`report` with narrow intervals around these ratios at batch 1."""
    intervals = {
        name: {"1": Interval(value=v, ci95_low=v * 0.998, ci95_high=v * 1.002)}
        for name, v in ratios.items()
    }
    return with_ratio(report, **intervals)


def check(new, old, *names, allowed=0.02):
    found = regression.check(new, old, allowed=allowed, names=names or None)
    return {finding.scope: finding for finding in found}


def replaced(report, part, **changes):
    return dataclasses.replace(
        report, **{part: dataclasses.replace(getattr(report, part), **changes)}
    )


@pytest.mark.parametrize(
    ("now", "expected"),
    [(0.70, "pass"), (0.75, "pass"), (0.765, "undecided"), (0.78, "fail")],
)
def test_a_ratio_may_grow_by_what_is_allowed(now, expected):
    old, new = tight(sample_report(), latency=0.75), tight(sample_report(), latency=now)
    found = check(new, old, "latency")["latency, batch 1"]
    assert found.status.value == expected
    assert found.value == pytest.approx(now / 0.75 - 1)


def test_throughput_may_fall_by_what_is_allowed():
    old = tight(sample_report(), throughput=1.3)
    for now, expected in ((1.4, Status.PASS), (1.29, Status.PASS), (1.25, Status.FAIL)):
        found = check(tight(sample_report(), throughput=now), old, "throughput")
        assert found["throughput, batch 1"].status is expected


def test_counts_cosines_and_accuracy_are_held_to_it():
    old = sample_report()
    params = old.pruned.params
    for now, expected in ((round(params * 1.0199), "pass"), (round(params * 1.03), "fail")):
        new = replaced(old, "pruned", params=now)
        assert check(new, old, "params")["params"].status.value == expected
    for fall, expected in ((0.019, "pass"), (0.021, "fail")):
        new = replaced(old, "fidelity", cosine_p1=old.fidelity.cosine_p1 - fall)
        assert check(new, old, "cosine")["cosine"].status.value == expected

    def accurate(value, half):
        drop = Interval(value=value, ci95_low=value - half, ci95_high=value + half)
        return with_ratio(old, accuracy_difference={"knn_top1": drop})

    for value, expected in ((0.0, "pass"), (-0.02, "undecided"), (-0.05, "fail")):
        found = check(accurate(value, 0.004), accurate(0.0, 0.003), "accuracy")
        assert found["accuracy, knn_top1"].status.value == expected
    # 3-4-5: independent halves add in squares.
    assert found["accuracy, knn_top1"].ci95_low == pytest.approx(-0.055)
    assert found["accuracy, knn_top1"].ci95_high == pytest.approx(-0.045)


def test_a_report_is_no_worse_than_itself():
    found = check(whole_report(), whole_report(), *regression.QUANTITIES, allowed=0.2)
    assert {finding.status for finding in found.values()} == {Status.PASS}
    assert len(found) > len(regression.QUANTITIES)


HOST = sample_report().host
GPU = {"name": "Example GPU", "driver": "1", "memory_bytes": 1}
DATA = sample_report().data
SPEED = {"latency, batch 1", "compute, batch 8", "throughput, batch 1", "p50, batch 1", "memory"}
JUDGED = {"cosine", "patch-cosine", "accuracy, knn_top1"}
FILES = {"file-size"}
COUNTS = {"params", "flops"}


@pytest.mark.parametrize(
    ("changes", "says", "others"),
    [
        ({"model": "clip_b"}, "model: ", SPEED | JUDGED | FILES | COUNTS),
        ({"target": "torch"}, "target: ", SPEED | FILES),
        ({"image_size": 518}, "image size: 518 now, 224 then", SPEED | JUDGED | {"flops"}),
        ({"threads": 4}, "threads: 4 now, 2 then", SPEED),
        ({"device": "cuda"}, "device: cuda now, cpu then", SPEED),
        ({"host": {**HOST, "cpu": "Other"}}, "CPU: Other now, Example CPU", SPEED),
        ({"host": {**HOST, "cores_usable": 1}}, "usable cores: 1 now, 2 then", SPEED),
        ({"host": {**HOST, "gpus": [GPU]}}, "GPU or driver: Example GPU (driver 1) now", SPEED),
        ({"host": {**HOST, "board": "Orin"}}, "board: Orin now, unknown then", SPEED),
        ({"judged_on": "torch"}, "runtime that judged: torch now", JUDGED),
        (
            {"data": dataclasses.replace(DATA, eval=DATA.calib)},
            "evaluation images (sha256): bbbbbbbbbbbb now, cccccccccccc then",
            JUDGED,
        ),
        (
            {"data": dataclasses.replace(DATA, bank=DATA.calib)},
            "bank images (sha256)",
            {"accuracy, knn_top1"},
        ),
        (
            {"weights": dataclasses.replace(sample_report().weights, sha256="f" * 64)},
            "weights (sha256)",
            JUDGED,
        ),
        (
            {"telemetry": dataclasses.replace(sample_report().telemetry, power_mode="15W")},
            "power mode: 15W now, performance then",
            SPEED,
        ),
    ],
)
def test_only_like_is_compared_with_like(changes, says, others):
    everything = SPEED | JUDGED | FILES | COUNTS
    names = [name for name in regression.QUANTITIES if name != "cuda-graph"]
    found = check(sample_report(**changes), sample_report(), *names, allowed=0.2)
    for scope in everything:
        if scope in others:
            assert found[scope].status is Status.INCOMPARABLE, scope
            assert says in found[scope].reason
        else:
            assert found[scope].status is Status.PASS, scope


def test_another_clock_protocol_or_load_is_not_comparable():
    old = sample_report()
    timing = {k: dataclasses.replace(v, clock="CUDA events") for k, v in old.timing.items()}
    found = check(sample_report(timing=timing), old, "latency")["latency, batch 1"]
    assert "clock: CUDA events now, end to end then" in found.reason
    flights = {k: dataclasses.replace(v, in_flight=4) for k, v in old.throughput_timing.items()}
    found = check(sample_report(throughput_timing=flights), old, "throughput")
    assert "batches in flight: 4 now, 2 then" in found["throughput, batch 8"].reason
    tasks = {k: dataclasses.replace(v, protocol="another") for k, v in old.tasks.items()}
    found = check(sample_report(tasks=tasks), old, "accuracy")["accuracy, knn_top1"]
    assert found.status is Status.INCOMPARABLE
    assert "protocol: another now" in found.reason
    memory = replaced(old, "pruned", memory_batch_size=1)
    assert "batch size of memory" in check(memory, old, "memory")["memory"].reason
    unknown = sample_report(host={**HOST, "cpu": None})
    found = check(unknown, unknown, "memory")["memory"]
    assert found.status is Status.INCOMPARABLE
    assert "on which CPU" in found.reason


def test_what_one_report_has_not():
    old, new = sample_report(), bare_report()
    found = check(new, old)
    assert found["latency, batch 1"].status is Status.NOT_MEASURED
    assert found["accuracy, knn_top1"].status is Status.NOT_MEASURED
    assert found["cuda-graph"].status is Status.SKIPPED
    # Asked for by name, what is in neither report is no longer beside the point.
    assert check(new, old, "cuda-graph")["cuda-graph"].status is Status.NOT_MEASURED
    found = check(old, new)
    assert found["latency, batch 8"].status is Status.INCOMPARABLE
    assert "not in the old report: no reason but this test" in found["latency, batch 8"].reason
    fewer = with_ratio(old, latency={"1": old.ratio.latency["1"]})
    assert check(fewer, old)["latency, batch 8"].status is Status.NOT_MEASURED
    assert check(old, fewer)["latency, batch 8"].status is Status.INCOMPARABLE


def test_cosines_are_points_of_the_same_images_and_say_so():
    """Their intervals are about other images, and which were drawn is no part of the change."""
    old = sample_report(fidelity=few_images())
    for name in ("cosine", "patch-cosine"):
        found = check(old, old, name)[name]
        assert found.status is Status.PASS
        assert found.reason == "point values of the same 180 images in both reports"
        assert (found.ci95_low, found.ci95_high) == (None, None)
    no_patches = {"patch_cosine_p1": None, "patch_cosine_mean": None}
    new = sample_report(fidelity=fidelity(**no_patches, why=dict.fromkeys(no_patches, "has none")))
    assert check(new, old)["patch-cosine"].reason == "has none"
    assert check(new, new)["patch-cosine"].status is Status.SKIPPED


def test_a_task_that_was_left_out_is_no_reason_to_pass():
    whole = whole_report()
    tasks = dict.fromkeys(("knn_top1", "probe_top1"), whole.tasks["knn_top1"])
    same = Interval(value=0.0, ci95_low=-0.001, ci95_high=0.001)
    both = with_ratio(
        dataclasses.replace(whole, tasks=tasks), accuracy_difference=dict.fromkeys(tasks, same)
    )
    one = with_ratio(
        dataclasses.replace(whole, tasks_left_out={"probe": "one class"}),
        accuracy_difference={"knn_top1": same},
    )
    # Now left out, then there: under the metric's name, once.
    found = check(one, both, "accuracy")
    assert found.keys() == {"accuracy, knn_top1", "accuracy, probe_top1"}
    assert found["accuracy, knn_top1"].status is Status.PASS
    assert found["accuracy, probe_top1"].status is Status.NOT_MEASURED
    assert found["accuracy, probe_top1"].reason == "one class"
    # Now there, then left out.
    found = check(both, one, "accuracy")["accuracy, probe_top1"]
    assert found.status is Status.INCOMPARABLE
    assert found.reason == "not in the old report: one class"
    # In neither: passed over, unless accuracy was asked for by name.
    found = check(one, one)["accuracy, task probe"]
    assert (found.status, found.reason) == (Status.SKIPPED, "neither report has it: one class")
    found = check(one, one, "accuracy")["accuracy, task probe"]
    assert (found.status, found.reason) == (Status.NOT_MEASURED, "one class")
    # With no metric at all, each says its own reason.
    none = dataclasses.replace(bare_report(), tasks_left_out={"probe": "one class"})
    found = check(none, both, "accuracy")
    assert found["accuracy, probe_top1"].reason == "one class"
    assert found["accuracy, knn_top1"].reason == "no reason but this test"


def test_a_batch_size_that_was_not_timed_says_why():
    old = sample_report()
    fewer = with_ratio(
        sample_report(not_timed={"8": "too large"}), latency={"1": old.ratio.latency["1"]}
    )
    found = check(fewer, old, "latency")
    assert found["latency, batch 8"].status is Status.NOT_MEASURED
    assert found["latency, batch 8"].reason == "too large"
    assert check(old, fewer, "latency")["latency, batch 8"].reason == (
        "not in the old report: too large"
    )
    assert check(fewer, fewer)["latency, batch 8"].status is Status.SKIPPED
    assert check(fewer, fewer, "latency")["latency, batch 8"].status is Status.NOT_MEASURED


def test_a_change_has_the_ends_that_both_runs_give_it():
    def of(low, high):
        return Value(number=1.0, low=low, high=high, note="few" if None in (low, high) else "")

    whole, up, down = of(0.9, 1.2), of(None, 1.2), of(0.9, None)
    change = regression.difference(whole, whole)
    assert (change.low, change.high) == pytest.approx((-math.hypot(0.1, 0.2), math.hypot(0.2, 0.1)))
    for now, then, low, high in (
        (up, whole, None, math.hypot(0.2, 0.1)),
        (whole, down, None, math.hypot(0.2, 0.1)),
        (down, whole, -math.hypot(0.1, 0.2), None),
        (whole, up, -math.hypot(0.1, 0.2), None),
    ):
        change = regression.difference(now, then)
        assert change.low == (None if low is None else pytest.approx(low))
        assert change.high == (None if high is None else pytest.approx(high))
        assert not change.broken
        assert change.note == "few"
        assert regression.relative_change(now, then).broken is False
    # Nothing is left of the interval: it decides nothing, and is no point either.
    for now, then in ((up, up), (down, down), (whole, Value(number=1.0, note=POINT))):
        change = regression.difference(now, then)
        assert change.broken
        assert (change.low, change.high) == (None, None)


def test_changes_of_zero_or_nothing_have_no_ratio():
    now, then = Value(number=1.0, note=POINT), Value(number=0.0, note=POINT)
    change = regression.relative_change(now, then)
    assert change.number is None
    assert regression.relative_change(Value(number=math.nan), now).number is None
    assert regression.relative_change(
        Value(number=102.0, note=EXACT), Value(number=100.0, note=EXACT)
    ).number == pytest.approx(0.02)


def test_intervals_of_changes_cover_what_they_should():
    """Of two runs with a 95% interval each, 95 of 100 combined intervals hold the truth."""
    rng = np.random.default_rng(0)
    truth, sigma = (0.75, 0.78), (0.004, 0.007)
    held = 0
    for _ in range(4000):
        runs = []
        for ratio, spread in zip(truth, sigma, strict=True):
            seen = math.exp(rng.normal(math.log(ratio), spread))
            reach = math.exp(1.96 * spread)
            runs.append(Value(number=seen, low=seen / reach, high=seen * reach))
        change = regression.relative_change(*runs)
        held += change.low <= truth[0] / truth[1] - 1 <= change.high
    assert held / 4000 == pytest.approx(0.95, abs=0.012)


def test_more_samples_are_asked_for_in_both_runs():
    old, new = tight(sample_report(), latency=0.75), tight(sample_report(), latency=0.763)
    found = check(new, old, "latency")["latency, batch 1"]
    assert found.samples_to_settle > found.samples == 5
    assert "in each run would, as likely as not, settle it" in found.reason


def test_an_old_report_and_what_is_allowed_need_each_other():
    rule = parse_rule("max-params", ["1G"], where="x")
    with pytest.raises(ConfigError, match="need each other"):
        run_gate(sample_report(), GateConfig(rules=(rule,)), old=sample_report())
    with pytest.raises(ConfigError, match="need each other"):
        run_gate(sample_report(), GateConfig(rules=(rule,), max_regression=0.02))


def test_a_power_mode_that_is_unknown_is_no_difference():
    blind = dataclasses.replace(
        sample_report().telemetry,
        power_mode=None,
        clocks_mhz={"cpu": Spread(min=1.0, median=1.0, max=1.0)},
        why={"power_mode": "no sensor"},
    )
    found = check(sample_report(telemetry=blind), sample_report(), "memory")["memory"]
    assert found.status is Status.PASS


def never_decided():
    """Pairs of reports of which latency cannot be decided: whatever the numbers are."""
    good = sample_report()
    why = dict.fromkeys(("ci95_low", "ci95_high"), "9 pairs of timed calls")
    lost = Interval(value=2.0, ci95_low=None, ci95_high=None, why=why)
    slow = tight(good, latency=2.0)
    elsewhere = dataclasses.replace(slow, host={**HOST, "cpu": "Other"})
    return {
        "no interval now": (with_ratio(good, latency={"1": lost}), tight(good, latency=0.75)),
        "no interval then": (slow, with_ratio(good, latency={"1": lost})),
        "another machine": (elsewhere, tight(good, latency=0.75)),
        "not in the old report": (slow, with_ratio(good, latency={})),
        "no ratio of zero": (
            slow,
            with_ratio(good, latency={"1": Interval(value=0.0, ci95_low=0.0, ci95_high=0.0)}),
        ),
    }


@pytest.mark.parametrize("name", never_decided())
def test_what_was_never_decided_is_not_let_through_as_undecided(name):
    new, old = never_decided()[name]
    config = GateConfig(max_regression=0.02, regression_of=("latency",), undecided_passes=True)
    decision = run_gate(new, config, old=old)
    assert not decision.passed
    assert {f.status for f in decision.findings} <= {Status.NOT_MEASURED, Status.INCOMPARABLE}


@pytest.mark.parametrize("what", ["precision", "runtime", "power mode"])
def test_speed_of_another_precision_runtime_or_power_mode_is_not_compared(what):
    packages = {**HOST["packages"], "onnxruntime": "1.23.0"}
    old = sample_report(host={**HOST, "packages": packages})
    found = check(other_speed(what), old, "latency", "compute", "throughput", "params", allowed=0.2)
    assert found.pop("params").status is Status.PASS
    assert len(found) == 6
    for finding in found.values():
        assert finding.status is Status.INCOMPARABLE
        assert f"{what}: " in finding.reason


def test_remarks_behind_the_protocol_are_no_other_protocol():
    def remarked(text):
        tasks = {k: dataclasses.replace(v, protocol=text) for k, v in sample_report().tasks.items()}
        return sample_report(tasks=tasks)

    old = remarked("k-NN, k = 20. 3 images were skipped.")
    for text, expected in (
        ("k-NN, k = 20. 5 images were skipped.", Status.PASS),
        ("k-NN, k = 10. 3 images were skipped.", Status.INCOMPARABLE),
    ):
        found = check(remarked(text), old, "accuracy", allowed=0.2)["accuracy, knn_top1"]
        assert found.status is expected
