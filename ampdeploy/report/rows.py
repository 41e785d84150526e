"""The comparison table as text, shared by Markdown and the terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ampdeploy.report.result import Fidelity, Interval, Measured, Report

NOT_MEASURED = "not measured"
NOTHING = "–"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table."""

    what: str
    baseline: str
    pruned: str
    ratio: str


def count(value: float) -> str:
    """``22.1 M``: large counts with three or four significant digits."""
    for limit, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{value / limit:.2f} {unit}"
    return f"{value:g}"


def size(value: int | None) -> str:
    """Bytes in MB (10^6) or GB, as disks and downloads count."""
    if value is None:
        return NOT_MEASURED
    return f"{value / 1e6:.1f} MB" if value < 1e10 else f"{value / 1e9:.1f} GB"


def milliseconds(value: float | None) -> str:
    """Three digits, however small."""
    if value is None:
        return NOT_MEASURED
    return f"{value:.3g} ms" if value < 100 else f"{value:.0f} ms"


def times(value: float | None) -> str:
    """A ratio."""
    return NOT_MEASURED if value is None else f"{value:.3f}"


def score(value: float | None) -> str:
    """A cosine or a fraction."""
    return NOT_MEASURED if value is None else f"{value:.4f}"


def percent(value: float | None) -> str:
    """A fraction of images."""
    return NOT_MEASURED if value is None else f"{100 * value:.1f}%"


def interval(value: Interval, form: Callable[[float], str] = times) -> str:
    """``0.712 [0.703, 0.722]``; says so where there is no interval."""
    if value.ci95_low is None or value.ci95_high is None:
        return f"{form(value.value)} (no interval)"
    return f"{form(value.value)} [{form(value.ci95_low)}, {form(value.ci95_high)}]"


def difference(value: Interval) -> str:
    """A difference of two fractions, in percentage points: ``-0.5 [-3.0, +2.0] pp``."""
    return f"{interval(value, lambda number: f'{100 * number:+.1f}')} pp"


def batch_keys(report: Report) -> list[str]:
    """Batch sizes that were timed, smallest first."""
    return sorted(report.timing or {}, key=int)


def _memory_label(batch_size: int | None) -> str:
    return "Peak memory" if batch_size is None else f"Peak memory, batch {batch_size}"


def comparison_rows(report: Report) -> list[Row]:
    """Baseline against pruned against ratio: sizes, speed, memory, fidelity, accuracy."""
    base, slim, ratio = report.baseline, report.pruned, report.ratio
    return [
        Row(
            what="Parameters",
            baseline=count(base.params),
            pruned=count(slim.params),
            ratio=times(ratio.params),
        ),
        Row(
            what="FLOPs per image",
            baseline=count(base.flops),
            pruned=count(slim.flops),
            ratio=times(ratio.flops),
        ),
        Row(
            what="File size",
            baseline=size(base.file_bytes),
            pruned=size(slim.file_bytes),
            ratio=times(ratio.file_bytes),
        ),
        *_speed_rows(report),
        Row(
            what=_memory_label(base.memory_batch_size),
            baseline=size(base.memory_bytes),
            pruned=size(slim.memory_bytes),
            ratio=times(ratio.memory),
        ),
        Row(
            what="Energy per image",
            baseline=_joules(base),
            pruned=_joules(slim),
            ratio=NOTHING,
        ),
        *_fidelity_rows(report.fidelity),
        *_accuracy_rows(report),
    ]


def _joules(model: Measured) -> str:
    value = model.energy_j_per_image
    return NOT_MEASURED if value is None else f"{value:.3g} J"


def _speed_rows(report: Report) -> list[Row]:
    base, slim, ratios = report.baseline, report.pruned, report.ratio.latency
    if base.latency_ms is None or slim.latency_ms is None or ratios is None:
        return [Row(what="Latency", baseline=NOT_MEASURED, pruned=NOT_MEASURED, ratio=NOT_MEASURED)]
    rows = []
    for key in batch_keys(report):
        rows.append(
            Row(
                what=f"Latency p50, batch {key}",
                baseline=milliseconds(base.latency_ms[key].p50),
                pruned=milliseconds(slim.latency_ms[key].p50),
                ratio=interval(ratios[key]),
            )
        )
    if base.throughput_img_s is None or slim.throughput_img_s is None:
        return rows
    for key in batch_keys(report):
        before, after = base.throughput_img_s[key], slim.throughput_img_s[key]
        rows.append(
            Row(
                what=f"Throughput, batch {key}",
                baseline=f"{before:.1f} img/s",
                pruned=f"{after:.1f} img/s",
                ratio=times(after / before),
            )
        )
    return rows


def _fidelity_rows(fidelity: Fidelity | None) -> list[Row]:
    if fidelity is None:
        return [Row(what="Fidelity", baseline=NOTHING, pruned=NOT_MEASURED, ratio=NOTHING)]
    shown = (
        ("Feature cosine, mean", score(fidelity.cosine_mean)),
        ("Feature cosine, p1", score(fidelity.cosine_p1)),
        ("Patch cosine, mean", score(fidelity.patch_cosine_mean)),
        ("Patch cosine, p1", score(fidelity.patch_cosine_p1)),
        (
            f"Shared {fidelity.knn_k} neighbours",
            percent(fidelity.knn_agreement),
        ),
    )
    return [Row(what=what, baseline=NOTHING, pruned=value, ratio=NOTHING) for what, value in shown]


def _accuracy_rows(report: Report) -> list[Row]:
    base, slim = report.baseline.accuracy, report.pruned.accuracy
    if base is None or slim is None:
        return [
            Row(what="Accuracy", baseline=NOT_MEASURED, pruned=NOT_MEASURED, ratio=NOT_MEASURED)
        ]
    differences = report.ratio.accuracy_difference or {}
    return [
        Row(
            what=f"Accuracy, {metric}",
            baseline=percent(base[metric]),
            pruned=percent(slim.get(metric)),
            ratio=difference(differences[metric]) if metric in differences else NOTHING,
        )
        for metric in base
    ]
