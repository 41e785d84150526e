"""Small real ONNX files with the interface that ampdeploy exports, written without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SIZE = 8
WIDTH = 4


def write_linear_model(
    path: Path,
    *,
    size: int = SIZE,
    width: int = WIDTH,
    batch: int | str = "batch",
    input_name: str = "images",
    output_name: str = "features",
    patches: bool = True,
    seed: int = 0,
) -> np.ndarray:
    """Write features = flatten(images) @ W, patch_features = (pixels, 3). Returns W."""
    pixels = 3 * size * size
    weight = np.random.default_rng(seed).standard_normal((pixels, width), dtype=np.float32)
    nodes = [
        helper.make_node("Flatten", [input_name], ["flat"]),
        helper.make_node("MatMul", ["flat", "weight"], [output_name]),
    ]
    outputs = [helper.make_tensor_value_info(output_name, TensorProto.FLOAT, [batch, width])]
    initialisers = [numpy_helper.from_array(weight, "weight")]
    if patches:
        initialisers.append(numpy_helper.from_array(np.array([0, 3, -1], np.int64), "shape"))
        nodes += [
            helper.make_node("Reshape", [input_name, "shape"], ["rows"]),
            helper.make_node("Transpose", ["rows"], ["patch_features"], perm=[0, 2, 1]),
        ]
        outputs.append(
            helper.make_tensor_value_info(
                "patch_features", TensorProto.FLOAT, [batch, size * size, 3]
            )
        )
    images = helper.make_tensor_value_info(input_name, TensorProto.FLOAT, [batch, 3, size, size])
    graph = helper.make_graph(nodes, "linear", [images], outputs, initialisers)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return weight


def write_huge_model(path: Path) -> None:
    """A valid graph whose one output needs 2^46 bytes."""
    dims = numpy_helper.from_array(np.array([1 << 22, 1 << 22], np.int64), "dims")
    nodes = [
        helper.make_node("ReduceMax", ["images"], ["top"], keepdims=0),
        helper.make_node("Expand", ["top", "dims"], ["features"]),
    ]
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, SIZE, SIZE])
    features = helper.make_tensor_value_info("features", TensorProto.FLOAT, [None, None])
    graph = helper.make_graph(nodes, "huge", [images], [features], [dims])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))


def images(count: int, *, size: int = SIZE, seed: int = 0) -> np.ndarray:
    """(count, 3, size, size) float32."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, 3, size, size), dtype=np.float32)
