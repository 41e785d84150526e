"""`ampdeploy export`: both models of a run as ONNX, checked."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy import artifacts
from ampdeploy.commands import common


@click.command("export")
@click.argument("run", type=common.FOLDER)
@common.as_json
@common.verbosity
def command(run: Path, json_: bool) -> None:
    """Export the baseline and the pruned model of RUN and compare them with PyTorch."""
    from ampdeploy.pipeline import build, rerun_config

    finished = build(rerun_config(run), until="export")
    facts = artifacts.read_json(finished.path(artifacts.EXPORT))
    if json_:
        common.print_json(facts)
        return
    for role, name in (("baseline", artifacts.BASELINE_ONNX), ("pruned", artifacts.MODEL_ONNX)):
        worst = max(item["max_abs_diff"] for item in facts[role]["verified"])
        click.echo(f"{role}: {finished.path(name)}, largest difference to PyTorch {worst:.1e}")
