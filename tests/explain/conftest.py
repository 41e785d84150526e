"""A tiny dense model and a pruned one as ONNX, made once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from ampdeploy.export.onnx import export_onnx
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.slim import slim
from tests.mlp_kinds import make

# Of the first, second and third block: one off ONNX Runtime's tile of 16, one on it, one unpruned.
WIDTHS = {"plain": (50, 64, 128), "packed_swiglu": (20, 32, 64), "eva_split_gate": (20, 32, 88)}


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two exports of one kind of model, and the models."""

    dense: VisionModel
    pruned: VisionModel
    baseline: Path
    slim: Path


@pytest.fixture(scope="session")
def pair_of(tmp_path_factory):
    """``pair_of(kind)``: tests must not change what it returns."""
    made: dict[str, Pair] = {}

    def get(kind: str) -> Pair:
        if kind not in made:
            dense = make(kind)
            kept = [
                torch.arange(min(width, site.hidden))
                for site, width in zip(dense.spec.sites, WIDTHS[kind], strict=True)
            ]
            pruned = slim(make(kind), kept)  # the same seed, so the same model
            folder = tmp_path_factory.mktemp(kind)
            pair = Pair(
                dense=dense,
                pruned=pruned,
                baseline=folder / "baseline.onnx",
                slim=folder / "model.onnx",
            )
            export_onnx(dense, pair.baseline, opset=18)
            export_onnx(pruned, pair.slim, opset=18)
            made[kind] = pair
        return made[kind]

    return get
