"""Putting weights back. TensorRT's runtime and refitter are a stand-in: they take a GPU."""

import dataclasses
import hashlib
import sys

import numpy as np
import pytest
from onnx import helper

from ampdeploy.config import EngineConfig
from ampdeploy.device.build_engine import build_engine, refit_plan
from ampdeploy.device.engine_file import (
    check_fits,
    check_plan_file,
    read_manifest,
    write_manifest,
)
from ampdeploy.errors import AmpDeployError, ArtifactError, MissingDependencyError
from tests.device.engine_samples import ADA, NO_GPU, trt_with_a_gpu, write_graph


@pytest.fixture
def onnx(tmp_path):
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["features"]),
    ]
    return write_graph(tmp_path / "model.onnx", nodes, {"w": np.ones((192, 4), np.float32)})


@pytest.fixture
def trt(monkeypatch):
    module = trt_with_a_gpu()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.fixture
def stripped(onnx, tmp_path, trt):
    """A real plan; that its weights are not in it is only said, for that takes a GPU as well."""
    plan = tmp_path / "stripped.plan"
    manifest = build_engine(
        onnx,
        plan,
        target="trt",
        config=EngineConfig(),
        model="tiny",
        image_size=8,
        precision="fp32",
        verdict={},
        here=ADA,
    )
    write_manifest(plan, dataclasses.replace(manifest, stripped=True))
    trt.calls.clear()
    return plan


def test_a_refitted_plan_is_complete(stripped, onnx, tmp_path, trt):
    out = tmp_path / "engine.plan"
    manifest = refit_plan(stripped, onnx, out, here=ADA)
    assert trt.calls == [
        "deserialize, host code False",
        "weights of model.onnx",
        "refit",
        "config",
        "EXCLUDE_WEIGHTS",
        "serialize",
    ]
    assert not manifest.stripped
    assert read_manifest(out) == manifest
    check_plan_file(out, manifest)
    assert manifest.plan_sha256 == hashlib.sha256(b"a plan with weights").hexdigest()
    check_fits(manifest, ADA, "10.13.3.9", "trt")
    assert read_manifest(stripped).stripped  # the small plan stays for the next device


def test_other_weights_are_refused(stripped, onnx, tmp_path, trt):
    other = tmp_path / "other.onnx"
    other.write_bytes(onnx.read_bytes() + b"\0")
    with pytest.raises(ArtifactError, match=r"is not the model\.onnx that the plan was built from"):
        refit_plan(stripped, other, tmp_path / "engine.plan", here=ADA)
    with pytest.raises(ArtifactError, match=r"give model\.onnx"):
        refit_plan(stripped, tmp_path / "gone.onnx", tmp_path / "engine.plan", here=ADA)
    onnx.with_name("model.onnx.data").write_bytes(b"weights of another export")
    with pytest.raises(ArtifactError, match="sha256 differs"):
        refit_plan(stripped, onnx, tmp_path / "engine.plan", here=ADA)
    assert trt.calls == []


def test_what_cannot_be_refitted_is_refused_before_tensorrt_sees_it(stripped, onnx, tmp_path, trt):
    out = tmp_path / "engine.plan"
    with pytest.raises(MissingDependencyError, match="needs an NVIDIA GPU"):
        refit_plan(stripped, onnx, out, here=NO_GPU)
    with pytest.raises(ArtifactError, match="this is NVIDIA L4"):
        refit_plan(stripped, onnx, out, here=dataclasses.replace(ADA, gpu="NVIDIA L4"))
    write_manifest(stripped, dataclasses.replace(read_manifest(stripped), stripped=False))
    with pytest.raises(ArtifactError, match="nothing to refit"):
        refit_plan(stripped, onnx, out, here=ADA)
    assert trt.calls == []
    assert not out.exists()


def test_every_no_of_tensorrt_is_an_error(stripped, onnx, tmp_path, trt, monkeypatch):
    out = tmp_path / "engine.plan"

    def fails(match):
        with pytest.raises(AmpDeployError, match=match):
            refit_plan(stripped, onnx, out, here=ADA)
        assert not out.exists()

    with monkeypatch.context() as patch:
        patch.setattr(trt.Runtime, "deserialize_cuda_engine", lambda *_: None)
        fails("does not load it. TensorRT gave no reason")
    with monkeypatch.context() as patch:
        patch.setattr(trt.OnnxParserRefitter, "refit_from_file", lambda *_: False)
        patch.setattr(trt.OnnxParserRefitter, "num_errors", 1)
        patch.setattr(trt.OnnxParserRefitter, "get_error", lambda *_: "odd shape", raising=False)
        fails(r"does not take the weights of model\.onnx. odd shape")
    with monkeypatch.context() as patch:
        patch.setattr(trt.Refitter, "missing", ("w",))
        fails("1 weights are still missing, w among them")
    with monkeypatch.context() as patch:
        patch.setattr(trt.Refitter, "refit_cuda_engine", lambda *_: False)
        fails("refitting failed")
