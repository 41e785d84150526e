"""Comparing runs: ranks follow intervals, and what was measured differently is never ranked."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from ampdeploy.bench.host import PACKAGES
from ampdeploy.errors import ConfigError
from ampdeploy.report.compare import (
    compare,
    not_comparable,
    render_html,
    render_markdown,
    run_names,
    to_plain,
)
from ampdeploy.report.conditions import timed_with
from ampdeploy.report.result import Interval, Report
from ampdeploy.report.terminal import comparison_notes, comparison_table
from ampdeploy.targets.base import target_names as all_targets
from tests.report.samples import (
    bare_report,
    engine_report,
    fidelity,
    sample_report,
    timing,
    with_ratio,
)
from tests.report.test_html import Page
from tests.report.test_markdown import table_after


def entries(name, **reports: Report):
    """The entries of one metric, by run."""
    found = [metric for metric in compare(reports).metrics if metric.name == name]
    assert len(found) == 1
    return {entry.run: entry for entry in found[0].entries}


def ranks(name, **reports: Report):
    return {run: entry.rank for run, entry in entries(name, **reports).items()}


def with_latency(low, value, high, **changes):
    ratio = {"1": Interval(value=value, ci95_low=low, ci95_high=high)}
    return with_ratio(sample_report(**changes), latency=ratio)


def test_ranks_follow_intervals():
    found = ranks(
        "Latency ratio, batch 1",
        a=with_latency(0.74, 0.75, 0.76),
        b=with_latency(0.745, 0.755, 0.765),  # cannot be told from a
        c=with_latency(0.80, 0.81, 0.82),
        d=with_latency(0.60, 0.61, 0.62),
    )
    assert found == {"a": 2, "b": 2, "c": 4, "d": 1}


def judged(low, value, high):
    """A report whose p1 has such an interval, with ends that may be open."""
    ends = {"ci95_low": low, "ci95_high": high}
    why = {name: "few images" for name, end in ends.items() if end is None}
    whole = fidelity(cosine_p1=value)
    p1 = Interval(value=value, **ends, why=why)
    return sample_report(
        fidelity=dataclasses.replace(whole, intervals={**whole.intervals, "cosine_p1": p1})
    )


def test_cosines_are_ranked_by_their_intervals():
    several = {
        "a": judged(0.90, 0.91, 0.92),
        "b": judged(0.915, 0.93, 0.94),  # cannot be told from a
        "c": judged(0.95, 0.96, 0.97),
    }
    assert ranks("Feature cosine, p1", **several) == {"a": 2, "b": 2, "c": 1}
    found = entries("Feature cosine, p1", **several)["a"]
    assert found.shown == "0.9100 [0.9000, 0.9200]"
    assert (found.ci95_low, found.ci95_high) == (0.9, 0.92)


def test_what_nothing_bounds_from_below_is_ahead_of_nothing():
    several = {
        "few": judged(None, 0.96, 0.97),
        "low": judged(0.90, 0.91, 0.92),
        "lower": judged(None, 0.80, 0.85),
        "lost": judged(None, 0.99, None),
    }
    found = ranks("Feature cosine, p1", **several)
    # Whatever the end of `few` is, `lower` is below `low`.
    assert found == {"few": 1, "low": 1, "lower": 2, "lost": None}
    shown = {run: entry.shown for run, entry in entries("Feature cosine, p1", **several).items()}
    assert shown["few"] == "0.9600 [–, 0.9700]"
    assert shown["lost"] == "0.9900 (no interval)"


def test_a_task_that_one_run_left_out_says_why():
    without = sample_report()
    gone = {"pruned": dataclasses.replace(without.pruned, accuracy={})}
    without = with_ratio(
        sample_report(**gone, tasks_left_out={"knn": "one class"}), accuracy_difference={}
    )
    for line in ("Accuracy, knn_top1", "Accuracy difference, knn_top1"):
        assert entries(line, a=sample_report(), b=without)["b"].why == "one class"


def test_more_is_better_for_throughput_and_accuracy():
    def report(low, high):
        value = Interval(value=(low + high) / 2, ci95_low=low, ci95_high=high)
        return with_ratio(
            sample_report(), throughput={"1": value}, accuracy_difference={"knn_top1": value}
        )

    several = {"a": report(0.1, 0.2), "b": report(0.3, 0.4), "c": report(0.15, 0.35)}
    for name in ("Throughput ratio, batch 1", "Accuracy difference, knn_top1"):
        # c is not behind b: their intervals overlap.
        assert ranks(name, **several) == {"a": 2, "b": 1, "c": 1}


def test_milliseconds_are_shown_and_never_ranked():
    found = entries("Latency p50, batch 1", a=sample_report(), b=sample_report())
    assert [(e.shown, e.rank, e.comparable) for e in found.values()] == [
        ("67.5 ms", None, True)
    ] * 2


def host(**changes):
    return {"host": {**sample_report().host, **changes}}


def data(role, sha256):
    whole = sample_report().data
    changed = dataclasses.replace(getattr(whole, role), sha256=sha256)
    return {"data": dataclasses.replace(whole, **{role: changed})}


def task(protocol):
    whole = sample_report().tasks["knn_top1"]
    return {"tasks": {"knn_top1": dataclasses.replace(whole, protocol=protocol)}}


OTHERWISE = [
    ("Latency ratio, batch 1", host(cpu="B"), "other CPU: B, not Example CPU | 3 GHz"),
    ("Latency ratio, batch 1", host(cores_usable=8), "other number of usable cores: 8, not 2"),
    ("Latency ratio, batch 1", host(gpus=[{"name": "H200"}]), "other GPU: H200, not none"),
    ("Latency ratio, batch 1", host(board="Orin"), "other board: Orin, not unknown"),
    ("Latency ratio, batch 1", {"threads": 4}, "other number of threads: 4, not 2"),
    ("Latency ratio, batch 1", {"image_size": 518}, "other image size: 518, not 224"),
    ("Latency ratio, batch 1", {"target": "torch"}, "other target: torch, not ort"),
    ("Latency ratio, batch 1", {"model": "other"}, "other model: other, not dinov2_s"),
    (
        "Latency ratio, batch 1",
        {"timing": {"1": timing(clock="CUDA events"), "8": timing()}},
        "other clock: CUDA events, not end to end",
    ),
    ("Latency p50, batch 1", host(cpu="B"), "other CPU"),
    ("Device compute ratio, batch 8", host(cpu="B"), "other CPU"),
    (
        "Throughput ratio, batch 1",
        {
            "throughput_timing": {
                key: dataclasses.replace(value, in_flight=4)
                for key, value in sample_report().throughput_timing.items()
            }
        },
        "other number of batches in flight: 4, not 2",
    ),
    (
        "Peak memory",
        {"pruned": dataclasses.replace(sample_report().pruned, memory_batch_size=1)},
        "other batch: 1, not 8",
    ),
    ("FLOPs per image", {"image_size": 518}, "other image size"),
    ("File size", {"target": "trt"}, "other target: trt, not ort"),
    ("Feature cosine, p1", data("eval", "9" * 64), "other evaluation images: 999999999999, not cc"),
    ("Feature cosine, p1", {"judged_on": "torch"}, "other runtime that judged: torch, not ort"),
    ("Accuracy difference, knn_top1", data("bank", "8" * 64), "other bank of labels: 8888"),
    ("Accuracy, knn_top1", data("eval", "9" * 64), "other evaluation images"),
    ("Accuracy difference, knn_top1", task("k = 10"), "other protocol: k = 10, not DINOv2's"),
]


@pytest.mark.parametrize(("name", "changes", "why"), OTHERWISE)
def test_what_was_measured_otherwise_is_named_and_not_ranked(name, changes, why):
    reports = {"a": sample_report(), "b": sample_report(**changes), "c": sample_report()}
    found = entries(name, **reports)
    assert found["b"].why.startswith(why)
    assert not found["b"].comparable
    assert found["b"].rank is None
    assert found["b"].value is not None
    # The others are as they would be without it.
    both = entries(name, a=reports["a"], c=reports["c"])
    assert {run: found[run] for run in ("a", "c")} == both
    assert why in "; ".join(not_comparable(compare(reports))["b"])


def test_a_remark_behind_the_protocol_is_no_other_protocol():
    runs = {
        "a": sample_report(**task("Probe. C = 1.")),
        "b": sample_report(**task("Probe. C = 2.")),
    }
    assert set(ranks("Accuracy difference, knn_top1", **runs).values()) == {1}


def test_the_other_host_does_not_touch_what_is_no_matter_of_hosts():
    several = {"a": sample_report(), "b": sample_report(**host(cpu="B"))}
    for name in ("Parameters", "Feature cosine, p1", "Accuracy difference, knn_top1"):
        assert set(ranks(name, **several).values()) == {1}


def test_what_is_missing_has_its_reason_and_the_next_run_is_the_reference():
    found = entries("Latency ratio, batch 1", a=bare_report(), b=sample_report(), c=sample_report())
    assert found["a"].value is None
    assert found["a"].why == "no reason but this test"
    assert (found["b"].rank, found["c"].rank) == (1, 1)


def test_a_batch_that_one_engine_does_not_take():
    one = sample_report()
    ratio = one.ratio
    few = dataclasses.replace(
        with_ratio(one, latency={"1": ratio.latency["1"]}),
        pruned=dataclasses.replace(one.pruned, latency_ms={"1": one.pruned.latency_ms["1"]}),
        timing={"1": timing()},
        not_timed={"8": "the engine was built for 1 to 4"},
    )
    found = entries("Latency ratio, batch 8", a=one, b=few)
    assert found["b"].why == "the engine was built for 1 to 4"
    assert found["a"].rank is None  # nothing to rank it with


def test_names_are_as_long_as_they_must_be(tmp_path):
    paths = [tmp_path / "x" / "demo", tmp_path / "y" / "demo"]
    for path in paths:
        path.mkdir(parents=True)
    assert run_names(paths) == ["x/demo", "y/demo"]
    assert run_names([paths[0], paths[1] / "report.json", Path("other.json")]) == [
        f"{tmp_path.name}/x/demo".removeprefix(f"{tmp_path.name}/"),
        "y/demo",
        f"{Path.cwd().name}/other",
    ]
    with pytest.raises(ConfigError, match="given twice"):
        run_names([paths[0], paths[0] / "report.json"])


def several():
    return compare(
        {
            "a": with_latency(0.74, 0.75, 0.76),
            "b": with_latency(0.60, 0.61, 0.62, fidelity=fidelity(cosine_p1=0.8)),
            "elsewhere": with_latency(0.5, 0.51, 0.52, **host(cpu="<B>")),
        }
    )


def test_markdown():
    text = render_markdown(several())
    table = {row[0]: row[1:] for row in table_after(text, "# a, b, elsewhere")}
    assert table[""] == ["a", "b", "elsewhere"]
    assert table["Latency ratio, batch 1"] == [
        "0.750 [0.740, 0.760] #2",
        "**0.610 [0.600, 0.620]** #1",
        "<i>0.510 [0.500, 0.520]</i> n/c",
    ]
    assert table["Parameters"] == ["16.54 M"] * 3  # equal, so none is best
    assert "Energy per image" not in table
    assert "elsewhere is not ranked there: other CPU: &lt;B>, not Example CPU \\| 3 GHz" in text
    assert "- no energy meter on this machine: Energy per image (a), Energy per image (b)" in text


def test_html_draws_only_what_is_comparable():
    text = render_html(several())
    page = Page(text)
    assert "0.510 [0.500, 0.520] n/c" in page.text
    assert "0.610 [0.600, 0.620] #1" in page.text
    assert not re_search_network(text)
    latency = text.split("Latency ratio, batch 1 by share of parameters")[1].split("</svg>")[0]
    assert "elsewhere" not in latency
    # A cosine is no matter of the CPU.
    cosine = text.split("Feature cosine, p1 by share of parameters")[1].split("</svg>")[0]
    assert "elsewhere" in cosine


def re_search_network(text):
    return [part for part in ("http:", "https:", "url(", "<script") if part in text]


def test_terminal():
    out = io.StringIO()
    Console(file=out, width=160, force_terminal=False).print(comparison_table(several()))
    text = out.getvalue()
    assert "0.610 [0.600, 0.620] #1" in text
    assert "0.510 [0.500, 0.520] n/c" in text
    notes = "\n".join(comparison_notes(several()))
    assert "n/c elsewhere: not comparable with a: other CPU: <B>" in notes


def test_json_has_every_number():
    plain = json.loads(json.dumps(to_plain(several()), allow_nan=False))
    metric = next(m for m in plain["metrics"] if m["name"] == "Latency ratio, batch 1")
    assert metric["better"] == "lower"
    assert metric["entries"][1] == {
        "run": "b",
        "value": 0.61,
        "ci95_low": 0.6,
        "ci95_high": 0.62,
        "shown": "0.610 [0.600, 0.620]",
        "rank": 1,
        "why": None,
        "comparable": True,
    }
    assert metric["entries"][2]["comparable"] is False


def test_a_ratio_that_lost_its_interval_has_no_rank():
    why = dict.fromkeys(("ci95_low", "ci95_high"), "9 pairs of timed calls")
    lost = Interval(value=0.5, ci95_low=None, ci95_high=None, why=why)
    found = ranks(
        "Latency ratio, batch 1",
        a=with_latency(0.74, 0.75, 0.76),
        b=with_ratio(sample_report(), latency={"1": lost}),
        c=with_latency(0.80, 0.81, 0.82),
    )
    assert found == {"a": 1, "b": None, "c": 2}


def other_speed(what):
    """A report of the same run, but for one thing that speed depends on."""
    report = sample_report()
    if what == "precision":
        proof = engine_report().precision
        return dataclasses.replace(report, precision=proof)
    if what == "runtime":
        packages = {**report.host["packages"], "onnxruntime": "1.99"}
        return dataclasses.replace(report, host={**report.host, "packages": packages})
    telemetry = dataclasses.replace(report.telemetry, power_mode="15W")
    return dataclasses.replace(report, telemetry=telemetry)


@pytest.mark.parametrize("what", ["precision", "runtime", "power mode"])
def test_speed_of_another_precision_runtime_or_power_mode_is_not_ranked(what):
    packages = {**sample_report().host["packages"], "onnxruntime": "1.23.0"}
    first = sample_report(host={**sample_report().host, "packages": packages})
    for line in ("Latency ratio, batch 1", "Device compute ratio, batch 8",
                 "Throughput ratio, batch 1", "Latency p50, batch 1"):  # fmt: skip
        found = entries(line, a=first, b=other_speed(what))["b"]
        assert found.why is not None, line
        assert f"other {what}: " in found.why
        assert found.rank is None
    assert entries("Parameters", a=first, b=other_speed(what))["b"].comparable


@pytest.mark.parametrize("target", all_targets())
def test_the_runtime_of_every_target_is_known(target):
    packages = dict.fromkeys(PACKAGES, "1.0")
    report = sample_report(target=target, host={**sample_report().host, "packages": packages})
    assert "1.0" in timed_with(report)["runtime"]


def test_what_one_run_does_not_know_is_no_difference():
    blind = dataclasses.replace(
        sample_report().telemetry, power_mode=None, why={"power_mode": "no sensor"}
    )
    several = {"a": sample_report(telemetry=blind), "b": other_speed("runtime")}
    assert all(e.comparable for e in entries("Latency ratio, batch 1", **several).values())


def test_engines_name_their_runtime():
    old = engine_report()
    newer = {
        role: dataclasses.replace(engine, tensorrt="trt-rtx 1.8.0")
        for role, engine in old.engine.items()
    }
    found = entries("Latency ratio, batch 1", a=old, b=engine_report(engine=newer))["b"]
    assert found.why == "other runtime: trt-rtx 1.8.0, not trt-rtx 1.7.1.116"
