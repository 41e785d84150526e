"""`ampdeploy prune`: the stages up to a physically smaller checkpoint."""

from __future__ import annotations

from typing import Any

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.progress import log


@click.command("prune")
@common.model_options
@click.option(
    "--target",
    help="What it will be built for: decides the steps of the widths. Default: the run's, or ort.",
)
@common.data_options
@common.prune_options
@common.run_options
@common.dry_run
@common.as_json
@common.verbosity
def command(dry_run: bool, json_: bool, **options: Any) -> None:
    """Score, search and slim MODEL; writes slim.safetensors and widths.json."""
    asked = options.pop("target")
    config = common.keep_the_rest(common.build_config({**options, "target": asked or "ort"}), asked)
    if dry_run:
        from ampdeploy.commands.plan import print_plan

        print_plan(config, as_json=json_, until="slim")
        return
    from ampdeploy.pipeline import build

    run = build(config, until="slim")
    widths = artifacts.read_json(run.path(artifacts.WIDTHS))
    if json_:
        common.print_json({"folder": str(run.folder), **widths["totals"]})
        return
    totals = widths["totals"]
    cut = 1 - totals["params"] / totals["params_dense"]
    if run.path(artifacts.REPORT_JSON).exists():
        log.warning(
            "ONNX files and report in %s may be of an earlier size; `ampdeploy report %s --update` "
            "brings them up to date",
            run.folder,
            run.folder,
        )
    click.echo(
        f"{totals['params_dense']:,} -> {totals['params']:,} parameters (-{cut:.1%}); "
        f"wrote {run.path(artifacts.SLIM)}"
    )
