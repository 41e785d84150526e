"""Exports shared by the tests of this folder: one per kind of model, made once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from ampdeploy.export.onnx import ExportFacts, export_onnx, reference_outputs
from ampdeploy.models.vision import VisionModel
from tests.mlp_kinds import SIZE, make

OPSET = 18


@dataclass(frozen=True, kw_only=True)
class Exported:
    """A tiny model, its ONNX file and what it computes on five images."""

    model: VisionModel
    path: Path
    facts: ExportFacts
    images: Tensor
    reference: dict[str, np.ndarray]


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """``exported(kind)``: tests must not change what it returns."""

    @cache
    def export(kind: str) -> Exported:
        model = make(kind)
        path = tmp_path_factory.mktemp(kind) / "model.onnx"
        facts = export_onnx(model, path, opset=OPSET)
        images = torch.randn(5, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
        return Exported(
            model=model,
            path=path,
            facts=facts,
            images=images,
            reference=reference_outputs(model, images),
        )

    return export
