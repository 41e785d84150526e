"""`ampdeploy gate`: may this model go out?"""

from __future__ import annotations

import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.errors import AmpDeployError, ConfigError
from ampdeploy.gate.gate import Decision, GateConfig, GateError, run_gate
from ampdeploy.gate.regression import QUANTITIES
from ampdeploy.gate.require import REQUIREMENTS
from ampdeploy.gate.rules import KINDS, parse_rule
from ampdeploy.gate.rules_file import read_rules_file
from ampdeploy.gate.units import SHARE
from ampdeploy.models.registry import close_matches
from ampdeploy.report.consistent import read_consistent

UNDECIDED = ("fail", "pass")
# Whoever writes 1 means 1%: nobody allows a model to be twice as slow.
_BARE_SHARE = 0.5

# Options of a rules file that are no rules -> whether they may be given more than once.
_OTHERS = {
    "require": True,
    "baseline-report": False,
    "max-regression": False,
    "regression-of": True,
    "undecided": False,
}
_KNOWN = {**{name: bool(kind.scope) for name, kind in KINDS.items()}, **_OTHERS}

_rule_options = common.stack(
    *(
        click.option(
            f"--{name}",
            multiple=True,
            metavar=f"[{kind.scope.upper()}=]LIMIT" if kind.scope else "LIMIT",
            help=kind.help,
        )
        for name, kind in KINDS.items()
    )
)


@click.command("gate")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--rules", type=common.FILE, help="YAML file of these options, which win over it.")
@_rule_options
@click.option("--require", multiple=True, metavar="NAME", help=f"Also: {', '.join(REQUIREMENTS)}.")
@click.option(
    "--baseline-report",
    multiple=True,
    type=common.FILE,
    help="An older report.json that this one must not be worse than.",
)
@click.option(
    "--max-regression", multiple=True, metavar="SHARE", help="By how much it may be, e.g. 2%."
)
@click.option(
    "--regression-of",
    multiple=True,
    metavar="NAME",
    help=f"In what: {', '.join(QUANTITIES)}. Default: all but p50, which is no ratio.",
)
@click.option(
    "--undecided",
    multiple=True,
    metavar="|".join(UNDECIDED),
    help="What a limit inside the 95% interval means. Default: fail.",
)
@click.option("--junit", type=common.FILE, help="Also write JUnit XML.")
@click.option("--markdown", type=common.FILE, help="Also write a summary in Markdown.")
@common.as_json
@common.verbosity
def command(
    path: Path,
    rules: Path | None,
    junit: Path | None,
    markdown: Path | None,
    json_: bool,
    **options: tuple[Any, ...],
) -> None:
    """Hold PATH, a report.json or a run directory, against rules; exit 3 if one says no.

    Limits of latency, throughput and accuracy hold for every batch size or metric of the report,
    or for one: --max-latency-ratio 8=0.75. A rule passes when the whole 95% interval is within its
    limit, fails when all of it is beyond, and is undecided between, or where the end that it would
    need is missing; what was not measured fails.
    """
    started = time.monotonic()
    written = _written(rules, options)
    config = _config(written)
    old_path = Path(written["baseline-report"][0]) if "baseline-report" in written else None
    file = _report_file(path)
    _check_outputs((junit, markdown), reading=(file, rules, old_path))
    report = read_consistent(file)
    old = read_consistent(old_path) if old_path else None
    decision = run_gate(report, config, old=old)
    if junit:
        from ampdeploy.gate.junit import junit_xml

        now = datetime.now(timezone.utc)
        took = time.monotonic() - started
        artifacts.write_text(junit, junit_xml(decision, when=now, seconds=took))
    if markdown:
        from ampdeploy.gate.views import markdown as as_markdown

        artifacts.write_text(markdown, as_markdown(decision))
    if json_:
        common.print_json(decision.to_plain())
    else:
        _show(decision)
    if not decision.passed:
        raise GateError(f"{path} does not pass. {decision.headline}.")


def _written(rules: Path | None, options: dict[str, tuple[Any, ...]]) -> dict[str, tuple[str, ...]]:
    """Name -> what was written behind it, in the file or, first, on the command line.

    Raises:
        ConfigError: More than one value for what takes one, or as `read_rules_file`.
    """
    given = {name.replace("_", "-"): tuple(map(str, v)) for name, v in options.items() if v}
    for name, texts in given.items():
        if len(texts) > 1 and not _KNOWN[name]:
            raise ConfigError(f"--{name} is given {len(texts)} times. Which one is meant?")
    if rules is None:
        return given
    in_file = read_rules_file(rules, _KNOWN)
    if "baseline-report" in in_file:
        # A file that is run from elsewhere means the same file.
        in_file["baseline-report"] = (str(rules.parent / in_file["baseline-report"][0]),)
    written = {**in_file, **given}
    if "max-regression" not in written and "regression-of" not in given:
        # A file may say what to compare before there is anything to compare with.
        written.pop("regression-of", None)
    return written


def _config(written: dict[str, tuple[str, ...]]) -> GateConfig:
    if ("max-regression" in written) != ("baseline-report" in written):
        raise ConfigError(
            "--max-regression and --baseline-report need each other: how much worse, than what?"
        )
    if "regression-of" in written and "max-regression" not in written:
        raise ConfigError("--regression-of needs --max-regression and --baseline-report.")
    allowed = written.get("max-regression")
    undecided = written.get("undecided", (UNDECIDED[0],))
    return GateConfig(
        rules=tuple(
            parse_rule(name, texts, where=f"--{name}")
            for name, texts in written.items()
            if name in KINDS
        ),
        require=_names("require", written, REQUIREMENTS) or (),
        max_regression=_allowed(allowed[0]) if allowed else None,
        regression_of=_names("regression-of", written, QUANTITIES),
        undecided_passes=_names("undecided", {"undecided": undecided}, UNDECIDED) == ("pass",),
    )


def _allowed(text: str) -> float:
    """The share behind ``--max-regression``.

    Raises:
        ConfigError: No share, or a bare number that was rather meant as per cent.
    """
    share = SHARE.parse(text, "--max-regression")
    if share >= _BARE_SHARE and "%" not in text:
        raise ConfigError(
            f"--max-regression {text!r} would let it be {SHARE.show(share)} worse. Write {text}% "
            f"for {text} per cent, or {100 * share:g}% if you mean that."
        )
    return share


def _names(option: str, written: dict[str, tuple[str, ...]], known: Any) -> tuple[str, ...] | None:
    """The names behind an option, written one by one or with commas between.

    Raises:
        ConfigError: One that is not in `known`.
    """
    if option not in written:
        return None
    names = [part.strip() for text in written[option] for part in text.split(",")]
    for name in names:
        if name not in known:
            raise ConfigError(
                f"--{option}: unknown {name!r}.{close_matches(name, known)} Known: "
                f"{', '.join(known)}."
            )
    return tuple(dict.fromkeys(names))


def _report_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    from ampdeploy.pipeline import require_current, rerun_config

    then = f"ampdeploy report {path} --update"
    require_current(rerun_config(path), "report", then, ignoring=artifacts.REPORT_MD)
    return path / artifacts.REPORT_JSON


def _check_outputs(outputs: tuple[Path | None, ...], *, reading: tuple[Path | None, ...]) -> None:
    """Refuse to write over what is read, over each other, or over what is no file.

    Raises:
        AmpDeployError: One of these would happen.
    """
    taken = {path.resolve() for path in reading if path}
    for path in filter(None, outputs):
        if path.resolve() in taken:
            raise AmpDeployError(f"{path} is used for something else here. Give another file name.")
        taken.add(path.resolve())
        # Files are replaced, not filled: /dev/stdout would become one.
        if (path.exists() and not path.is_file()) or path.parent.resolve() == Path("/dev"):
            raise AmpDeployError(f"{path} is no ordinary file. Give a file name to write to.")


def _show(decision: Decision) -> None:
    from rich.console import Console

    from ampdeploy.gate import views

    console = Console()
    if console.is_terminal:
        console.print(views.table(decision))
        return
    for finding in decision.findings:
        click.echo(views.line(finding))
    click.echo(decision.headline)
