"""Fidelity against size, a line per method.

    python -m benchmarks.compression.plot benchmarks/results/compression_dinov2_s.json OUT.svg

The vertical axis is the mean cosine to the dense model's pooled features, stretched towards 1 so
that 0.9 and 0.99 are as far apart as 0 and 0.9. Bands go from the lowest seed to the highest.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.artifacts import read_json, write_with
from ampdeploy.errors import AmpDeployError
from ampdeploy.optional import require
from benchmarks.compression.methods import OURS
from benchmarks.compression.summary import read_summary
from benchmarks.compression.table import SETS

TICKS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.98, 0.99, 0.995, 0.999)

# Dark ink on a white card: readable in a light and in a dark page alike.
INK, CARD, OUR_COLOUR = "#1f2328", "#ffffff", "#d1242f"
# Distinct on white, and none of them like ours.
COLOURS = ("#0969da", "#1a7f37", "#9a6700", "#8250df", "#57606a", "#bf3989", "#0e7490", "#2f2f2f")
LINES = ("-", "--", ":", "-.")
MARKERS = "osv^DPX<>*hp"


def _stretch(cosine: Any) -> Any:
    """Cosine to -log10(1 - cosine), which grows by 1 for every tenfold smaller loss."""
    return -np.log10(1 - np.clip(cosine, -0.999, 1 - 1e-6))


def _shrink(value: Any) -> Any:
    return 1 - 10 ** -np.asarray(value, dtype=float)


def draw(result: Any, source: str, out: Path, images: str = "val") -> None:
    """Write the plot as SVG.

    Args:
        result: What `run` wrote.
        source: Its name, for messages.
        out: The file.
        images: ``val`` or ``photos``: which images judge.

    Raises:
        ArtifactError: `result` is something else.
        MissingDependencyError: matplotlib is not installed.
    """
    summary = read_summary(result, source)
    matplotlib = require("matplotlib", needed_by="the plot")
    # The same result gives the same file, and text stays text.
    options = {"svg.hashsalt": "ampdeploy", "svg.fonttype": "none", "font.family": "sans-serif"}
    with matplotlib.rc_context(options):
        figure = require("matplotlib.figure", needed_by="the plot").Figure(
            figsize=(9, 5.2), facecolor=CARD, layout="constrained"
        )
        axes = figure.add_subplot(facecolor=CARD)
        axes.set_yscale("function", functions=(_stretch, _shrink))
        _lines(axes, summary, images)
        _dress(axes, result, summary, images)
        write_with(out, lambda path: figure.savefig(path, format="svg", metadata={"Date": None}))


def _lines(axes: Any, summary: list[dict[str, Any]], images: str) -> None:
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in summary:
        groups.setdefault(row["method"], []).append(row)
    # The legend has the order of the lines, best first.
    ordered = sorted(
        groups.items(), key=lambda item: -min(r[images]["cosine_mean"]["mean"] for r in item[1])
    )
    for position, (method, rows) in enumerate(ordered):
        rows = sorted(rows, key=lambda row: row["params"]["mean"])
        params = [row["params"]["mean"] / 1e6 for row in rows]
        cosine = [row[images]["cosine_mean"] for row in rows]
        ours = method == OURS
        colour = OUR_COLOUR if ours else COLOURS[position % len(COLOURS)]
        axes.plot(
            params,
            [value["mean"] for value in cosine],
            label=rows[0]["label"],
            color=colour,
            linewidth=3 if ours else 1.3,
            linestyle="-" if ours else LINES[position % len(LINES)],
            marker=MARKERS[position % len(MARKERS)],
            markersize=6 if ours else 4,
            zorder=3 if ours else 2,
        )
        low, high = ([value[end] for value in cosine] for end in ("min", "max"))
        axes.fill_between(params, low, high, color=colour, alpha=0.15, linewidth=0, zorder=1)


def _dress(axes: Any, result: Any, summary: list[dict[str, Any]], images: str) -> None:
    cosines = [row[images]["cosine_mean"] for row in summary]
    bottom = min(0.0, *(value["min"] for value in cosines))
    best = max(value["max"] for value in cosines)
    ticks = [tick for tick in TICKS if tick <= best + (1 - best) / 2]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylim(bottom, best + (1 - best) / 3)
    dense = result["dense"]["params"]
    axes.set_xlabel(f"parameters, millions (dense: {dense / 1e6:.1f})", color=INK)
    axes.set_ylabel("mean cosine to the dense features", color=INK)
    axes.set_title(
        f"{result['model']}, {result['image_size']} px, untrained; on {SETS[images]}",
        color=INK,
        fontsize=11,
    )
    axes.tick_params(colors=INK)
    axes.grid(alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(
        loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False, fontsize=9, labelcolor=INK
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw a result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("result", type=Path)
    parser.add_argument("out", type=Path, help="SVG file to write")
    parser.add_argument("--images", choices=tuple(SETS), default="val", help="which images judge")
    options = parser.parse_args(arguments)
    try:
        draw(read_json(options.result), options.result.name, options.out, options.images)
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
