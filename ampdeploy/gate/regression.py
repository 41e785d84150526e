"""Has it become worse since an older report?

Numbers are compared only where they are of the same thing, measured in the same way
(`gate.comparable`); elsewhere the answer is "incomparable", with the reason. That is never let
through: nothing was compared.

The interval of a change between two runs comes from the runs' own intervals by the method of
variance estimates recovery (Zou and Donner, Statistics in Medicine 27, 2008, "Construction of
confidence limits about effect measures: a general approach"): of x - y with intervals [xl, xh] and
[yl, yh],

    low  = x - y - sqrt((x - xl)^2 + (yh - y)^2)
    high = x - y + sqrt((xh - x)^2 + (y - yl)^2)

which keeps the intervals' asymmetry. Ratios combine in log space, where a ratio of ratios is a
difference. What this takes for granted:

- The two runs are independent. Their calls are. For accuracy, where both runs judge the same
  images, they are not: what makes an image hard for one run makes it hard for the other, so the
  true interval is narrower than this one, which errs towards undecided.
- Each run's interval covers what varies between its own calls, not what changed on the machine
  between the runs. A ratio to the baseline measured in the same run is nearly free of that, since
  the machine was the same for both models; that is why `latency` and `throughput` here are ratios.
  `p50` is not a ratio, and decides as a point: its change is the machine's as well as the model's.

Cosines are compared as points. Both runs must have judged the same images, so that which images
were drawn, which is what their intervals are about, is the same for both and no part of the change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ampdeploy.config import task_of
from ampdeploy.gate import comparable, values
from ampdeploy.gate.finding import EXACT, Finding, Status, Value, decide
from ampdeploy.gate.units import CHANGE, POINTS, SHARE, Unit
from ampdeploy.report.result import Report

Reasons = Callable[[Report, Report, str], Iterable[str]]


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """Something that must not become worse."""

    name: str
    read: values.Read
    reasons: Reasons
    """(new, old, batch size or metric) -> why the two cannot be compared."""
    smaller_is_better: bool
    scope: str = ""
    """What it has several values of: `values.BATCH` sizes, `values.METRIC`s, or nothing."""
    relative: bool = True
    """Compared by their ratio; else by their difference, for what is a share of 1."""
    by_default: bool = True

    @property
    def unit(self) -> Unit:
        """Of the change."""
        return CHANGE if self.relative else POINTS


def _clock(timing: str) -> Reasons:
    return lambda new, old, size: comparable.same_clock(new, old, timing, size)


def _ratio(name: str, field: str, timing: str) -> Quantity:
    return Quantity(
        name=name,
        read=values.paired_ratio(field, timing, " in each run"),
        reasons=_clock(timing),
        smaller_is_better=True,
        scope=values.BATCH,
    )


_QUANTITIES = (
    Quantity(
        name="params", read=values.exact("params"), smaller_is_better=True,
        reasons=lambda new, old, _: comparable.same_model(new, old),
    ),
    Quantity(
        name="flops", read=values.exact("flops"), smaller_is_better=True,
        reasons=lambda new, old, _: comparable.same_work(new, old),
    ),
    Quantity(
        name="file-size", read=values.exact("file_bytes"), smaller_is_better=True,
        reasons=lambda new, old, _: comparable.same_file(new, old),
    ),
    _ratio("latency", "latency", "timing"),
    _ratio("compute", "compute", "timing"),
    _ratio("cuda-graph", "cuda_graph_compute", "cuda_graph_timing"),
    Quantity(
        name="throughput", smaller_is_better=False, reasons=_clock("throughput_timing"),
        scope=values.BATCH,
        read=values.paired_ratio("throughput", "throughput_timing", " in each run"),
    ),
    Quantity(
        name="p50", read=values.latency("latency_ms", "p50"), smaller_is_better=True,
        reasons=_clock("timing"), scope=values.BATCH, by_default=False,
    ),
    Quantity(
        name="memory", read=values.point("pruned", "memory_bytes"), smaller_is_better=True,
        reasons=lambda new, old, _: comparable.same_memory(new, old),
    ),
    Quantity(
        name="cosine", read=values.fidelity_on_the_same_images("cosine_p1"),
        smaller_is_better=False, relative=False,
        reasons=lambda new, old, _: comparable.same_images(new, old),
    ),
    Quantity(
        name="patch-cosine", read=values.fidelity_on_the_same_images("patch_cosine_p1"),
        smaller_is_better=False, relative=False,
        reasons=lambda new, old, _: comparable.same_images(new, old),
    ),
    Quantity(
        name="accuracy", read=values.accuracy_difference, smaller_is_better=False, relative=False,
        reasons=comparable.same_task, scope=values.METRIC,
    ),
)  # fmt: skip

QUANTITIES = {quantity.name: quantity for quantity in _QUANTITIES}


def check(
    new: Report, old: Report, *, allowed: float, names: tuple[str, ...] | None
) -> list[Finding]:
    """A finding for each quantity, and each batch size or metric of it.

    Args:
        new: The report to judge.
        old: What it must not be worse than.
        allowed: Fraction of the old value by which it may be worse; of 1 for cosine and accuracy.
        names: Keys of `QUANTITIES`; None: all that go `by_default` and either report has.

    Raises:
        ArtifactError: A number of a report is none.
    """
    findings: list[Finding] = []
    for name in names or [q.name for q in _QUANTITIES if q.by_default]:
        findings += _check(QUANTITIES[name], new, old, allowed, asked=names is not None)
    return findings


def _check(
    quantity: Quantity, new: Report, old: Report, allowed: float, *, asked: bool
) -> Iterator[Finding]:
    now, then = quantity.read(new), quantity.read(old)
    no_now, no_then = now.get(values.ONE), then.get(values.ONE)
    if no_now and no_then:
        scopes = [values.ONE]
    else:  # of one there is only the reason why it has none: it holds for all scopes of the other
        scopes = [key for key in {**now, **then} if key != values.ONE]
        seen = {*scopes, *map(task_of, scopes)}
        scopes += [key for key in values.left_out(new, quantity.scope) if key not in seen]

    def absent(report: Report, scope: str, why: Value | None, otherwise: str) -> Value:
        reason = values.why_absent(report, quantity.scope, scope)
        return Value.missing(reason) if reason else why or Value.missing(otherwise)

    for scope in scopes:
        yield _compare(
            quantity,
            new,
            old,
            scope,
            now.get(scope) or absent(new, scope, no_now, "the report has no such row"),
            then.get(scope) or absent(old, scope, no_then, "it has no such row"),
            allowed,
            asked,
        )


def _compare(
    quantity: Quantity,
    new: Report,
    old: Report,
    scope: str,
    now: Value,
    then: Value,
    allowed: float,
    asked: bool,
) -> Finding:
    limit = allowed if quantity.smaller_is_better else -allowed
    rule = f"max-regression {SHARE.show(allowed)}"
    label = values.label(quantity.scope, scope)
    what = f"{quantity.name}, {label}" if scope else quantity.name

    def without(status: Status, reason: str) -> Finding:
        return Finding(
            rule=rule, scope=what, status=status, measured="–", reason=reason, limit=limit
        )

    if now.number is None and then.number is None and not asked:
        return without(Status.SKIPPED, f"neither report has it: {now.note}")
    if now.number is None:
        return without(Status.NOT_MEASURED, now.note)
    if then.number is None:
        return without(Status.INCOMPARABLE, f"not in the old report: {then.note}")
    reasons = list(quantity.reasons(new, old, scope))
    if reasons:
        return without(Status.INCOMPARABLE, f"not comparable: {'; '.join(reasons)}")
    change = relative_change(now, then) if quantity.relative else difference(now, then)
    if change.number is None:
        return without(Status.INCOMPARABLE, change.note)
    return decide(
        rule,
        what,
        change,
        limit=limit,
        at_most=quantity.smaller_is_better,
        unit=quantity.unit,
    )


def difference(now: Value, then: Value) -> Value:
    """`now` minus `then` of two independent runs; see the module for the interval."""
    assert now.number is not None
    assert then.number is not None
    number = now.number - then.number
    note = now.note or then.note
    if not (now.has_interval or then.has_interval or now.broken or then.broken):
        return Value(number=number, note=note)
    down = _reach(now.low, now.number, then.number, then.high)
    up = _reach(now.number, now.high, then.low, then.number)
    broken = now.broken or then.broken or (down is None and up is None)
    return Value(
        number=number,
        low=None if broken or down is None else number - down,
        high=None if broken or up is None else number + up,
        note=note if broken or down is None or up is None else "",
        broken=broken,
        samples=_fewest(now, then),
        sample=now.sample,
    )


def _reach(
    low: float | None, high: float | None, other_low: float | None, other_high: float | None
) -> float | None:
    """How far a difference reaches to one side: both distances together; None: to infinity."""
    if low is None or high is None or other_low is None or other_high is None:
        return None
    # A bootstrap's interval need not contain the value itself; a negative distance would.
    return math.hypot(max(0.0, high - low), max(0.0, other_high - other_low))


def relative_change(now: Value, then: Value) -> Value:
    """`now` / `then` - 1 of two independent runs, combined in log space."""
    numbers = [x for v in (now, then) for x in (v.number, v.low, v.high) if x is not None]
    if not all(x > 0 for x in numbers):  # NaN is not
        return Value.missing("a value of 0 or less cannot be compared by its ratio")
    assert now.number is not None
    assert then.number is not None
    if EXACT in (now.note, then.note):  # no detour over logarithms, which would round
        return Value(number=(now.number - then.number) / then.number, note=EXACT)
    change = difference(_log(now), _log(then))
    assert change.number is not None
    return Value(
        number=math.expm1(change.number),
        low=None if change.low is None else math.expm1(change.low),
        high=None if change.high is None else math.expm1(change.high),
        note=change.note,
        broken=change.broken,
        samples=change.samples,
        sample=change.sample,
    )


def _log(value: Value) -> Value:
    assert value.number is not None
    return Value(
        number=math.log(value.number),
        low=None if value.low is None else math.log(value.low),
        high=None if value.high is None else math.log(value.high),
        note=value.note,
        broken=value.broken,
        samples=value.samples,
        sample=value.sample,
    )


def _fewest(now: Value, then: Value) -> int | None:
    if now.samples is None or then.samples is None:
        return None
    return min(now.samples, then.samples)
