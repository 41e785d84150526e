"""What in an ONNX graph known TensorRT bugs depend on: one named predicate each.

Weights are not read, and onnx is imported only when a file is looked at, so that a device that
plans without a graph needs nothing but the standard library.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ampdeploy.errors import ArtifactError
from ampdeploy.optional import require

# Element types of onnx.TensorProto, which are part of the file format.
FLOAT16 = 10
BFLOAT16 = 16

# What changes a tensor's type, shape or layout, but computes nothing.
_MOVES = {
    *("Cast", "Identity", "Reshape", "Transpose", "Squeeze", "Unsqueeze"),
    *("Flatten", "Dropout", "Expand"),
}
# What may stand between q k^T and its softmax: scale, bias and mask.
_BEFORE_SOFTMAX = _MOVES | {"Add", "Sub", "Mul", "Div", "Where"}
_GEMMS = {"MatMul", "Gemm"}


def _sorted(nodes: Any) -> list[Any]:
    """`nodes` with each after those that it reads from.

    ONNX demands that order, but converters that put casts at the end do not keep it.
    """
    maker = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    waits_for = [{maker[name] for name in node.input if name in maker} for node in nodes]
    blocks: dict[int, list[int]] = {}
    for index, before in enumerate(waits_for):
        for other in before:
            blocks.setdefault(other, []).append(index)
    ready = [index for index, before in enumerate(waits_for) if not before]
    order: list[int] = []
    while ready:
        order.append(ready.pop())
        for index in blocks.get(order[-1], []):
            waits_for[index].discard(order[-1])
            if not waits_for[index]:
                ready.append(index)
    return [nodes[index] for index in order]


class Graph:
    """A graph's nodes by what they make and take; the wiring that the predicates share."""

    def __init__(self, proto: Any) -> None:
        """Index `proto`, an `onnx.GraphProto`; inner graphs of control flow are not entered."""
        self.nodes = _sorted(proto.node)
        self.constants: dict[str, Any] = {tensor.name: tensor for tensor in proto.initializer}
        self.inputs = [value for value in proto.input if value.name not in self.constants]
        self.maker: dict[str, Any] = {}
        self.takers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in node.output:
                self.maker[name] = node
            for name in dict.fromkeys(node.input):  # q q^T reads one tensor twice
                self.takers.setdefault(name, []).append(node)
            if node.op_type == "Constant":
                value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
                self.constants[node.output[0]] = value
        self.types = self._types()

    def _types(self) -> dict[str, int]:
        """Element type of every tensor, passed on from input to output.

        Exact for the operators of a ViT. ONNX's own inference would copy all weights, and fails
        on models above 2 GB.
        """
        types = {value.name: value.type.tensor_type.elem_type for value in self.inputs}
        types |= {name: tensor.data_type for name, tensor in self.constants.items() if tensor}
        for node in self.nodes:
            first = 1 if node.op_type == "Where" else 0  # Where's first input is its condition
            kind = types.get(node.input[first], 0) if len(node.input) > first else 0
            if node.op_type == "Cast":
                kind = next(entry.i for entry in node.attribute if entry.name == "to")
            for name in node.output:
                types.setdefault(name, kind)
        return types

    def source(self, name: str, through: set[str] = _MOVES) -> Any:
        """The node that computed `name`, looking through `through`; None for inputs, constants."""
        node = self.maker.get(name)
        while node is not None and node.op_type in through:
            node = self.maker.get(self._data_input(node))
        return node

    def _data_input(self, node: Any) -> str:
        """Of a node's inputs the one that is no constant (scale, mask), the first if in doubt."""
        computed = [name for name in node.input if name and name not in self.constants]
        name: str = computed[0] if computed else node.input[0]
        return name

    def sinks(self, name: str, through: set[str] = _MOVES) -> Iterator[Any]:
        """The nodes that use `name`, looking through `through`."""
        for node in self.takers.get(name, []):
            if node.op_type in through:
                for output in node.output:
                    yield from self.sinks(output, through)
            else:
                yield node

    def is_constant(self, name: str) -> bool:
        """Whether `name` is a weight, however it is cast or laid out."""
        while name not in self.constants:
            node = self.maker.get(name)
            if node is None or node.op_type not in {*_MOVES, "DequantizeLinear"}:
                return False
            name = node.input[0]
        return True

    def is_scalar(self, name: str) -> bool:
        """Whether `name` is one number: a constant, or the root of one worked out in the graph."""
        node = self.source(name)
        if node is not None and node.op_type != "Constant":
            return bool(node.op_type == "Sqrt")
        while name not in self.constants:
            if name not in self.maker:
                return False
            name = self.maker[name].input[0]
        tensor = self.constants[name]
        size = 1
        for dim in tensor.dims if tensor else ():
            size *= dim
        return size == 1

    def of(self, *kinds: str) -> Iterator[Any]:
        """Nodes of these operator types."""
        return (node for node in self.nodes if node.op_type in kinds)

    def scores(self) -> Iterator[Any]:
        """The q k^T of each attention that is written out: MatMul, Softmax, MatMul."""
        for softmax in self.of("Softmax"):
            made = self.source(softmax.input[0], _BEFORE_SOFTMAX)
            mixes = any(node.op_type == "MatMul" for node in self.sinks(softmax.output[0]))
            if mixes and made is not None and made.op_type == "MatMul":
                yield made


def _transformer(graph: Graph) -> bool:
    return any(graph.scores()) or _attention_op(graph)


def _attention_op(graph: Graph) -> bool:
    return any(graph.of("Attention", "MultiHeadAttention"))


def _dynamic_batch(graph: Graph) -> bool:
    for value in graph.inputs:
        dims = value.type.tensor_type.shape.dim
        if len(dims) and not dims[0].HasField("dim_value"):
            return True
    return False


def _control_flow(graph: Graph) -> bool:
    return any(graph.of("If", "Loop", "Scan"))


def _rope(graph: Graph) -> bool:
    """Rotation of pairs on the way to q k^T: (-b, a) times sine, or a cos - b sin joined."""
    if not _transformer(graph):
        return False
    for concat in graph.of("Concat"):
        halves = [graph.source(name) for name in concat.input]
        kinds = {node.op_type for node in halves if node is not None}
        rotated = "Neg" in kinds and any(
            node.op_type == "Mul" for node in graph.sinks(concat.output[0])
        )
        differences = (
            node
            for node in halves
            if node is not None
            and node.op_type == "Sub"
            and all(_is_made_by(graph, name, "Mul") for name in node.input)
        )
        if rotated or ("Add" in kinds and any(differences)):
            return True
    return False


def _is_made_by(graph: Graph, name: str, kind: str) -> bool:
    node = graph.source(name)
    return node is not None and node.op_type == kind


def _sqrt_scale_both_sides(graph: Graph) -> bool:
    def scaled(name: str) -> bool:
        node = graph.source(name)
        return (
            node is not None
            and node.op_type in ("Mul", "Div")
            and any(graph.is_scalar(factor) for factor in node.input)
        )

    return any(all(scaled(name) for name in node.input) for node in graph.scores())


def _fp16_attention(graph: Graph) -> bool:
    return any(graph.types.get(node.output[0]) in (FLOAT16, BFLOAT16) for node in graph.scores())


def _shared_input_gemms(graph: Graph) -> bool:
    """Two or more GEMMs with weights on one tensor: what is fused side by side."""
    readers: dict[str, int] = {}
    for node in graph.of(*_GEMMS):
        if graph.is_constant(node.input[1]) and not graph.is_constant(node.input[0]):
            name = node.input[0]
            while name in graph.maker and graph.maker[name].op_type in ("Cast", "Identity"):
                name = graph.maker[name].input[0]
            readers[name] = readers.get(name, 0) + 1
    return any(count > 1 for count in readers.values())


def _conv_between_blocks(graph: Graph) -> bool:
    after: set[str] = set()
    for node in graph.nodes:
        if node.op_type in ("Softmax", "Attention") or after.intersection(node.input):
            if node.op_type == "Conv":
                return True
            after.update(node.output)
    return False


def _fp16_variance(graph: Graph) -> bool:
    for mean in graph.of("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2"):
        if graph.types.get(mean.input[0]) != FLOAT16:
            continue
        square = graph.maker.get(mean.input[0])
        if mean.op_type in ("ReduceSumSquare", "ReduceL2") or (
            square is not None
            and (
                square.op_type == "Pow"
                or (square.op_type == "Mul" and square.input[0] == square.input[1])
            )
        ):
            return True
    return False


# name -> whether a graph has it. The names are those of known_bugs.json.
PATTERNS: dict[str, Callable[[Graph], bool]] = {
    "transformer": _transformer,
    "attention-op": _attention_op,
    "dynamic-batch": _dynamic_batch,
    "control-flow": _control_flow,
    "rope": _rope,
    "sqrt-scale-both-sides": _sqrt_scale_both_sides,
    "fp16-attention": _fp16_attention,
    "shared-input-gemms": _shared_input_gemms,
    "conv-between-blocks": _conv_between_blocks,
    "fp16-variance": _fp16_variance,
}


def graph_patterns(onnx_path: Path) -> set[str]:
    """The names in `PATTERNS` that hold for a file.

    Args:
        onnx_path: The ONNX file as TensorRT gets it: typed, where it is. Weights in a ``.data``
            file beside it are not read.

    Raises:
        ArtifactError: It is missing or is no ONNX file.
        MissingDependencyError: The onnx package is not installed.
    """
    onnx: Any = require("onnx", needed_by=f"looking for known bugs in {onnx_path.name}")
    if not onnx_path.is_file():
        raise ArtifactError(f"there is no ONNX file at {onnx_path}. Run `ampdeploy export` first.")
    try:
        model = onnx.load(str(onnx_path), format="protobuf", load_external_data=False)
    except Exception as error:  # protobuf's own class, whose package is not named here
        raise ArtifactError(
            f"{onnx_path} ({onnx_path.stat().st_size} bytes) is not an ONNX file, or it is "
            f"incomplete ({error}). Export it again."
        ) from error
    if not model.graph.node:
        raise ArtifactError(f"{onnx_path} holds no graph. Export it again.")
    graph = Graph(model.graph)
    return {name for name, holds in PATTERNS.items() if holds(graph)}
