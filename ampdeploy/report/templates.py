"""Where the templates of the views are, and what they may call."""

from __future__ import annotations

from typing import Any

from ampdeploy.optional import require
from ampdeploy.report import rows
from ampdeploy.report.escape import markdown_text


def environment(needed_by: str, *, html: bool) -> Any:
    """A jinja2 environment over this package's templates; a name that is not given is an error.

    Args:
        needed_by: What is rendered, for the message if jinja2 is missing.
        html: Escape every value for HTML; else every text for Markdown.
    """
    jinja2 = require("jinja2", needed_by=needed_by)
    result = jinja2.Environment(
        loader=jinja2.PackageLoader("ampdeploy", "report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=html,
        finalize=None if html else _plain,
    )
    result.globals["percent"] = rows.percent
    result.filters.update(
        fact=_fact,
        milliseconds=rows.milliseconds,
        percent=rows.percent,
        size=rows.size,
        joules=rows.joules,
        images_per_second=rows.images_per_second,
        interval=rows.interval,
        times=rows.times,
        score=rows.score,
        fidelity=rows.fidelity_interval,
        difference=rows.difference,
    )
    return result


def _plain(value: Any) -> Any:
    """What an expression of a Markdown template gives: no text is trusted, wherever it is from."""
    return markdown_text(value) if isinstance(value, str) else value


def _fact(host: dict[str, Any], name: str) -> str:
    """A fact about the host, of which any may be unknown."""
    value = host.get(name)
    return "unknown" if value is None else str(value)
