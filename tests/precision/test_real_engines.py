"""FP16 engines of true shapes, really built by TensorRT for RTX on a machine without GPU.

Real images throughout; real weights for DINOv2-S. The other towers have their published widths,
random weights and few blocks: what can break there is shapes, operators and ranges.
"""

from __future__ import annotations

import gc

import pytest
import timm
import torch

from ampdeploy.artifacts import sha256_file
from ampdeploy.config import EngineConfig, PrecisionConfig
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.export.graph import check_graph, count_norms
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.reference import block_references
from ampdeploy.export.write import write_graph
from ampdeploy.models.build import build_model, wrap_backbone
from ampdeploy.models.weights import load_weights
from ampdeploy.precision.compare import Reference
from ampdeploy.precision.ranges import measure_ranges
from ampdeploy.precision.repair import type_graph
from ampdeploy.prune.slim import slim
from tests.conftest import DINOV2_S_WHEEL

pytestmark = pytest.mark.slow

FP16 = PrecisionConfig(precision="fp16")


def slim_dinov2_s():
    """Real weights; every block narrower than the one before it."""
    model = build_model("dinov2_s")
    load_weights(model, DINOV2_S_WHEEL)
    slim(model, [torch.arange(site.hidden - 64 * site.block) for site in model.spec.sites])
    return model


def tower(timm_name, depth, gate_std=None):
    """The first blocks of a published architecture.

    With `gate_std`, of SwiGLU's first linear, gate and value reach some hundreds: both are within
    FP16, their product is not.
    """
    torch.manual_seed(0)
    backbone = timm.create_model(timm_name, pretrained=False, num_classes=0, depth=depth)
    with torch.no_grad():
        for block in backbone.blocks if gate_std else ():
            torch.nn.init.normal_(block.mlp.fc1.weight, std=gate_std)
    cfg = timm.get_pretrained_cfg(timm_name).to_dict()
    return wrap_backbone(backbone, name=timm_name, timm_name=timm_name, cfg=cfg)


GIANT = "vit_giant_patch14_reg4_dinov2.lvd142m"
MODELS = {
    "dinov2_s, slim": slim_dinov2_s,
    "dinov2_g": lambda: tower(GIANT, 2),
    "dinov2_g, overflowing": lambda: tower(
        "vit_giant_patch14_reg4_dinov2.lvd142m", 2, gate_std=1.5
    ),
    "clip_l14": lambda: tower("vit_large_patch14_clip_quickgelu_224.openai", 2),
    "eva02_clip_e": lambda: tower("eva02_enormous_patch14_clip_224.laion2b_plus", 1),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_typed_graph_is_right_and_becomes_an_engine(name, tmp_path, calib_data):
    pytest.importorskip("tensorrt_rtx")
    from ampdeploy.device.engine.build import build_engine

    model = MODELS[name]().eval()
    if model.spec.image_size > 224:  # DINOv2's own 518 pixels take minutes here, and add no shape
        model = at_224(model)
    source, typed_path = tmp_path / "model.onnx", tmp_path / "model.fp16.onnx"
    export_onnx(model, source, opset=18)
    check_graph(source, norms=count_norms(model))
    calib = load_all(scan_folder(calib_data / "train", limit=4, seed=0), model.spec)
    judging = load_all(scan_folder(calib_data / "val", limit=2, seed=0), model.spec)
    blocks, outputs = block_references(model, judging)
    spec = model.spec
    del model
    gc.collect()
    reference = Reference(images=judging.numpy(), blocks=blocks, outputs=outputs)
    typed = type_graph(source, measure_ranges(source, calib.numpy()), reference, FP16)
    assert typed.judgement.passes(FP16.min_cosine_p1)
    scaled = [decision for decision in typed.decisions if decision.scale is not None]
    assert bool(scaled) == ("overflowing" in name)
    write_graph(typed.model, typed_path)
    manifest = build_engine(
        typed_path,
        tmp_path / "engine.plan",
        target="trt-rtx",
        config=EngineConfig(batch=(1, 2, 8)),
        model=spec.name,
        image_size=spec.image_size,
        precision="fp16",
        verdict={},
    )
    assert manifest.precision.half_share == 1.0
    assert manifest.plan_sha256 == sha256_file(tmp_path / "engine.plan")
    assert manifest.plan_bytes < 0.6 * source.stat().st_size


def at_224(model):
    backbone = model.backbone
    backbone.set_input_size((224, 224))
    cfg = timm.get_pretrained_cfg(model.spec.timm_name).to_dict()
    return wrap_backbone(
        backbone,
        name=model.spec.name,
        timm_name=model.spec.timm_name,
        cfg={**cfg, "input_size": (3, 224, 224)},
    )
