"""The charts of report.html. Baseline and pruned differ in colour, shape and line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ampdeploy.report import rows, svg
from ampdeploy.report.result import BlockWidth, Interval, LatencyStats, Report
from ampdeploy.report.svg import CHARACTER, WIDTH, Chart, Scale

# The longest call this many times the 90th percentile: a linear axis would show nothing else.
TAIL = 3.0


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model in a chart of something against size."""

    name: str
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    baseline: bool = False


def ratio_chart(report: Report) -> Chart:
    """Every ratio to the baseline with its interval, on one logarithmic axis around 1."""
    ratio = report.ratio
    points: list[tuple[str, Interval]] = [
        ("Parameters", _exact(ratio.params)),
        ("FLOPs", _exact(ratio.flops)),
        ("File size", _exact(ratio.file_bytes)),
    ]
    for name, _, label in rows.CLOCKS:
        found = getattr(ratio, name) or {}
        points += [(f"{label}, batch {key}", found[key]) for key in sorted(found, key=int)]
    if ratio.memory is not None:
        points.append(("Peak memory", _exact(ratio.memory)))
    if ratio.energy is not None:
        points.append(("Energy", _exact(ratio.energy)))
    for key in sorted(ratio.throughput or {}, key=int):
        points.append((f"Throughput, batch {key} ↑", (ratio.throughput or {})[key]))
    ends = [
        end
        for _, value in points
        for end in (value.value, value.ci95_low, value.ci95_high, 1.0)
        if end is not None and end > 0
    ]
    left = 10 + CHARACTER * max(len(name) for name, _ in points)
    scale = Scale(min(ends) / 1.08, max(ends) * 1.08, left, WIDTH - 52, log=True)
    bottom = 10.0 + 22 * len(points)
    parts = svg.x_axis(scale, 6, bottom, "pruned / baseline, logarithmic")
    parts.append(svg.line(scale(1), 6, scale(1), bottom, "one"))
    for index, (name, value) in enumerate(points):
        y = 20.0 + 22 * index
        shown = rows.interval(value) if _measured(value) else rows.times(value.value)
        parts.append(svg.text(left - 8, y + 4, name, anchor="end"))
        if value.ci95_low is not None and value.ci95_high is not None:
            parts.append(svg.line(scale(value.ci95_low), y, scale(value.ci95_high), y, "whisker"))
        css = "pruned" if _differs(value) else "pruned hollow"
        tip = f"{name}: {shown}"
        if value.value > 0:
            parts.append(svg.marker(scale(value.value), y, "circle", css, tip))
        parts.append(svg.text(WIDTH - 2, y + 4, rows.times(value.value), anchor="end", css="value"))
    words = "; ".join(f"{name} {rows.times(value.value)}" for name, value in points)
    return svg.chart(
        "ratios", "Pruned against baseline", f"Ratios, 1 is equal: {words}.", bottom + 38, parts
    )


def _exact(value: float) -> Interval:
    return Interval(value=value, ci95_low=value, ci95_high=value)


def _measured(value: Interval) -> bool:
    return not value.ci95_low == value.value == value.ci95_high


def _differs(value: Interval) -> bool:
    """Whether 1 is outside the interval."""
    if value.ci95_low is None or value.ci95_high is None:
        return False
    return not value.ci95_low <= 1 <= value.ci95_high


def latency_chart(name: str, title: str, before: LatencyStats, after: LatencyStats) -> Chart:
    """Share of calls that took no longer than a time, from the 21 quantiles of each model."""
    low = min(before.min, after.min)
    high = max(before.max, after.max)
    log = high > TAIL * max(before.p90, after.p90)
    # Never 1: every call may have taken the same time.
    air = max((high / low) ** 0.04 if log else 1 + 0.04 * (high - low) / high, 1.001)
    x = Scale(low / air, high * air, 38, WIDTH - 12, log=log)
    y = Scale(0, 100, 190, 30)
    parts = svg.y_axis(y, 38, WIDTH - 12, "{:g}%")
    parts += svg.x_axis(x, 30, 190, "milliseconds per call" + (", logarithmic" if log else ""))
    pair = (("baseline", before, "square"), ("pruned", after, "circle"))
    for role, stats, shape in pair:
        last = len(stats.quantiles) - 1
        curve = [(x(ms), y(100 * step / last)) for step, ms in enumerate(stats.quantiles)]
        parts.append(svg.path(curve, f"curve {role}"))
        tip = f"{role}: median {rows.milliseconds(stats.p50)}"
        parts.append(svg.marker(x(stats.p50), y(50), shape, role, tip))
    parts += _legend(38)
    words = "; ".join(
        f"{role} half within {rows.milliseconds(s.p50)}, 90% within {rows.milliseconds(s.p90)}, "
        f"all within {rows.milliseconds(s.max)}"
        for role, s, _ in pair
    )
    return svg.chart(name, title, f"Distribution of {after.n} calls of each: {words}.", 228, parts)


def _legend(left: float) -> list[str]:
    parts = []
    for index, (role, shape) in enumerate((("baseline", "square"), ("pruned", "circle"))):
        x = left + 100 * index
        parts.append(svg.path([(x, 14), (x + 28, 14)], f"curve {role}"))
        parts.append(svg.marker(x + 14, 14, shape, role))
        parts.append(svg.text(x + 34, 18, role, anchor="start"))
    return parts


def width_chart(widths: Sequence[BlockWidth]) -> Chart:
    """Hidden neurons of each block: those there were, and those that are left."""
    most = max(width.hidden for width in widths)
    y = Scale(0, most * 1.02, 190, 30)
    parts = svg.y_axis(y, 42, WIDTH - 6)
    step = (WIDTH - 50) / len(widths)
    every = -(-len(widths) // 14)
    for index, width in enumerate(widths):
        left, bar = 44 + step * index, step * 0.78
        share = rows.percent(width.kept / width.hidden)
        tip = f"block {width.block}: {width.kept} of {width.hidden} ({share})"
        parts.append(svg.rect(left, y(width.hidden), bar, y(0) - y(width.hidden), "removed", tip))
        parts.append(svg.rect(left, y(width.kept), bar, y(0) - y(width.kept), "pruned", tip))
        if index % every == 0:
            parts.append(svg.text(left + bar / 2, 204, str(width.block)))
    parts.append(svg.line(42, 190, WIDTH - 6, 190, "axis"))
    parts.append(svg.text(WIDTH / 2, 222, "block", css="label"))
    for x, css, word in ((42, "removed", "removed"), (130, "pruned", "kept")):
        parts += [svg.rect(x, 8, 12, 12, css), svg.text(x + 18, 18, word, anchor="start")]
    words = ", ".join(f"{w.block}: {w.kept} of {w.hidden}" for w in widths)
    return svg.chart(
        "widths", "Hidden MLP neurons per block", f"Kept by block: {words}.", 228, parts
    )


def size_chart(
    name: str, title: str, y_label: str, points: Sequence[Point], *, joined: bool = False
) -> Chart:
    """Something against the share of the parameters that is left.

    Args:
        name: Unique in the page.
        title: Of the chart.
        y_label: What the vertical axis counts.
        points: The models; the baseline among them where its value is known.
        joined: Draw a line from each to the next larger.
    """
    x = Scale(*svg.padded([100 * point.x for point in points], 0.12), 46, WIDTH - 14)
    ends = [end for point in points for end in (point.y, point.low, point.high) if end is not None]
    y = Scale(*svg.padded(ends, 0.15), 190, 26)
    parts = svg.y_axis(y, 46, WIDTH - 14)
    parts += svg.x_axis(x, 26, 190, "parameters, % of the baseline")
    parts.append(svg.text(4, 14, y_label, anchor="start", css="label"))
    ordered = sorted(points, key=lambda point: point.x)
    if joined and len(ordered) > 1:
        parts.append(svg.path([(x(100 * p.x), y(p.y)) for p in ordered], "join"))
    taken: list[tuple[float, float]] = []
    for point in ordered:
        here, there = x(100 * point.x), y(point.y)
        role, shape = ("baseline", "square") if point.baseline else ("pruned", "circle")
        tip = f"{point.name}: {100 * point.x:.1f}% of the parameters, {point.y:.4f}"
        if point.low is not None and point.high is not None:
            parts.append(svg.line(here, y(point.low), here, y(point.high), "whisker"))
        parts.append(svg.marker(here, there, shape, role, tip))
        parts.append(_name_of(point.name, here, there, taken))
    words = "; ".join(f"{p.name} {100 * p.x:.1f}%: {p.y:.4f}" for p in ordered)
    return svg.chart(name, title, f"{y_label} by share of parameters: {words}.", 228, parts)


def _name_of(name: str, x: float, y: float, taken: list[tuple[float, float]]) -> str:
    """A label towards the middle, so that it is not cut off, on the side of a point that a rising
    line leaves free, and on no other label; its place is added to `taken`."""
    right = x > WIDTH / 2
    away = -12 if right else 12
    y += -8 if right else 16
    while any(abs(y - other_y) < 11 and abs(x - other_x) < 80 for other_x, other_y in taken):
        y += away
    taken.append((x, y))
    shown = name if len(name) <= 28 else f"{name[:27]}…"
    return svg.text(x + (-8 if right else 8), y, shown, anchor="end" if right else "start")


def fidelity_chart(report: Report) -> Chart | None:
    """This run's fidelity at its size; the baseline is equal to itself by definition."""
    if report.fidelity is None:
        return None
    points = [
        Point(name="baseline", x=1.0, y=1.0, baseline=True),
    ]
    for name, field in (("pruned, mean", "cosine_mean"), ("pruned, p1", "cosine_p1")):
        found = report.fidelity.interval(field)
        assert found is not None  # of features, there are always cosines
        points.append(
            Point(
                name=name,
                x=report.ratio.params,
                y=found.value,
                low=found.ci95_low,
                high=found.ci95_high,
            )
        )
    return size_chart("fidelity", "Fidelity against size", "feature cosine to baseline", points)


def stage_chart(seconds: Mapping[str, float]) -> Chart:
    """Where the build's time went."""
    left = 12 + CHARACTER * max(len(stage) for stage in seconds)
    x = Scale(0, max(*seconds.values(), 1e-3), left, WIDTH - 56)
    parts = []
    for index, (stage, value) in enumerate(seconds.items()):
        y = 4.0 + 22 * index
        parts.append(svg.text(left - 6, y + 13, stage, anchor="end"))
        parts.append(svg.rect(left, y, max(x(value) - left, 1), 16, "bar", f"{value:.1f} s"))
        parts.append(svg.text(x(value) + 6, y + 13, f"{value:.1f} s", anchor="start", css="value"))
    words = ", ".join(f"{stage} {value:.1f} s" for stage, value in seconds.items())
    return svg.chart("stages", "Time per stage", f"{words}.", 8 + 22 * len(seconds), parts)
