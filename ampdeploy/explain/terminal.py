"""An `Explanation` on a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from ampdeploy.explain.evidence import interval, times
from ampdeploy.explain.result import Cell, Explanation


def explanation_view(result: Explanation) -> RenderableType:
    """Two tables, what was fused, how it was measured, and the findings."""
    widths = {block: (dense, slim) for block, dense, slim in result.widths}
    blocks = _table("per block", ("block", "width"))
    for cell in result.blocks:
        dense, slim = widths.get(cell.block if cell.block is not None else -1, ("?", "?"))
        blocks.add_row(str(cell.block), f"{dense} -> {slim}", *_numbers(cell, result))
    kinds = _table("per kind of operator", ("kind",))
    for cell in (*result.kinds, result.total):
        kinds.add_row(cell.kind or "all", *_numbers(cell, result))
    return Group(kinds, Text(), blocks, Text(), *_lines(result))


def _table(title: str, first: Sequence[str]) -> Table:
    table = Table(title=title, title_justify="left", box=None)
    for heading in first:
        table.add_column(heading)
    for heading in ("baseline", "share", "pruned", "predicted", "measured [95%]"):
        table.add_column(escape(heading), justify="right")
    return table


def _numbers(cell: Cell, result: Explanation) -> tuple[str, ...]:
    share = cell.baseline_ms / result.total.baseline_ms if result.total.baseline_ms else 0.0
    measured = cell.measured
    return (
        f"{cell.baseline_ms:.2f} ms",
        f"{share:.0%}",
        f"{cell.pruned_ms:.2f} ms",
        times(cell.predicted) if cell.predicted else "-",
        escape(times(measured.value) + interval(measured)) if measured else "-",
    )


def _lines(result: Explanation) -> Iterator[Text]:
    low, high = result.latency_spread
    yield Text(
        f"One call at batch {result.batch}: {result.latency_baseline_ms:.2f} -> "
        f"{result.latency_pruned_ms:.2f} ms, {times(result.latency.value)}"
        f"{interval(result.latency)}; median of {result.runs} calls without the profiler, spread "
        f"(p90 - p10) / p50 {low:.0%} and {high:.0%}."
    )
    for role, fused in result.fused.items():
        listed = ", ".join(f"{name} {count}" for name, count in sorted(fused.items()))
        yield Text(f"Put in by the runtime, {role}: {listed or 'nothing'}.")
    yield Text(f"Predicted: {result.model}.")
    yield Text(f"Measured: {result.clock}; {result.runs} calls of each, turn and turn about.")
    yield Text()
    for finding in result.findings:
        yield Text(f"- {finding.says}")
