"""Frozen dataclasses to and from plain JSON data, checked on the way in.

The type annotations are the schema. Only what report.json needs: dataclasses, scalars, `T | None`,
`tuple[T, ...]`, `dict[str, T]` and `Any`.
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from typing import Any, TypeVar, Union

from ampdeploy.errors import ArtifactError

T = TypeVar("T")


def to_plain(value: Any) -> Any:
    """A dataclass (and what it holds) as dicts, lists and scalars that `json.dumps` takes.

    Raises:
        ValueError: A number is not finite; JSON has no such number.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} is not a number that JSON can hold; use None and say why")
    return value


def from_plain(cls: type[T], data: Any, *, where: str) -> T:
    """Build dataclass `cls` from parsed JSON.

    Args:
        cls: A dataclass.
        data: What `json.loads` gave.
        where: What to call it in messages, e.g. ``report.json``.

    Raises:
        ArtifactError: A key is missing or unknown, or a value has another type; says which.
    """
    result: T = _decode(cls, data, where)
    return result


def _refuse(where: str, problem: str) -> ArtifactError:
    return ArtifactError(
        f"{where} {problem}. The file is damaged or another version wrote it; "
        "run the command that writes it again."
    )


def _decode(kind: Any, data: Any, where: str) -> Any:
    origin = typing.get_origin(kind)
    if kind is Any:
        return data
    if origin in (Union, types.UnionType):
        inner = [arg for arg in typing.get_args(kind) if arg is not type(None)]
        return None if data is None else _decode(inner[0], data, where)
    if dataclasses.is_dataclass(kind):
        return _decode_dataclass(kind, data, where)
    if origin is tuple:
        _expect(list, data, where)
        item = typing.get_args(kind)[0]
        return tuple(_decode(item, value, f"{where}[{i}]") for i, value in enumerate(data))
    if origin is dict:
        _expect(dict, data, where)
        item = typing.get_args(kind)[1]
        return {key: _decode(item, value, f"{where}.{key}") for key, value in data.items()}
    _expect(kind, data, where)
    return float(data) if kind is float else data


def _decode_dataclass(kind: Any, data: Any, where: str) -> Any:
    _expect(dict, data, where)
    hints = typing.get_type_hints(kind)
    names = [field.name for field in dataclasses.fields(kind)]
    missing = [name for name in names if name not in data]
    if missing:
        raise _refuse(where, f"has no {', '.join(map(repr, missing))}")
    unknown = [name for name in data if name not in names]
    if unknown:
        raise _refuse(where, f"has the unknown keys {', '.join(map(repr, unknown))}")
    values = {name: _decode(hints[name], data[name], f"{where}.{name}") for name in names}
    try:
        return kind(**values)
    except ValueError as error:
        raise _refuse(where, f"is not consistent: {error}") from error


def _expect(kind: Any, data: Any, where: str) -> None:
    accepted = (int, float) if kind is float else (kind,)
    # bool is an int in Python, but not in JSON.
    if not isinstance(data, accepted) or (isinstance(data, bool) and kind is not bool):
        raise _refuse(where, f"is {data!r:.60}, not {kind.__name__}")
