"""What no schema of a report.json can say: values that nothing measures, and maps that do not fit.

A damaged or edited file must not pass a gate. Views show it all the same, to find out what it is.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ampdeploy.config import TASK_METRICS, task_of
from ampdeploy.errors import ArtifactError
from ampdeploy.report.result import (
    INTERVAL_FIELDS,
    BlockWidth,
    Fidelity,
    Interval,
    LatencyStats,
    Report,
)

Problem = tuple[str, str]  # place in the report, what is wrong there

# Maps that have the same keys, where they are there at all: the first decides.
_SAME_KEYS = (
    ("ratio.latency", "baseline.latency_ms", "pruned.latency_ms", "timing"),
    ("ratio.compute", "baseline.compute_ms", "pruned.compute_ms"),
    (
        "ratio.cuda_graph_compute",
        "baseline.cuda_graph_compute_ms",
        "pruned.cuda_graph_compute_ms",
        "cuda_graph_timing",
    ),
    (
        "ratio.throughput",
        "baseline.throughput_img_s",
        "pruned.throughput_img_s",
        "throughput_timing",
    ),
    ("baseline.accuracy", "pruned.accuracy", "ratio.accuracy_difference", "tasks"),
)
# Those of them, and others, whose keys are batch sizes.
_BY_BATCH = (*(names[0] for names in _SAME_KEYS[:-1]), "not_timed")

_ROUNDING = 1e-6  # cosines are sums in float32


@dataclass(frozen=True)
class _Bounds:
    low: float
    high: float
    open: bool = False
    """Whether `low` itself is outside."""

    def refuses(self, value: float) -> bool:
        """Whether nothing measures `value`; NaN and infinities are such."""
        inside = self.low - _ROUNDING <= value <= self.high + _ROUNDING
        return not (math.isfinite(value) and inside) or (self.open and value <= self.low)

    def __str__(self) -> str:
        if math.isinf(self.high):
            return f"{'more than' if self.open else 'at least'} {self.low:g}"
        return f"from {self.low:g} to {self.high:g}"


_POSITIVE = _Bounds(0.0, math.inf, open=True)
_FROM_ZERO = _Bounds(0.0, math.inf)
_COSINE = _Bounds(-1.0, 1.0)
_SHARE = _Bounds(0.0, 1.0)

# End of a field's name -> what its numbers can be, and those of the maps below it. The first fits.
_FIELDS = (
    (("accuracy_difference",), _COSINE),  # of two shares
    (("accuracy", "chance", "knn_agreement", "half_share"), _SHARE),
    (("cosine", "cosine_mean", "cosine_p1", "cosine_min"), _COSINE),
    (
        ("params", "flops", "file_bytes", "image_size", "images", "loads", "pairs", "windows",
         "in_flight", "batch_size", "threads", "n", "hidden", "classes"),
        _POSITIVE,
    ),
    (
        ("latency_ms", "compute_ms", "throughput_img_s", "latency", "compute", "throughput",
         "cuda_graph_compute"),
        _POSITIVE,
    ),
    (("bytes", "energy_j_per_image", "memory", "energy", "samples", "kept"), _FROM_ZERO),
)  # fmt: skip


def read_consistent(path: Path) -> Report:
    """A report.json to decide by.

    Raises:
        ArtifactError: As `Report.read`, or it holds what `problems` finds.
    """
    report = Report.read(path)
    for place, problem in problems(report):
        raise ArtifactError(
            f"{path}: {place} {problem}. The file is damaged or was edited; run the command that "
            "writes it again. `ampdeploy report --check` names every such place."
        )
    return report


def problems(report: Report) -> Iterator[Problem]:
    """Every place of `report` that cannot be as it is, with the value seen there."""
    yield from _walk(report, "", None)
    yield from _maps(report)
    yield from _left_out(report)
    if report.fidelity is not None:
        yield from _intervals(report.fidelity)


def _bounds(field: str) -> _Bounds | None:
    for names, bounds in _FIELDS:
        if any(field == name or field.endswith(f"_{name}") for name in names):
            return bounds
    return None


def _walk(value: Any, place: str, bounds: _Bounds | None) -> Iterator[Problem]:
    if isinstance(value, bool) or value is None:
        return
    if isinstance(value, int | float):
        if bounds is not None and bounds.refuses(value):
            yield place, f"is {value}, not {bounds}"
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _walk(item, f"{place}.{key}", bounds)
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _walk(item, f"{place}[{index}]", bounds)
    elif dataclasses.is_dataclass(value):
        yield from _ordered(value, place)
        for field in dataclasses.fields(value):
            if field.name in ("why", "host", "asked", "not_timed", "stages_seconds", "skipped"):
                continue  # of anything
            if isinstance(value, Fidelity) and field.name == "intervals":
                for key, item in value.intervals.items():  # each as the field of its name
                    yield from _walk(item, f"{place}.intervals.{key}", _bounds(key))
                continue
            # A ratio's interval, and the statistics of times, are numbers of the field they are in.
            whole = isinstance(value, Interval | LatencyStats) and field.name != "n"
            yield from _walk(
                getattr(value, field.name),
                f"{place}.{field.name}".removeprefix("."),
                bounds if whole else _bounds(field.name),
            )


def _ordered(value: Any, place: str) -> Iterator[Problem]:
    if isinstance(value, Interval):
        low, high = value.ci95_low, value.ci95_high
        if (low is None) != (high is None):
            yield from _one_ended(value, place)
        elif low is not None and high is not None:
            # A bootstrap's interval need not contain the value, but it is nowhere else either.
            slack = (high - low) + _ROUNDING * abs(value.value)
            if not low <= high or not low - slack <= value.value <= high + slack:
                yield place, f"is {value.value} with the interval [{low}, {high}]"
    elif isinstance(value, LatencyStats):
        slack = 1 + _ROUNDING
        if not value.min <= value.p50 * slack <= value.p90 * slack**2 <= value.max * slack**3:
            yield (
                place,
                f"has min {value.min}, p50 {value.p50}, p90 {value.p90}, max {value.max}",
            )
    elif isinstance(value, BlockWidth) and value.kept > value.hidden:
        yield place, f"keeps {value.kept} of {value.hidden} neurons"


def _one_ended(value: Interval, place: str) -> Iterator[Problem]:
    """One end may be open, with its reason; a lost one, or one that is explained away, is not."""
    there = "ci95_high" if value.ci95_low is None else "ci95_low"
    end = getattr(value, there)
    if there in value.why:
        yield place, f"has {there} {end}, and a reason for having none: {value.why[there]!r}"
    slack = _ROUNDING * abs(value.value)
    outside = value.value - end if there == "ci95_high" else end - value.value
    if not outside <= slack:
        yield place, f"is {value.value}, beyond the only end of its interval, {end}"


def _intervals(fidelity: Fidelity) -> Iterator[Problem]:
    """Every number has its interval, and every interval its number."""
    place = "fidelity.intervals"
    expected = [name for name in INTERVAL_FIELDS if getattr(fidelity, name) is not None]
    if fidelity.intervals.keys() != set(expected):
        found = ", ".join(fidelity.intervals) or "nothing"
        yield place, f"has {found}; measured are {', '.join(expected)}"
    for name in expected:
        number, interval = getattr(fidelity, name), fidelity.intervals.get(name)
        if interval is not None and interval.value != number:
            yield f"{place}.{name}", f"is of {interval.value}; {name} is {number}"


def _left_out(report: Report) -> Iterator[Problem]:
    """Tasks that were left out are tasks, have a reason, and gave nothing."""
    for task, reason in report.tasks_left_out.items():
        if task not in TASK_METRICS:
            yield "tasks_left_out", f"has {task!r}, which is no task"
        if not reason.strip():
            yield f"tasks_left_out.{task}", "has no reason"
        given = [metric for metric in report.tasks or {} if task_of(metric) == task]
        if given:
            yield "tasks_left_out", f"has {task}, which gave {', '.join(given)}"


def _maps(report: Report) -> Iterator[Problem]:
    """Maps over batch sizes, or over metrics, that do not fit together."""
    for name in _BY_BATCH:
        for key in operator.attrgetter(name)(report) or {}:
            if not (key.isascii() and key.isdigit() and int(key)):
                yield name, f"has {key!r}, which is no batch size"
    for first, *others in _SAME_KEYS:
        expected = operator.attrgetter(first)(report)
        for name in others:
            found = operator.attrgetter(name)(report)
            if (found is None) != (expected is None):
                yield name, f"is {'null' if found is None else 'there'}, unlike {first}"
            elif found is not None and found.keys() != expected.keys():
                yield (
                    name,
                    f"has {', '.join(found) or 'nothing'}; {first} has {', '.join(expected)}",
                )
    # Compute is a part of the calls of latency, and some runtimes have no clock for it.
    parts, calls = report.ratio.compute, report.ratio.latency
    if parts is not None and (calls is None or parts.keys() != calls.keys()):
        yield (
            "ratio.compute",
            f"has {', '.join(parts) or 'nothing'}; ratio.latency has "
            f"{'nothing' if calls is None else ', '.join(calls)}",
        )
