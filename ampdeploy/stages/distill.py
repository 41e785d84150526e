"""Train the slim model against the original."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.progress import log
from ampdeploy.stages.common import (
    queries_of,
)

if TYPE_CHECKING:
    from ampdeploy.run import Run


def _recipe(config: BuildConfig) -> dict[str, Any]:
    """What the trained weights depend on: not how often the state is saved on the way."""
    recipe = to_json(config.distill)
    del recipe["checkpoint_seconds"]
    return recipe


def distill_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.data.folder import folder_signature

    folder = config.distill.images or config.data.calib
    return {**_recipe(config), "signature": folder_signature(folder)}


def distill(run: Run) -> dict[str, Any]:
    """Train the slim model against the original, into `distilled.safetensors`."""
    import torch

    from ampdeploy.checkpoint import kept_indices, load_model, save_model
    from ampdeploy.data.folder import scan_folder
    from ampdeploy.distill.trainer import distill as train

    config = run.config.distill
    images = scan_folder(
        config.images or run.config.data.calib,
        limit=None,
        seed=config.seed,
        minimum=config.batch_size,
    )
    queries = queries_of(run)
    unseen = images.without(queries)
    if len(unseen) < len(images):
        log.info(
            "        %d images are kept for judging and not trained on", len(images) - len(unseen)
        )
    student = load_model(run.path(artifacts.SLIM))
    state = run.path(artifacts.DISTILL_STATE)
    identity = artifacts.sha256_json(
        {
            "options": _recipe(run.config),
            "images": unseen.sha256,
            "baseline": run.sha256(artifacts.BASELINE),
            "slim": run.sha256(artifacts.SLIM),
        }
    )
    result = train(
        student,
        load_model(run.path(artifacts.BASELINE)),
        unseen,
        config,
        state_path=state,
        identity=identity,
    )
    kept = kept_indices(run.path(artifacts.SLIM))
    save_model(
        student,
        run.path(artifacts.DISTILLED),
        kept=[torch.tensor(indices) for indices in kept] if kept else None,
    )
    facts = dataclasses.asdict(result)
    artifacts.write_json(run.path(artifacts.DISTILL), facts)
    state.unlink(missing_ok=True)
    return {name: value for name, value in facts.items() if name != "history"}
