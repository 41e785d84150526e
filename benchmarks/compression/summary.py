"""From rows, one per seed, to mean and spread: what tables and plots show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ampdeploy.errors import ArtifactError

KEYS = ("method", "label", "cut", "exact")


def summarise(rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean, smallest and largest over the seeds of every number, by method and size.

    Args:
        rows: As `run` writes them: numbers, and one level of dictionaries of numbers.

    Returns:
        Per method and size, in the order of first appearance: `KEYS`, ``seeds`` (how many), and
        every number as {"mean", "min", "max"}; None where no seed has it.
    """
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["cut"]), []).append(row)
    return [
        {
            **{key: group[0][key] for key in KEYS},
            "seeds": len(group),
            **{
                name: _spread([row[name] for row in group])
                for name in group[0]
                if name not in (*KEYS, "seed", "widths")
            },
        }
        for group in groups.values()
    ]


def _spread(values: list[Any]) -> Any:
    if isinstance(values[0], dict):
        return {name: _spread([value[name] for value in values]) for name in values[0]}
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    return {"mean": sum(numbers) / len(numbers), "min": min(numbers), "max": max(numbers)}


def read_summary(result: Any, source: str) -> list[dict[str, Any]]:
    """The summary of a result file.

    Raises:
        ArtifactError: It is not a result of this comparison, or has no rows yet.
    """
    if not isinstance(result, dict) or result.get("benchmark") != "compression":
        raise ArtifactError(
            f"{source} is not a result of benchmarks.compression.run. Give the file of its --out."
        )
    summary: list[dict[str, Any]] = result["summary"]
    if not summary:
        raise ArtifactError(f"{source} has no rows. Run benchmarks.compression.run to the end.")
    return summary
