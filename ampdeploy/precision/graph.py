"""Reading an exported graph: which block a node is in, and what kind of work it does.

Kinds are told by structure, not by the exporter's names; only the number of a block comes from the
node's name, which the export sets (``blocks.3.mlp.fc1/MatMul``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from onnxscript import ir

from ampdeploy.errors import ArtifactError
from ampdeploy.export.graph import load_graph

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
FLOATS = (FLOAT, HALF)

# Operators that move values and compute nothing: they take the type of what they are given.
MOVEMENT = frozenset(
    (
        "Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape", "Slice", "Split",
        "Squeeze", "Tile", "Transpose", "Unsqueeze", "Where",
    )
)  # fmt: skip
GEMMS = frozenset(("MatMul", "Gemm", "Conv"))
SOFTMAX = "Softmax"
NORM = "LayerNormalization"

_BLOCK = re.compile(r"blocks\.(\d+)(?=[./])")


def load_model(path: Path) -> ir.Model:
    """The graph of an ONNX file; large weights stay on disk until they are read.

    Raises:
        ArtifactError: It is missing, is not ONNX, or was not exported by ampdeploy.
    """
    load_graph(path)  # its errors are for people
    model = ir.load(path)
    untyped = [value.name for node in model.graph for value in node.outputs if value.dtype is None]
    if untyped:
        raise ArtifactError(
            f"{path} does not say the type of {len(untyped)} tensors, {untyped[0]} first. Export "
            "it again with `ampdeploy export`."
        )
    return model


def block_of(node: ir.Node) -> int | None:
    """The transformer block that a node belongs to; None: stem or head."""
    found = _BLOCK.match(node.name or "")
    return int(found[1]) if found else None


def is_float(value: ir.Value | None) -> bool:
    """Whether a value is a float tensor, of either width."""
    return value is not None and value.dtype in FLOATS


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is stored in the file."""
    return value is not None and value.const_value is not None


def activations(node: ir.Node) -> list[ir.Value]:
    """The float inputs of a node that are computed."""
    return [v for v in node.inputs if v is not None and is_float(v) and not is_weight(v)]


def weights(node: ir.Node) -> list[ir.Value]:
    """The float inputs of a node that are stored."""
    return [v for v in node.inputs if v is not None and is_float(v) and is_weight(v)]


def float_outputs(node: ir.Node) -> list[ir.Value]:
    """The float tensors that a node computes."""
    return [v for v in node.outputs if is_float(v)]


def computes(node: ir.Node) -> bool:
    """Whether a node does arithmetic on float tensors, so that its precision can be chosen."""
    if node.op_type in (*MOVEMENT, "Cast", "Constant"):
        return False
    return bool(float_outputs(node)) and bool(activations(node))


def kind_of(node: ir.Node) -> str:
    """What a computing node does: one of `KINDS`."""
    if node.op_type == NORM:
        return "norm"
    if node.op_type == SOFTMAX:
        return "softmax"
    if node.op_type in GEMMS:
        return "linear" if weights(node) else "attention"
    if node.op_type == "Add" and len(activations(node)) == 2:
        return "residual"
    return "pointwise"


KINDS = ("norm", "softmax", "residual", "pointwise", "attention", "linear")


def block_outputs(model: ir.Model) -> dict[int, ir.Value]:
    """Block -> the tokens (B, N, C) that it hands on: the last float tensor it computes.

    Raises:
        ArtifactError: The nodes do not say which block they belong to.
    """
    found = {
        block: float_outputs(node)[0]
        for node in model.graph
        for block in [block_of(node)]
        if block is not None and float_outputs(node)
    }
    if sorted(found) != list(range(len(found))) or not found:
        raise ArtifactError(
            f"the graph names the blocks {sorted(found)}, expected 0, 1, 2 and so on. Export it "
            "again with `ampdeploy export`."
        )
    return dict(sorted(found.items()))


def typed_nodes(model: ir.Model) -> Iterator[ir.Node]:
    """Every node whose tensors get a type: those that compute, and those that move."""
    for node in model.graph:
        if computes(node) or (node.op_type in MOVEMENT and float_outputs(node)):
            yield node
