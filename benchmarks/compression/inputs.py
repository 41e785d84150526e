"""What `run` and `cost` begin with: the dense model, and images to calibrate and to judge on."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from ampdeploy.config import PruneConfig
from ampdeploy.data.folder import ImageSet, scan_eval, scan_folder
from ampdeploy.errors import ConfigError, DataError
from ampdeploy.models.build import build_model
from ampdeploy.models.device import resolve_device
from ampdeploy.models.vision import VisionModel
from ampdeploy.models.weights import load_weights

CRITERION_BATCH = 64


def add_input_options(parser: argparse.ArgumentParser, *, images: int) -> None:
    """Model, images and sizes; `images` is the default number that calibrate."""
    parser.add_argument("--model", required=True)
    parser.add_argument("--weights", help="as for ampdeploy build; default timm's hub")
    parser.add_argument("--calib", type=Path, required=True, help="folder to calibrate on")
    parser.add_argument("--eval", type=Path, required=True, help="folder to judge on")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--images", type=int, default=images, help="calibration images")
    parser.add_argument("--eval-images", type=int, default=256)
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--width-multiple", type=int, default=16)
    parser.add_argument("--micro-batch", type=int, default=8, help="images per forward")
    parser.add_argument("--device", default="cpu")


def load_dense(options: argparse.Namespace) -> tuple[VisionModel, dict[str, Any]]:
    """The dense model on its device, frozen, and where its weights came from.

    Raises:
        AmpDeployError: Model, weights or device cannot be used.
    """
    device = resolve_device(options.device)
    dense = build_model(options.model, image_size=options.image_size)
    provenance = load_weights(dense, options.weights)
    return dense.to(device).requires_grad_(False), dataclasses.asdict(provenance)


def prune_config(options: argparse.Namespace) -> PruneConfig:
    """AMP's published options for the model, on the grid and with the batches asked for.

    Raises:
        ConfigError: The images are not a whole number of the criterion's batches.
    """
    batch = min(CRITERION_BATCH, options.images)
    if batch < 1 or options.images % batch:
        raise ConfigError(
            f"--images is {options.images}; the criterion compares {batch} images with each "
            f"other, so give a multiple of {CRITERION_BATCH}, or fewer than that."
        )
    return PruneConfig.for_model(
        options.model,
        batch_size=batch,
        micro_batch_size=options.micro_batch,
        width_multiple=options.width_multiple,
    )


def held_out_images(options: argparse.Namespace) -> ImageSet:
    """The images that judge, the same for every seed.

    Raises:
        DataError: There are none.
    """
    return scan_eval(options.eval, limit=options.eval_images, seed=0).queries


def calibration_images(options: argparse.Namespace, held_out: ImageSet, seed: int) -> ImageSet:
    """The calibration images of one seed, without any that judges, by content.

    Raises:
        DataError: The folder has too few.
    """
    spare = len(held_out)  # at most these are taken out again
    found = scan_folder(options.calib, limit=options.images + spare, seed=seed)
    chosen = found.without(held_out).first(options.images)
    if len(chosen) < options.images:
        raise DataError(
            f"{options.calib} has {len(chosen)} images that are not judged on; {options.images} "
            "were asked for. Lower --images or give a larger folder."
        )
    return chosen


def describe_images(images: ImageSet) -> dict[str, Any]:
    """What identifies an image set anywhere: the end of its path, size and hash."""
    return {
        "name": "/".join(images.root.resolve().parts[-2:]),
        "images": len(images),
        "sha256": images.sha256,
    }
