"""Values that nothing measures are refused by the gate and by --check, with their place."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ampdeploy.cli import main
from ampdeploy.errors import ArtifactError
from ampdeploy.report.consistent import problems
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

BATCH_1 = {"value": 0.1, "ci95_low": 0.1, "ci95_high": 0.1, "why": {}}
LOW_ONLY = {"value": 0.75, "ci95_low": 0.8, "ci95_high": None, "why": {"ci95_high": "few"}}
HIGH_ONLY = {"value": 0.75, "ci95_low": None, "ci95_high": 0.7, "why": {"ci95_low": "few"}}
EXPLAINED_AWAY = {
    "value": 0.75, "ci95_low": None, "ci95_high": 0.8, "why": {"ci95_low": "few", "ci95_high": "x"},
}  # fmt: skip


@pytest.mark.parametrize("make", [sample_report, engine_report, bare_report, whole_report])
def test_what_was_measured_is_consistent(make):
    assert list(problems(make())) == []


def without_compute(report):
    """As `ort-cuda` gives it: calls are timed, and the device's part of them is not known."""
    why = {"compute_ms": "no clock"}
    models = {
        role: dataclasses.replace(
            getattr(report, role), compute_ms=None, why={**getattr(report, role).why, **why}
        )
        for role in ("baseline", "pruned")
    }
    why = {**report.ratio.why, "compute": "no clock"}
    return dataclasses.replace(
        report, **models, ratio=dataclasses.replace(report.ratio, compute=None, why=why)
    )


def test_a_runtime_may_have_no_clock_for_compute():
    assert list(problems(without_compute(whole_report()))) == []


def test_compute_is_of_the_batch_sizes_of_latency():
    report = whole_report()
    fewer = {
        role: dataclasses.replace(
            getattr(report, role), compute_ms={"1": getattr(report, role).compute_ms["1"]}
        )
        for role in ("baseline", "pruned")
    }
    ratio = dataclasses.replace(report.ratio, compute={"1": report.ratio.compute["1"]})
    found = list(problems(dataclasses.replace(report, **fewer, ratio=ratio)))
    assert found == [("ratio.compute", "has 1; ratio.latency has 1, 8")]


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("pruned.params", -1, "pruned.params is -1, not more than 0"),
        ("pruned.flops", 0, "pruned.flops is 0"),
        ("pruned.file_bytes", -5, "pruned.file_bytes is -5"),
        ("ratio.file_bytes", -0.5, "ratio.file_bytes is -0.5"),
        ("fidelity.cosine_p1", 1.2, "fidelity.cosine_p1 is 1.2, not from -1 to 1"),
        ("fidelity.patch_cosine_mean", -7.0, "patch_cosine_mean is -7.0"),
        ("fidelity.images", 0, "fidelity.images is 0, not more than 0"),
        ("data.eval.images", 0, "data.eval.images is 0"),
        ("pruned.accuracy.knn_top1", 57.0, "knn_top1 is 57.0, not from 0 to 1"),
        ("pruned.memory_bytes", -1, "pruned.memory_bytes is -1, not at least 0"),
        ("pruned.energy_j_per_image", -1.0, "energy_j_per_image is -1.0"),
        ("ratio.energy", -1.0, "ratio.energy is -1.0"),
        ("ratio.latency.1.value", 3.0, "ratio.latency.1 is 3.0 with the interval [0.741, 0.762]"),
        ("ratio.latency.1.ci95_low", 0.9, "ratio.latency.1 is 0.75 with the interval [0.9, 0.762]"),
        ("ratio.latency.1.ci95_low", -0.9, "ratio.latency.1.ci95_low is -0.9, not more than 0"),
        ("ratio.latency.32", BATCH_1, "baseline.latency_ms has 1, 8; ratio.latency has 1, 8, 32"),
        ("pruned.latency_ms.1.p50", -3.0, "pruned.latency_ms.1"),
        ("pruned.latency_ms.1.p90", 1.0, "has min 60.75, p50 67.5, p90 1.0"),
        ("pruned.latency_ms.1.n", 0, "pruned.latency_ms.1.n is 0"),
        ("pruned.throughput_img_s.8", 0.0, "pruned.throughput_img_s.8 is 0.0"),
        ("timing.1.pairs", -40, "timing.1.pairs is -40"),
        ("ratio.accuracy_difference.knn_top1.ci95_high", 3.0, "ci95_high is 3.0, not from -1 to 1"),
        ("engine.pruned.test.cosine_p1.1.features", 2.0, "cosine_p1.1.features is 2.0"),
        ("precision.pruned.bar_cosine_p1", -3.0, "precision.pruned.bar_cosine_p1 is -3.0"),
        ("method.widths.1.kept", 2000, "method.widths[1] keeps 2000 of 1536 neurons"),
        ("not_timed.x", "why", "not_timed has 'x', which is no batch size"),
        ("tasks_left_out.probes", "one class", "tasks_left_out has 'probes', which is no task"),
        ("tasks_left_out.probe", " ", "tasks_left_out.probe has no reason"),
        ("tasks_left_out.knn", "one class", "tasks_left_out has knn, which gave knn_top1"),
        ("fidelity.intervals.cosine_p1.ci95_low", -3.0, "intervals.cosine_p1.ci95_low is -3.0"),
        ("fidelity.intervals.knn_agreement.ci95_high", 1.5, "ci95_high is 1.5, not from 0 to 1"),
        ("fidelity.intervals.cosine_p1.value", 0.952, "is of 0.952; cosine_p1 is 0.9512"),
        ("fidelity.intervals.cosine_min", BATCH_1, "fidelity.intervals has cosine_mean, cosine_p1"),
        ("fidelity.intervals", {}, "fidelity.intervals has nothing; measured are cosine_mean, "),
        ("ratio.latency.1", LOW_ONLY, "is 0.75, beyond the only end of its interval, 0.8"),
        ("ratio.latency.1", HIGH_ONLY, "is 0.75, beyond the only end of its interval, 0.7"),
        ("ratio.latency.1", EXPLAINED_AWAY, "has ci95_high 0.8, and a reason for having none: 'x'"),
    ],
)
def test_what_nothing_measures_is_refused_with_place_and_value(
    path, value, says, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    data = json.loads(whole_report().to_json())
    inner = data
    *parents, last = path.split(".")
    for key in parents:
        inner = inner[int(key)] if isinstance(inner, list) else inner[key]
    inner[last] = value
    good, bad = tmp_path / "good.json", tmp_path / "bad.json"
    whole_report().write(good)
    bad.write_text(json.dumps(data))
    against = ("--baseline-report", str(bad), "--max-regression", "2%")
    for arguments in (
        ("gate", str(bad), "--max-params", "1G"),
        ("gate", str(good), *against),
        ("report", str(bad), "--check"),
    ):
        assert main([*arguments]) == 1
        found = " ".join(capsys.readouterr().err.split())
        assert "bad.json" in found
        assert says in found.replace(": is ", " is ").replace(": has ", " has ").replace(
            ": keeps ", " keeps "
        )


def test_one_end_alone_is_no_damage_where_it_is_explained():
    assert list(problems(sample_report(fidelity=few_images()))) == []
    data = json.loads(sample_report(fidelity=few_images()).to_json())
    data["fidelity"]["intervals"]["cosine_p1"]["why"] = {}
    with pytest.raises(ArtifactError, match="ci95_low is null without a why"):
        Report.from_json(json.dumps(data))
    for value, low, high in ((0.75, 0.7, None), (0.75, None, 0.75), (0.75, 0.75, None)):
        why = {"ci95_low" if low is None else "ci95_high": "few"}
        ratio = Interval(value=value, ci95_low=low, ci95_high=high, why=why)
        report = sample_report()
        both = with_ratio(report, latency={**report.ratio.latency, "1": ratio})
        assert list(problems(both)) == []


def test_what_was_not_measured_needs_no_interval():
    none = dict.fromkeys(("patch_cosine_mean", "patch_cosine_p1", "knn_agreement"))
    found = fidelity(**none, why=dict.fromkeys(none, "no patches"))
    assert list(problems(sample_report(fidelity=found))) == []
    spare = dataclasses.replace(found, intervals=fidelity().intervals)
    assert [place for place, _ in problems(sample_report(fidelity=spare))] == ["fidelity.intervals"]


def test_rounding_is_no_damage():
    data = json.loads(whole_report().to_json())
    data["fidelity"]["cosine_mean"] = 1.0000001
    whole = {"value": 1.0000001, "ci95_low": 1.0, "ci95_high": 1.0000001, "why": {}}
    data["fidelity"]["intervals"]["cosine_mean"] = whole
    same = {"value": 1.0, "ci95_low": 1.0000001, "ci95_high": 1.0000001, "why": {}}
    data["ratio"]["latency"]["1"] = same
    assert list(problems(type(whole_report()).from_json(json.dumps(data)))) == []
