"""What is known of a build before anything runs, on machines with a known bug."""

from __future__ import annotations

import dataclasses
import sys

import pytest

from ampdeploy.config import BuildConfig, DataConfig, EngineConfig, ModelConfig, PrecisionConfig
from ampdeploy.device.radar.graph_patterns import graph_patterns
from ampdeploy.errors import VerificationError
from ampdeploy.export.onnx import export_onnx
from ampdeploy.stages.engine import look_up_bugs
from ampdeploy.stages.judging import find_judge, this_machine
from ampdeploy.stages.preflight import expected_patterns
from tests.conftest import TINY
from tests.device import stand_ins as nvidia
from tests.device.engine_samples import trt_with_a_gpu
from tests.mlp_kinds import BACKBONES, make


def config(tmp_path, **changes) -> BuildConfig:
    fields = {"target": "trt", **changes}
    return BuildConfig(model=ModelConfig(name=TINY), data=DataConfig(calib=tmp_path), **fields)


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_patterns_of_a_graph_are_known_from_its_model(kind, tmp_path):
    model = make(kind)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, opset=18)
    float32 = config(tmp_path, precision=PrecisionConfig(precision="fp32"))
    assert expected_patterns(model, float32) == graph_patterns(path)
    assert expected_patterns(model, config(tmp_path)) == {*graph_patterns(path), "fp16-attention"}


@pytest.fixture
def orin(monkeypatch):
    """A GPU of compute capability 8.7 and a TensorRT whose version tests may change."""
    nvidia.install_driver(monkeypatch, name="Orin", capability=(8, 7), integrated=1)
    module = trt_with_a_gpu()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    this_machine.cache_clear()
    yield module
    this_machine.cache_clear()


def test_a_model_that_this_tensorrt_gets_wrong_is_refused(tmp_path, orin):
    orin.__version__ = "10.3.0.30"
    rope = expected_patterns(make("eva_packed_gate"), config(tmp_path))
    with pytest.raises(VerificationError, match="rope-vit-wrong of TensorRT"):
        look_up_bugs(config(tmp_path), rope)
    # Not on a guess: it depends on the device's TensorRT.
    deferred = config(tmp_path, engine=EngineConfig(when="deferred"))
    _, notes = look_up_bugs(deferred, rope)
    assert [note for note in notes if "rope-vit-wrong may be met" in note]
    orin.__version__ = "10.13.3.9"
    assert look_up_bugs(config(tmp_path), rope) == (EngineConfig(), [])


def test_what_a_known_bug_changes_is_known_too(tmp_path, orin):
    orin.__version__ = "10.3.0.30"
    engine, notes = look_up_bugs(
        config(tmp_path), expected_patterns(make("plain"), config(tmp_path))
    )
    assert engine.batch == (1, 1, 1)
    assert notes[0].startswith("Batch 1,1,8 became 1,1,1 because of known bug dynamic-batch")


@pytest.mark.parametrize(
    ("target", "capabilities", "judge"),
    [
        ("trt", (), "trt"),
        ("trt-rtx", (), "trt-rtx"),
        ("trt-rtx", ("8.7", "8.9"), "trt-rtx"),
        ("trt-rtx", ("8.9",), "ort"),
        ("ort", (), "ort"),
        ("torch", (), "torch"),
    ],
)
def test_who_judges(tmp_path, orin, target, capabilities, judge):
    asked = config(tmp_path, target=target)
    engine = dataclasses.replace(asked.engine, compute_capabilities=capabilities)
    found = find_judge(dataclasses.replace(asked, engine=engine))
    assert found.target == judge
    assert (found.why_no_engine is None) == (judge == target)
    if asked.builds_engine:
        deferred = dataclasses.replace(asked, engine=EngineConfig(when="deferred"))
        assert find_judge(deferred).target == "ort"
