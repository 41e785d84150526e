from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx
import pytest

from ampdeploy.errors import (
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    VerificationError,
)
from ampdeploy.export.graph import check_graph
from ampdeploy.export.names import data_path
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.session import ImageInput, image_input, open_session
from tests.export.conftest import OPSET


def test_runs_with_the_threads_asked_for(exported):
    case = exported("plain")
    session = open_session(case.path, threads=1)
    assert session.get_session_options().intra_op_num_threads == 1
    (features,) = session.run(["features"], {"images": case.images.numpy()})
    assert np.allclose(features, case.reference["features"], atol=1e-4)


@pytest.mark.parametrize("content", [b"", b"this is not ONNX\n" * 20, None])
def test_files_that_are_not_onnx(exported, tmp_path, content):
    path = tmp_path / "model.onnx"
    whole = exported("plain").path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ArtifactError, match=r"model\.onnx .* cannot be opened as ONNX"):
        open_session(path)


def test_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="there is no ONNX file"):
        open_session(tmp_path / "absent.onnx")


def test_missing_data_file(exported, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(exported("plain").model, path, opset=OPSET, single_file_limit=1000)
    open_session(path)
    data_path(path).unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data"):
        open_session(path)
    with pytest.raises(VerificationError, match=r"model\.onnx\.data"):
        check_graph(path, norms=None)


def test_bad_thread_count(exported):
    with pytest.raises(ConfigError, match="threads is 0"):
        open_session(exported("plain").path, threads=0)


def test_absent_provider_is_named(exported):
    with pytest.raises(MissingDependencyError, match="needs RocketExecutionProvider") as caught:
        open_session(exported("plain").path, providers=("RocketExecutionProvider",))
    assert "only " in str(caught.value)
    assert "pip uninstall onnxruntime, then pip install '.[gpu]'" in str(caught.value)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (["b", 3, 8, 8], ImageInput(batch=None, size=8)),
        ([None, 3, 8, 8], ImageInput(batch=None, size=8)),
        ([2, 3, 8, 8], ImageInput(batch=2, size=8)),
        ([2, 3, 8, 9], None),
        ([2, 3, "h", "h"], None),
        ([2, 1, 8, 8], None),
        ([3, 8, 8], None),
        ([], None),
    ],
)
def test_only_square_images_of_a_fixed_size_are_an_input(tmp_path, shape, expected):
    float32 = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["images"], ["features"])],
        "identity",
        [onnx.helper.make_tensor_value_info("images", float32, shape)],
        [onnx.helper.make_tensor_value_info("features", float32, shape)],
    )
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    path = tmp_path / "model.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    session = open_session(path)
    if expected is None:
        with pytest.raises(ArtifactError, match=r"any\.onnx takes images tensor\(float\) \["):
            image_input(session, "any.onnx")
    else:
        assert image_input(session, "any.onnx") == expected


def test_verification_needs_no_torch():
    code = (
        "import sys; sys.modules['torch'] = sys.modules['timm'] = None\n"
        "import ampdeploy.export.session, ampdeploy.export.verify, ampdeploy.export.graph"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
