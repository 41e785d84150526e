"""report.json: nothing is lost on the way, and what is wrong is refused with its place."""

from __future__ import annotations

import dataclasses
import json

import pytest

from ampdeploy.errors import ArtifactError
from ampdeploy.report.codec import to_plain
from ampdeploy.report.result import Interval, Report, unmeasured
from tests.report.samples import NO_METER, bare_report, measured, sample_report


@pytest.mark.parametrize("report", [sample_report(), bare_report()], ids=["full", "bare"])
def test_round_trip(report, tmp_path):
    assert Report.from_json(report.to_json()) == report
    report.write(tmp_path / "report.json")
    assert Report.read(tmp_path / "report.json") == report


def test_contract_keys():
    data = json.loads(sample_report().to_json())
    assert data["schema_version"] == 6
    assert {"model", "target", "host", "baseline", "pruned", "fidelity", "ratio"} <= set(data)
    latency = data["pruned"]["latency_ms"]["8"]
    assert {"p50", "p90", "p99", "mean", "n"} <= set(latency)
    assert data["pruned"]["energy_j_per_image"] is None
    assert data["pruned"]["why"]["energy_j_per_image"] == NO_METER
    assert data["ratio"]["latency"]["1"] == {
        "value": 0.75,
        "ci95_low": 0.741,
        "ci95_high": 0.762,
        "why": {},
    }


def _paths(data, path=()):
    """The path of every key of every typed object; free-form maps are left out."""
    free = {"host", "why", "latency_ms", "throughput_img_s", "accuracy", "latency", "timing"}
    free |= {"compute_ms", "compute", "throughput", "throughput_timing", "tasks"}
    free |= {"clocks_mhz", "temperature_c", "intervals"}
    free |= {
        "accuracy_difference",
        "asked",
        "skipped",
        "max_abs_diff",
        "min_cosine",
        "stages_seconds",
    }
    for key, value in data.items():
        yield (*path, key)
        if isinstance(value, dict) and key not in free:
            yield from _paths(value, (*path, key))


ALL_KEYS = list(_paths(json.loads(sample_report().to_json())))


@pytest.mark.parametrize("path", ALL_KEYS, ids=".".join)
def test_every_missing_key_is_refused_by_name(path):
    data = json.loads(sample_report().to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    del inner[path[-1]]
    with pytest.raises(ArtifactError, match=path[-1].replace("schema_version", "schema version")):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize(
    ("path", "value", "seen"),
    [
        (("baseline", "params"), "many", r"report\.json\.baseline\.params is 'many', not int"),
        (("baseline", "params"), True, "is True, not int"),
        (("pruned", "latency_ms", "8", "p50"), None, r"latency_ms\.8\.p50 is None, not float"),
        (("method", "widths"), {}, "not list"),
        (("fidelity", "cosine"), 1, "unknown keys 'cosine'"),
        (("pruned", "why"), {}, "energy_j_per_image, energy is null without a why"),
        (("schema_version",), 99, "schema version 99"),
    ],
)
def test_wrong_values_are_refused_with_their_place(path, value, seen):
    data = json.loads(sample_report().to_json())
    inner = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    with pytest.raises(ArtifactError, match=seen):
        Report.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_text_that_is_no_report_is_refused(text):
    with pytest.raises(ArtifactError, match=r"report\.json"):
        Report.from_json(text)


def test_integers_are_accepted_for_floats_as_json_writers_drop_the_point():
    text = sample_report().to_json().replace('"value": 0.75,', '"value": 1,')
    ratio = Report.from_json(text).ratio.latency
    assert ratio is not None
    assert isinstance(ratio["1"].value, float)


def test_null_needs_a_reason():
    with pytest.raises(ValueError, match="ci95_low, ci95_high is null without a why"):
        Interval(value=1.0, ci95_low=None, ci95_high=None)


@pytest.mark.parametrize("reason", [None, "", " ", 3])
def test_a_reason_that_says_nothing_is_none(reason):
    why = {"ci95_low": "9 pairs", "ci95_high": reason}
    with pytest.raises(ValueError, match="why ci95_high is null is"):
        Interval(value=1.0, ci95_low=None, ci95_high=None, why=why)


def test_nan_is_not_written():
    with pytest.raises(ValueError, match="nan"):
        to_plain(Interval(value=float("nan"), ci95_low=0.0, ci95_high=1.0))


def test_ratios_are_pruned_over_baseline():
    ratio = sample_report().ratio
    for value in (ratio.params, ratio.flops, ratio.file_bytes, ratio.memory):
        assert value == pytest.approx(0.75)


def test_memory_ratio_is_null_with_the_models_own_reason():
    whole = measured(1.0)
    gone = dataclasses.replace(
        whole, memory_bytes=None, why={**whole.why, "memory_bytes": "on a GPU"}
    )
    assert bare_report().ratio.why["memory"] == "no reason but this test"
    report = dataclasses.replace(sample_report(), pruned=gone)
    assert ("pruned.memory_bytes", "on a GPU") in unmeasured(report)


def test_unmeasured_lists_every_null_once():
    names = [name for name, _ in unmeasured(sample_report())]
    of_a_model = [
        "latency_ms[1].p99",
        "latency_ms[8].p99",
        "compute_ms[1].p99",
        "compute_ms[8].p99",
        "cuda_graph_compute_ms",
        "energy_j_per_image",
        "energy",
    ]
    assert names == [
        "precision",
        "engine",
        *(f"{role}.{name}" for role in ("baseline", "pruned") for name in of_a_model),
        "ratio.cuda_graph_compute",
        "ratio.energy",
        "cuda_graph_timing",
    ]
