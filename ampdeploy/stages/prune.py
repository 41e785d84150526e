"""Score, search and slim."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.progress import log
from ampdeploy.stages.common import (
    calibration_images,
    checkpoint,
)

if TYPE_CHECKING:
    from ampdeploy.run import Run


def score_options(config: BuildConfig) -> dict[str, Any]:
    prune = config.prune
    return {
        "criterion": prune.criterion,
        "inv_temperature": prune.inv_temperature,
        "batch_size": prune.batch_size,
        "micro_batch_size": prune.micro_batch_size,
        "device": prune.device,
    }


def score(run: Run) -> dict[str, Any]:
    """Importance of every hidden neuron, into `scores.safetensors`."""
    from ampdeploy.checkpoint import METADATA_KEY, write_safetensors
    from ampdeploy.data.loading import iter_batches
    from ampdeploy.prune.score import importance

    config = run.config.prune
    model = checkpoint(run, artifacts.BASELINE)
    images = calibration_images(run)
    scores = importance(
        model,
        iter_batches(images, model.spec, config.batch_size),
        config,
        count=len(images),
    )
    tensors = {site.name: s for site, s in zip(model.spec.sites, scores, strict=True)}
    facts = {
        "criterion": config.criterion,
        "inv_temperature": config.inv_temperature,
        "images": len(images),
        "batch_size": config.batch_size,
        "seed": run.config.data.seed,
    }
    # One key: the library writes several in an order that changes from process to process, and
    # with it the file's hash.
    metadata = {METADATA_KEY: json.dumps(facts)}
    write_safetensors(run.path(artifacts.SCORES), tensors, metadata)
    return {"images": len(images)}


def search(run: Run) -> dict[str, Any]:
    """Every block's width and everything that was tried, into `widths.json`."""
    from safetensors.torch import load_file

    from ampdeploy.data.loading import iter_batches
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.amp import search as search_widths

    config = run.config.prune
    model = checkpoint(run, artifacts.BASELINE)
    sites = model.spec.sites
    dense_params = count_params(model)
    stored = load_file(run.path(artifacts.SCORES))
    images = calibration_images(run)
    result = search_widths(
        model,
        iter_batches(images, model.spec, config.micro_batch_size),
        [stored[site.name] for site in sites],
        config,
        images=len(images),
    )
    widths = [len(kept) for kept in result.kept]
    params = count_params(model)
    artifacts.write_json(
        run.path(artifacts.WIDTHS),
        {
            "schema_version": artifacts.SCHEMA_VERSION,
            "model": model.spec.name,
            "blocks": [
                {
                    "block": site.block,
                    "name": site.name,
                    "hidden": site.hidden,
                    "kept": width,
                    "indices": kept.tolist(),
                }
                for site, width, kept in zip(sites, widths, result.kept, strict=True)
            ],
            "totals": {
                "hidden": sum(site.hidden for site in sites),
                "kept": sum(widths),
                "params_dense": dense_params,
                "params": params,
            },
            "search": {
                "method": "amp",
                **to_json(config),
                "images": result.images,
                "dense_value": result.dense_value,
                "final_value": result.final_value,
                "block_forwards_per_image": result.block_forwards_per_image,
                "candidates": [dataclasses.asdict(c) for c in result.candidates],
            },
        },
    )
    log.info(
        "        kept %d of %d hidden neurons; %.1f%% fewer parameters",
        sum(widths),
        sum(site.hidden for site in sites),
        100 * (1 - params / dense_params),
    )
    return {"widths": widths, "block_forwards_per_image": result.block_forwards_per_image}


def slim(run: Run) -> dict[str, Any]:
    """The physically smaller model, into `slim.safetensors`."""
    import torch

    from ampdeploy.checkpoint import load_model, save_model
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.slim import slim as slim_model

    model = load_model(run.path(artifacts.BASELINE))
    blocks = artifacts.read_json(run.path(artifacts.WIDTHS))["blocks"]
    kept = [torch.tensor(block["indices"], dtype=torch.int64) for block in blocks]
    slim_model(model, kept)
    save_model(model, run.path(artifacts.SLIM), kept=kept)
    return {"params": count_params(model)}
