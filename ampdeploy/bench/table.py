"""`ampdeploy bench` on a terminal: a row per clock and batch size."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from ampdeploy.bench.latency import PairTimes
from ampdeploy.bench.result import BenchResult
from ampdeploy.report.result import Interval

# Field of `BenchResult` -> what its row is called.
_CLOCKS = {
    "latency": "end to end",
    "compute": "compute",
    "cuda_graph": "CUDA graph",
}
_MB = 1e6


def bench_table(result: BenchResult, *, title: str) -> Table:
    """Baseline, pruned and their ratio by every clock, and memory."""
    # No lines and short names: it fits 80 columns, where rich would cut numbers short.
    table = Table(
        title=escape(title), title_justify="left", box=None, padding=(0, 2, 0, 0), pad_edge=False
    )
    for heading in ("", "batch"):
        table.add_column(heading, no_wrap=True)
    for heading in ("baseline", "pruned", "ratio [95% interval]", "n"):
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for row in _rows(result):
        table.add_row(*(escape(text) for text in row))
    return table


def _rows(result: BenchResult) -> Iterator[tuple[str, ...]]:
    for field, name in _CLOCKS.items():
        times: dict[str, PairTimes] = getattr(result, field) or {}
        for size, row in times.items():
            dense, slim = row.baseline, row.pruned
            yield (
                f"{name} p50, ms", size, f"{dense.p50:.3f}", f"{slim.p50:.3f}",
                ratio_text(row.ratio), str(dense.n),
            )  # fmt: skip
            yield f"{name} p90, ms", size, f"{dense.p90:.3f}", f"{slim.p90:.3f}", "", ""
            if dense.p99 is not None and slim.p99 is not None:
                yield f"{name} p99, ms", size, f"{dense.p99:.3f}", f"{slim.p99:.3f}", "", ""
    for size, rates in (result.throughput or {}).items():
        yield (
            f"images/s, {rates.timing.in_flight} at once", size,
            f"{rates.baseline:.1f}", f"{rates.pruned:.1f}",
            ratio_text(rates.ratio), str(rates.timing.windows),
        )  # fmt: skip
    if result.memory:
        dense_memory, slim_memory = result.memory["baseline"], result.memory["pruned"]
        before, after = dense_memory.memory_bytes, slim_memory.memory_bytes
        if before is not None and after is not None:
            yield (
                "memory, MB", str(slim_memory.batch_size),
                f"{before / _MB:.1f}", f"{after / _MB:.1f}",
                f"{after / before:.3f}" if before else "", "",
            )  # fmt: skip


def ratio_text(ratio: Interval) -> str:
    """``0.778 [0.772, 0.783]``."""
    low, high = ratio.ci95_low, ratio.ci95_high
    interval = "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]"
    return f"{ratio.value:.3f}{interval}"


def footnotes(result: BenchResult) -> Iterator[str]:
    """What the table does not show, with the reason, and how to read it."""
    rows = {**_CLOCKS, "throughput": "throughput", "memory": "memory"}
    for field, name in rows.items():
        if getattr(result, field) is None:
            yield f"{name}: not measured: {result.why[field]}"
    for role, memory in (result.memory or {}).items():
        if memory.memory_bytes is None:
            yield f"memory of {role}: not measured: {memory.why['memory_bytes']}"
    for size, why in result.not_timed.items():
        yield f"batch {size}: not timed: {why}"
    for size, row in (result.latency or {}).items():
        if not row.timing.warmup_stable:
            yield f"batch {size}: warm-up did not settle; the machine may be busy or throttling"
        if row.ratio.ci95_low is None:
            yield f"batch {size}: no interval: {row.ratio.why['ci95_low']}"
