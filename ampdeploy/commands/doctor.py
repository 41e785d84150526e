"""`ampdeploy doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import click

from ampdeploy import __version__
from ampdeploy.commands import common
from ampdeploy.errors import AmpDeployError
from ampdeploy.optional import (
    BUILD_HOST_MODULES,
    available,
    distribution_of,
    install_line,
    require,
)

if TYPE_CHECKING:
    from ampdeploy.device.engine.flavour import Flavour
    from ampdeploy.device.platform import DeviceFacts

# What of a known bug's entry is reported.
_BUG_KEYS = ("id", "certain", "patterns", "symptom", "workaround", "applies", "link")

# Who needs the packages of a build host.
BUILD_HOST_VERBS = (
    "The verbs build, prune, distill, export, eval, explain, inspect and bundle need them, and "
    "bench --images; a device, with engine and bench --inputs, does not."
)

RUNS = "run"
BUILDS_AND_RUNS = "build and run"
BUILDS = "build only"
NOTHING = "nothing"


@click.command("doctor")
@common.as_json
@common.verbosity
def command(json_: bool) -> None:
    """Report the machine, its GPU, each package, each target, and known bugs of its TensorRT."""
    facts = _facts()
    if json_:
        common.print_json(facts)
    else:
        _print(facts)


def _facts() -> dict[str, Any]:
    from ampdeploy.bench.host import host_facts
    from ampdeploy.device.platform import device_facts
    from ampdeploy.device.radar.bugs import TARGETS, bug_table
    from ampdeploy.targets.base import target_names

    device = device_facts()
    flavours = {name: _answer(partial(_flavour, name)) for name in TARGETS}
    targets = {name: _target(name, device, flavours.get(name)) for name in target_names()}
    return {
        "ampdeploy": __version__,
        "host": host_facts(),
        "device": dataclasses.asdict(device),
        "modules": {
            **{name: _module(name) for name in BUILD_HOST_MODULES},
            "cuda-python": _cuda_python(),
        },
        "tensorrt": {
            name: {"version": flavour and flavour.version, "problem": problem}
            for name, (flavour, problem) in flavours.items()
        },
        "targets": {name: state["problem"] for name, state in targets.items()},
        "can": {name: {"do": state["do"], "why": state["why"]} for name, state in targets.items()},
        "known_bugs": {
            "data_version": bug_table().data_version,
            "bugs": _bugs(device, {name: flavour for name, (flavour, _) in flavours.items()}),
        },
        "cuda": _cuda(),
        "meters": _meters(device),
        "sensors": _sensors(device),
    }


def _answer(question: Callable[[], Any]) -> tuple[Any, str | None]:
    """What `question` returns, or None and why it failed: one broken part hides no other."""
    try:
        return question(), None
    except AmpDeployError as error:
        return None, str(error)
    except Exception as error:
        # Of a package that breaks in a way nobody foresaw, or our bug: shown, either way.
        return None, f"unexpected {type(error).__name__}: {error}"


def _module(name: str) -> dict[str, str | None]:
    needed_by = "target ort" if name == "onnxruntime" else "a build"
    loaded, problem = _answer(lambda: require(name, needed_by=needed_by))
    version = None if loaded is None else str(getattr(loaded, "__version__", "?"))
    return {"version": version, "problem": problem}


def _cuda_python() -> dict[str, str | None]:
    """NVIDIA's bindings: under which name they are imported depends on their version."""
    from importlib import metadata

    from ampdeploy.device.cuda import runtime_api

    _, problem = _answer(lambda: runtime_api(needed_by="running an engine"))
    if problem is not None:
        return {"version": None, "problem": problem}
    for distribution in ("cuda-python", "cuda-bindings"):
        version, _ = _answer(partial(metadata.version, distribution))
        if version is not None:
            return {"version": version, "problem": None}
    return {"version": "?", "problem": None}


def _flavour(target: str) -> Flavour:
    from ampdeploy.device.engine.flavour import find_flavour

    return find_flavour(target, needed_by=f"target {target}")


def _target(
    name: str, device: DeviceFacts, flavour: tuple[Flavour | None, str | None] | None
) -> dict[str, str | None]:
    """What one target can do here, and why not more."""
    from ampdeploy.targets.base import get_target

    _, problem = _answer(lambda: get_target(name).check())
    if flavour is None:
        return {"problem": problem, "do": NOTHING if problem else RUNS, "why": problem}
    found, missing = flavour
    if found is None:
        return {"problem": problem or missing, "do": NOTHING, "why": _deferred(name, missing)}
    unlisted = _unlisted(found, device)
    if problem or unlisted:
        why = problem or unlisted
        if found.can_build_without_gpu:
            return {"problem": why, "do": BUILDS, "why": why}
        return {"problem": why, "do": NOTHING, "why": _deferred(name, why)}
    return {"problem": None, "do": BUILDS_AND_RUNS, "why": None}


def _deferred(name: str, why: str | None) -> str | None:
    """`why`, and for TensorRT that nothing of it is needed to make what the device builds."""
    if name != "trt" or why is None:
        return why
    return (
        f"{why.rstrip('.')}. `ampdeploy build --target trt --engine deferred` does without: its "
        "bundle builds the engine on the device."
    )


def _unlisted(flavour: Flavour, device: DeviceFacts) -> str | None:
    """Why this TensorRT has no kernels for this GPU; None if it has, or does not say."""
    known = getattr(flavour.trt, "ComputeCapability", None)
    if known is None or device.compute_capability is None:
        return None
    if hasattr(known, "SM" + device.compute_capability.replace(".", "")):
        return None
    return (
        f"TensorRT {flavour.version} of target {flavour.target} does not list this GPU, "
        f"SM {device.compute_capability}."
    )


def _bugs(device: DeviceFacts, flavours: dict[str, Flavour | None]) -> list[dict[str, Any]]:
    """Known bugs of the TensorRT that is here, whatever the graph has."""
    from ampdeploy.device.radar.bugs import find_bugs
    from ampdeploy.device.radar.graph_patterns import PATTERNS

    return [
        {
            "target": target,
            **{key: getattr(bug, key) for key in _BUG_KEYS},
            "tensorrt": bug.versions,
            "gpus": bug.gpus,
        }
        for target, flavour in flavours.items()
        if flavour is not None
        for bug in find_bugs(
            tensorrt_version=flavour.version,
            target=target,
            compute_capability=device.compute_capability,
            patterns=set(PATTERNS),
        )
    ]


def _cuda() -> bool | None:
    """Whether torch sees a GPU; None without torch."""
    try:
        torch = importlib.import_module("torch")
        return bool(torch.cuda.is_available())
    except Exception:  # why it does not load is among the modules
        return None


def _meters(device: DeviceFacts) -> dict[str, dict[str, str | None]]:
    """Where energy would be read, or why it cannot be measured."""
    from ampdeploy.bench.sensors.survey import survey_meter

    found = {}
    for name in ("cpu", "cuda"):
        source: str | None = None
        problem: str | None = f"no GPU can be used: {device.problem}"
        if name == "cpu" or device.gpu is not None:
            answer, unexpected = _answer(partial(survey_meter, name))
            source, problem = answer or (None, unexpected)
        found[name] = {"source": source, "problem": problem}
    return found


def _sensors(device: DeviceFacts) -> dict[str, dict[str, str | None]]:
    """What can be watched while models are timed, or why it cannot."""
    from ampdeploy.bench.sensors.survey import SENSORS, survey_sensors

    seen, unexpected = _answer(partial(survey_sensors, "cpu" if device.gpu is None else "cuda"))
    seen = seen or dict.fromkeys(SENSORS, (None, unexpected))
    return {name: dict(zip(("seen", "why"), answer, strict=True)) for name, answer in seen.items()}


def _print(facts: dict[str, Any]) -> None:
    host = facts["host"]
    click.echo(f"ampdeploy {facts['ampdeploy']}, Python {host['python']}, {host['os']}")
    click.echo(f"{host['cpu']}, {host['cores_usable']} cores, {host['ram_bytes'] / 2**30:.1f} GiB")
    for line in _device_lines(facts["device"]):
        click.echo(line)
    click.echo()
    _table("Packages:", _package_rows(facts["modules"]))
    _table("TensorRT:", [(name, *_state(state)) for name, state in facts["tensorrt"].items()])
    _table("Targets:", _target_rows(facts["can"]))
    _table("Energy of models on:", _able(facts["meters"]))
    _table("Watched while timing:", _able(facts["sensors"]))
    known = facts["known_bugs"]
    if not known["bugs"]:
        click.echo("Known bugs: no TensorRT here, or none of this one on this GPU.")
        return
    click.echo(f"Known bugs of this TensorRT (list {known['data_version']}), by what a graph has:")
    for bug in known["bugs"]:
        sure = "" if bug["certain"] else ", if the GPU is one that shows it"
        click.echo(
            f"  {bug['target']}: {' + '.join(bug['patterns'])} ({bug['tensorrt']}; {bug['gpus']}"
            f"{sure})\n    {bug['symptom']}\n    way out: {bug['workaround']}\n    {bug['link']}"
        )


def _package_rows(modules: dict[str, dict[str, str | None]]) -> list[tuple[str, str, str]]:
    """A row each; one for all that is not installed and only a build host needs."""
    rows, missing = [], []
    for name, state in modules.items():
        if name in BUILD_HOST_MODULES and name != "onnxruntime" and not available(name):
            missing.append(distribution_of(name))
        else:
            rows.append((distribution_of(name), *_state(state)))
    if missing:
        what = f"{', '.join(missing)}. {BUILD_HOST_VERBS} Run: {install_line('torch')}"
        rows.append(("build host", "missing", what))
    return rows


def _target_rows(can: dict[str, dict[str, Any]]) -> list[tuple[str, str, str]]:
    """A row each; one for targets of one runtime that fail alike."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, able in can.items():
        why = able["why"] or ""
        rows.setdefault((able["do"], why.replace(f"target {name} ", "", 1)), []).append(name)
    return [
        (", ".join(names), do, can[names[0]]["why"] or "" if len(names) == 1 else why)
        for (do, why), names in rows.items()
    ]


def _able(states: dict[str, dict[str, str | None]]) -> list[tuple[str, str, str]]:
    """Rows of what is there, each of two facts: what, or why not."""
    rows = []
    for name, state in states.items():
        seen, why = state.values()
        rows.append((name, "yes" if seen else "no", seen or why or ""))
    return rows


def _state(state: dict[str, str | None]) -> tuple[str, str]:
    return state["version"] or "missing", state["problem"] or ""


def _device_lines(device: dict[str, Any]) -> list[str]:
    """The GPU and, on a Jetson, the board; what is not known is left out."""
    if device["gpu"] is None:
        lines = [f"GPU: none ({device['problem']})"]
    else:
        parts = [device["gpu"]]
        for label, key in (
            ("SM", "compute_capability"),
            ("driver", "driver"),
            ("CUDA up to", "cuda_driver_version"),
        ):
            if device[key] is not None:
                parts.append(f"{label} {device[key]}")
        if device["memory_total_bytes"] is not None:
            shared = " shared with the host" if device["integrated"] else ""
            parts.append(f"{device['memory_total_bytes'] / 2**30:.1f} GiB{shared}")
        lines = ["GPU: " + ", ".join(parts)]
    if device["l4t"] is not None:
        jetpack = device["jetpack"] or "of unknown version"
        lines.append(f"{device['board'] or 'Jetson'}: JetPack {jetpack}, L4T {device['l4t']}")
    return lines


def _table(title: str, rows: list[tuple[str, str, str]]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=title,
        title_justify="left",
        title_style="",
        box=None,
        show_header=False,
        pad_edge=True,
    )
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(escape(text) for text in row))
    console = Console(highlight=False)
    console.print(table)
    console.print()
