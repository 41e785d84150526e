"""`ampdeploy eval`: is it still right, on images of your own?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ampdeploy.commands import common
from ampdeploy.commands.pair import find_pair, pair_options


@click.command("eval")
@pair_options
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
    limit: int | None,
    seed: int,
    labels: bool | None,
    json_: bool,
) -> None:
    """Fidelity of a pruned model to its baseline on --images, and k-NN accuracy of both.

    Class folders give labels; train/ and val/ inside are used as k-NN bank and queries. Without
    labels, fidelity alone is measured.
    """
    pair = find_pair("eval", artifact, baseline, run, target)
    from ampdeploy.data.folder import scan_eval
    from ampdeploy.evaluate import evaluate_pair
    from ampdeploy.targets.base import get_target

    chosen = scan_eval(images, limit=limit, seed=seed, labelled=labels)
    opened = get_target(pair.target)
    with opened.open(pair.baseline) as dense, opened.open(pair.pruned) as slim:
        result = evaluate_pair(
            dense, slim, queries=chosen.queries, bank=chosen.bank, spec=pair.spec
        )
    result["target"] = pair.target
    result["skipped"] = {item.relative: item.reason for item in chosen.queries.skipped}
    if json_:
        common.print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    fidelity = result["fidelity"]
    rows = [
        ("images", str(fidelity["images"])),
        ("feature cosine, mean", _number(fidelity["cosine_mean"])),
        ("feature cosine, 1st pct", _number(fidelity["cosine_p1"])),
        ("patch cosine, mean", _number(fidelity["patch_cosine_mean"])),
        (f"shared {fidelity['knn_k']} neighbours", _number(fidelity["knn_agreement"])),
    ]
    if result["accuracy"]:
        for metric, dense in result["accuracy"]["baseline"].items():
            slim = result["accuracy"]["pruned"][metric]
            change = result["accuracy_difference"][metric]
            interval = f"{100 * change['ci95_low']:+.1f}, {100 * change['ci95_high']:+.1f}"
            rows.append((metric, f"{dense:.1%} -> {slim:.1%}, 95% of change [{interval}] points"))
    for name, value in rows:
        click.echo(f"{name:28} {value}")
    for name, reason in {**fidelity["why"], **result["why"]}.items():
        click.echo(f"{name}: not measured, {reason}")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
