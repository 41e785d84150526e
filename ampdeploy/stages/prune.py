"""Score, search and slim."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, PruneConfig
from ampdeploy.progress import log
from ampdeploy.stages.common import calibration_images, calibration_parts, checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from ampdeploy.data.folder import ImageSet
    from ampdeploy.models.vision import VisionModel
    from ampdeploy.prune.divergence import Divergence
    from ampdeploy.prune.moments import BlockMoments
    from ampdeploy.prune.repair import Repair
    from ampdeploy.run import Run


def score_options(config: BuildConfig) -> dict[str, Any]:
    prune = config.prune
    options = {
        "search": prune.search,
        "moments": prune.needs_moments,
        "micro_batch_size": prune.micro_batch_size,
        "device": prune.device,
    }
    if prune.search == "amp":
        options |= {
            "criterion": prune.criterion,
            "inv_temperature": prune.inv_temperature,
            "batch_size": prune.batch_size,
        }
    return options


def score(run: Run) -> dict[str, Any]:
    """Score of every hidden neuron, and where the build needs them the moments of all of them."""
    from ampdeploy.checkpoint import METADATA_KEY, write_safetensors
    from ampdeploy.data.loading import iter_batches
    from ampdeploy.prune.compress import scores_of
    from ampdeploy.prune.moments import collect
    from ampdeploy.prune.score import importance

    config = run.config.prune
    model = checkpoint(run, artifacts.BASELINE)
    sites = model.spec.sites
    images = calibration_parts(run).fit
    facts: dict[str, Any] = {"images": len(images), "seed": run.config.data.seed}
    moments = None
    if config.needs_moments:
        batches = iter_batches(images, model.spec, config.micro_batch_size)
        moments = collect(model, batches, count=len(images))
        _write_moments(run, model, moments)
    if config.search == "amp":
        images = calibration_images(run)
        batches = iter_batches(images, model.spec, config.batch_size)
        scores = importance(model, batches, config, count=len(images))
        facts |= {
            "criterion": config.criterion,
            "inv_temperature": config.inv_temperature,
            "images": len(images),
            "batch_size": config.batch_size,
        }
    else:
        assert moments is not None
        scores = scores_of(model, moments)
        facts |= {"criterion": "predicted loss of cosine", "tokens": moments[0].tokens}
    tensors = {site.name: score for site, score in zip(sites, scores, strict=True)}
    # One key: the library writes several in an order that changes from process to process, and
    # with it the file's hash.
    write_safetensors(run.path(artifacts.SCORES), tensors, {METADATA_KEY: json.dumps(facts)})
    return {"images": len(images)}


def _write_moments(run: Run, model: VisionModel, moments: list[BlockMoments]) -> None:
    from ampdeploy.checkpoint import METADATA_KEY, write_safetensors

    tensors = {}
    for site, block in zip(model.spec.sites, moments, strict=True):
        tensors[f"{site.name}.mean"] = block.mean.cpu()
        tensors[f"{site.name}.covariance"] = block.covariance.cpu()
        if block.metric is not None:
            tensors[f"{site.name}.metric"] = block.metric.cpu()
    facts = {"tokens": [block.tokens for block in moments]}
    write_safetensors(run.path(artifacts.MOMENTS), tensors, {METADATA_KEY: json.dumps(facts)})


def _read_moments(run: Run, model: VisionModel) -> list[BlockMoments]:
    from safetensors import safe_open

    from ampdeploy.checkpoint import METADATA_KEY
    from ampdeploy.prune.moments import BlockMoments

    device = str(next(model.parameters()).device)
    with safe_open(run.path(artifacts.MOMENTS), framework="pt", device=device) as file:
        tokens = json.loads(file.metadata()[METADATA_KEY])["tokens"]
        names = set(file.keys())
        return [
            BlockMoments(
                mean=file.get_tensor(f"{site.name}.mean"),
                covariance=file.get_tensor(f"{site.name}.covariance"),
                metric=file.get_tensor(key) if (key := f"{site.name}.metric") in names else None,
                tokens=count,
            )
            for site, count in zip(model.spec.sites, tokens, strict=True)
        ]


def search_options(config: BuildConfig) -> dict[str, Any]:
    prune = config.prune
    options = {
        "search": prune.search,
        "inv_temperature": prune.inv_temperature,
        "micro_batch_size": prune.micro_batch_size,
        "device": prune.device,
    }
    if prune.search == "amp":
        return options | {
            "criterion": prune.criterion,
            "batch_size": prune.batch_size,
            "threshold": prune.threshold,
            "steps": prune.steps,
        }
    kind, value = prune.budget
    return options | {
        kind: value,
        "width_multiple": config.width_multiple,
        "min_width": prune.min_width,
        "fold": prune.fold,
    }


def search(run: Run) -> dict[str, Any]:
    """Every block's width and everything that was tried, into `widths.json`."""
    from safetensors.torch import load_file

    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.slim import slim as slim_model

    config = run.config.prune
    model = checkpoint(run, artifacts.BASELINE)
    sites = model.spec.sites
    dense_params = count_params(model)
    stored = load_file(run.path(artifacts.SCORES))
    scores = [stored[site.name] for site in sites]
    run_search = _search_amp if config.search == "amp" else _search_divergence
    kept, trace = run_search(run, model, scores)
    widths = [len(indices) for indices in kept]
    if config.search != "amp":  # AMP's search has slimmed the model along the way
        slim_model(model, kept)
    params = count_params(model)
    options = search_options(run.config)
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
                    "indices": indices.tolist(),
                }
                for site, width, indices in zip(sites, widths, kept, strict=True)
            ],
            "totals": {
                "hidden": sum(site.hidden for site in sites),
                "kept": sum(widths),
                "params_dense": dense_params,
                "params": params,
            },
            "search": {"method": options.pop("search"), **options, **trace},
        },
    )
    log.info(
        "        kept %d of %d hidden neurons; %.1f%% fewer parameters",
        sum(widths),
        sum(site.hidden for site in sites),
        100 * (1 - params / dense_params),
    )
    return {"widths": widths, "block_forwards_per_image": trace["block_forwards_per_image"]}


def _search_amp(
    run: Run, model: VisionModel, scores: list[Tensor]
) -> tuple[list[Tensor], dict[str, Any]]:
    from ampdeploy.data.loading import iter_batches
    from ampdeploy.prune.amp import search

    config = run.config.prune
    images = calibration_images(run)
    batches = iter_batches(images, model.spec, config.micro_batch_size)
    result = search(model, batches, scores, config, images=len(images))
    return result.kept, {
        "images": result.images,
        "dense_value": result.dense_value,
        "final_value": result.final_value,
        "block_forwards_per_image": result.block_forwards_per_image,
        "candidates": [dataclasses.asdict(candidate) for candidate in result.candidates],
    }


def _search_divergence(
    run: Run, model: VisionModel, scores: list[Tensor]
) -> tuple[list[Tensor], dict[str, Any]]:
    from ampdeploy.prune.budget import plan_budget
    from ampdeploy.prune.search import search

    config = run.config.prune
    budget = plan_budget(model, config, multiple=run.config.width_multiple)
    parts = calibration_parts(run)
    result = search(
        model,
        _read_moments(run, model),
        scores,
        _batches(parts.measure, model, config),
        _batches(parts.verify, model, config),
        budget,
        config,
    )
    images = len(parts.refit) + len(parts.verify)
    return result.kept, {
        "images": images,
        "measured_images": result.measured_images,
        "verified_images": result.verified_images,
        "block_forwards_per_image": round(result.block_forwards / images, 3),
        "measurements": [dataclasses.asdict(block) for block in result.measurements],
        "allocations": [dataclasses.asdict(tried) for tried in result.allocations],
        "chosen": result.chosen,
    }


def _batches(images: ImageSet, model: VisionModel, config: PruneConfig) -> list[Tensor]:
    from ampdeploy.data.loading import iter_batches

    return list(iter_batches(images, model.spec, config.micro_batch_size))


def slim_options(config: BuildConfig) -> dict[str, Any]:
    prune = config.prune
    options: dict[str, Any] = {"repair": prune.repair, "device": prune.device}
    if prune.fold != "none":
        options |= {
            "micro_batch_size": prune.micro_batch_size,
            "inv_temperature": prune.inv_temperature,
        }
    return options


def slim(run: Run) -> dict[str, Any]:
    """The physically smaller model, repaired, into `slim.safetensors`."""
    import torch

    from ampdeploy.checkpoint import save_model
    from ampdeploy.data.loading import iter_batches
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.repair import slim_and_repair
    from ampdeploy.prune.slim import slim as slim_model

    config = run.config.prune
    model = checkpoint(run, artifacts.BASELINE)
    blocks = artifacts.read_json(run.path(artifacts.WIDTHS))["blocks"]
    kept = [torch.tensor(block["indices"], dtype=torch.int64) for block in blocks]
    trace: dict[str, Any] = {"method": "none"}
    if config.fold == "none":
        slim_model(model, kept)
    else:
        parts = calibration_parts(run)
        model, repair = slim_and_repair(
            model,
            kept,
            _read_moments(run, model),
            iter_batches(parts.refit, model.spec, config.micro_batch_size),
            _batches(parts.verify, model, config),
            config,
        )
        trace = {
            **dataclasses.asdict(repair),
            "fitted_images": len(parts.refit),
            "verified_images": len(parts.verify),
        }
        log.info("        %s", _describe(repair))
    artifacts.write_json(
        run.path(artifacts.REPAIR), {"schema_version": artifacts.SCHEMA_VERSION, **trace}
    )
    save_model(model, run.path(artifacts.SLIM), kept=kept)
    return {"params": count_params(model), "repair": trace["method"]}


def _describe(repair: Repair) -> str:
    def losses(divergence: Divergence) -> str:
        text = f"{divergence.cosine:.2g} pooled"
        if divergence.patch_cosine is not None:
            text += f", {divergence.patch_cosine:.2g} patches"
        return text

    text = f"loss of cosine on held-back calibration images: {losses(repair.folded)}"
    if repair.refitted is not None:
        kept = "" if repair.method == "refit" else " (not kept)"
        text += f"; re-fitted {losses(repair.refitted)}{kept}"
    return text
