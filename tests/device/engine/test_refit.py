"""Plans without weights: which file completes one. Giving them to an engine: tests/targets."""

import dataclasses
import hashlib

import pytest

from ampdeploy.device.engine.manifest import read_manifest, write_manifest
from ampdeploy.device.engine.refit import check_weights, data_sha256, weights_file
from ampdeploy.errors import ArtifactError
from tests.targets.test_tensorrt import write_engine


@pytest.fixture
def onnx(tmp_path):
    path = tmp_path / "model.fp16.onnx"
    path.write_bytes(b"a graph with its weights")
    return path


@pytest.fixture
def stripped(onnx, tmp_path):
    sha256 = hashlib.sha256(onnx.read_bytes()).hexdigest()
    return write_engine(tmp_path, stripped=True, onnx_sha256=sha256)


def test_the_weights_lie_beside_the_plan(stripped, onnx):
    manifest = read_manifest(stripped)
    assert weights_file(stripped, manifest) == onnx
    check_weights(stripped, manifest)


def test_a_plan_with_weights_needs_no_file(tmp_path):
    plan = write_engine(tmp_path)
    assert weights_file(plan, read_manifest(plan)) is None
    check_weights(plan, read_manifest(plan))


def test_a_data_file_that_was_not_there_is_not_taken(stripped, onnx):
    assert data_sha256(onnx) is None
    onnx.with_name("model.fp16.onnx.data").write_bytes(b"weights of another export")
    with pytest.raises(ArtifactError, match=r"its sha256 differs.*Copy that one there"):
        check_weights(stripped, read_manifest(stripped))


@pytest.mark.parametrize("name", ["../model.fp16.onnx", "/etc/passwd", "", ".."])
def test_a_manifest_that_points_elsewhere_is_refused(stripped, name):
    manifest = dataclasses.replace(read_manifest(stripped), onnx=name)
    write_manifest(stripped, manifest)
    with pytest.raises(ArtifactError, match="must be a file beside the plan"):
        check_weights(stripped, read_manifest(stripped))
