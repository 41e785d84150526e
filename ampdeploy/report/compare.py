"""Several reports in one table: what was measured alike is ranked, what was not is said to be so.

Every run is compared with the first that has the number. Ranks follow 95% intervals: a run is
behind another only if its whole interval is worse, so runs that cannot be told apart share a rank.
Times of separate runs have no common interval (machines drift between them), so milliseconds are
shown but never ranked; what is ranked is the ratio of each run to its own baseline, which was
measured in turns with it, and only if the baselines are the same model. Sizes and peak memory
come without an interval: their rank is that of the values. A number that should have an interval
and has none is not ranked, and one that nothing bounds on one side can be anywhere there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ampdeploy import __version__
from ampdeploy.artifacts import REPORT_JSON
from ampdeploy.errors import ConfigError
from ampdeploy.report import rows
from ampdeploy.report.charts import Point, size_chart
from ampdeploy.report.compare_lines import Better, Line, lines
from ampdeploy.report.result import Interval, Report
from ampdeploy.report.svg import Chart
from ampdeploy.report.templates import environment


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One number of one run."""

    run: str
    value: float | None
    ci95_low: float | None
    ci95_high: float | None
    shown: str
    rank: int | None
    """1 more than the comparable runs whose whole interval is better. None: not ranked."""
    why: str | None
    """Why it was not measured, or cannot be compared with the others."""

    @property
    def comparable(self) -> bool:
        """Whether it was measured, and as the others were."""
        return self.why is None


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One line of the table."""

    name: str
    better: Better | None
    """None: shown, never ranked."""
    entries: tuple[Entry, ...]
    """Of every run, in the order given."""

    @property
    def measured(self) -> bool:
        """Whether any run has it."""
        return any(entry.value is not None for entry in self.entries)

    @property
    def told_apart(self) -> bool:
        """Whether some run is clearly behind another; else there is no best."""
        return any((entry.rank or 1) > 1 for entry in self.entries)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The table."""

    runs: tuple[str, ...]
    reports: tuple[Report, ...]
    metrics: tuple[Metric, ...]


def run_names(paths: Sequence[Path]) -> list[str]:
    """A short name for each run: its folder's, with as many parents as tell it apart.

    Raises:
        ConfigError: The same report twice.
    """
    whole = [
        path if path.is_dir() else path.parent if path.name == REPORT_JSON else path.with_suffix("")
        for path in (p.resolve() for p in paths)
    ]
    for index, path in enumerate(whole):
        if path in whole[:index]:
            raise ConfigError(f"{paths[index]} is given twice. Name each report once.")
    depth = 1
    while len({path.parts[-depth:] for path in whole}) < len(whole):
        depth += 1
    return ["/".join(path.parts[-depth:]) for path in whole]


def compare(runs: Mapping[str, Report]) -> Comparison:
    """Put reports beside each other.

    Args:
        runs: Name -> report, at least two; the first is the reference.
    """
    metrics = [_metric(line, runs) for line in lines(list(runs.values()))]
    return Comparison(runs=tuple(runs), reports=tuple(runs.values()), metrics=tuple(metrics))


def not_comparable(comparison: Comparison) -> dict[str, list[str]]:
    """Run -> everything in it that was measured otherwise than in the first, each once."""
    found: dict[str, list[str]] = {}
    for metric in comparison.metrics:
        for entry in metric.entries:
            if entry.value is None or entry.why is None:
                continue
            for reason in entry.why.split("; "):
                if reason not in found.setdefault(entry.run, []):
                    found[entry.run].append(reason)
    return found


def _metric(line: Line, runs: Mapping[str, Report]) -> Metric:
    reference: Mapping[str, Any] | None = None
    entries: list[Entry] = []
    lost: set[str] = set()  # runs whose number should have an interval, and has none
    for run, report in runs.items():
        taken = line.take(report)
        if taken is None:
            entries.append(_entry(run, line, None, line.why(report)))
            continue
        conditions = line.conditions(report)
        if reference is None:
            reference = conditions
        entries.append(_entry(run, line, taken, _differences(reference, conditions)))
        if isinstance(taken, Interval) and taken.lost:
            lost.add(run)
    ranked = tuple(_ranked(entries, line.better, lost))
    return Metric(name=line.name, better=line.better, entries=ranked)


def _entry(run: str, line: Line, taken: float | Interval | None, why: str | None) -> Entry:
    low = high = None
    value: float | None
    if isinstance(taken, Interval):
        value, low, high = taken.value, taken.ci95_low, taken.ci95_high
        shown = rows.interval(taken, line.form) + line.unit
    else:
        value = taken
        shown = rows.NOT_MEASURED if taken is None else line.form(taken) + line.unit
    return Entry(
        run=run, value=value, ci95_low=low, ci95_high=high, shown=shown, rank=None, why=why
    )


def _differences(first: Mapping[str, Any], other: Mapping[str, Any]) -> str | None:
    found = [
        f"other {name}: {_words(value)}, not {_words(first[name])}"
        for name, value in other.items()
        if name in first and value != first[name]
    ]
    return "; ".join(found) or None


def _words(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    text = "unknown" if value is None else str(value)
    # A hash is told apart by its beginning.
    return text[:12] if len(text) == 64 and " " not in text else text


def _ranked(entries: list[Entry], better: Better | None, lost: set[str]) -> Iterator[Entry]:
    measured = [entry for entry in entries if entry.comparable and entry.run not in lost]
    rank = better is not None and len(measured) > 1
    sign = -1.0 if better == "higher" else 1.0

    def ends(entry: Entry) -> tuple[float, float]:
        assert entry.value is not None
        low, high = entry.value, entry.value
        if entry.ci95_low is not None or entry.ci95_high is not None:
            low = -math.inf if entry.ci95_low is None else entry.ci95_low
            high = math.inf if entry.ci95_high is None else entry.ci95_high
        first, second = sorted((sign * low, sign * high))
        return first, second

    for entry in entries:
        if not rank or entry not in measured:
            yield entry
            continue
        ahead = sum(ends(other)[1] < ends(entry)[0] for other in measured)
        yield Entry(**{**vars(entry), "rank": 1 + ahead})


def to_plain(comparison: Comparison) -> dict[str, Any]:
    """The table as data for `--json`; the reports themselves are in their own files."""
    return {
        "runs": list(comparison.runs),
        "metrics": [
            {
                "name": metric.name,
                "better": metric.better,
                "entries": [
                    {**vars(entry), "comparable": entry.comparable} for entry in metric.entries
                ],
            }
            for metric in comparison.metrics
        ],
    }


def render_markdown(comparison: Comparison) -> str:
    """The table for a comment on a pull request."""
    text: str = (
        environment("the comparison", html=False)
        .get_template("compare.md.j2")
        .render(**_shared(comparison))
    )
    return text


def render_html(comparison: Comparison) -> str:
    """The table and the curves, as one self-contained file."""
    text: str = (
        environment("the comparison", html=True)
        .get_template("compare.html.j2")
        .render(tool_version=__version__, charts=_curves(comparison), **_shared(comparison))
    )
    return text


def _shared(comparison: Comparison) -> dict[str, Any]:
    return {
        "comparison": comparison,
        "metrics": [metric for metric in comparison.metrics if metric.measured],
        "otherwise": not_comparable(comparison),
        "missing": missing(comparison),
    }


def missing(comparison: Comparison) -> dict[str, list[str]]:
    """Reason -> ``metric (run)`` of everything that some run has not measured."""
    return rows.by_reason(
        (f"{metric.name} ({entry.run})", entry.why or "no reason is given")
        for metric in comparison.metrics
        for entry in metric.entries
        if entry.value is None
    )


# Metric -> title of its curve over size, and its value for the baseline itself.
_CURVES = {
    "Feature cosine, p1": ("Fidelity against size", 1.0),
    "Latency ratio": ("Latency against size", 1.0),
}


def _curves(comparison: Comparison) -> list[Chart]:
    """Fidelity and speed over size, of the runs that can be compared."""
    found: list[Chart] = []
    for metric in comparison.metrics:
        start = next((name for name in _CURVES if metric.name.startswith(name)), None)
        if start is None or not any(entry.comparable for entry in metric.entries):
            continue
        title, of_baseline = _CURVES[start]
        points = [Point(name="baseline", x=1.0, y=of_baseline, baseline=True)]
        points += [
            Point(
                name=entry.run,
                x=report.ratio.params,
                y=entry.value,
                low=entry.ci95_low,
                high=entry.ci95_high,
            )
            for entry, report in zip(metric.entries, comparison.reports, strict=True)
            if entry.comparable and entry.value is not None
        ]
        name = f"curve-{len(found)}"
        found.append(size_chart(name, title, metric.name, points, joined=True))
    return found
