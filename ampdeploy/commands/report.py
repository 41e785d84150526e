"""`ampdeploy report`: views of report.json."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.errors import ConfigError
from ampdeploy.report.result import Report


@click.command("report")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print the Markdown report instead of the table.")
@click.option(
    "--update", is_flag=True, help="First run what the report of PATH needs: export, eval, bench."
)
@common.as_json
@common.verbosity
def command(path: Path, markdown: bool, update: bool, json_: bool) -> None:
    """Show PATH: a run directory or a report.json. In a run directory, report.md is rewritten."""
    if path.is_dir():
        from ampdeploy.pipeline import build, require_current, rerun_config

        config = rerun_config(path)
        if update:
            build(config)
        # report.md is a view, written anew below.
        then = f"ampdeploy report {path} --update"
        require_current(config, "report", then, ignoring=artifacts.REPORT_MD)
    elif update:
        raise ConfigError(f"--update takes a run directory, and {path} is none.")
    file = path / artifacts.REPORT_JSON if path.is_dir() else path
    report = Report.read(file)
    if json_:
        click.echo(report.to_json(), nl=False)
        return
    from ampdeploy.report.markdown import render_markdown

    text = render_markdown(report)
    if path.is_dir():
        artifacts.write_text(path / artifacts.REPORT_MD, text)
    if markdown:
        click.echo(text, nl=False)
        return
    from rich.console import Console

    from ampdeploy.report.terminal import summary_table

    Console().print(summary_table(report))
