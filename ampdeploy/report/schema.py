"""The JSON Schema of report.json, made from the dataclasses of `ampdeploy.report.result`.

``python -m ampdeploy.report.schema`` writes `report.schema.json`, which is committed so that other
tools can use it; a test proves that it is current. Draft 2020-12:
https://json-schema.org/draft/2020-12

Own code, because the rule that a null has an entry in `why` is no part of what libraries generate.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import json
import re
import textwrap
import types
import typing
from pathlib import Path
from typing import Any, NoReturn, Union

from ampdeploy.artifacts import write_text
from ampdeploy.errors import ArtifactError
from ampdeploy.optional import require
from ampdeploy.report.consistent import problems
from ampdeploy.report.result import SCHEMA_VERSION, Explained, LatencyStats, Report, Spread

SCHEMA_FILE = Path(__file__).with_name("report.schema.json")
_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_MAX_SHOWN = 10  # errors of one file; a damaged one can have hundreds

_SCALARS = {str: "string", int: "integer", float: "number", bool: "boolean"}
# End of a field's name -> unit of its numbers. The first that fits is meant.
_UNITS = (
    ("_j_per_image", "J per image"),
    ("_img_s", "images per second"),
    ("_ms", "ms"),
    ("_bytes", "bytes"),
    ("seconds", "s"),
    ("_watts", "W"),
    ("_mhz", "MHz"),
    ("_c", "degrees Celsius"),
    ("flops", "FLOPs per image"),
)


def report_schema() -> dict[str, Any]:
    """The schema, as plain data."""
    definitions: dict[str, Any] = {}
    top = _object(Report, definitions)
    top["properties"]["schema_version"] = {"const": SCHEMA_VERSION}
    return {
        "$schema": _DIALECT,
        "$id": f"urn:ampdeploy:report:{SCHEMA_VERSION}",
        **top,
        "$defs": dict(sorted(definitions.items())),
    }


def schema_text() -> str:
    """What `report.schema.json` has to hold."""
    return json.dumps(report_schema(), indent=1, ensure_ascii=False) + "\n"


def check_file(path: Path) -> Report:
    """Validate a report.json against the schema, with our own reader, and against itself.

    Raises:
        ArtifactError: It is missing, not JSON, or not what the schema says; names every place.
        MissingDependencyError: The package jsonschema is not installed.
    """
    jsonschema = require("jsonschema", needed_by="ampdeploy report --check")
    data = _read_strictly(path)
    if isinstance(data, dict) and data.get("schema_version") == SCHEMA_VERSION:
        # The committed file is what others validate with, so it is what is used here.
        schema = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))
        errors = list(jsonschema.Draft202012Validator(schema).iter_errors(data))
        if errors:
            raise ArtifactError(_describe(path, [_place_and_problem(e) for e in errors]))
    # Another version is refused here, with both versions in the message.
    report = Report.from_json(json.dumps(data), where=path.name)
    contradictions = list(problems(report))
    if contradictions:
        raise ArtifactError(_describe(path, contradictions))
    return report


def _read_strictly(path: Path) -> Any:
    """Parse JSON; unlike Python's default, NaN and infinities are no JSON."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{constant} is no JSON number")

    try:
        return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)
    except FileNotFoundError as error:
        raise ArtifactError(f"{path} does not exist. Is this the folder of a run?") from error
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}. Build the run again.") from error


def _describe(path: Path, found: list[tuple[str, str]]) -> str:
    shown = [f"  {place}: {problem}" for place, problem in found[:_MAX_SHOWN]]
    if len(found) > _MAX_SHOWN:
        shown.append(f"  and {len(found) - _MAX_SHOWN} more")
    return (
        f"{path} does not follow the schema of report.json, version {SCHEMA_VERSION}:\n"
        + "\n".join(shown)
        + "\nThe file is damaged or was edited; run the command that writes it again."
    )


def _place_and_problem(error: Any) -> tuple[str, str]:
    """Where the file is wrong, and what was found there.

    A field that may be null has two schemas; what the value breaks in the one that is not null
    says more than that it fits neither.
    """
    while inner := [e for e in error.context or () if e.validator_value != "null"]:
        error = max(inner, key=lambda e: len(e.absolute_path))
    place = error.json_path.removeprefix("$.") if error.absolute_path else "the whole file"
    if error.validator == "required" and error.absolute_path and error.absolute_path[-1] == "why":
        name = next(n for n in error.validator_value if n not in error.instance)
        return place, f"{name!r} is null and has no reason here"
    if error.validator == "type":
        wanted = error.validator_value
        kinds = wanted if isinstance(wanted, str) else " or ".join(wanted)
        return place, f"is {_short(error.instance)}, not {kinds}"
    return place, error.message if len(error.message) < 200 else error.message[:200] + " ..."


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:60] + " ..."


def _object(cls: type, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one dataclass; those that it holds go into `definitions`."""
    hints = typing.get_type_hints(cls)
    described = _field_docs(cls)
    properties: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        schema = _schema(hints[field.name], definitions)
        unit = next((unit for end, unit in _UNITS if field.name.endswith(end)), None)
        if unit and _holds_numbers(hints[field.name]):
            schema["x-unit"] = unit
        if field.name in described:
            schema["description"] = described[field.name]
        properties[field.name] = schema
    result: dict[str, Any] = {
        "title": cls.__name__,
        "description": _prose(cls.__doc__ or ""),
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    nullable = [name for name in properties if type(None) in typing.get_args(hints[name])]
    if nullable and issubclass(cls, Explained):
        result["allOf"] = [
            {
                "if": {"properties": {name: {"type": "null"}}, "required": [name]},
                "then": {"properties": {"why": {"required": [name]}}},
            }
            for name in nullable
        ]
    return result


def _schema(kind: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema of one annotation; the same kinds that `ampdeploy.report.codec` reads."""
    if kind is Any:
        return {}
    if kind in _SCALARS:
        return {"type": _SCALARS[kind]}
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        inner = _schema(next(a for a in arguments if a is not type(None)), definitions)
        if set(inner) == {"type"}:
            return {"type": [inner["type"], "null"]}
        return {"anyOf": [inner, {"type": "null"}]}
    if origin is tuple:
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if kind.__name__ not in definitions:
            definitions[kind.__name__] = {}  # taken, before what it holds is looked at
            definitions[kind.__name__] = _object(kind, definitions)
        return {"$ref": f"#/$defs/{kind.__name__}"}
    raise TypeError(f"report.json cannot hold {kind}")


def _holds_numbers(kind: Any) -> bool:
    """Whether a unit in a field's name is that of the numbers below it."""
    if kind in (int, float, LatencyStats, Spread):
        return True
    return any(_holds_numbers(inner) for inner in typing.get_args(kind))


def _field_docs(cls: type) -> dict[str, str]:
    """Field -> the string below it, which Python itself throws away."""
    found: dict[str, str] = {}
    for ancestor in reversed(cls.__mro__[:-1]):
        body = ast.parse(textwrap.dedent(inspect.getsource(ancestor))).body[0]
        assert isinstance(body, ast.ClassDef)
        for field, below in zip(body.body, body.body[1:], strict=False):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(field.target, ast.Name)
                and isinstance(below, ast.Expr)
                and isinstance(below.value, ast.Constant)
            ):
                found[field.target.id] = _prose(str(below.value.value))
    return found


def _prose(docstring: str) -> str:
    """One line, in JSON's words."""
    return re.sub(r"\bNone\b", "null", " ".join(docstring.split())).replace("``", "`")


if __name__ == "__main__":
    write_text(SCHEMA_FILE, schema_text())
