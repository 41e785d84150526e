"""The few pieces of SVG that the charts of report.html are made of.

Own code, not a plotting library: a report is also rendered on a Jetson, where matplotlib would be
the largest dependency, and its SVG fixes every colour, so that one file could not follow a light
and a dark screen. Here shapes have classes, and the style sheet of the page has the colours.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

# In units of the view box. Charts are no wider than a phone, so that their text stays readable
# there; pages put several beside each other.
WIDTH = 400.0
CHARACTER = 6.2  # mean width of a character at the charts' font size of 11


@dataclass(frozen=True)
class Chart:
    """A finished chart."""

    title: str
    description: str
    """What it shows, for those who do not see it: with the numbers that matter."""
    svg: str


@dataclass(frozen=True)
class Scale:
    """Values to positions along one axis."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, here = self.low, self.high, value
        if self.log:
            low, high, here = math.log(low), math.log(high), math.log(value)
        return self.start + (here - low) / (high - low) * (self.end - self.start)

    def ticks(self, most: int = 6) -> list[float]:
        """Round numbers inside the scale, at most `most`."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1, 1.5, 2, 3, 5, 7), (1, 2, 5), (1,)):
                found = [
                    float(f"{step}e{decade}")
                    for decade in decades
                    for step in steps
                    if self.low <= float(f"{step}e{decade}") <= self.high
                ]
                if len(found) <= most:
                    break
            if len(found) >= 3:
                return found
        return linear_ticks(self.low, self.high, most)


def linear_ticks(low: float, high: float, most: int) -> list[float]:
    """Multiples of 1, 2, 2.5 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(s * power for s in (1, 2, 2.5, 5, 10) if s * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [float(f"{index * step:.6g}") for index in range(first, last + 1)]


def padded(values: Iterable[float], share: float = 0.06) -> tuple[float, float]:
    """Smallest and largest with some air; never of no extent."""
    found = list(values)
    low, high = min(found), max(found)
    room = (high - low) * share or abs(high) * share or 1.0
    return low - room, high + room


def text(x: float, y: float, content: str, *, anchor: str = "middle", css: str = "tick") -> str:
    """A label; `anchor` is start, middle or end."""
    return (
        f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">'
        f"{escape(content)}</text>"
    )


def line(x1: float, y1: float, x2: float, y2: float, css: str) -> str:
    """A straight line."""
    return f'<line class="{css}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def path(points: Sequence[tuple[float, float]], css: str) -> str:
    """A line through points."""
    steps = " L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    return f'<path class="{css}" d="M{steps}"/>'


def rect(x: float, y: float, width: float, height: float, css: str, tip: str = "") -> str:
    """A bar; `tip` is shown where the pointer rests on it."""
    shape = f'class="{css}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    return f"<rect {shape}>{_tip(tip)}</rect>"


def marker(x: float, y: float, shape: str, css: str, tip: str = "") -> str:
    """A ``circle``, ``square`` or ``diamond`` at a point."""
    if shape == "circle":
        return f'<circle class="{css}" cx="{x:.1f}" cy="{y:.1f}" r="4.5">{_tip(tip)}</circle>'
    if shape == "square":
        return rect(x - 4, y - 4, 8, 8, css, tip)
    corners = f"{x:.1f},{y - 6:.1f} {x + 6:.1f},{y:.1f} {x:.1f},{y + 6:.1f} {x - 6:.1f},{y:.1f}"
    return f'<polygon class="{css}" points="{corners}">{_tip(tip)}</polygon>'


def chart(name: str, title: str, description: str, height: float, parts: Iterable[str]) -> Chart:
    """Put shapes into an image that names and describes itself.

    Args:
        name: Unique in the page; made into ids.
        title: Of the chart; the page shows it, too.
        description: Read out instead of the image.
        height: Of the view box.
        parts: The shapes.
    """
    svg = (
        f'<svg viewBox="0 0 {WIDTH:g} {height:g}" role="img" '
        f'aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title>'
        f'<desc id="{name}-desc">{escape(description)}</desc>{"".join(parts)}</svg>'
    )
    return Chart(title, description, svg)


def x_axis(scale: Scale, top: float, bottom: float, label: str, form: str = "{:g}") -> list[str]:
    """Grid lines up from the ticks, their numbers, and what they count."""
    parts = []
    for tick in scale.ticks():
        parts.append(line(scale(tick), top, scale(tick), bottom, "grid"))
        parts.append(text(scale(tick), bottom + 14, form.format(tick)))
    parts.append(line(scale.start, bottom, scale.end, bottom, "axis"))
    parts.append(text((scale.start + scale.end) / 2, bottom + 30, label, css="label"))
    return parts


def y_axis(scale: Scale, left: float, right: float, form: str = "{:g}") -> list[str]:
    """Grid lines to the right of the ticks, and their numbers."""
    parts = []
    for tick in scale.ticks(5):
        parts.append(line(left, scale(tick), right, scale(tick), "grid"))
        parts.append(text(left - 5, scale(tick) + 4, form.format(tick), anchor="end"))
    return parts


def _tip(content: str) -> str:
    return f"<title>{escape(content)}</title>" if content else ""
