"""`report.html`: a view of `report.json` in one file that loads nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ampdeploy.report import charts, rows
from ampdeploy.report.result import Interval, Report, unmeasured
from ampdeploy.report.templates import environment
from ampdeploy.report.verdict import DROP_IN_P1, UNUSABLE_P1, Tone, judgements, speed_verdict

TEMPLATE = "report.html.j2"


@dataclass(frozen=True, kw_only=True)
class Tile:
    """One headline number."""

    what: str
    number: str
    detail: str
    tone: Tone = "neutral"


def render_html(report: Report) -> str:
    """The report as one self-contained HTML file, for every screen and for paper."""
    clocks = rows.measured_clocks(report)
    text: str = (
        environment("report.html", html=True)
        .get_template(TEMPLATE)
        .render(
            tool_version=report.tool_version,
            report=report,
            host=report.host,
            tiles=tiles(report),
            judged=judgements(report),
            rows=rows.comparison_rows(report),
            left_out=rows.left_out(report),
            clocks=clocks,
            charts={
                "ratios": charts.ratio_chart(report),
                "latency": [
                    charts.latency_chart(f"latency-{index}-{key}", f"{label}, batch {key}", *pair)
                    for index, (label, sizes) in enumerate(clocks)
                    for key, pair in sizes.items()
                ],
                "widths": charts.width_chart(report.method.widths),
                "fidelity": charts.fidelity_chart(report),
                "stages": charts.stage_chart(report.stages_seconds)
                if report.stages_seconds
                else None,
            },
            unmeasured=rows.by_reason(unmeasured(report)),
            packages=rows.packages(report),
            sets=rows.datasets(report),
        )
    )
    return text


def tiles(report: Report) -> list[Tile]:
    """The headline numbers, with their intervals: what was measured, most asked for first."""
    return [
        *_speed_tiles(report),
        _cut("Parameters", report.ratio.params, rows.count, report, "params"),
        *_resource_tiles(report),
        *_quality_tiles(report),
    ]


# A number that large print would make look established.
_OPEN: dict[Tone, str] = {"neutral": "not established: ", "good": "", "bad": "", "caution": ""}


def _speed_tiles(report: Report) -> list[Tile]:
    base, slim, ratios = report.baseline.latency_ms, report.pruned.latency_ms, report.ratio.latency
    if base is None or slim is None or ratios is None:
        why = report.ratio.why.get("latency", "no times")
        return [Tile(what="Latency", number="–", detail=f"not measured: {why}")]
    found = []
    for key in sorted(ratios, key=int):
        tone = speed_verdict(key, ratios[key]).tone
        found.append(
            Tile(
                what=f"Speed, batch {key}",
                number=f"{1 / ratios[key].value:.2f}×",
                detail=f"{_OPEN[tone]}latency ratio {rows.interval(ratios[key])}; "
                f"{rows.milliseconds(base[key].p50)} → {rows.milliseconds(slim[key].p50)}",
                tone=tone,
            )
        )
    return found


def _cut(what: str, ratio: float, form: Callable[[Any], str], report: Report, field: str) -> Tile:
    before, after = getattr(report.baseline, field), getattr(report.pruned, field)
    return Tile(
        what=what,
        number=f"{100 * (ratio - 1):+.1f}%".replace("-", "−"),
        detail=f"{form(before)} → {form(after)}",
        tone="good" if ratio < 1 else "bad" if ratio > 1 else "neutral",
    )


def _resource_tiles(report: Report) -> list[Tile]:
    found = []
    if report.ratio.memory is not None:
        found.append(_cut("Peak memory", report.ratio.memory, rows.size, report, "memory_bytes"))
    if report.ratio.energy is not None:
        name = "energy_j_per_image"
        found.append(_cut("Energy per image", report.ratio.energy, rows.joules, report, name))
    return found


def _quality_tiles(report: Report) -> list[Tile]:
    found = []
    fidelity = report.fidelity
    if fidelity is not None:
        p1 = fidelity.cosine_p1
        found.append(
            Tile(
                what="Feature cosine, p1",
                number=f"{p1:.3f}",
                detail=f"{rows.fidelity_interval(fidelity, 'cosine_p1', rows.times)}; mean "
                f"{rows.fidelity_interval(fidelity, 'cosine_mean', rows.times)}, smallest "
                f"{fidelity.cosine_min:.3f}; {fidelity.images} images",
                tone="good" if p1 >= DROP_IN_P1 else "bad" if p1 < UNUSABLE_P1 else "neutral",
            )
        )
    for metric, change in list((report.ratio.accuracy_difference or {}).items())[:1]:
        tone = _tone_of_difference(change)
        before = (report.baseline.accuracy or {}).get(metric)
        after = (report.pruned.accuracy or {}).get(metric)
        found.append(
            Tile(
                what=f"Accuracy, {metric}",
                number=f"{100 * change.value:+.1f} pp".replace("-", "−"),
                detail=f"{_OPEN[tone]}{rows.difference(change)}; {rows.percent(before)} → "
                f"{rows.percent(after)}",
                tone=tone,
            )
        )
    return found


def _tone_of_difference(change: Interval) -> Tone:
    if change.ci95_low is None or change.ci95_high is None:
        return "neutral"
    return "good" if change.ci95_low > 0 else "bad" if change.ci95_high < 0 else "neutral"
