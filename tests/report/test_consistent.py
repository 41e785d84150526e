"""Values that nothing measures are refused by the gate and by --check, with their place."""

from __future__ import annotations

import json

import pytest

from ampdeploy.cli import main
from ampdeploy.report.consistent import problems
from tests.report.samples import bare_report, engine_report, sample_report, whole_report

BATCH_1 = {"value": 0.1, "ci95_low": 0.1, "ci95_high": 0.1, "why": {}}


@pytest.mark.parametrize("make", [sample_report, engine_report, bare_report, whole_report])
def test_what_was_measured_is_consistent(make):
    assert list(problems(make())) == []


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


def test_rounding_is_no_damage():
    data = json.loads(whole_report().to_json())
    data["fidelity"]["cosine_mean"] = 1.0000001
    same = {"value": 1.0, "ci95_low": 1.0000001, "ci95_high": 1.0000001, "why": {}}
    data["ratio"]["latency"]["1"] = same
    assert list(problems(type(whole_report()).from_json(json.dumps(data)))) == []
