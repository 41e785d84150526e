"""Rules from a YAML file, by the names that they have on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.gate.rules import ALL
from ampdeploy.models.registry import close_matches
from ampdeploy.optional import require

Written = dict[str, tuple[str, ...]]
"""Name -> what was written behind it, once per use."""


def read_rules_file(path: Path, known: Mapping[str, bool]) -> Written:
    """The content of a rules file, as if it had been options.

    A mapping of names (without the leading dashes) to a limit, a list of limits, or a mapping of
    batch sizes or metrics to limits::

        max-latency-ratio: {1: 0.8, 8: 0.75}
        max-params: 14e6
        require: [warm-up-settled, engine-tested]

    Args:
        path: The file.
        known: Every name there is -> whether it may be given more than once.

    Raises:
        ArtifactError: It cannot be read, or is not YAML.
        ConfigError: It says something that no option does; names the nearest.
    """
    yaml = require("yaml", needed_by="--rules")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ArtifactError(f"{path} is not text: {error}.") from error
    try:
        # Composed and not loaded: YAML would make 8:30 a number in base 60, and of two entries
        # with one name silently take the last.
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ArtifactError(f"{path} is not YAML: {error}") from error
    if root is None:
        raise ConfigError(f"{path} holds no rules. Write a line like `max-params: 14e6`.")
    found: Written = {}
    for key, node in _pairs(root, str(path)):
        name = key.replace("_", "-")
        if name not in known:
            raise ConfigError(
                f"{path}: unknown key {key!r}.{close_matches(name, known)} `ampdeploy gate "
                "--help` lists the options, whose names these are."
            )
        if name in found:
            raise ConfigError(f"{path} gives {key!r} twice. Which one is meant?")
        found[name] = _written(node, f"{path}: {key}")
        if not found[name]:
            raise ConfigError(f"{path}: {key} has no value. Give one, or leave the line out.")
        if len(found[name]) > 1 and not known[name]:
            raise ConfigError(f"{path}: {key} takes one value, not {len(found[name])}.")
    return found


def _written(node: Any, where: str) -> tuple[str, ...]:
    """What a value says, as it would be written behind the option."""
    if node.id == "scalar":
        return (_scalar(node, where),)
    if node.id == "sequence":
        return tuple(_scalar(item, where) for item in node.value)
    return tuple(
        _scalar(value, where) if key == ALL else f"{key}={_scalar(value, where)}"
        for key, value in _pairs(node, where)
    )


def _pairs(node: Any, where: str) -> list[tuple[str, Any]]:
    if node.id != "mapping":
        raise ConfigError(f"{where} is not a list of `name: value` lines.")
    return [(_scalar(key, where), value) for key, value in node.value]


def _scalar(node: Any, where: str) -> str:
    if node.id != "scalar":
        raise ConfigError(
            f"{where} is nested too deeply at line {node.start_mark.line + 1}. Give a limit, a "
            "list of limits, or `batch size: limit`."
        )
    text = str(node.value)
    if not text.strip() or (node.tag.endswith(":null") and node.style is None):
        raise ConfigError(f"{where} has no value at line {node.start_mark.line + 1}.")
    return text
