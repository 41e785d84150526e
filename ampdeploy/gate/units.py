"""What limits are written in: `60MB`, `2%`, `14M`, `5ms`."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ampdeploy.errors import ConfigError
from ampdeploy.report import rows

_NUMBER = re.compile(r"([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d{1,3})?)\s*([a-z%/]*)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Unit:
    """How one kind of number is read and shown."""

    example: str
    factors: Mapping[str, Fraction | int]
    """Suffix, in lower case -> what it multiplies by."""
    low: float
    high: float
    zero: bool
    """Whether 0 makes sense as a limit."""
    show: Callable[[float], str]

    def parse(self, text: str, what: str) -> float:
        """The number that `text` stands for.

        Args:
            text: What the user wrote.
            what: What to call it in messages, e.g. ``--max-params``.

        Raises:
            ConfigError: Not a number of this kind, or one that can be no limit.
        """
        found = _NUMBER.fullmatch(text.strip())
        factor = self.factors.get(found[2].lower()) if found else None
        if found is None or factor is None:
            raise ConfigError(f"{what} {text!r} is no limit. Write it like {self.example}.")
        value = _float(Fraction(found[1]) * factor)
        if not self.low <= value <= self.high or math.isinf(value) or (not value and not self.zero):
            above = "" if self.zero else ", and not 0"
            raise ConfigError(
                f"{what} {text!r} is out of range: give {self.show(self.low)} to "
                f"{self.show(self.high) if self.high < math.inf else 'anything'}{above}. "
                f"Write it like {self.example}."
            )
        return value


def _float(value: Fraction) -> float:
    """Rounded once: 57 * 0.01 in floating point is more than 57%, and would fail what has 57%."""
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _decimal(value: float) -> str:
    """Counts and sizes with their unit, and all the digits that tell two of them apart."""
    for limit, unit in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if abs(value) >= limit:
            return f"{value / limit:.5g}{unit}"
    return f"{value:.5g}"


def _points(value: float) -> str:
    return f"{100 * value:+.2f} pp"


_KILO = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}
_PERCENT = Fraction(1, 100)
_THOUSANDTH = Fraction(1, 1000)
# As disks and downloads count, and as the report shows them; the binary units are there, too.
_SIZES = {
    **{f"{prefix}b": factor for prefix, factor in _KILO.items()},
    "": 1,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
}

COUNT = Unit(
    example="14e6 or 14M", factors=_KILO, low=0.0, high=math.inf, zero=False, show=_decimal
)
SIZE = Unit(
    example="60MB",
    factors=_SIZES,
    low=0.0,
    high=math.inf,
    zero=False,
    show=lambda value: _decimal(value) + "B" if value >= 1e3 else f"{value:.0f} B",
)
RATIO = Unit(example="0.75", factors={"": 1}, low=0.0, high=math.inf, zero=False, show=rows.times)
MILLISECONDS = Unit(
    example="12.5ms",
    factors={"": 1, "ms": 1, "us": _THOUSANDTH, "s": 1000},
    low=0.0,
    high=math.inf,
    zero=False,
    show=lambda value: f"{value:.4g} ms",
)
RATE = Unit(
    example="100", factors={"": 1, "img/s": 1}, low=0.0, high=math.inf, zero=False,
    show=lambda value: f"{value:.4g} img/s",
)  # fmt: skip
JOULES = Unit(
    example="0.5J", factors={"": 1, "j": 1, "mj": _THOUSANDTH}, low=0.0, high=math.inf, zero=False,
    show=lambda value: f"{value:.4g} J",
)  # fmt: skip
COSINE = Unit(
    example="0.98", factors={"": 1}, low=-1.0, high=1.0, zero=True, show=lambda v: f"{v:.4f}"
)
SHARE = Unit(
    example="2% or 0.02", factors={"": 1, "%": _PERCENT}, low=0.0, high=1.0, zero=True,
    show=lambda value: f"{100 * value:.2f}%",
)  # fmt: skip
POINTS = Unit(
    example="1 or 1pp, in percentage points",
    factors={"": _PERCENT, "pp": _PERCENT},
    low=0.0,
    high=1.0,
    zero=True,
    show=_points,
)
CHANGE = Unit(  # only shown: of one report against another
    example="", factors={}, low=-1.0, high=math.inf, zero=True, show=lambda v: f"{100 * v:+.2f}%"
)
