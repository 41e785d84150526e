"""What several stages need: which artifact, which images, which model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig
from ampdeploy.progress import log

if TYPE_CHECKING:
    from ampdeploy.data.folder import ImageSet
    from ampdeploy.models.spec import ModelSpec
    from ampdeploy.models.vision import VisionModel
    from ampdeploy.run import Run


def student_artifact(config: BuildConfig) -> str:
    """The checkpoint of the pruned model: distilled if it was, else as slimmed."""
    return artifacts.DISTILLED if config.distill.epochs else artifacts.SLIM


def runnable_artifacts(config: BuildConfig, target: str) -> tuple[str, str]:
    """What `target` runs of this build: (baseline, pruned)."""
    from ampdeploy.targets.base import get_target

    suffixes = get_target(target).artifact_suffixes
    if ".safetensors" in suffixes:
        return artifacts.BASELINE, student_artifact(config)
    if ".plan" in suffixes:
        return artifacts.BASELINE_PLAN, artifacts.ENGINE_PLAN
    return artifacts.BASELINE_ONNX, artifacts.MODEL_ONNX


def engine_sources(config: BuildConfig) -> tuple[str, str]:
    """The graphs that engines are built from: (baseline, pruned)."""
    if config.precision.precision == "fp16":
        return artifacts.BASELINE_FP16_ONNX, artifacts.MODEL_FP16_ONNX
    return artifacts.BASELINE_ONNX, artifacts.MODEL_ONNX


def shipped_artifacts(config: BuildConfig) -> tuple[str, str]:
    """What the build is for, and whose size counts: (baseline, pruned)."""
    if not config.builds_engine:
        return runnable_artifacts(config, config.target)
    if config.engine.when == "deferred":
        return engine_sources(config)
    return artifacts.BASELINE_PLAN, artifacts.ENGINE_PLAN


def resolve_paths(config: BuildConfig) -> BuildConfig:
    """`config` with absolute paths, so that a run can be continued from any folder."""
    data = dataclasses.replace(
        config.data,
        calib=config.data.calib.resolve(),
        eval=config.data.eval.resolve() if config.data.eval else None,
    )
    images = config.distill.images
    distill = dataclasses.replace(config.distill, images=images.resolve() if images else None)
    model = config.model
    if model.weights and not model.weights.startswith("wheel:"):
        model = dataclasses.replace(model, weights=str(Path(model.weights).expanduser().resolve()))
    head = config.evaluate.head
    evaluate = dataclasses.replace(config.evaluate, head=head.resolve() if head else None)
    return dataclasses.replace(config, data=data, distill=distill, model=model, evaluate=evaluate)


def model_spec(config: BuildConfig) -> ModelSpec:
    """The spec of the model that is built, without its weights."""
    from ampdeploy.models.build import build_model

    model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
    return model.spec


def queries_of(run: Run) -> ImageSet:
    """The images that judge the result."""
    from ampdeploy.data.folder import ImageSet

    return ImageSet.from_json(run.facts("data")["queries"])


def bank_of(run: Run) -> ImageSet | None:
    """The labelled images that vote in k-NN; None where the queries vote for each other."""
    from ampdeploy.data.folder import ImageSet

    stored = run.facts("data")["bank"]
    return ImageSet.from_json(stored) if stored else None


def calibration_images(run: Run) -> ImageSet:
    """The calibration images, a whole number of criterion batches."""
    from ampdeploy.data.folder import ImageSet

    images = ImageSet.from_json(run.facts("data")["calib"])
    whole = len(images) - len(images) % run.config.prune.batch_size
    if whole < len(images):
        log.info(
            "        the last %d images do not fill a batch of %d and are left out",
            len(images) - whole,
            run.config.prune.batch_size,
        )
    return images.first(whole)


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationParts:
    """The calibration images by what they do, see `prune.compress.Split`."""

    fit: ImageSet
    measure: ImageSet
    verify: ImageSet
    refit: ImageSet
    """`fit` and `measure`."""


def calibration_parts(run: Run) -> CalibrationParts:
    """The calibration images, shared out."""
    from ampdeploy.data.folder import ImageSet
    from ampdeploy.prune.compress import split_calibration

    images = ImageSet.from_json(run.facts("data")["calib"])
    split = split_calibration(len(images))
    seen = split.fit + split.measure
    return CalibrationParts(
        fit=images.first(split.fit),
        measure=images.first(seen).after(split.fit),
        verify=images.after(seen),
        refit=images.first(seen),
    )


def checkpoint(run: Run, artifact: str) -> VisionModel:
    """The model in a checkpoint of the run, on the device that prunes."""
    from ampdeploy.checkpoint import load_model
    from ampdeploy.models.device import resolve_device

    return load_model(run.path(artifact)).to(resolve_device(run.config.prune.device))
