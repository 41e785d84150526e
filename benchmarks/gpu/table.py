"""The rows of a result as lines of text."""

from __future__ import annotations

from typing import Any

HEAD = (
    f"{'model':<16}{'way':<14}{'batch':>5}{'dense ms':>10}{'pruned ms':>10}"
    f"{'ratio':>7}  {'95%':<13}{'cosine p1':>10}"
)


def summary_lines(rows: list[dict[str, Any]]) -> list[str]:
    """A head and one line per timed or failed row.

    Args:
        rows: As `run` keeps them.
    """
    lines = [HEAD]
    for row in rows:
        head = f"{row['model']:<16}{row['way']:<14}{row['batch'] or '':>5}"
        if "error" in row:
            lines.append(f"{head}  failed: {row['error'].splitlines()[0]}")
        elif "ratio" in row:
            lines.append(head + _timed(row))
    return lines


def _timed(row: dict[str, Any]) -> str:
    ratio = row["ratio"]
    interval = "-"
    if ratio["ci95_low"] is not None:
        interval = f"{ratio['ci95_low']:.3f}-{ratio['ci95_high']:.3f}"
    worst = min(
        seen["cosine_p1"] for outputs in row["numerics"].values() for seen in outputs.values()
    )
    return (
        f"{row['dense']['p50']:>10.3f}{row['pruned']['p50']:>10.3f}{ratio['value']:>7.3f}"
        f"  {interval:<13}{worst:>10.6f}"
    )
