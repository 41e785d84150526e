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
from tests.report.samples import bare_report, engine_report, sample_report, whole_report, with_ratio


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
    "min-cosine-p1": ("0.95", "0.98"),
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
