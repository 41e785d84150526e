"""The end of a build: the table, and where everything is. Not a verb."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy import artifacts
from ampdeploy.report.result import Report

# What a user opens first comes first.
_WORTH_NAMING = (
    artifacts.REPORT_MD,
    artifacts.REPORT_JSON,
    artifacts.ENGINE_PLAN,
    artifacts.ENGINE_JSON,
    artifacts.BASELINE_PLAN,
    artifacts.MODEL_FP16_ONNX,
    artifacts.PRECISION,
    artifacts.MODEL_ONNX,
    artifacts.BASELINE_ONNX,
    artifacts.DISTILLED,
    artifacts.SLIM,
    artifacts.WIDTHS,
    artifacts.REPAIR,
    artifacts.MANIFEST,
)


def show_run(folder: Path, *, as_json: bool) -> None:
    """Print a finished run's report as a table, or as JSON."""
    report = Report.read(folder / artifacts.REPORT_JSON)
    if as_json:
        click.echo(report.to_json(), nl=False)
        return
    from rich.console import Console

    from ampdeploy.report.terminal import summary_table

    Console().print(summary_table(report))
    from ampdeploy.pipeline import plan, rerun_config

    # Of this build: other things may lie in the folder, too.
    ours = {name for stage in plan(rerun_config(folder)) for name in stage.writes}
    click.echo(f"\nWrote to {folder}:")
    for name in _WORTH_NAMING:
        if name in ours or name == artifacts.MANIFEST:
            click.echo(f"  {name:22} {(folder / name).stat().st_size / 1e6:8.2f} MB")
