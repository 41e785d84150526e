"""Where the templates of the views are, and what they may call."""

from __future__ import annotations

from typing import Any

from ampdeploy.optional import require
from ampdeploy.report import rows


def environment(needed_by: str, *, html: bool) -> Any:
    """A jinja2 environment over this package's templates; a name that is not given is an error.

    Args:
        needed_by: What is rendered, for the message if jinja2 is missing.
        html: Escape every value; Markdown escapes with `cell` and `prose`.
    """
    jinja2 = require("jinja2", needed_by=needed_by)
    result = jinja2.Environment(
        loader=jinja2.PackageLoader("ampdeploy", "report"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=html,
    )
    result.filters.update(
        cell=_cell,
        prose=_prose,
        fact=_fact,
        milliseconds=rows.milliseconds,
        percent=rows.percent,
        size=rows.size,
        joules=rows.joules,
        images_per_second=rows.images_per_second,
        interval=rows.interval,
        times=rows.times,
        score=rows.score,
        difference=rows.difference,
    )
    return result


def _prose(value: Any) -> str:
    """Text that cannot begin an HTML tag, nor a line of its own, in Markdown."""
    return str(value).replace("&", "&amp;").replace("<", "&lt;").replace("\n", " ")


def _cell(value: Any) -> str:
    """Text that cannot break out of a Markdown table's cell."""
    return _prose(value).replace("|", "\\|")


def _fact(host: dict[str, Any], name: str) -> str:
    """A fact about the host, of which any may be unknown."""
    value = host.get(name)
    return "unknown" if value is None else str(value)
