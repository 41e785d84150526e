"""`ampdeploy distill`: train the slim model of a run against the original."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import click

from ampdeploy import artifacts
from ampdeploy.commands import common


@click.command("distill")
@click.argument("run", type=common.FOLDER)
@click.option("--epochs", type=int, required=True)
@click.option("--images", type=common.FOLDER, help="Training images. Default: the run's --calib.")
@click.option("--batch-size", type=int, help="Images per step.")
@click.option(
    "--base-lr",
    type=float,
    help="Learning rate at batch 256. Default: published for the model.",
)
@click.option("--warmup-epochs", type=float)
@click.option("--min-scale", type=float, help="Smallest area of the random crops, in (0, 1].")
@click.option(
    "--strong-augment/--plain-augment",
    default=None,
    help="Colour jitter, greyscale, blur and solarise. Default: published for the model.",
)
@click.option("--device", help="auto, cpu, cuda or cuda:N.")
@click.option("--autocast", help="auto, bfloat16 or none.")
@common.as_json
@common.verbosity
def command(run: Path, json_: bool, **options: Any) -> None:
    """Distil the slim model of RUN, a folder made by `build` or `prune`."""
    from ampdeploy.pipeline import build, rerun_config

    config = rerun_config(run)
    given = {name: value for name, value in options.items() if value is not None}
    config = dataclasses.replace(config, distill=dataclasses.replace(config.distill, **given))
    finished = build(config, until="distill" if config.distill.epochs else "slim")
    if not config.distill.epochs:
        click.echo("0 epochs: nothing was trained; the run's model is the slim one again.")
        return
    facts = finished.facts("distill")
    if json_:
        common.print_json(facts)
        return
    click.echo(
        f"loss {facts['first_loss']:.4g} -> {facts['last_loss']:.4g} in {facts['steps']} steps; "
        f"wrote {finished.path(artifacts.DISTILLED)}\n"
        f"Next: ampdeploy report {run} --update"
    )
