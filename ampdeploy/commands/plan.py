"""What a build would do, for `--dry-run`. Not a verb."""

from __future__ import annotations

import click

from ampdeploy.commands.common import print_json
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.optional import require_build_host


def print_plan(config: BuildConfig, *, as_json: bool, until: str = "report") -> None:
    """Print each stage, whether it would run, and what it writes. Nothing is changed."""
    require_build_host("ampdeploy build")
    from ampdeploy.pipeline import status
    from ampdeploy.stages.preflight import preflight

    preflight(config)
    rows = status(config)
    names = [stage.name for stage, _ in rows]
    rows = rows[: names.index(until) + 1]
    if as_json:
        print_json(
            {
                "config": to_json(config),
                "folder": str(config.folder),
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
    for stage, state in rows:
        wrote = f" -> {', '.join(stage.writes)}" if stage.writes else ""
        click.echo(f"  {stage.name:8} {state:11} {stage.does}{wrote}")
