"""The lines of a comparison: what to take from a report, and what must be alike to compare it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ampdeploy.config import task_of
from ampdeploy.report import rows
from ampdeploy.report.conditions import protocol, timed_with
from ampdeploy.report.result import Interval, Report

Better = Literal["lower", "higher"]


@dataclass(frozen=True, kw_only=True)
class Line:
    """What to take from a report, and what must be equal for two to be comparable."""

    name: str
    better: Better | None
    """None: shown, never ranked."""
    take: Callable[[Report], float | Interval | None]
    form: Callable[[float], str]
    conditions: Callable[[Report], Mapping[str, Any]]
    """What is in one report's only is not compared."""
    why: Callable[[Report], str]
    unit: str = ""
    """Written behind a value and its interval."""


def lines(reports: Sequence[Report]) -> Iterator[Line]:
    """Every line that any of the reports has a number for, or a reason for having none."""
    yield _count("Parameters", "params", {})
    yield _count("FLOPs per image", "flops", {"image size": lambda r: r.image_size})
    yield Line(
        name="File size",
        better="lower",
        take=lambda r: float(r.pruned.file_bytes),
        form=lambda value: rows.size(int(value)),
        conditions=lambda r: {"target": r.target},
        why=lambda r: "",
    )
    for ratio, field, label in rows.CLOCKS:
        for batch in _keys(getattr(r.ratio, ratio) for r in reports):
            yield from _times(label, ratio, field, batch)
    for batch in _keys(r.ratio.throughput for r in reports):
        yield from _throughput(batch)
    yield Line(
        name="Peak memory",
        better="lower",
        take=lambda r: None if r.pruned.memory_bytes is None else float(r.pruned.memory_bytes),
        form=lambda value: rows.size(int(value)),
        conditions=lambda r: {**_machine(r), "batch": r.pruned.memory_batch_size},
        why=lambda r: r.pruned.why["memory_bytes"],
    )
    yield Line(
        name="Energy per image",
        better=None,  # without an interval, and with every watt of the machine in it
        take=lambda r: r.pruned.energy_j_per_image,
        form=rows.joules,
        conditions=lambda r: {**_machine(r), **_energy_conditions(r)},
        why=lambda r: r.pruned.why["energy_j_per_image"],
    )
    for name, field in rows.COSINES:
        yield _fidelity(name, field)
    for metric in _keys((r.pruned.accuracy for r in reports), key=None):
        yield from _accuracy(metric)


def _keys(maps: Any, key: Callable[[str], Any] | None = int) -> list[str]:
    found = dict.fromkeys(name for entries in maps for name in entries or {})
    return sorted(found, key=key) if key else list(found)


def _count(name: str, field: str, conditions: Mapping[str, Callable[[Report], Any]]) -> Line:
    return Line(
        name=name,
        better="lower",
        take=lambda r: float(getattr(r.pruned, field)),
        form=rows.count,
        conditions=lambda r: {what: of(r) for what, of in conditions.items()},
        why=lambda r: "",
    )


def _machine(report: Report) -> dict[str, Any]:
    """What times, memory and energy belong to."""
    host = report.host
    return {
        "target": report.target,
        "device": report.device,
        "CPU": host.get("cpu"),
        "number of usable cores": host.get("cores_usable"),
        "GPU": [gpu.get("name") for gpu in host.get("gpus") or []],
        "board": host.get("board"),
        "number of threads": report.threads,
        "image size": report.image_size,
    }


def _baseline(report: Report) -> dict[str, Any]:
    """What a number relative to the baseline belongs to."""
    return {"model": report.model, "weights": report.weights.sha256}


def _times(label: str, ratio: str, field: str, batch: str) -> Iterator[Line]:
    def conditions(report: Report) -> dict[str, Any]:
        graph = ratio == "cuda_graph_compute"
        timing = (report.cuda_graph_timing if graph else report.timing) or {}
        return {
            **_machine(report),
            **timed_with(report),
            "clock": timing[batch].clock if batch in timing else None,
        }

    def missing(report: Report) -> str:
        return report.pruned.why.get(field) or report.not_timed.get(
            batch, "not timed at this batch"
        )

    def p50(report: Report) -> float | None:
        stats = (getattr(report.pruned, field) or {}).get(batch)
        return None if stats is None else stats.p50

    yield Line(
        name=f"{label} p50, batch {batch}",
        better=None,
        take=p50,
        form=rows.milliseconds,
        conditions=conditions,
        why=missing,
    )
    yield Line(
        name=f"{label} ratio, batch {batch}",
        better="lower",
        take=lambda r: (getattr(r.ratio, ratio) or {}).get(batch),
        form=rows.times,
        conditions=lambda r: {**conditions(r), **_baseline(r)},
        why=missing,
    )


def _throughput(batch: str) -> Iterator[Line]:
    def conditions(report: Report) -> dict[str, Any]:
        timing = (report.throughput_timing or {}).get(batch)
        return {
            **_machine(report),
            **timed_with(report),
            "number of batches in flight": None if timing is None else timing.in_flight,
        }

    def missing(report: Report) -> str:
        return report.ratio.why.get("throughput") or report.not_timed.get(
            batch, "not timed at this batch"
        )

    yield Line(
        name=f"Throughput, batch {batch}",
        better=None,
        take=lambda r: (r.pruned.throughput_img_s or {}).get(batch),
        form=rows.images_per_second,
        conditions=conditions,
        why=missing,
    )
    yield Line(
        name=f"Throughput ratio, batch {batch}",
        better="higher",
        take=lambda r: (r.ratio.throughput or {}).get(batch),
        form=rows.times,
        conditions=lambda r: {**conditions(r), **_baseline(r)},
        why=missing,
    )


def _energy_conditions(report: Report) -> dict[str, Any]:
    energy = report.pruned.energy
    return {"meter": energy and energy.source, "batch": energy and energy.batch_size}


def _fidelity(name: str, field: str) -> Line:
    def missing(report: Report) -> str:
        fidelity = report.fidelity
        return report.why["fidelity"] if fidelity is None else fidelity.why[field]

    return Line(
        name=name,
        better="higher",
        take=lambda r: None if r.fidelity is None else r.fidelity.interval(field),
        form=rows.score,
        conditions=lambda r: {**_baseline(r), **_judged(r)},
        why=missing,
    )


def _judged(report: Report) -> dict[str, Any]:
    return {
        "runtime that judged": report.judged_on,
        "evaluation images": report.data.eval.sha256,
        "image size": report.image_size,
    }


def _accuracy(metric: str) -> Iterator[Line]:
    def conditions(report: Report) -> dict[str, Any]:
        task = (report.tasks or {}).get(metric)
        bank = report.data.bank
        return {
            **_judged(report),
            "bank of labels": None if bank is None else bank.sha256,
            "protocol": protocol(task),
        }

    def missing(report: Report) -> str:
        left_out = report.tasks_left_out.get(task_of(metric) or "")
        return left_out or report.pruned.why.get("accuracy", "this task was not run")

    yield Line(
        name=f"Accuracy, {metric}",
        better=None,
        take=lambda r: (r.pruned.accuracy or {}).get(metric),
        form=rows.percent,
        conditions=conditions,
        why=missing,
    )
    yield Line(
        name=f"Accuracy difference, {metric}",
        better="higher",
        take=lambda r: (r.ratio.accuracy_difference or {}).get(metric),
        form=lambda value: f"{100 * value:+.1f}",
        unit=" pp",
        conditions=lambda r: {**conditions(r), **_baseline(r)},
        why=missing,
    )
