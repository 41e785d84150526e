"""The end of `ampdeploy build` on a terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ampdeploy.report.result import Report
from ampdeploy.report.rows import comparison_rows


def summary_table(report: Report) -> Table:
    """Baseline against pruned against ratio, as in the first table of report.md."""
    table = Table(title=escape(f"{report.model} on {report.target}"), title_justify="left")
    table.add_column("")
    for heading in ("baseline", "pruned", "ratio [95% interval]"):
        table.add_column(escape(heading), justify="right")
    for row in comparison_rows(report):
        # Intervals are written in square brackets, which rich would read as markup.
        table.add_row(*(escape(text) for text in (row.what, row.baseline, row.pruned, row.ratio)))
    return table
