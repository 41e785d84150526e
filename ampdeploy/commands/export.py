"""`ampdeploy export`: both models of a run as ONNX, checked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.config import ExportConfig


@click.command("export")
@click.argument("run", type=common.FOLDER)
@click.option("--opset", type=int, help="ONNX operator set, 18 or newer. Default: the run's.")
@click.option(
    "--max-relative-diff",
    type=float,
    help="Largest difference to PyTorch allowed in any output element, in units of that output's "
    f"RMS. Default: the run's, {ExportConfig.max_relative_diff:g} unless set here before.",
)
@common.as_json
@common.verbosity
def command(run: Path, json_: bool, **options: Any) -> None:
    """Export the baseline and the pruned model of RUN and compare them with PyTorch."""
    from ampdeploy.pipeline import build, rerun_config

    config = rerun_config(run)
    given = {name: value for name, value in options.items() if value is not None}
    config = dataclasses.replace(config, export=dataclasses.replace(config.export, **given))
    finished = build(config, until="export")
    facts = artifacts.read_json(finished.path(artifacts.EXPORT))
    if json_:
        common.print_json(facts)
        return
    for role, name in (("baseline", artifacts.BASELINE_ONNX), ("pruned", artifacts.MODEL_ONNX)):
        worst = max(item["max_relative_diff"] for item in facts[role]["verified"])
        click.echo(
            f"{role}: {finished.path(name)}, largest difference to PyTorch {worst:.1e} of the RMS"
        )
