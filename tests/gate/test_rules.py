"""Rules on a whole report."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from ampdeploy.errors import ArtifactError, ConfigError, UnknownNameError
from ampdeploy.gate import require
from ampdeploy.gate.finding import Status
from ampdeploy.gate.rules import KINDS, parse_rule
from ampdeploy.report.result import Interval, Report
from tests.report.samples import (
    bare_report,
    engine_report,
    few_images,
    fidelity,
    sample_report,
    whole_report,
    with_ratio,
)


def check(name, *texts, report=None):
    return parse_rule(name, texts, where=f"--{name}").check(report or sample_report())


def statuses(findings):
    return {finding.scope: finding.status for finding in findings}


# Of `whole_report`: a limit that passes and one that fails.
LIMITS = {
    "max-latency-ratio": ("0.8", "0.7"),
    "max-compute-ratio": ("0.8", "0.7"),
    "max-cuda-graph-ratio": ("0.8", "0.7"),
    "min-throughput-ratio": ("1.2", "1.4"),
    "max-p50-ms": ("600", "60"),
    "max-p90-ms": ("0.7s", "70"),
    "max-p99-ms": ("2s", "100"),
    "max-compute-p50-ms": ("600", "60"),
    "max-compute-p99-ms": ("2s", "100"),
    "min-throughput": ("10", "20"),
    "max-params": ("17M", "16e6"),
    "min-params-cut": ("25%", "0.26"),
    "max-flops": ("10G", "9G"),
    "min-flops-cut": ("25%", "26%"),
    "max-file-size": ("67MB", "60MiB"),
    "max-file-ratio": ("0.76", "0.7"),
    "max-memory": ("200MB", "100MB"),
    "max-memory-ratio": ("0.76", "0.7"),
    "max-energy": ("0.5J", "499mJ"),
    "max-energy-ratio": ("1", "0.99"),
    "min-cosine-mean": ("0.98", "0.99"),
    "min-cosine-p1": ("0.94", "0.98"),
    "min-cosine-min": ("0.93", "0.95"),
    "min-patch-cosine-mean": ("0.97", "0.98"),
    "min-patch-cosine-p1": ("0.9", "0.95"),
    "min-knn-agreement": ("80%", "0.9"),
    "max-accuracy-drop": ("3", "-"),
    "min-accuracy": ("50%", "60%"),
}


@pytest.mark.parametrize("name", KINDS)
def test_every_rule_passes_and_fails(name):
    passing, failing = LIMITS[name]
    found = check(name, passing, report=whole_report())
    assert {f.status for f in found} == {Status.PASS}
    if failing != "-":  # its interval begins below 0, where no limit is
        assert Status.FAIL in {f.status for f in check(name, failing, report=whole_report())}


@pytest.mark.parametrize("name", KINDS)
def test_every_null_fails_with_its_reason(name):
    found = check(name, LIMITS[name][0], report=bare_report())
    nullable = name not in (
        "max-params", "min-params-cut", "max-flops", "min-flops-cut", "max-file-size",
        "max-file-ratio",
    )  # fmt: skip
    if nullable:
        assert [f.status for f in found] == [Status.NOT_MEASURED]
        assert found[0].reason == "no reason but this test"


def test_a_real_drop_in_accuracy_fails():
    drop = Interval(value=-0.05, ci95_low=-0.07, ci95_high=-0.03)
    report = with_ratio(sample_report(), accuracy_difference={"knn_top1": drop})
    assert statuses(check("max-accuracy-drop", "2", report=report)) == {"knn_top1": Status.FAIL}
    assert statuses(check("max-accuracy-drop", "4", report=report)) == {
        "knn_top1": Status.UNDECIDED
    }
    (found,) = check("max-accuracy-drop", "7pp", report=report)
    assert found.status is Status.PASS
    assert (found.value, found.ci95_low, found.ci95_high) == (0.05, 0.03, 0.07)
    (found,) = check("max-accuracy-drop", "6", report=report)
    # 0.02 of reach to 0.01: four times the 256 images.
    assert found.samples_to_settle == pytest.approx(1024, abs=1)


def test_a_percentile_of_few_images_fails_or_is_undecided_and_never_passes():
    report = sample_report(fidelity=few_images())  # 0.9512 [-, 0.9532]
    for limit, expected in (
        ("-1", Status.UNDECIDED),
        ("0.5", Status.UNDECIDED),
        ("0.9512", Status.UNDECIDED),
        ("0.953", Status.UNDECIDED),
        ("0.9533", Status.FAIL),
    ):
        (found,) = check("min-cosine-p1", limit, report=report)
        assert found.status is expected, limit
        assert found.measured == "0.9512 [–, 0.9532]"
        assert (found.value, found.ci95_low, found.samples) == (0.9512, None, 180)
    (found,) = check("min-cosine-p1", "0.5", report=report)
    assert "180 images; about 368 would give the lower end" in found.reason
    # The mean of as many images has both ends.
    (found,) = check("min-cosine-mean", "0.97", report=report)
    assert found.status is Status.PASS


@pytest.mark.parametrize(
    ("name", "within", "inside", "beyond"),
    [
        ("min-cosine-mean", "0.983", "0.984", "0.99"),
        ("min-cosine-p1", "0.947", "0.95", "0.954"),
        ("min-patch-cosine-mean", "0.971", "0.975", "0.978"),
        ("min-patch-cosine-p1", "0.908", "0.912", "0.915"),
        ("min-knn-agreement", "82%", "83%", "83.5%"),
    ],
)
def test_fidelity_is_decided_by_its_interval(name, within, inside, beyond):
    statuses = [check(name, limit)[0].status for limit in (within, inside, beyond)]
    assert statuses == [Status.PASS, Status.UNDECIDED, Status.FAIL]
    (found,) = check(name, inside)
    assert found.samples == 256
    assert "images" in found.reason


def test_the_smallest_cosine_decides_as_it_is():
    (found,) = check("min-cosine-min", "0.9333")
    assert found.status is Status.PASS
    assert found.reason == "point value, no interval; 256 images"


def test_fidelity_without_its_interval_decides_nothing():
    why = dict.fromkeys(("ci95_low", "ci95_high"), "17 images; an interval needs 20")
    lost = Interval(value=0.9871, ci95_low=None, ci95_high=None, why=why)
    whole = fidelity()
    few = dataclasses.replace(whole, intervals={**whole.intervals, "cosine_mean": lost})
    (found,) = check("min-cosine-mean", "0.1", report=sample_report(fidelity=few))
    assert found.status is Status.NOT_MEASURED
    assert found.reason == "no interval: 17 images; an interval needs 20"
    gone = dataclasses.replace(whole, intervals={})
    (found,) = check("min-cosine-mean", "0.1", report=sample_report(fidelity=gone))
    assert found.status is Status.NOT_MEASURED


def test_a_limit_holds_for_all_batch_sizes_or_for_one():
    assert statuses(check("max-latency-ratio", "0.77")) == {
        "batch 1": Status.PASS,
        "batch 8": Status.PASS,
    }
    assert statuses(check("max-latency-ratio", "8=0.73")) == {"batch 8": Status.FAIL}
    mixed = statuses(check("max-latency-ratio", "0.77", "8=0.73"))
    assert mixed == {"batch 8": Status.FAIL, "batch 1": Status.PASS}
    assert mixed == statuses(check("max-latency-ratio", "all=0.77", "8=0.73"))


def test_a_batch_size_that_was_not_timed_fails():
    (found,) = check("max-latency-ratio", "32=0.8")
    assert found.status is Status.NOT_MEASURED
    assert "batch sizes 1, 8" in found.reason
    report = sample_report(not_timed={"32": "the engine takes 1 to 8"})
    (found,) = check("max-latency-ratio", "32=0.8", report=report)
    assert found.reason == "the engine takes 1 to 8"
    (found,) = check("max-accuracy-drop", "knn_top5=1")
    assert found.status is Status.NOT_MEASURED


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.scope == "batch"])
def test_a_batch_size_that_was_asked_for_and_not_timed_fails_the_rule_for_all(name):
    report = dataclasses.replace(whole_report(), not_timed={"32": "the engine takes 1 to 8"})
    found = {finding.scope: finding for finding in check(name, LIMITS[name][0], report=report)}
    assert found["batch 32"].status is Status.NOT_MEASURED
    assert found["batch 32"].reason == "the engine takes 1 to 8"
    assert {f.status for s, f in found.items() if s != "batch 32"} == {Status.PASS}
    # One that is named does not speak of the others.
    assert set(statuses(check(name, f"8={LIMITS[name][0]}", report=report))) == {"batch 8"}


@pytest.mark.parametrize("name", ["max-accuracy-drop", "min-accuracy"])
def test_a_task_that_was_asked_for_and_left_out_fails_the_rule_for_all(name):
    limit = LIMITS[name][0]
    left_out = {"retrieval": "no image has another one of its class", "probe": "one class"}
    report = sample_report(tasks_left_out=left_out)
    found = {finding.scope: finding for finding in check(name, limit, report=report)}
    assert found.keys() == {"knn_top1", "task retrieval", "task probe"}
    assert found["knn_top1"].status is Status.PASS
    for task, why in left_out.items():
        assert found[f"task {task}"].status is Status.NOT_MEASURED
        assert found[f"task {task}"].reason == why
    # One that is named does not speak of the others.
    assert statuses(check(name, f"knn_top1={limit}", report=report)) == {"knn_top1": Status.PASS}
    # Named by any of its metrics or by itself, it says why; and once, beside a limit for all.
    for key in ("retrieval_map_r", "retrieval_recall1", "retrieval"):
        (finding,) = check(name, f"{key}={limit}", report=report)
        assert (finding.status, finding.reason) == (Status.NOT_MEASURED, left_out["retrieval"])
    both = check(name, limit, f"retrieval={limit}", report=report)
    assert [finding.scope for finding in both].count("task retrieval") == 1
    (finding,) = check(name, f"supervised_top1={limit}", report=report)
    assert finding.reason == "the report has the metrics knn_top1"


def test_where_no_task_gave_a_metric_each_has_its_reason():
    left_out = {"retrieval": "no other of its class", "probe": "one class"}
    report = dataclasses.replace(bare_report(), tasks_left_out=left_out)
    (found,) = check("min-accuracy", "50%", report=report)
    assert (found.status, found.reason) == (Status.NOT_MEASURED, "no reason but this test")
    found = check("min-accuracy", "probe_top1=50%", "knn_top1=50%", report=report)
    assert [finding.reason for finding in found] == ["one class", "no reason but this test"]


def test_a_batch_size_is_no_task_and_a_task_no_batch_size():
    report = sample_report(not_timed={"32": "too large"}, tasks_left_out={"probe": "one class"})
    assert "32" not in {f.scope for f in check("min-accuracy", "50%", report=report)}
    scopes = {f.scope for f in check("max-latency-ratio", "0.8", report=report)}
    assert scopes == {"batch 1", "batch 8", "batch 32"}


def test_no_batch_size_at_all_does_not_pass():
    report = with_ratio(sample_report(not_timed={"8": "too large"}), latency={})
    (found,) = check("max-latency-ratio", "0.8", report=report)
    assert found.status is Status.NOT_MEASURED
    assert "too large" in found.reason


def test_an_interval_that_is_missing_decides_nothing():
    why = dict.fromkeys(("ci95_low", "ci95_high"), "9 pairs of timed calls")
    ratio = Interval(value=0.5, ci95_low=None, ci95_high=None, why=why)
    report = with_ratio(sample_report(), latency={"1": ratio})
    (found,) = check("max-latency-ratio", "0.8", report=report)
    assert found.status is Status.NOT_MEASURED
    assert "9 pairs" in found.reason


def test_shares_that_are_met_exactly_pass():
    model = sample_report()
    for percent in range(1, 100):
        report = dataclasses.replace(
            model,
            baseline=dataclasses.replace(model.baseline, params=1000),
            pruned=dataclasses.replace(model.pruned, params=1000 - 10 * percent),
        )
        (found,) = check("min-params-cut", f"{percent}%", report=report)
        assert found.status is Status.PASS, percent


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("max-params", "many", "14e6 or 14M"),
        ("max-params", "", "is no limit"),
        ("max-params", "0", "not 0"),
        ("max-params", "-3", "out of range"),
        ("max-params", "nan", "is no limit"),
        ("max-params", "inf", "is no limit"),
        ("max-params", "1e999", "out of range"),
        ("max-params", "1e999999999", "is no limit"),
        ("max-params", "8=3", "has one limit"),
        ("max-latency-ratio", "75%", "Write it like 0.75"),
        ("max-latency-ratio", "8=", "is no limit"),
        ("max-latency-ratio", "=0.7", "is no batch size"),
        ("max-latency-ratio", "0=0.7", "is no batch size"),
        ("max-latency-ratio", "x=0.7", "is no batch size"),
        ("max-accuracy-drop", "=1", "names nothing"),
        ("max-accuracy-drop", "101", "out of range"),
        ("min-params-cut", "30", "2% or 0.02"),
        ("min-cosine-p1", "1.1", "out of range"),
        ("max-file-size", "60 parsecs", "Write it like 60MB"),
    ],
)
def test_limits_that_are_none_are_refused(name, text, says):
    with pytest.raises(ConfigError, match=says) as refused:
        parse_rule(name, [text], where=f"--{name}")
    assert refused.value.exit_code == 2


def test_two_limits_for_one_thing_are_refused():
    for texts in (["0.7", "0.8"], ["8=0.7", "08=0.8"]):
        with pytest.raises(ConfigError, match="second limit"):
            parse_rule("max-latency-ratio", texts, where="x")


def test_an_unknown_rule_names_the_nearest():
    with pytest.raises(UnknownNameError, match="max-latency-ratio"):
        parse_rule("max-latncy-ratio", ["1"], where="x")


def required(name, report):
    (found,) = require.check((name,), report)
    return found


@pytest.mark.parametrize("name", require.REQUIREMENTS)
def test_requirements_are_met_by_a_whole_report_and_not_by_a_bare_one(name):
    assert required(name, whole_report()).status is Status.PASS
    found = required(name, bare_report())
    assert found.status is Status.NOT_MEASURED
    assert found.reason == "no reason but this test"


def test_an_engine_below_its_bar_or_untested_is_not_tested():
    report = engine_report()
    engine = report.engine["pruned"]

    def with_test(**changes):
        test = dataclasses.replace(engine.test, **changes)
        return engine_report(
            engine={"baseline": engine, "pruned": dataclasses.replace(engine, test=test)}
        )

    low = {"1": {"features": 0.9999}, "8": {"features": 0.9}}
    found = required("engine-tested", with_test(cosine_p1=low))
    assert found.status is Status.FAIL
    assert "batch 8" in found.reason
    for nothing in ({}, {"1": {}}, {"1": {"features": math.nan}}):
        assert required("engine-tested", with_test(cosine_p1=nothing)).status is Status.FAIL
    untested = dataclasses.replace(engine, test=None, why={"test": "no such GPU"})
    found = required("engine-tested", engine_report(engine={"pruned": untested}))
    assert (found.status, found.reason) == (Status.NOT_MEASURED, "pruned engine: no such GPU")


def test_a_proof_below_its_bar_is_none():
    proof = engine_report().precision["pruned"]
    below = dataclasses.replace(proof, cosine_p1={"features": 0.99})
    report = engine_report(precision={"baseline": proof, "pruned": below})
    assert required("precision-proven", report).status is Status.FAIL


def test_unsettled_throttled_and_capped_runs_fail():
    report = sample_report()
    timing = report.timing["8"]
    unsettled = {**report.timing, "8": dataclasses.replace(timing, warmup_stable=False)}
    assert "batch 8" in required("warm-up-settled", sample_report(timing=unsettled)).reason
    graphs = sample_report(cuda_graph_timing=unsettled, why=report.why)
    assert required("warm-up-settled", graphs).status is Status.FAIL
    capped = {**report.timing, "8": dataclasses.replace(timing, capped=True)}
    assert required("all-timed", sample_report(timing=capped)).status is Status.FAIL
    skipped = sample_report(not_timed={"32": "too large"})
    assert required("all-timed", skipped).status is Status.NOT_MEASURED
    hot = dataclasses.replace(report.telemetry, throttled=("thermal",))
    assert "thermal" in required("no-throttling", sample_report(telemetry=hot)).reason
    blind = dataclasses.replace(report.telemetry, throttled=None, why={"throttled": "no sensor"})
    found = required("no-throttling", sample_report(telemetry=blind))
    assert (found.status, found.reason) == (Status.NOT_MEASURED, "no sensor")


def test_a_report_with_nan_is_refused_not_passed():
    data = json.loads(sample_report().to_json())
    data["fidelity"]["cosine_p1"] = math.nan
    report = Report.from_json(json.dumps(data))
    with pytest.raises(ArtifactError, match="damaged"):
        check("min-cosine-p1", "0.1", report=report)
