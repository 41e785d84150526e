"""`ampdeploy report`: views of report.json, and of several beside each other."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.errors import ConfigError
from ampdeploy.report.result import Report


@click.command("report")
@click.argument("paths", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--markdown", is_flag=True, help="Print Markdown instead of the table.")
@click.option("--md", "md_file", type=common.FILE, help="Write Markdown to FILE.")
@click.option("--html", "html_file", type=common.FILE, help="Write one self-contained page.")
@click.option(
    "--check",
    is_flag=True,
    help="Only validate each report.json against its schema; exit 1 if not.",
)
@click.option(
    "--update", is_flag=True, help="First run what the report of PATH needs: export, eval, bench."
)
@common.as_json
@common.verbosity
def command(
    paths: tuple[Path, ...],
    markdown: bool,
    md_file: Path | None,
    html_file: Path | None,
    check: bool,
    update: bool,
    json_: bool,
) -> None:
    """Show PATHS, each a run directory or a report.json.

    Of one run directory, report.md and report.html are rewritten. Several are compared in one
    table; what was measured differently from the first is marked as not comparable, not ranked.
    """
    if markdown and json_:
        raise ConfigError("--markdown and --json both print on stdout. Choose one of them.")
    if check:
        if markdown or md_file or html_file or update or json_:
            raise ConfigError("--check only validates. Leave out the other options.")
        for path in paths:
            _check(path)
        return
    if len(paths) > 1 and update:
        raise ConfigError(f"--update takes one run directory, not {len(paths)}.")
    reports = [_read(path, update=update) for path in paths]
    if len(paths) == 1:
        _show_one(paths[0], reports[0], markdown, md_file, html_file, json_)
    else:
        _show_several(paths, reports, markdown, md_file, html_file, json_)


def _file(path: Path) -> Path:
    return path / artifacts.REPORT_JSON if path.is_dir() else path


def _check(path: Path) -> None:
    from ampdeploy.report.schema import check_file

    report = check_file(_file(path))
    click.echo(f"{_file(path)} follows the schema of report.json, version {report.schema_version}.")


def _read(path: Path, *, update: bool) -> Report:
    if path.is_dir():
        from ampdeploy.pipeline import build, require_current, rerun_config

        config = rerun_config(path)
        if update:
            build(config)
        # The views are written anew below.
        then = f"ampdeploy report {path} --update"
        require_current(config, "report", then, ignoring=artifacts.REPORT_VIEWS)
    elif update:
        raise ConfigError(f"--update takes a run directory, and {path} is none.")
    return Report.read(_file(path))


def _show_one(
    path: Path,
    report: Report,
    markdown: bool,
    md_file: Path | None,
    html_file: Path | None,
    json_: bool,
) -> None:
    from ampdeploy.report.html import render_html
    from ampdeploy.report.markdown import render_markdown

    if json_:
        click.echo(report.to_json(), nl=False)
        if not (md_file or html_file):
            return
    views = {
        artifacts.REPORT_MD: render_markdown(report),
        artifacts.REPORT_HTML: render_html(report),
    }
    if path.is_dir() and not json_:
        for name, text in views.items():
            artifacts.write_text(path / name, text)
    _write(md_file, views[artifacts.REPORT_MD])
    _write(html_file, views[artifacts.REPORT_HTML])
    if markdown:
        click.echo(views[artifacts.REPORT_MD], nl=False)
    elif not json_:
        from rich.console import Console

        from ampdeploy.report.terminal import summary_table

        Console().print(summary_table(report))


def _show_several(
    paths: tuple[Path, ...],
    reports: list[Report],
    markdown: bool,
    md_file: Path | None,
    html_file: Path | None,
    json_: bool,
) -> None:
    from ampdeploy.report import compare

    names = compare.run_names(paths)
    comparison = compare.compare(dict(zip(names, reports, strict=True)))
    if md_file:
        _write(md_file, compare.render_markdown(comparison))
    if html_file:
        _write(html_file, compare.render_html(comparison))
    if json_:
        common.print_json(compare.to_plain(comparison))
    elif markdown:
        click.echo(compare.render_markdown(comparison), nl=False)
    else:
        from rich.console import Console

        from ampdeploy.report.terminal import comparison_notes, comparison_table

        Console().print(comparison_table(comparison))
        for note in comparison_notes(comparison):
            click.echo(note)


def _write(file: Path | None, text: str) -> None:
    if file is not None:
        artifacts.write_text(file, text)
