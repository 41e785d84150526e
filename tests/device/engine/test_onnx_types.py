import math

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ampdeploy.device.engine.onnx_types import initializers
from ampdeploy.errors import ArtifactError
from ampdeploy.export.onnx import export_onnx
from tests.device.engine_samples import to_fp16, write_graph
from tests.mlp_kinds import make


def test_the_same_as_the_onnx_package_says(tmp_path):
    source = tmp_path / "model.onnx"
    # Small enough a limit puts the weights into a file of their own.
    export_onnx(make("plain"), source, opset=18, single_file_limit=10_000)
    assert (tmp_path / "model.onnx.data").exists()
    typed = to_fp16(source, tmp_path / "model.fp16.onnx")
    for path in (source, typed):
        graph = onnx.load(path, load_external_data=False).graph
        expected = [
            (tensor.name, TensorProto.DataType.Name(tensor.data_type), tuple(tensor.dims))
            for tensor in graph.initializer
        ]
        found = initializers(path)
        assert [(tensor.name, tensor.dtype, tensor.shape) for tensor in found] == expected
        assert len({tensor.dtype for tensor in found}) > 1
        for tensor, proto in zip(found, graph.initializer, strict=True):
            size = helper.tensor_dtype_to_np_dtype(proto.data_type).itemsize
            assert tensor.nbytes == size * math.prod(proto.dims)


def test_a_scalar_and_an_empty_tensor(tmp_path):
    weights = {"scalar": np.float16(0.5), "none": np.zeros((0, 3), np.int64)}
    nodes = [helper.make_node("Flatten", ["images"], ["features"])]
    scalar, empty = initializers(write_graph(tmp_path / "a.onnx", nodes, weights))
    assert (scalar.dtype, scalar.shape, scalar.nbytes) == ("FLOAT16", (), 2)
    assert (empty.dtype, empty.shape, empty.nbytes) == ("INT64", (0, 3), 0)


@pytest.mark.parametrize("blob", [b"", b"no graph at all", b"\x3a\xff\xff\xff"])
def test_what_is_no_onnx_is_refused(tmp_path, blob):
    path = tmp_path / "model.onnx"
    path.write_bytes(blob)
    with pytest.raises(ArtifactError, match=r"not an ONNX file|cannot read"):
        initializers(path)


def test_half_a_file_is_refused(tmp_path):
    nodes = [helper.make_node("Flatten", ["images"], ["features"])]
    path = write_graph(tmp_path / "a.onnx", nodes, {"w": np.ones((64, 64), np.float32)})
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ArtifactError, match="not an ONNX file"):
        initializers(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        initializers(tmp_path / "gone.onnx")
