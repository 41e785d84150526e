"""`ampdeploy doctor`: what this machine can do, and what is missing."""

from __future__ import annotations

import importlib
from typing import Any

import click

from ampdeploy import __version__
from ampdeploy.commands import common
from ampdeploy.errors import AmpDeployError, MissingDependencyError
from ampdeploy.optional import BUILD_HOST_MODULES, require


@click.command("doctor")
@common.as_json
@common.verbosity
def command(json_: bool) -> None:
    """Report the machine, each package that a build needs, and each target."""
    facts = _facts()
    if json_:
        common.print_json(facts)
    else:
        _print(facts)


def _facts() -> dict[str, Any]:
    from ampdeploy.bench.host import host_facts
    from ampdeploy.targets.base import get_target, target_names

    modules = {}
    for module in BUILD_HOST_MODULES:
        try:
            loaded = require(module, needed_by="a build")
            modules[module] = {"version": getattr(loaded, "__version__", "?"), "problem": None}
        except MissingDependencyError as error:
            modules[module] = {"version": None, "problem": str(error)}
    targets: dict[str, str | None] = {}
    for name in target_names():
        try:
            get_target(name).check()
            targets[name] = None
        except AmpDeployError as error:
            targets[name] = str(error)
    return {
        "ampdeploy": __version__,
        "host": host_facts(),
        "modules": modules,
        "targets": targets,
        "cuda": _cuda(),
    }


def _cuda() -> bool | None:
    """Whether torch sees a GPU; None without torch."""
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError):
        return None
    return bool(torch.cuda.is_available())


def _print(facts: dict[str, Any]) -> None:
    host = facts["host"]
    click.echo(f"ampdeploy {facts['ampdeploy']}, Python {host['python']}, {host['os']}")
    click.echo(
        f"{host['cpu']}, {host['cores_usable']} cores, {host['ram_bytes'] / 2**30:.1f} GiB, "
        f"GPUs: {', '.join(gpu['name'] for gpu in host['gpus'] or []) or 'none seen'}"
    )
    click.echo("\nPackages a build needs:")
    for module, state in facts["modules"].items():
        click.echo(f"  {module:12} {state['version'] or 'missing: ' + state['problem']}")
    click.echo("\nTargets:")
    for name, problem in facts["targets"].items():
        click.echo(f"  {name:12} {problem or 'ready'}")
