"""The comparison as Markdown.

    python -m benchmarks.compression.table benchmarks/results/compression_dinov2_s.json

Two tables of the mean cosine to the dense model's pooled features, by method and size, on both
sets of images; then every column at one size. A number is the mean over the seeds, ± half the
range from the lowest to the highest.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import read_json
from ampdeploy.errors import AmpDeployError, ConfigError
from benchmarks.compression.methods import OURS
from benchmarks.compression.summary import read_summary

SETS = {"val": "held-out images like the calibration images", "photos": "photographs"}

# A size that misses its target by more than this is shown with its own.
SAME_SIZE = 0.002

Cell = Callable[[dict[str, Any]], str]


def spread(value: dict[str, float] | None, *, scale: float = 1.0, digits: int = 3) -> str:
    """Mean ± half the range; the latter only where the seeds differ by what is shown."""
    if value is None:
        return "-"
    text = f"{scale * value['mean']:.{digits}f}"
    half = scale * (value["max"] - value["min"]) / 2
    return f"{text} ± {half:.{digits}f}" if half >= 0.5 * 10**-digits else text


def _grid(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *(["---:"] * (len(head) - 1))], *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _bold(label: str, method: str) -> str:
    return f"**{label}**" if method == OURS else label


def by_size(result: dict[str, Any], summary: list[dict[str, Any]], images: str) -> str:
    """Mean cosine of pooled features, a row per method and a column per size."""
    sizes = result["sizes"]
    dense = result["dense"]["params"]
    found = {(row["method"], row["cut"]): row for row in summary}
    best = {
        cut: max(row[images]["cosine_mean"]["mean"] for row in summary if row["cut"] == cut)
        for cut in sizes
        if any(row["cut"] == cut for row in summary)
    }

    def cell(method: str, cut: float) -> str:
        row = found.get((method, cut))
        if row is None:
            return "-"
        cosine = row[images]["cosine_mean"]
        text = spread(cosine)
        if cosine["mean"] == best[cut]:
            text = f"**{text}**"
        true = 1 - row["params"]["mean"] / dense
        return text if abs(true - cut) <= SAME_SIZE else f"{text} (at -{true:.1%})"

    labels = {row["method"]: row["label"] for row in summary}
    head = [
        f"cosine on {SETS[images]}",
        *(f"-{cut:.0%} ({dense * (1 - cut) / 1e6:.1f}M)" for cut in sizes),
    ]
    rows = [
        [_bold(label, method), *(cell(method, cut) for cut in sizes)]
        for method, label in labels.items()
    ]
    return _grid(head, rows)


def _columns(images: str) -> dict[str, Cell]:
    def of(name: str) -> Cell:
        return lambda row: spread(row[images][name])

    columns = {
        "CLS mean": of("cosine_mean"),
        "CLS p1": of("cosine_p1"),
        "patch mean": of("patch_cosine_mean"),
        "patch p1": of("patch_cosine_p1"),
        "neighbours": of("knn_agreement"),
    }
    return {**columns, "k-NN": of("knn")} if images == "val" else columns


_COST: dict[str, Cell] = {
    "params, M": lambda row: spread(row["params"], scale=1e-6, digits=2),
    "GFLOPs": lambda row: spread(row["flops"], scale=1e-9, digits=2),
    "block-forwards per image": lambda row: spread(row["block_forwards_per_image"], digits=0),
    "backwards": lambda row: spread(row["block_backwards_per_image"], digits=0),
    "seconds": lambda row: spread(row["seconds"], digits=0),
    "memory, MB": lambda row: spread(row["peak_memory_bytes"], scale=1e-6, digits=0),
}


def details(result: dict[str, Any], summary: list[dict[str, Any]], cut: float) -> str:
    """Every column at one size: fidelity on both sets, then size and cost, and the dense model.

    Raises:
        ConfigError: The comparison has no such size.
    """
    chosen = [row for row in summary if row["cut"] == cut]
    if not chosen:
        sizes = ", ".join(str(size) for size in result["sizes"])
        raise ConfigError(f"the comparison has no rows at size {cut}. Sizes: {sizes}.")
    tables = []
    for title, columns in (
        (f"-{cut:.0%}, {SETS['val']}", _columns("val")),
        (f"-{cut:.0%}, {SETS['photos']}", _columns("photos")),
        (f"-{cut:.0%}, size and cost", _COST),
    ):
        rows = [
            [_bold(row["label"], row["method"]), *(cell(row) for cell in columns.values())]
            for row in chosen
        ]
        tables.append(_grid([title, *columns], rows))
    dense = result["dense"]
    knn = dense["val"]["knn"]
    tables.append(
        f"Dense: {dense['params'] / 1e6:.2f}M parameters, {dense['flops'] / 1e9:.2f} GFLOPs"
        + ("." if knn is None else f", leave-one-out k-NN {knn:.3f}.")
    )
    return "\n\n".join(tables)


def render(result: Any, source: str, cut: float | None = None) -> str:
    """All tables.

    Args:
        result: What `run` wrote.
        source: Its name, for messages.
        cut: Size of the detailed tables; None: the one nearest to -40%.

    Raises:
        ArtifactError: `result` is something else.
        ConfigError: It has no such size.
    """
    summary = read_summary(result, source)
    if cut is None:
        cut = min((row["cut"] for row in summary), key=lambda size: abs(size - 0.4))
    parts = [by_size(result, summary, images) for images in SETS]
    return "\n\n".join([*parts, details(result, summary, cut)]) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Print the tables of a result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("--size", type=float, help="of the detailed tables; default 0.4")
    options = parser.parse_args(arguments)
    try:
        sys.stdout.write(render(read_json(options.result), options.result.name, options.size))
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
