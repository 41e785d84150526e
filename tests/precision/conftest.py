"""Tiny models with what breaks FP16 put into them, exported and measured."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from ampdeploy.config import PrecisionConfig
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.reference import block_references
from ampdeploy.models.vision import VisionModel
from ampdeploy.precision.compare import Reference
from ampdeploy.precision.ranges import measure_ranges
from ampdeploy.precision.repair import Typed, type_graph
from tests.mlp_kinds import SIZE, make

FP16 = PrecisionConfig(precision="fp16")


@dataclass(frozen=True, kw_only=True)
class Case:
    """A float32 export with its ranges and PyTorch's results."""

    model: VisionModel
    path: Path
    ranges: dict[str, float]
    reference: Reference

    def typed(self, config: PrecisionConfig = FP16) -> Typed:
        return type_graph(self.path, self.ranges, self.reference, config)


def images(count: int, seed: int, size: int = SIZE) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(seed))


def prepare(model: VisionModel, folder: Path) -> Case:
    """Export `model` and measure it; calibration and judging images differ."""
    path = folder / "model.onnx"
    model.eval()
    export_onnx(model, path, opset=18)
    judging = images(4, seed=2, size=model.spec.image_size)
    blocks, outputs = block_references(model, judging)
    return Case(
        model=model,
        path=path,
        ranges=measure_ranges(path, images(4, seed=1, size=model.spec.image_size).numpy()),
        reference=Reference(images=judging.numpy(), blocks=blocks, outputs=outputs),
    )


def as_it_is(backbone) -> None:
    """Leave the model alone."""


@pytest.fixture(scope="session")
def case(tmp_path_factory):
    """``case(kind, break_it)``: a tiny model of `kind` after `break_it(backbone)`, made once."""

    @cache
    def made(kind: str, break_it=as_it_is) -> Case:
        model = make(kind)
        with torch.no_grad():
            break_it(model.backbone)
        return prepare(model, tmp_path_factory.mktemp(kind))

    return made


def large_residuals(backbone) -> None:
    """Every block adds hundreds of thousands to the residual stream."""
    for block in backbone.blocks:
        for linear in (block.attn.proj, block.mlp.fc2):
            linear.weight.mul_(3e5)
            linear.bias.mul_(3e5)


def large_gate(backbone) -> None:
    """silu(g) * u leaves FP16, though g and u are in it."""
    for block in backbone.blocks:
        block.mlp.fc1.weight.mul_(1000)
        block.mlp.fc2.weight.mul_(0.02)


def large_weight(backbone) -> None:
    """A weight that FP16 cannot hold."""
    backbone.blocks[1].mlp.fc1.weight[3, 5] = 1e5


def tiny_scale(backbone) -> None:
    """LayerScale near its initial value: subnormal in FP16."""
    for block in backbone.blocks:
        block.ls1.gamma.fill_(3.3e-7)
        block.ls2.gamma.fill_(3.3e-7)


def passing_offset(backbone) -> None:
    """Block 0 adds 3000 to the residual stream and block 1 takes it away again.

    In range, so no rule minds; in between FP16 has steps of 2, and what matters is below them.
    """
    width = backbone.embed_dim
    sign = torch.where(torch.arange(width) % 2 == 0, 3000.0, -3000.0)
    backbone.blocks[0].mlp.fc2.bias.add_(sign)
    backbone.blocks[1].mlp.fc2.bias.sub_(sign)


def large_token(backbone) -> None:
    """A CLS token that FP16 cannot hold; it reaches the graph through an Expand."""
    backbone.cls_token[0, 0, 3] = 1e5


def native(path: Path, batch: np.ndarray) -> dict[str, np.ndarray]:
    """What ONNX Runtime's own CPU kernels make of a typed file."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {"images": batch}), strict=True))
