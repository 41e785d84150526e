"""Tables on a terminal: the end of `ampdeploy build`, and the comparison of several runs."""

from __future__ import annotations

from collections.abc import Iterator

from rich.markup import escape
from rich.table import Table

from ampdeploy.report.compare import Comparison, Entry, missing, not_comparable
from ampdeploy.report.result import Report
from ampdeploy.report.rows import comparison_rows, left_out


def summary_table(report: Report) -> Table:
    """Baseline against pruned against ratio, as in the first table of report.md."""
    absent = "; ".join(f"{names} ({why})" for names, why in left_out(report))
    table = Table(
        title=escape(f"{report.model} on {report.target}"),
        title_justify="left",
        caption=escape(f"Not measured: {absent}.") if absent else None,
        caption_justify="left",
    )
    table.add_column("")
    for heading in ("baseline", "pruned", "ratio [95% interval]"):
        table.add_column(escape(heading), justify="right")
    for row in comparison_rows(report):
        # Intervals are written in square brackets, which rich would read as markup.
        table.add_row(*(escape(text) for text in (row.what, row.baseline, row.pruned, row.ratio)))
    return table


def comparison_table(comparison: Comparison) -> Table:
    """A column for each run; #1 is best, n/c is not comparable."""
    table = Table()
    table.add_column("")
    for run in comparison.runs:
        table.add_column(escape(run), justify="right")
    for metric in comparison.metrics:
        if metric.measured:
            cells = [_cell(entry, metric.told_apart) for entry in metric.entries]
            table.add_row(*map(escape, (metric.name, *cells)))
    return table


def comparison_notes(comparison: Comparison) -> Iterator[str]:
    """What the table cannot say: why a number is not ranked, or not there."""
    yield (
        "#1 is best: a rank counts the runs whose whole 95% interval is better; "
        "without ranks, the runs cannot be told apart or times are not compared."
    )
    for run, reasons in not_comparable(comparison).items():
        yield f"n/c {run}: not comparable with {comparison.runs[0]}: {'; '.join(reasons)}."
    for reason, names in missing(comparison).items():
        yield f"not measured: {', '.join(names)}: {reason}."


def _cell(entry: Entry, told_apart: bool) -> str:
    if entry.value is None:
        return "–"
    if not entry.comparable:
        return f"{entry.shown} n/c"
    return f"{entry.shown} #{entry.rank}" if told_apart and entry.rank else entry.shown
