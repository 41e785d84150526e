"""A measured value, and what a rule makes of it.

Decisions are made on intervals. The whole 95% interval on the right side of the limit passes, the
whole of it on the wrong side fails, and a limit inside the interval is undecided: the measurement
is too coarse to tell. An end that is missing, where the other is there, is no limit to the value: a
rule that would need it is undecided. A value that never has an interval decides by itself, and the
finding says so; one that should have an interval and has none counts as not measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum

from ampdeploy.errors import ArtifactError
from ampdeploy.gate.units import Unit
from ampdeploy.report.result import Interval

# Beyond this many samples nobody measures: the value lies on the limit for all that can be told.
MOST_SAMPLES = 1_000_000

EXACT = "exact"
POINT = "point value, no interval"
OPEN = "–"  # in place of an end


class Status(str, Enum):
    """What became of a rule."""

    PASS = "pass"
    FAIL = "fail"
    UNDECIDED = "undecided"
    """The limit is inside the interval: measured, and too coarsely to tell."""
    NOT_MEASURED = "not measured"
    """There is no number, or not the interval that it is decided by."""
    INCOMPARABLE = "incomparable"
    """The older report has no such number, or one that was measured otherwise."""
    SKIPPED = "skipped"
    """Neither report of a comparison has the number, and nobody asked for it by name."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A number that a rule is about, or why there is none."""

    number: float | None
    low: float | None = None
    """Of the 95% interval; None: nothing bounds it from below, if it has a `high`."""
    high: float | None = None
    """The same from above."""
    note: str = ""
    """Why there is no number, or no interval, or one end of it only."""
    broken: bool = False
    """It should have an interval and has none, so that it decides nothing."""
    samples: int | None = None
    sample: str = ""
    """What there are so many of, e.g. ``pairs of calls``."""

    @property
    def has_interval(self) -> bool:
        """Whether there is an end of one, at least."""
        return self.low is not None or self.high is not None

    @classmethod
    def of(cls, interval: Interval, samples: int | None, sample: str) -> Value:
        """A number of the report that comes with its interval."""
        return cls(
            number=interval.value,
            low=interval.ci95_low,
            high=interval.ci95_high,
            note=interval.why_open,
            broken=interval.lost,
            samples=samples,
            sample=sample,
        )

    @classmethod
    def missing(cls, why: str) -> Value:
        """No number."""
        return cls(number=None, note=why)


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One rule on one value: a line of the output."""

    rule: str
    """With its limit, e.g. ``max-latency-ratio 0.75``."""
    scope: str
    """What of it, e.g. ``batch 8``; empty where there is one."""
    status: Status
    measured: str
    reason: str
    value: float | None = None
    ci95_low: float | None = None
    ci95_high: float | None = None
    limit: float | None = None
    samples: int | None = None
    samples_to_settle: int | None = None
    """Estimate; None: decided, or no number of samples would settle it."""

    @property
    def name(self) -> str:
        """Rule and scope."""
        return f"{self.rule}, {self.scope}" if self.scope else self.rule


def decide(
    rule: str, scope: str, value: Value, *, limit: float, at_most: bool, unit: Unit
) -> Finding:
    """Hold `value` against `limit`.

    Args:
        rule: As `Finding.rule`.
        scope: As `Finding.scope`.
        value: What was measured.
        limit: In the units of `value`.
        at_most: Whether the limit is the largest value allowed; else it is the smallest.
        unit: How to show the numbers.

    Raises:
        ArtifactError: The numbers are none that can be measured: NaN, or ends in wrong order.
    """
    number = value.number
    if number is None:
        return Finding(
            rule=rule,
            scope=scope,
            status=Status.NOT_MEASURED,
            measured="–",
            reason=value.note,
            limit=limit,
        )
    low, high = _ends(value, number, rule)
    status = _side(low, high, limit, at_most)
    reason, settled = value.note, None
    if value.broken:
        status = Status.NOT_MEASURED
        reason = f"no interval: {value.note}"
    elif status is Status.UNDECIDED:
        settled, reason = _undecided(value, number, limit)
    elif value.has_interval:
        reason = f"the whole 95% interval is {'within' if status is Status.PASS else 'beyond'} it"
    return Finding(
        rule=rule,
        scope=scope,
        status=status,
        measured=_shown(value, number, unit),
        reason=reason,
        value=number,
        ci95_low=value.low,
        ci95_high=value.high,
        limit=limit,
        samples=value.samples,
        samples_to_settle=settled,
    )


def _ends(value: Value, number: float, rule: str) -> tuple[float, float]:
    """Between what the value lies; infinite where nothing bounds it."""
    given = [number, *(end for end in (value.low, value.high) if end is not None)]
    low, high = (-math.inf, math.inf) if value.has_interval else (number, number)
    low = low if value.low is None else value.low
    high = high if value.high is None else value.high
    # NaN would compare false on either side and come out as whatever the code tests last.
    if not all(map(math.isfinite, given)) or low > high:
        raise ArtifactError(
            f"{rule}: the report says {number} [{low}, {high}], which no measurement gives. The "
            "report is damaged; measure again."
        )
    return low, high


def _side(low: float, high: float, limit: float, at_most: bool) -> Status:
    if at_most:
        inside, outside = high <= limit, low > limit
    else:
        inside, outside = low >= limit, high < limit
    if inside:
        return Status.PASS
    return Status.FAIL if outside else Status.UNDECIDED


def _undecided(value: Value, number: float, limit: float) -> tuple[int | None, str]:
    """How many samples would settle it, and in words why it is not settled."""
    end = "high" if limit > number else "low"
    if getattr(value, end) is None:  # the limit is on the side that is open
        name = {"low": "lower", "high": "upper"}[end]
        return None, f"the 95% interval has no {name} end: {value.note}"
    settled, advice = samples_to_settle(value, limit)
    return settled, f"the 95% interval contains the limit; {advice}"


def _shown(value: Value, number: float, unit: Unit) -> str:
    if not value.has_interval:
        return unit.show(number)
    low, high = (OPEN if end is None else unit.show(end) for end in (value.low, value.high))
    return f"{unit.show(number)} [{low}, {high}]"


def samples_to_settle(value: Value, limit: float) -> tuple[int | None, str]:
    """How many samples would as likely as not settle it, about, and the same in words.

    The width of an interval falls with 1/sqrt(n), so the end that reaches over the limit gets to
    it at n * (its distance from the value / the limit's distance from the value)^2. There, the end
    lies on the limit: whether the rule is decided then is about as likely as not, and all of it
    takes the value to stay where it is.

    Args:
        value: With an interval that contains `limit`; its end beyond the limit is there.
        limit: In the same units.
    """
    assert value.number is not None
    gap = limit - value.number
    end = value.high if gap > 0 else value.low
    assert end is not None
    reach = end - value.number
    if value.samples is None:
        return None, "more samples would narrow it"
    needed = value.samples * (reach / gap) ** 2 if gap else math.inf
    if needed > MOST_SAMPLES:
        return None, (
            f"to settle it would take more than a million {value.sample} ({value.samples} now): "
            "the value is practically at the limit"
        )
    needed = max(math.ceil(needed), value.samples + 1)
    return (
        needed,
        f"about {_round(needed)} {value.sample} would, as likely as not, settle it "
        f"({value.samples} now)",
    )


def _round(count: int) -> str:
    """Two significant digits, upwards: it is an estimate."""
    digits = max(0, len(str(count)) - 2)
    return f"{math.ceil(count / 10**digits) * 10**digits:,}".replace(",", " ")
