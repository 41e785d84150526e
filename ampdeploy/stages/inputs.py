"""The first two stages: which images, and which weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.errors import DataError
from ampdeploy.progress import log
from ampdeploy.run import IDENTITY
from ampdeploy.stages.common import (
    model_spec,
)

if TYPE_CHECKING:
    from ampdeploy.run import Run

# Without --eval, this many images that calibration did not draw are kept for judging.
JUDGE_IMAGES = 256
# Fewer than this say nothing about a 1st percentile.
MIN_EVAL_IMAGES = 16


def data_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.data.folder import folder_signature

    folders = [config.data.calib, config.data.eval]
    signatures = [folder_signature(folder) for folder in folders if folder]
    return {
        **to_json(config.data),
        "fewest_images": config.prune.fewest_images,
        "signatures": signatures,
    }


def data(run: Run) -> dict[str, Any]:
    """Choose the images; the manifest keeps every file's name and hash."""
    from ampdeploy.data.folder import scan_eval, scan_folder

    config = run.config.data
    spare = 0 if config.eval else JUDGE_IMAGES
    found = scan_folder(
        config.calib,
        limit=config.calib_images + spare,
        seed=config.seed,
        minimum=run.config.prune.fewest_images,
    )
    calib = found.first(config.calib_images)
    bank = None
    if config.eval:
        evaluation = scan_eval(config.eval, limit=config.eval_images, seed=config.seed)
        queries, bank = evaluation.queries, evaluation.bank
    else:
        queries = found.after(config.calib_images)
    unseen = queries.without(calib)
    queries, shared = unseen, len(queries) - len(unseen)
    if shared:
        log.warning("%d evaluation images are calibration images too; left out", shared)
    if len(queries) < MIN_EVAL_IMAGES:
        raise DataError(
            f"{len(queries)} images are left to judge the result on; at least {MIN_EVAL_IMAGES} "
            "that calibration does not use are needed. Give another folder with --eval, or lower "
            "--calib-images."
        )
    log.info("        %d calibration images, %d to judge on", len(calib), len(queries))
    return {
        IDENTITY: {
            "calib": calib.sha256,
            "queries": queries.sha256,
            "bank": bank.sha256 if bank else None,
        },
        "calib": calib.to_json(),
        "queries": queries.to_json(),
        "bank": bank.to_json() if bank else None,
        "shared_with_calibration": shared,
    }


def load_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.models.weights import weights_identity

    return {
        "name": config.model.name,
        "image_size": config.model.image_size,
        "weights": weights_identity(config.model.weights, model_spec(config)),
    }


def load(run: Run) -> dict[str, Any]:
    """Weights into the model; the unpruned model becomes `baseline.safetensors`."""
    from ampdeploy.checkpoint import save_model
    from ampdeploy.models.build import build_model
    from ampdeploy.models.weights import load_weights

    config = run.config.model
    model = build_model(config.name, image_size=config.image_size)
    provenance = dataclasses.asdict(load_weights(model, config.weights))
    save_model(model, run.path(artifacts.BASELINE))
    run.manifest.data["weights"] = provenance
    return {"weights": provenance, "spec": model.spec.to_json()}
