"""The end of a build: the table, and where everything is. Not a verb."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy import artifacts
from ampdeploy.report.result import Report

# What a user opens first comes first.
_WORTH_NAMING = (
    artifacts.REPORT_HTML,
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
    from ampdeploy.stages.preflight import packs_bundle

    # Of this build: other things may lie in the folder, too.
    config = rerun_config(folder)
    ours = {name for stage in plan(config) for name in stage.writes}
    click.echo(f"\nWrote to {folder}:")
    for name in _WORTH_NAMING:
        if name in ours or name == artifacts.MANIFEST:
            click.echo(f"  {name:22} {(folder / name).stat().st_size / 1e6:8.2f} MB")
    if not packs_bundle(config, "report"):
        return
    from ampdeploy.device.bundle.pack import bundle_path

    bundle = bundle_path(folder)
    size = sum(path.stat().st_size for path in bundle.iterdir()) / 1e6
    click.echo(f"and the bundle for the device, {size:.2f} MB: {bundle}")
