"""`report.md`: a view of `report.json` for people, fit for a comment on a pull request."""

from __future__ import annotations

from ampdeploy.report import rows
from ampdeploy.report.result import Report, unmeasured
from ampdeploy.report.templates import environment
from ampdeploy.report.verdict import verdicts

TEMPLATE = "report.md.j2"


def render_markdown(report: Report) -> str:
    """The report as GitHub-flavoured Markdown: verdict and table first, the rest folded."""
    text: str = (
        environment("report.md", html=False)
        .get_template(TEMPLATE)
        .render(
            report=report,
            host=report.host,
            rows=rows.comparison_rows(report),
            left_out=rows.left_out(report),
            verdicts=verdicts(report),
            clocks=rows.measured_clocks(report),
            unmeasured=rows.by_reason(unmeasured(report)),
            packages=rows.packages(report),
            sets=rows.datasets(report),
        )
    )
    return text
