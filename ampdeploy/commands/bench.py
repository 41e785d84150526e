"""`ampdeploy bench`: is it faster and smaller, on this machine?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ampdeploy.commands import common
from ampdeploy.commands.pair import find_pair, pair_options
from ampdeploy.config import BenchConfig


@click.command("bench")
@pair_options
@click.option("--batches", default="1,8", show_default=True, help="Batch sizes, e.g. 1,8.")
@click.option("--min-runs", type=int, default=BenchConfig.min_runs, show_default=True)
@click.option("--seconds", type=float, default=BenchConfig.max_seconds, show_default=True)
@click.option("--threads", type=int, help="CPU threads of the runtime. Default: its own choice.")
@common.as_json
@common.verbosity
def command(
    artifact: Path | None,
    baseline: Path | None,
    run: Path | None,
    target: str | None,
    images: Path,
    batches: str,
    min_runs: int,
    seconds: float,
    threads: int | None,
    json_: bool,
) -> None:
    """Latency, interleaved, and memory of a pruned model against its baseline."""
    config = BenchConfig(
        batch_sizes=common.integers(batches, "--batches"),
        min_runs=min_runs,
        max_seconds=seconds,
        threads=threads,
    )
    pair = find_pair("bench", artifact, baseline, run, target)
    from ampdeploy.bench.latency import BUFFERS
    from ampdeploy.bench.run import measure_pair
    from ampdeploy.data.folder import scan_folder
    from ampdeploy.data.loading import load_all
    from ampdeploy.report.codec import to_plain

    chosen = scan_folder(images, limit=BUFFERS * max(config.batch_sizes), seed=0, minimum=2)
    pixels = load_all(chosen, pair.spec).numpy()
    measured = measure_pair(pair.target, pair.baseline, pair.pruned, pixels, config)
    result = {"target": pair.target, **to_plain(measured)}
    if json_:
        common.print_json(result)
    else:
        _print(result)


def _print(result: dict[str, Any]) -> None:
    for size, row in result["latency"].items():
        ratio, dense, slim = row["ratio"], row["baseline"], row["pruned"]
        low, high = ratio["ci95_low"], ratio["ci95_high"]
        interval = f" [{low:.3f}, {high:.3f}]" if low is not None else ""
        click.echo(
            f"batch {size}: p50 {dense['p50']:.2f} -> {slim['p50']:.2f} ms, ratio "
            f"{ratio['value']:.3f}{interval}, n {dense['n']}"
            + ("" if row["timing"]["warmup_stable"] else " (warm-up did not settle)")
        )
    for role, memory in result["memory"].items():
        if memory["memory_bytes"] is None:
            click.echo(f"memory {role}: not measured, {memory['why']['memory_bytes']}")
            continue
        click.echo(
            f"memory {role}: {memory['memory_bytes'] / 1e6:.1f} MB above the runtime at batch "
            f"{memory['batch_size']}, peak {memory['peak_rss_bytes'] / 1e6:.1f} MB"
        )
