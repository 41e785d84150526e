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

from ampdeploy.errors import ArtifactError
from ampdeploy.report.result import BlockWidth, Interval, LatencyStats, Report

Problem = tuple[str, str]  # place in the report, what is wrong there

# Maps that have the same keys, where they are there at all: the first decides.
_SAME_KEYS = (
    ("ratio.latency", "baseline.latency_ms", "pruned.latency_ms", "timing"),
    ("ratio.compute", "baseline.compute_ms", "pruned.compute_ms", "timing"),
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
        ("params", "flops", "file_bytes", "image_size", "images", "pairs", "windows", "in_flight",
         "batch_size", "threads", "n", "hidden", "classes"),
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
            yield place, f"has one end of an interval only: {low}, {high}"
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
