"""What findings are made from, and how they write ratios."""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import NormalDist

from ampdeploy.explain.profiled import ProfiledModel
from ampdeploy.explain.result import ActivationProbe, Cell, Machine, WidthProbe
from ampdeploy.report.result import Interval


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that findings are made from."""

    baseline: ProfiledModel
    pruned: ProfiledModel
    batch: int
    width_multiple: int
    total: Cell
    cells: tuple[Cell, ...]
    latency: Interval
    machine: Machine | None
    width_probes: tuple[WidthProbe, ...] | None
    activation_probe: ActivationProbe | None
    other_batch: tuple[int, float, float] | None
    """Another batch size, and milliseconds of a call of baseline and pruned at it."""


def times(ratio: float) -> str:
    """A time ratio as a speed-up: ``1.35x``."""
    return f"{1 / ratio:.2f}x"


def interval(measured: Interval) -> str:
    """A time ratio's interval as that of the speed-up: `` [1.29, 1.40]``."""
    if measured.ci95_low is None or measured.ci95_high is None:
        return ""
    return f" [{1 / measured.ci95_high:.2f}, {1 / measured.ci95_low:.2f}]"


def plain_interval(measured: Interval) -> str:
    """A time ratio's interval as it is."""
    if measured.ci95_low is None or measured.ci95_high is None:
        return ""
    return f" [{measured.ci95_low:.3f}, {measured.ci95_high:.3f}]"


def simultaneous(measured: Interval, tests: int) -> Interval:
    """A time ratio's 95% interval, widened so that `tests` of its kind hold together (Bonferroni).

    By the normal distribution of the ratio's logarithm: a bootstrap's own percentiles do not reach
    that far out.
    """
    low, high = measured.ci95_low, measured.ci95_high
    if low is None or high is None:
        return measured
    normal = NormalDist()
    wider = normal.inv_cdf(1 - 0.025 / tests) / normal.inv_cdf(0.975)
    value = measured.value
    return replace(
        measured,
        ci95_low=value * (low / value) ** wider,
        ci95_high=value * (high / value) ** wider,
    )


def is_apart(measured: Interval) -> bool:
    """Whether a ratio is surely not 1."""
    low, high = measured.ci95_low, measured.ci95_high
    return low is not None and high is not None and not low <= 1 <= high


def share(part: float, whole: float) -> float:
    """`part` / `whole`, of a whole that may be nothing."""
    return part / whole if whole else 0.0


def next_multiple(width: int, multiple: int) -> int:
    """The smallest multiple that is not below `width`."""
    return -(-width // multiple) * multiple
