"""What the gate says, on a terminal, in a log and in Markdown."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from ampdeploy.gate.finding import Finding, Status
from ampdeploy.gate.gate import Decision
from ampdeploy.report.escape import markdown_text

_STYLES = {
    Status.PASS: "green",
    Status.FAIL: "bold red",
    Status.NOT_MEASURED: "red",
    Status.INCOMPARABLE: "red",
    Status.UNDECIDED: "yellow",
    Status.SKIPPED: "dim",
}
_WIDTH = max(len(status.value) for status in Status)


def _word(finding: Finding) -> str:
    """The status; what closes the gate is told by more than its colour."""
    value = finding.status.value
    return value.upper() if finding.status is Status.FAIL else value


def line(finding: Finding) -> str:
    """One finding as one line of text."""
    measured = "" if finding.measured == "–" else f"{finding.measured}; "
    text = f"{_word(finding):{_WIDTH}}  {finding.name}: {measured}{finding.reason}"
    return " ".join(text.splitlines())


def table(decision: Decision) -> Table:
    """All findings as a table for a terminal."""
    title = f"{decision.headline} ({decision.model} on {decision.target})"
    shown = Table(title=escape(title), title_justify="left")
    shown.add_column("", no_wrap=True)
    for heading in ("rule", "measured [95% interval]", "why"):
        shown.add_column(escape(heading))
    for finding in decision.findings:
        style = _STYLES[finding.status]
        # Intervals are written in square brackets, which rich would read as markup.
        shown.add_row(
            f"[{style}]{_word(finding)}[/]",
            *(escape(text) for text in (finding.name, finding.measured, finding.reason)),
        )
    return shown


def markdown(decision: Decision) -> str:
    """A section of GitHub-flavoured Markdown, for a job's summary or a comment."""
    lines = [
        f"### {_cell(decision.headline)}",
        "",
        f"{_cell(decision.model)} on {_cell(decision.target)}",
        "",
        "| | rule | measured [95% interval] | why |",
        "|---|---|---|---|",
    ]
    for finding in decision.findings:
        word = _word(finding)
        cells = (finding.name, finding.measured, finding.reason)
        shown = f"**{word}**" if decision.blocks(finding) else word
        lines.append(f"| {shown} | {' | '.join(map(_cell, cells))} |")
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    """Text that cannot break out of a table's cell, nor become a link or a mention."""
    return markdown_text(" ".join(text.split()))
