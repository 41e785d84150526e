"""Small real ONNX models to time: one, and the same with 5% more work.

Random weights, seeded: speed depends on shapes alone.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.export.onnx import export_onnx
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import profile_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.slim import slim

OPSET = 18
IMAGES = 16  # real ones, to rotate


@dataclass(frozen=True, kw_only=True)
class Twins:
    """One model and a heavier one, as files."""

    light: Path
    heavy: Path
    flops_ratio: float
    """Heavy / light."""
    images: np.ndarray
    """(N, 3, S, S) float32 real images, preprocessed."""


def make_twins(
    name: str,
    folder: Path,
    images: Path,
    *,
    image_size: int | None = None,
    more: float = 0.05,
    seed: int = 0,
) -> Twins:
    """Export a model, and before it the same with MLPs that narrow that it does less work.

    The heavy one is the published architecture; the light one's MLPs all have the width at which
    heavy / light is closest to 1 + `more` in FLOPs. So the heavy one's extra work is real matrix
    products, not a pause.

    Args:
        name: A registry name or ``timm:<name>``.
        folder: Where to write ``light.onnx`` and ``heavy.onnx``.
        images: Folder of images to time with.
        image_size: Side of the square input, pixels; None: the model's own.
        more: Extra work of the heavy one.
        seed: Of the weights.
    """
    torch.manual_seed(seed)
    heavy = build_model(name, image_size=image_size).requires_grad_(False)
    width, ratio = _width_for(heavy, 1 + more)
    light = _narrowed(heavy, width)
    paths = {"light": folder / "light.onnx", "heavy": folder / "heavy.onnx"}
    export_onnx(light, paths["light"], opset=OPSET)
    export_onnx(heavy, paths["heavy"], opset=OPSET)
    chosen = scan_folder(images, limit=IMAGES, seed=seed, minimum=2)
    pixels = load_all(chosen, heavy.spec).numpy()
    return Twins(**paths, flops_ratio=ratio, images=pixels)


def _narrowed(model: VisionModel, width: int) -> VisionModel:
    blocks = len(profile_model(model).blocks)
    return slim(copy.deepcopy(model), [torch.arange(width)] * blocks)


def _width_for(model: VisionModel, wanted: float) -> tuple[int, float]:
    """Width of every MLP, a multiple of 8, and the ratio of FLOPs that it gives."""
    profile = profile_model(model)
    hidden = profile.blocks[0].hidden
    # FLOPs are linear in the width, so a second point gives all of them.
    half = profile_model(_narrowed(model, hidden // 2)).flops
    per_neuron = (profile.flops - half) / (hidden - hidden // 2)
    width = hidden - 8 * round(profile.flops * (1 - 1 / wanted) / per_neuron / 8)
    return width, profile.flops / profile_model(_narrowed(model, width)).flops
