"""`ampdeploy build`: the whole story in one line."""

from __future__ import annotations

from typing import Any

import click

from ampdeploy.commands import common
from ampdeploy.config import BenchConfig


@click.command("build")
@common.model_options
@click.option(
    "--target",
    default="ort",
    show_default=True,
    help="What it is built for, and measured on: ort, ort-cuda, torch, torch-cuda, trt or trt-rtx.",
)
@common.data_options
@common.prune_options
@click.option(
    "--distill-epochs", type=int, default=0, show_default=True, help="0 skips distillation."
)
@common.engine_options
@common.task_options
@click.option(
    "--bench-batches",
    help="Batch sizes to time, e.g. 1,8. Default: 1,8, as far as the engine takes them.",
)
@click.option(
    "--bench-seconds",
    type=float,
    default=BenchConfig.max_seconds,
    show_default=True,
    help="Time spent timing each batch size.",
)
@click.option(
    "--bench-loads",
    type=int,
    default=BenchConfig.loads,
    show_default=True,
    help="Open both models anew so often; the time is spread over the loads. Below 5 there are no "
    "intervals.",
)
@common.energy_seconds
@click.option("--threads", type=int, help="CPU threads of the runtime. Default: its own choice.")
@common.run_options
@common.dry_run
@common.as_json
@common.verbosity
def command(dry_run: bool, json_: bool, **options: Any) -> None:
    """Prune, optionally distil, export, measure and report MODEL, in one resumable run."""
    config = common.build_config(options)
    from ampdeploy.commands.plan import print_plan

    if dry_run:
        print_plan(config, as_json=json_)
        return
    if config.evaluate.head is not None:
        from ampdeploy.models.head_file import read_head

        read_head(config.evaluate.head)  # now, and not after the pruning
    from ampdeploy.pipeline import build

    run = build(config)
    from ampdeploy.commands.result import show_run

    show_run(run.folder, as_json=json_)
