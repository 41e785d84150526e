"""The comparison table as text, shared by Markdown, HTML and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from ampdeploy.report.result import Dataset, Fidelity, Interval, Report

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
    """``0.712 [0.703, 0.722]``, or ``[–, 0.722]`` where nothing bounds it from below; says so
    where there is no interval."""
    if value.lost:
        return f"{form(value.value)} (no interval)"
    low, high = (NOTHING if end is None else form(end) for end in (value.ci95_low, value.ci95_high))
    return f"{form(value.value)} [{low}, {high}]"


def fidelity_interval(fidelity: Fidelity, name: str, form: Callable[[float], str] = score) -> str:
    """A field of the fidelity with its interval."""
    found = fidelity.interval(name)
    return NOT_MEASURED if found is None else interval(found, form)


def difference(value: Interval) -> str:
    """A difference of two fractions, in percentage points: ``-0.5 [-3.0, +2.0] pp``."""
    return f"{interval(value, _points)} pp"


def _points(number: float) -> str:
    return f"{round(100 * number, 1) + 0.0:+.1f}"  # what rounds to nothing has no minus sign


def batch_keys(report: Report) -> list[str]:
    """Batch sizes that were timed, smallest first."""
    return sorted(report.timing or {}, key=int)


def images_per_second(value: float | None) -> str:
    """A throughput."""
    return NOT_MEASURED if value is None else f"{value:.1f} img/s"


def joules(value: float | None) -> str:
    """An energy, three digits."""
    return NOT_MEASURED if value is None else f"{value:.3g} J"


def comparison_rows(report: Report) -> list[Row]:
    """Baseline against pruned against ratio: sizes, speed, memory, energy, fidelity, accuracy.

    What every report is expected to have says so where it was not measured; the other lines are
    left out then, and `left_out` has the reasons.
    """
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
        *_latency_rows(report),
        *_throughput_rows(report),
        Row(
            what=_memory_label(base.memory_batch_size),
            baseline=size(base.memory_bytes),
            pruned=size(slim.memory_bytes),
            ratio=times(ratio.memory),
        ),
        *_energy_rows(report),
        *_fidelity_rows(report.fidelity),
        *_accuracy_rows(report),
    ]


# A line's name, field of `Fidelity`.
COSINES = (
    ("Feature cosine, mean", "cosine_mean"),
    ("Feature cosine, p1", "cosine_p1"),
    ("Patch cosine, mean", "patch_cosine_mean"),
    ("Patch cosine, p1", "patch_cosine_p1"),
)

# Field of `Ratios`, field of `Measured` -> the clock, in a line's name.
CLOCKS = (
    ("latency", "latency_ms", "Latency"),
    ("compute", "compute_ms", "Device compute"),
    ("cuda_graph_compute", "cuda_graph_compute_ms", "CUDA graph"),
)


def measured_clocks(report: Report) -> list[tuple[str, dict[str, tuple[Any, Any]]]]:
    """Clock -> batch size -> `LatencyStats` of baseline and pruned, of the clocks there are."""
    found = []
    for _, field, label in CLOCKS:
        before, after = getattr(report.baseline, field), getattr(report.pruned, field)
        if before is not None and after is not None:
            shared = sorted(before.keys() & after.keys(), key=int)
            found.append((label, {key: (before[key], after[key]) for key in shared}))
    return found


def datasets(report: Report) -> list[tuple[str, Dataset]]:
    """Use -> images."""
    data = report.data
    found = [("calibration", data.calib), ("evaluation", data.eval)]
    return found if data.bank is None else [*found, ("bank of labels", data.bank)]


def packages(report: Report) -> dict[str, str]:
    """Installed distribution -> version."""
    return {name: v for name, v in (report.host.get("packages") or {}).items() if v}


def left_out(report: Report) -> list[tuple[str, str]]:
    """What `comparison_rows` has no line for, and why; things with one reason are together."""
    ratio = report.ratio
    missing = [
        (label, ratio.why[name]) for name, _, label in CLOCKS[1:] if getattr(ratio, name) is None
    ]
    if ratio.throughput is None:
        missing.append(("Throughput", ratio.why["throughput"]))
    if ratio.energy is None:
        missing.append(("Energy", ratio.why["energy"]))
    if report.telemetry is None:
        missing.append(("Clocks and temperatures", report.why["telemetry"]))
    missing += [(f"task {task}", reason) for task, reason in report.tasks_left_out.items()]
    return [(", ".join(names), reason) for reason, names in by_reason(missing).items()]


def by_reason(missing: Iterable[tuple[str, str]]) -> dict[str, list[str]]:
    """(name, reason) -> reason with all its names, in order."""
    together: dict[str, list[str]] = {}
    for name, reason in missing:
        together.setdefault(reason, []).append(name)
    return together


def _memory_label(batch_size: int | None) -> str:
    return "Peak memory" if batch_size is None else f"Peak memory, batch {batch_size}"


def _latency_rows(report: Report) -> list[Row]:
    rows = []
    if report.ratio.latency is None:
        rows.append(Row(what="Latency", baseline=NOT_MEASURED, pruned=NOT_MEASURED, ratio=NOTHING))
    for ratio, field, label in CLOCKS:
        before, after = getattr(report.baseline, field), getattr(report.pruned, field)
        ratios = getattr(report.ratio, ratio)
        if before is None or after is None or ratios is None:
            continue
        rows += [
            Row(
                what=f"{label} p50, batch {key}",
                baseline=milliseconds(before[key].p50),
                pruned=milliseconds(after[key].p50),
                ratio=interval(ratios[key]),
            )
            for key in sorted(ratios, key=int)
        ]
    return rows


def _throughput_rows(report: Report) -> list[Row]:
    before, after = report.baseline.throughput_img_s, report.pruned.throughput_img_s
    ratios = report.ratio.throughput
    if before is None or after is None or ratios is None:
        return []
    return [
        Row(
            what=f"Throughput, batch {key}",
            baseline=images_per_second(before[key]),
            pruned=images_per_second(after[key]),
            ratio=interval(ratios[key]),
        )
        for key in sorted(ratios, key=int)
    ]


def _energy_rows(report: Report) -> list[Row]:
    base, slim = report.baseline, report.pruned
    if report.ratio.energy is None:
        return []
    return [
        Row(
            what="Energy per image",
            baseline=joules(base.energy_j_per_image),
            pruned=joules(slim.energy_j_per_image),
            ratio=times(report.ratio.energy),
        )
    ]


def _fidelity_rows(fidelity: Fidelity | None) -> list[Row]:
    if fidelity is None:
        return [Row(what="Fidelity", baseline=NOTHING, pruned=NOT_MEASURED, ratio=NOTHING)]
    shown = [(label, fidelity_interval(fidelity, name)) for label, name in COSINES]
    neighbours = fidelity_interval(fidelity, "knn_agreement", percent)
    shown.append((f"Shared {fidelity.knn_k} neighbours", neighbours))
    return [Row(what=what, baseline=NOTHING, pruned=value, ratio=NOTHING) for what, value in shown]


def _accuracy_rows(report: Report) -> list[Row]:
    base, slim = report.baseline.accuracy, report.pruned.accuracy
    if base is None or slim is None:
        return [Row(what="Accuracy", baseline=NOT_MEASURED, pruned=NOT_MEASURED, ratio=NOTHING)]
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
