"""Peak memory and time of pruning a large model, step by step, with random weights.

    python -m benchmarks.compression.memory --model dinov2_g --images 16 --micro-batch 4 \
        --rank-blocks 2 --out benchmarks/results/memory_dinov2_g.json

Memory and time do not depend on the values of weights, so none are fetched. The images are noise.
Each step reports the highest resident size of the whole process so far, weights included, and its
own seconds. Ranking takes the same time for every block of one width: with `--rank-blocks` only
that many are ranked by elimination, the others by variance, and the seconds of all are also
extrapolated (`seconds_all_blocks`). The seconds of the other steps grow with the images. The
search is left out, widths are those of the predicted curves: it holds what the repair holds, less a
second model.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ampdeploy.artifacts import prepare_folder, write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.config import PruneConfig
from ampdeploy.errors import AmpDeployError
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import count_params
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import plan_budget
from ampdeploy.prune.compress import split_calibration
from ampdeploy.prune.moments import BlockMoments, collect
from ampdeploy.prune.repair import slim_and_repair
from ampdeploy.prune.select import curve_of, error_curve, rank
from ampdeploy.prune.slim import top_neurons

T = TypeVar("T")


class Steps:
    """Runs steps and notes what each took."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, action: Callable[[], T]) -> T:
        """`action()`, timed."""
        started = time.perf_counter()
        result = action()
        seconds = time.perf_counter() - started
        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        self.rows.append({"step": name, "seconds": seconds, "peak_rss_bytes_so_far": peak})
        print(f"{name:8} {seconds:7.1f} s, peak so far {peak / 1e9:.2f} GB", file=sys.stderr)
        return result


def rank_some(model: VisionModel, moments: list[BlockMoments], blocks: int) -> list[Tensor]:
    """Scores of every block: the first `blocks` by elimination, the rest by variance."""
    scores = []
    for site, block in zip(model.spec.sites, moments, strict=True):
        linear = model.backbone.get_submodule(site.fc_out)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach()
        if site.block < blocks:
            scores.append(rank(weight, block))
            continue
        order = block.covariance.diagonal().argsort(descending=True).cpu()
        by_variance = torch.empty(len(order))
        by_variance[order] = error_curve(weight, block, order)[:-1].float()
        scores.append(by_variance)
    return scores


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All steps of pruning, on noise."""
    steps = Steps()
    torch.manual_seed(0)
    model = steps.run("build", lambda: build_model(options.model, image_size=options.image_size))
    model.eval().requires_grad_(False)
    size = model.spec.image_size
    config = PruneConfig(params_cut=options.params_cut, micro_batch_size=options.micro_batch)
    budget = plan_budget(model, config, multiple=64)
    images = torch.randn(options.images, 3, size, size)
    split = split_calibration(options.images)
    fit, measured, verify = (
        part.split(options.micro_batch)
        for part in images.split([split.fit, split.measure, split.verify])
    )
    dense_params = count_params(model)
    moments = steps.run("moments", lambda: collect(model, fit, count=split.fit))
    ranked = min(options.rank_blocks or model.spec.depth, model.spec.depth)
    scores = steps.run("rank", lambda: rank_some(model, moments, ranked))
    steps.rows[-1]["seconds_all_blocks"] = steps.rows[-1]["seconds"] * model.spec.depth / ranked
    widths = allocate([curve_of(score).double().numpy() for score in scores], budget)
    kept = [top_neurons(score, width) for score, width in zip(scores, widths, strict=True)]
    slim, repair = steps.run(
        "repair",
        lambda: slim_and_repair(model, kept, moments, measured, verify, config),
    )
    return {
        "benchmark": "pruning memory",
        "model": model.spec.name,
        "image_size": size,
        "weights": "random",
        "dtype": "float32",
        "images": options.images,
        "micro_batch": options.micro_batch,
        "params": dense_params,
        "params_slim": count_params(slim),
        "ranked_blocks": ranked,
        "blocks": model.spec.depth,
        "steps": steps.rows,
        "loss_of_cosine": {"folded": repair.folded.total, "refitted": repair.refitted.total}
        if repair.refitted
        else None,
        "peak_rss_bytes": steps.rows[-1]["peak_rss_bytes_so_far"],
        "host": {**host_facts(), "threads": torch.get_num_threads()},
    }


def main() -> None:
    """Measure one model and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--params-cut", type=float, default=0.4)
    parser.add_argument("--rank-blocks", type=int, help="rank only so many; default all")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    try:
        prepare_folder(options.out.parent)
        write_json(options.out, measure(options))
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
