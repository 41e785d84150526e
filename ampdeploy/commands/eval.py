"""`ampdeploy eval`: is it still right, on images of your own?"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from ampdeploy.commands import common
from ampdeploy.commands.pair import find_pair, pair_options

# Of the accuracy table; protocols are long and follow below it.
_COLUMNS = ("metric", "baseline", "pruned", "change, pp", "95% interval", "chance")


@click.command("eval")
@pair_options
@common.task_options
@click.option("--limit", type=int, help="At most this many images of each split. Default: all.")
@click.option("--seed", type=int, default=0, show_default=True)
@click.option(
    "--labels/--no-labels",
    default=None,
    help="Whether folders are classes. Default: two or more of them with no image beside them are.",
)
@common.as_json
@common.verbosity
def command(
    artifact: Path | None,
    baseline: Path | None,
    run: Path | None,
    target: str | None,
    images: Path,
    tasks: str | None,
    head: Path | None,
    limit: int | None,
    seed: int,
    labels: bool | None,
    json_: bool,
) -> None:
    """Fidelity of a pruned model to its baseline on --images, and what the features of both are
    good for.

    Class folders give labels; train/ and val/ inside are used as bank and queries, and ImageNet's
    flat val/ with its label file. Without labels, fidelity alone is measured.
    """
    options = common.evaluate_config(tasks, head)
    pair = find_pair("eval", artifact, baseline, run, target)
    from ampdeploy.data.folder import scan_eval
    from ampdeploy.evaluate import evaluate_pair
    from ampdeploy.targets.base import get_target

    chosen = scan_eval(images, limit=limit, seed=seed, labelled=labels)
    opened = get_target(pair.target)
    with opened.open(pair.baseline) as dense, opened.open(pair.pruned) as slim:
        result = evaluate_pair(
            dense, slim, queries=chosen.queries, bank=chosen.bank, spec=pair.spec, options=options
        )
    result["target"] = pair.target
    result["skipped"] = {item.relative: item.reason for item in chosen.queries.skipped}
    if json_:
        common.print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from ampdeploy.report.rows import by_reason

    console = Console()
    fidelity = result["fidelity"]
    table = Table(title="Fidelity to the baseline", title_justify="left")
    for column in ("measure", "value", "95% interval"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    table.add_row("images", str(fidelity["images"]), "")
    intervals = fidelity["intervals"]
    for name, field in (
        ("feature cosine, mean", "cosine_mean"),
        ("feature cosine, 1st percentile", "cosine_p1"),
        ("feature cosine, smallest", "cosine_min"),
        ("patch cosine, mean", "patch_cosine_mean"),
        ("patch cosine, 1st percentile", "patch_cosine_p1"),
        (f"shared {fidelity['knn_k']} neighbours", "knn_agreement"),
    ):
        table.add_row(name, _number(fidelity[field]), _ends(intervals.get(field)))
    console.print(table)
    for reason, fields in by_reason(_open_ends(intervals)).items():
        click.echo(f"{', '.join(fields)}: {reason}")
    if result["tasks"]:
        console.print(_accuracy_table(result))
        for metric, task in result["tasks"].items():
            click.echo(f"{metric}: {task['protocol']}")
    tasks_why = set(result["tasks_left_out"].values())  # said below
    for name, reason in {**fidelity["why"], **result["why"]}.items():
        if reason not in tasks_why:
            click.echo(f"{name}: not measured, {reason}")
    for reason, tasks in by_reason(result["tasks_left_out"].items()).items():
        click.echo(f"{', '.join(f'task {task}' for task in tasks)}: left out, {reason}")


def _accuracy_table(result: dict[str, Any]) -> Any:
    from rich.table import Table

    title = f"Accuracy on {result['dataset']['images']} images"
    if result["bank"]:
        title += f", with a bank of {result['bank']['images']}"
    table = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="left" if column == _COLUMNS[0] else "right")
    accuracy, differences = result["accuracy"], result["accuracy_difference"]
    for metric, task in result["tasks"].items():
        change = differences[metric]
        table.add_row(
            metric,
            f"{accuracy['baseline'][metric]:.1%}",
            f"{accuracy['pruned'][metric]:.1%}",
            f"{100 * change['value']:+.1f}",
            # Not a markup tag, which square brackets would be read as.
            f"{100 * change['ci95_low']:+.1f} to {100 * change['ci95_high']:+.1f}",
            f"{task['chance']:.1%}",
        )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _ends(interval: dict[str, Any] | None) -> str:
    """In words: square brackets would be read as a markup tag."""
    low, high = (interval or {}).get("ci95_low"), (interval or {}).get("ci95_high")
    if low is None and high is None:
        return "-"
    if low is None or high is None:
        return f"at most {_number(high)}" if low is None else f"at least {_number(low)}"
    return f"{_number(low)} to {_number(high)}"


def _open_ends(intervals: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(field, why an end of its interval is missing)."""
    for field, interval in intervals.items():
        for reason in dict.fromkeys(interval["why"].values()):
            yield field, reason
