"""A dense model and the same with narrower MLPs, on the device, and what PyTorch's FP32 says.

Random weights, seeded: speed and memory depend on shapes alone. For the numerics they are a
weaker test than trained ones, whose activations reach further.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ampdeploy.config import PruneConfig
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.export.onnx import reference_outputs
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import profile_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.models.weights import load_weights
from ampdeploy.prune.slim import slim
from benchmarks.compression.widths import budget_for, uniform_widths

DENSE, PRUNED = "dense", "pruned"
ROLES = (DENSE, PRUNED)


@contextlib.contextmanager
def float32_mode(*, tf32: bool) -> Iterator[None]:
    """Float32 matrix products and convolutions in full, or in TF32; restored after the block.

    torch's own defaults differ between the two: products in full, convolutions in TF32.
    """
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = tf32
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


@dataclass(frozen=True, kw_only=True)
class Pair:
    """What the rows of one model share."""

    name: str
    models: dict[str, VisionModel]
    """``dense`` and ``pruned``, float32, frozen, on the device."""
    images: np.ndarray
    """(N, 3, S, S) float32, real, preprocessed: for timing and judging."""
    calib: np.ndarray
    """(M, 3, S, S), others than `images`: for the ranges of the typed graph."""
    references: dict[str, dict[str, np.ndarray]]
    """Role -> output name -> what PyTorch computes for `images` in float32 without TF32."""

    @property
    def device(self) -> torch.device:
        """Where the models are."""
        return next(self.models[DENSE].parameters()).device

    def facts(self) -> dict[str, Any]:
        """Sizes of both models, for the result."""
        profiles = {role: profile_model(model) for role, model in self.models.items()}
        return {
            "model": self.name,
            "timm_name": self.models[DENSE].spec.timm_name,
            "image_size": self.models[DENSE].spec.image_size,
            **{
                role: {
                    "params": profile.params,
                    "flops": profile.flops,
                    "hidden": [block.hidden for block in profile.blocks],
                }
                for role, profile in profiles.items()
            },
        }


def build_pair(
    name: str,
    *,
    image_size: int | None,
    params_cut: float,
    width_multiple: int,
    seed: int,
    device: torch.device,
    images: Path,
    count: int,
    weights: str | None = None,
) -> Pair:
    """Build a model twice: dense, and with every MLP cut to the same share on the width grid.

    Which neurons go is not chosen: the first ones stay. Speed does not depend on it.

    Args:
        name: A registry name or ``timm:<name>``.
        image_size: Side of the square input, pixels; None: the registry's 224, or timm's own.
        params_cut: Share of the model's parameters to remove.
        width_multiple: Grid of the widths.
        seed: Of the weights.
        device: Where to build.
        images: Folder with ``train`` (calibration) and ``val`` (timing and judging).
        count: Images to time and judge with.
        weights: As for `load_weights`; None: random.

    Raises:
        AmpDeployError: The model, size, cut, weights or images cannot be used.
    """
    torch.manual_seed(seed)
    dense = build_model(name, image_size=image_size, device=device).requires_grad_(False)
    if weights is None:
        _let_blocks_matter(dense)
    else:
        load_weights(dense, weights)
    config = PruneConfig.for_model(name, params_cut=params_cut, width_multiple=width_multiple)
    widths = uniform_widths(budget_for(dense, config))
    pruned = slim(copy.deepcopy(dense), [torch.arange(width) for width in widths])
    models = {DENSE: dense, PRUNED: pruned.requires_grad_(False)}
    judged = _load(images / "val", dense, count)
    with float32_mode(tf32=False):
        references = {role: reference_outputs(model, judged) for role, model in models.items()}
    return Pair(
        name=name,
        models=models,
        images=judged.numpy(),
        calib=_load(images / "train", dense, count).numpy(),
        references=references,
    )


def _load(folder: Path, model: VisionModel, count: int) -> Tensor:
    return load_all(scan_folder(folder, limit=count, seed=0, minimum=2), model.spec)


def _let_blocks_matter(model: VisionModel) -> None:
    """LayerScale starts at 1e-5, with which no block would change a feature: set it to 1."""
    with torch.no_grad():
        for path, parameter in model.backbone.named_parameters():
            if path.rpartition(".")[2] in ("gamma", "gamma_1", "gamma_2"):
                parameter.fill_(1.0)
