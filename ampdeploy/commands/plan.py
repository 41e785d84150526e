"""What a build would do, for `--dry-run`. Not a verb."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from ampdeploy.commands.common import print_json
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.errors import MissingDependencyError
from ampdeploy.optional import require_build_host

if TYPE_CHECKING:
    from ampdeploy.stages.preflight import Expected


def print_plan(config: BuildConfig, *, as_json: bool, until: str = "report") -> None:
    """Print each stage, whether it would run, and what it writes. Nothing is changed.

    Raises:
        AmpDeployError: The build would be refused.
        MissingDependencyError: This machine lacks something for it; said after the plan.
    """
    require_build_host("ampdeploy build")
    from ampdeploy.stages.preflight import look_ahead

    expected = look_ahead(config, until=until)
    try:
        _print(config, expected, as_json=as_json, until=until)
    except MissingDependencyError:
        # Whether an engine that is there is still the right one takes its TensorRT to know.
        if expected.missing is None:
            raise
    if expected.missing is not None:
        raise MissingDependencyError(expected.missing)


def _print(config: BuildConfig, expected: Expected, *, as_json: bool, until: str) -> None:
    from ampdeploy.pipeline import status

    rows = status(config)
    names = [stage.name for stage, _ in rows]
    rows = rows[: names.index(until) + 1]
    if as_json:
        print_json(
            {
                "config": to_json(config),
                "folder": str(config.folder),
                "expected": dataclasses.asdict(expected),
                "stages": [
                    {
                        "name": stage.name,
                        "does": stage.does,
                        "state": state,
                        "reads": list(stage.reads),
                        "writes": list(stage.writes),
                    }
                    for stage, state in rows
                ],
            }
        )
        return
    click.echo(f"{config.model.name} for target {config.target}, into {config.folder}")
    size = f"{expected.params_dense / 1e6:.2f} M parameters"
    if expected.params is not None:
        cut = 1 - expected.params / expected.params_dense
        size += f" -> about {expected.params / 1e6:.2f} M (-{cut:.1%})"
    click.echo(f"{size}; widths in steps of {expected.multiple}; {_images(config)}")
    if expected.why_no_engine:
        click.echo(f"judged with {expected.judged_on} in float32: {expected.why_no_engine}")
    for note in expected.known_bugs:
        click.echo(note)
    for stage, state in rows:
        wrote = f" -> {', '.join(stage.writes)}" if stage.writes else ""
        click.echo(f"  {stage.name:8} {state:11} {stage.does}{wrote}")


def _images(config: BuildConfig) -> str:
    evaluation = config.data.eval or "what calibration does not draw"
    return f"up to {config.data.calib_images} calibration images, judged on {evaluation}"
