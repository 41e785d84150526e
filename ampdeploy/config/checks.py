"""Checks that several configs share."""

from __future__ import annotations

import math
from pathlib import Path

from ampdeploy.errors import ConfigError
from ampdeploy.models.registry import close_matches


def positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:  # NaN compares false
            raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be above 0.")


def as_paths(owner: object, *names: str) -> None:
    """Let the Python API take strings where it means paths."""
    for name in names:
        value = getattr(owner, name)
        if value is not None:
            object.__setattr__(owner, name, Path(value))


def as_floats(owner: object, *names: str) -> None:
    """20 and 20.0 are one value, and must hash as one.

    Raises:
        ConfigError: Something that is no number.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name.replace('_', ' ')} is {value!r}; give a number.")
        object.__setattr__(owner, name, float(value))


def one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"unknown {what} {value!r}.{close_matches(value, known)} Known: {', '.join(known)}."
        )
