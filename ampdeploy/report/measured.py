"""From `bench.json` and `eval.json` to the numbers of each model, and their ratios."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.export.names import data_path
from ampdeploy.report.codec import to_plain
from ampdeploy.report.result import Energy, Interval, Measured, Ratios

if TYPE_CHECKING:
    from ampdeploy.bench.result import BenchResult

# Field of `Measured` -> the measurement of `BenchResult` that fills it.
_TIMES = {
    "latency_ms": "latency",
    "compute_ms": "compute",
    "cuda_graph_compute_ms": "cuda_graph",
    "throughput_img_s": "throughput",
}
# Field of `Ratios` -> the same.
_RATIOS = {
    "latency": "latency",
    "compute": "compute",
    "cuda_graph_compute": "cuda_graph",
    "throughput": "throughput",
}
# Field of `Measured` -> field of `MemoryResult`.
_MEMORY = {
    "memory_bytes": "memory_bytes",
    "weight_bytes": "weight_bytes",
    "activation_bytes": "activation_bytes",
    "peak_rss_bytes": "peak_rss_bytes",
    "memory_batch_size": "batch_size",
}
_ENERGY = ("energy_j_per_image", "energy")


def measured_model(
    role: str,
    *,
    profile: Mapping[str, int],
    file: Path,
    accuracy: dict[str, float] | None,
    why_no_accuracy: str | None,
    bench: BenchResult,
) -> Measured:
    """The numbers of one model.

    Args:
        role: ``baseline`` or ``pruned``.
        profile: Its params and flops.
        file: What the target runs.
        accuracy: Metric -> value.
        why_no_accuracy: Reason for `accuracy` being None.
        bench: What was measured.
    """
    why: dict[str, str] = {}
    if accuracy is None:
        why["accuracy"] = str(why_no_accuracy)
    values: dict[str, Any] = {}
    for name, measurement in _TIMES.items():
        rows = getattr(bench, measurement)
        if rows is None:
            why[name] = bench.why[measurement]
        values[name] = rows and {size: getattr(row, role) for size, row in rows.items()}
    memory = bench.memory and bench.memory[role]
    if memory:
        values |= {name: getattr(memory, theirs) for name, theirs in _MEMORY.items()}
        why |= {name: reason for name, reason in memory.why.items() if name in values}
    else:
        values |= dict.fromkeys(_MEMORY)
        why |= dict.fromkeys(_MEMORY, bench.why["memory"])
    energy = bench.energy and bench.energy[role]
    if energy:
        facts = to_plain(energy)
        values["energy_j_per_image"] = facts.pop("joules_per_image")
        values["energy"] = Energy(**facts)
    else:
        values |= dict.fromkeys(_ENERGY)
        why |= dict.fromkeys(_ENERGY, bench.why["energy"])
    return Measured(
        params=profile["params"],
        flops=profile["flops"],
        file_bytes=_bytes_with_data(file),
        accuracy=accuracy,
        why=why,
        **values,
    )


def measured_ratios(
    bench: BenchResult,
) -> tuple[dict[str, dict[str, Interval] | None], dict[str, str]]:
    """The ratios that come with intervals, and why the others are missing.

    Returns:
        Fields of `Ratios` -> per batch size; field -> reason.
    """
    found: dict[str, dict[str, Interval] | None] = {}
    why: dict[str, str] = {}
    for name, measurement in _RATIOS.items():
        rows = getattr(bench, measurement)
        found[name] = rows and {size: row.ratio for size, row in rows.items()}
        if rows is None:
            why[name] = bench.why[measurement]
    return found, why


def compute_ratios(
    baseline: Measured,
    pruned: Measured,
    *,
    intervals: Mapping[str, dict[str, Interval] | None],
    accuracy_difference: dict[str, Interval] | None,
    why: Mapping[str, str],
) -> Ratios:
    """Pruned / baseline of every number both have.

    Args:
        baseline: The dense model.
        pruned: The slim model.
        intervals: Of `measured_ratios`: from paired samples.
        accuracy_difference: Per metric, from the paired predictions.
        why: Reasons for any of those being None.
    """
    reasons = dict(why)
    single: dict[str, float | None] = {}
    for name, field in (("memory", "memory_bytes"), ("energy", "energy_j_per_image")):
        dense, slim = getattr(baseline, field), getattr(pruned, field)
        single[name] = slim / dense if dense and slim else None
        if single[name] is None:
            null = {**baseline.why, **pruned.why}
            reasons[name] = null.get(field, f"{field} is 0 for one of the models")
    return Ratios(
        params=pruned.params / baseline.params,
        flops=pruned.flops / baseline.flops,
        file_bytes=pruned.file_bytes / baseline.file_bytes,
        memory=single["memory"],
        energy=single["energy"],
        latency=intervals["latency"],
        compute=intervals["compute"],
        cuda_graph_compute=intervals["cuda_graph_compute"],
        throughput=intervals["throughput"],
        accuracy_difference=accuracy_difference,
        why=reasons,
    )


def _bytes_with_data(file: Path) -> int:
    """Of an ONNX file above 2 GB, the weights are in a file of their own."""
    data = data_path(file)
    return file.stat().st_size + (data.stat().st_size if data.is_file() else 0)
