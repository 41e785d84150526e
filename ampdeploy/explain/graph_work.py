"""The operators of an ONNX file with their shapes at one batch size, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ampdeploy.errors import ArtifactError
from ampdeploy.explain.work import PRODUCTS, Operator, Tensor
from ampdeploy.optional import require

_BATCH_SYMBOL = 0  # dimension of every input that is the batch


def operators_of_graph(file: Path, batch: int) -> list[Operator]:
    """All nodes of an export, in order, with the shapes that ONNX's own inference gives.

    Args:
        file: The .onnx file; a ``.data`` file beside it is not read.
        batch: Images per call.

    Raises:
        ArtifactError: Shapes cannot be inferred: it is not an export of ampdeploy.
    """
    onnx = require("onnx", needed_by="ampdeploy explain")
    model = onnx.load(str(file), load_external_data=False)
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[_BATCH_SYMBOL].dim_value = batch
    # What the exporter wrote about the inside and the outputs is for any batch.
    del model.graph.value_info[:]
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    try:
        inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        raise ArtifactError(
            f"the shapes inside {file} cannot be worked out: {error}. Export the model with "
            "`ampdeploy export`."
        ) from error
    tensors = _tensors(onnx, inferred.graph)
    weights = {weight.name for weight in inferred.graph.initializer}
    return [
        Operator(
            name=node.name,
            op_type=node.op_type,
            inputs=_inputs(node, tensors, weights),
            outputs=tuple(tensors[name] for name in node.output if name in tensors),
        )
        for node in inferred.graph.node
    ]


def _inputs(node: Any, tensors: dict[str, Tensor], weights: set[str]) -> tuple[Tensor, ...]:
    """Operands as a runtime lists them, which has put the weights of products away."""
    away = weights if node.op_type in PRODUCTS else set()
    return tuple(tensors[n] for n in node.input if n in tensors and n not in away)


def _tensors(onnx: Any, graph: Any) -> dict[str, Tensor]:
    known = {
        weight.name: Tensor(dtype=_name(onnx, weight.data_type), shape=tuple(weight.dims))
        for weight in graph.initializer
    }
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        dims = kind.shape.dim
        if kind.HasField("shape") and all(dim.HasField("dim_value") for dim in dims):
            shape = tuple(dim.dim_value for dim in dims)
            known[value.name] = Tensor(dtype=_name(onnx, kind.elem_type), shape=shape)
    return known


def _name(onnx: Any, elem_type: int) -> str:
    return str(onnx.TensorProto.DataType.Name(elem_type)).lower()
