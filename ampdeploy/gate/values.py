"""Where in a report the numbers are that rules are about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ampdeploy.config import TASK_METRICS, task_of
from ampdeploy.gate.finding import EXACT, POINT, Value
from ampdeploy.report.result import INTERVAL_FIELDS, Interval, LatencyStats, Report

# What a value is of: "" where there is one, else a batch size or a metric of accuracy.
Values = Mapping[str, Value]
Read = Callable[[Report], Values]

ONE = ""

# What there can be several values of.
BATCH = "batch"
METRIC = "metric"


def left_out(report: Report, scope: str) -> Mapping[str, str]:
    """What was asked for and gave no values -> why: batch sizes, or tasks of accuracy.

    Args:
        report: That says so.
        scope: `BATCH`, `METRIC`, or nothing.
    """
    return {BATCH: report.not_timed, METRIC: report.tasks_left_out}.get(scope, {})


def label(scope: str, key: str) -> str:
    """What to call one of several values: ``batch 8``, a metric, or ``task probe``."""
    if scope == BATCH:
        return f"batch {key}"
    return f"task {key}" if key in TASK_METRICS else key


def why_absent(report: Report, scope: str, key: str) -> str | None:
    """Why there is no value of a batch size, a metric or a task; None: the report does not say.

    Args:
        report: That has none.
        scope: As `left_out`.
        key: The batch size, or the name of the metric or the task.
    """
    reasons = left_out(report, scope)
    task = task_of(key) if scope == METRIC else None
    return reasons.get(key) or (reasons.get(task) if task else None)


def exact(role_field: str) -> Read:
    """A field of the pruned model that is counted, not measured."""
    return lambda report: {ONE: Value(number=float(getattr(report.pruned, role_field)), note=EXACT)}


def exact_ratio(field: str) -> Read:
    """A field of the ratios that is counted, not measured."""
    return lambda report: {ONE: Value(number=getattr(report.ratio, field), note=EXACT)}


def cut(field: str) -> Read:
    """The share that was removed."""

    def read(report: Report) -> Values:
        dense, slim = getattr(report.baseline, field), getattr(report.pruned, field)
        # Not 1 - ratio, which is rounded twice: 1 - 0.9 is less than 10%.
        return {ONE: Value(number=(dense - slim) / dense, note=EXACT)}

    return read


def point(owner: str, field: str) -> Read:
    """A number without an interval, of ``pruned`` or ``ratio``."""

    def read(report: Report) -> Values:
        holder = getattr(report, owner)
        value = getattr(holder, field)
        if value is None:
            return {ONE: Value.missing(holder.why[field])}
        return {ONE: Value(number=float(value), note=POINT)}

    return read


def fidelity(field: str) -> Read:
    """A field of the fidelity, with its interval over images if it is one of those that have one.

    The smallest cosine has none: it decides as it is.
    """

    def read(report: Report) -> Values:
        if report.fidelity is None:
            return {ONE: Value.missing(report.why["fidelity"])}
        images = report.fidelity.images
        if field not in INTERVAL_FIELDS:
            note = f"{POINT}; {images} images"
            return {ONE: Value(number=getattr(report.fidelity, field), note=note)}
        interval = report.fidelity.interval(field)
        if interval is None:
            return {ONE: Value.missing(report.fidelity.why[field])}
        return {ONE: Value.of(interval, images, "images")}

    return read


def fidelity_on_the_same_images(field: str) -> Read:
    """A field of the fidelity without its interval, for reports that judged the same images."""

    def read(report: Report) -> Values:
        if report.fidelity is None:
            return {ONE: Value.missing(report.why["fidelity"])}
        value = getattr(report.fidelity, field)
        if value is None:
            return {ONE: Value.missing(report.fidelity.why[field])}
        # Its interval is about other images, and would be wrong here: the images are shared.
        note = f"point values of the same {report.fidelity.images} images in both reports"
        return {ONE: Value(number=value, note=note)}

    return read


def paired_ratio(field: str, timing: str, where: str = "") -> Read:
    """A ratio per batch size that comes with its interval over the loads of both files.

    Args:
        field: Of `Ratios`.
        timing: Field of `Report` that says how it was measured.
        where: To be said behind ``loads``.
    """

    def read(report: Report) -> Values:
        ratios: Mapping[str, Interval] | None = getattr(report.ratio, field)
        if ratios is None:
            return {ONE: Value.missing(report.ratio.why[field])}
        rows: Mapping[str, Any] = getattr(report, timing) or {}
        return _by_batch(
            report,
            {
                size: Value.of(ratio, getattr(rows.get(size), "loads", None), f"loads{where}")
                for size, ratio in ratios.items()
            },
        )

    return read


def latency(field: str, statistic: str) -> Read:
    """A percentile per batch size of the pruned model's calls."""

    def value(stats: LatencyStats) -> Value:
        number = getattr(stats, statistic)
        if number is None:
            return Value.missing(stats.why[statistic])
        return Value(number=number, note=f"{POINT}; {stats.n} calls")

    def read(report: Report) -> Values:
        rows: Mapping[str, LatencyStats] | None = getattr(report.pruned, field)
        if rows is None:
            return {ONE: Value.missing(report.pruned.why[field])}
        return _by_batch(report, {size: value(stats) for size, stats in rows.items()})

    return read


def throughput(report: Report) -> Values:
    """Images per second of the pruned model, per batch size."""
    rows = report.pruned.throughput_img_s
    if rows is None:
        return {ONE: Value.missing(report.pruned.why["throughput_img_s"])}
    return _by_batch(
        report, {size: Value(number=number, note=POINT) for size, number in rows.items()}
    )


def _by_batch(report: Report, values: dict[str, Value]) -> Values:
    if not values:
        reasons = "; ".join(f"batch {size}: {why}" for size, why in report.not_timed.items())
        return {ONE: Value.missing(reasons or "no batch size was timed")}
    return {size: values[size] for size in sorted(values, key=int)}


def accuracy_drop(report: Report) -> Values:
    """How much less accurate the pruned model is than the baseline, per metric, from pairs."""
    differences = report.ratio.accuracy_difference
    if differences is None:
        return {ONE: Value.missing(report.ratio.why["accuracy_difference"])}
    found = {
        metric: Value.of(_negative(difference), _images(report, metric), "images")
        for metric, difference in differences.items()
    }
    return found or {ONE: Value.missing("no metric was judged")}


def accuracy_difference(report: Report) -> Values:
    """The same with its sign: pruned minus baseline."""
    differences = report.ratio.accuracy_difference
    if differences is None:
        return {ONE: Value.missing(report.ratio.why["accuracy_difference"])}
    found = {
        metric: Value.of(difference, _images(report, metric), "images")
        for metric, difference in differences.items()
    }
    return found or {ONE: Value.missing("no metric was judged")}


def accuracy(report: Report) -> Values:
    """Accuracy of the pruned model, per metric."""
    values = report.pruned.accuracy
    if values is None:
        return {ONE: Value.missing(report.pruned.why["accuracy"])}
    found = {metric: Value(number=number, note=POINT) for metric, number in values.items()}
    return found or {ONE: Value.missing("no metric was judged")}


def _negative(difference: Interval) -> Interval:
    low, high = difference.ci95_low, difference.ci95_high
    return Interval(
        value=0.0 - difference.value,  # -0.0 would be shown with its sign
        ci95_low=None if high is None else 0.0 - high,
        ci95_high=None if low is None else 0.0 - low,
        why={
            **({"ci95_low": difference.why["ci95_high"]} if high is None else {}),
            **({"ci95_high": difference.why["ci95_low"]} if low is None else {}),
        },
    )


def _images(report: Report, metric: str) -> int | None:
    task = (report.tasks or {}).get(metric)
    return task.images if task else None
