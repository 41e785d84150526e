"""`report.md`: a view of `report.json` for people."""

from __future__ import annotations

from typing import Any

from ampdeploy.optional import require
from ampdeploy.report import rows
from ampdeploy.report.result import Report, unmeasured
from ampdeploy.report.verdict import verdicts

TEMPLATE = "report.md.j2"


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown."""
    jinja2 = require("jinja2", needed_by="report.md")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("ampdeploy", "report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `cell` escapes what would break a table
    )
    environment.filters.update(
        cell=_cell,
        fact=_fact,
        milliseconds=rows.milliseconds,
        percent=rows.percent,
        size=rows.size,
    )
    text: str = environment.get_template(TEMPLATE).render(
        report=report,
        host=report.host,
        rows=rows.comparison_rows(report),
        verdicts=verdicts(report),
        batches=rows.batch_keys(report),
        unmeasured=unmeasured(report),
        packages={k: v for k, v in (report.host.get("packages") or {}).items() if v},
    )
    return text


def _cell(value: Any) -> str:
    """Text that cannot break out of a table cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _fact(host: dict[str, Any], name: str) -> str:
    """A fact about the host, of which any may be unknown."""
    value = host.get(name)
    return "unknown" if value is None else str(value)
