"""What can be said about an ONNX file without running it. Needs onnx; torch only to count norms.

The gates are the known ways in which exported ViTs go wrong on TensorRT: control flow and
data-dependent shapes from position embeddings, LayerNorm taken apart (it overflows in FP16),
and double precision that no engine keeps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from ampdeploy.device.radar import graph_patterns as patterns
from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.export.names import FEATURES, IMAGES, OUTPUTS, PATCH_FEATURES
from ampdeploy.optional import require

if TYPE_CHECKING:
    from ampdeploy.models.vision import VisionModel

CONTROL_FLOW = ("If", "Loop", "Scan", "Range")
FLOAT64 = onnx.TensorProto.DOUBLE
RANKS = {IMAGES: 4, FEATURES: 2, PATCH_FEATURES: 3}


@dataclass(frozen=True, kw_only=True)
class GraphFacts:
    """What `check_graph` saw."""

    opset: int
    nodes: dict[str, int]
    """Operator type -> number of nodes."""
    norms: int
    """LayerNormalization nodes."""
    initializers: int
    weight_bytes: int
    """Bytes of all initialisers."""
    outputs: tuple[str, ...]


def count_norms(model: VisionModel) -> int:
    """How often a LayerNorm runs in one forward pass: what the graph must have as nodes.

    Counted on one black image, because modules that exist need not be used.
    """
    torch: Any = require("torch", needed_by="counting the norms of a model")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    hooks = [
        module.register_forward_hook(count)
        for module in model.modules()
        if isinstance(module, torch.nn.LayerNorm)
    ]
    size = model.spec.image_size
    device = next(model.parameters()).device
    try:
        with torch.inference_mode():
            model(torch.zeros(1, 3, size, size, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def check_graph(path: Path, *, norms: int | None) -> GraphFacts:
    """Check that `path` is valid ONNX and holds nothing that breaks later.

    Args:
        path: The ``.onnx`` file.
        norms: LayerNormalization nodes it must have (`count_norms`); None does not check.

    Raises:
        ArtifactError: It is missing or is not ONNX.
        VerificationError: One or more gates said no; the message lists every one.
    """
    model = load_graph(path)
    failures = [*_validity(path, model)]
    if not failures:  # on an invalid model the gates below would only repeat the noise
        model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
        found = sum(node.op_type == "LayerNormalization" for node in model.graph.node)
        failures += [
            *_interface(model),
            *_control_flow(model),
            *_dynamic_tiles(model),
            *_norm_count(found, norms),
            *_attention(model),
            *_float64(model),
        ]
    if failures:
        listed = "".join(f"\n  - {failure}" for failure in failures)
        raise VerificationError(
            f"{path} is not fit for deployment:{listed}\nExport it again with `ampdeploy export`; "
            "if the failure stays, the model uses something this tool does not know yet."
        )
    return GraphFacts(
        opset=_opset(model),
        nodes=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        norms=found,
        initializers=len(model.graph.initializer),
        weight_bytes=sum(_tensor_bytes(tensor) for tensor in model.graph.initializer),
        outputs=tuple(output.name for output in model.graph.output),
    )


def load_graph(path: Path) -> onnx.ModelProto:
    """Parse an ONNX file; weights kept in a ``.data`` file are not read.

    Raises:
        ArtifactError: It is missing, not ONNX, or cut short.
    """
    if not path.is_file():
        raise ArtifactError(f"there is no ONNX file at {path}. Run `ampdeploy export` first.")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise ArtifactError(
            f"{path} ({path.stat().st_size} bytes) is not an ONNX file, or it is incomplete "
            f"({error}). Export it again."
        ) from error
    if not model.graph.node:  # what an empty file parses to
        raise ArtifactError(
            f"{path} ({path.stat().st_size} bytes) holds no graph. Export it again."
        )
    return model


def _validity(path: Path, model: onnx.ModelProto) -> Iterator[str]:
    # By path: the checker then finds external data, and models above 2 GB pass through it.
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        yield f"the ONNX checker refuses it: {error}"
    if model.functions:
        yield f"it has {len(model.functions)} local functions, which TensorRT cannot parse"


def _opset(model: onnx.ModelProto) -> int:
    return max((entry.version for entry in model.opset_import if entry.domain == ""), default=0)


def _all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those inside branches and loop bodies included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _all_nodes(inner)


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    """Dimensions of a tensor; None where dynamic or unknown."""
    return [
        dim.dim_value if dim.HasField("dim_value") else None
        for dim in value.type.tensor_type.shape.dim
    ]


def _interface(model: onnx.ModelProto) -> Iterator[str]:
    """`images` in; `features` and perhaps `patch_features` out; only the batch is dynamic."""
    graph = model.graph
    inputs = [value.name for value in graph.input]
    outputs = [value.name for value in graph.output]
    if inputs != [IMAGES]:
        yield f"its inputs are {inputs}, expected {[IMAGES]}"
    known = list(OUTPUTS)
    if outputs not in (known[:1], known):
        yield f"its outputs are {outputs}, expected {known[:1]} or {known}"
    for value in [*graph.input, *graph.output]:
        kind = value.type.tensor_type.elem_type
        if kind != onnx.TensorProto.FLOAT:
            yield f"{value.name} is {onnx.TensorProto.DataType.Name(kind)}, expected FLOAT"
        dims = _dims(value)
        if len(dims) != RANKS.get(value.name, len(dims)):
            yield f"{value.name} has shape {dims}, expected {RANKS[value.name]} dimensions"
        elif dims and dims[0] is not None:
            yield f"{value.name} has the fixed batch {dims[0]}, expected a dynamic one"
        if None in dims[1:]:
            yield f"{value.name} has shape {dims}: only the batch may be dynamic"


def _control_flow(model: onnx.ModelProto) -> Iterator[str]:
    for node in _all_nodes(model.graph):
        if node.op_type in CONTROL_FLOW:
            yield f"node {node.name!r} is {node.op_type}: control flow gives wrong or slow engines"


def _dynamic_tiles(model: onnx.ModelProto) -> Iterator[str]:
    constants = {tensor.name for tensor in model.graph.initializer}
    nodes = list(_all_nodes(model.graph))
    constants |= {node.output[0] for node in nodes if node.op_type == "Constant"}
    for node in nodes:
        if node.op_type == "Tile" and node.input[1] not in constants:
            yield f"node {node.name!r} is a Tile whose repeats {node.input[1]!r} are computed"


def _norm_count(found: int, expected: int | None) -> Iterator[str]:
    if expected is not None and found != expected:
        yield (
            f"it has {found} LayerNormalization nodes, the model runs {expected} norms: "
            "a norm taken apart overflows in FP16"
        )


def _attention(model: onnx.ModelProto) -> Iterator[str]:
    """Written out as q k^T, softmax, v, and scaled once before it: what TensorRT fuses right.

    https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/transformers-fused-attention.html
    """
    graph = patterns.Graph(model.graph)
    if patterns.PATTERNS["attention-op"](graph):
        yield "it has fused attention operators, which TensorRT releases compute differently"
    if patterns.PATTERNS["sqrt-scale-both-sides"](graph):
        yield "attention scales q and k by a root each, which TensorRT 10.7 gets wrong"
    softmaxes, fusible = len(list(graph.of("Softmax"))), len(list(graph.scores()))
    if softmaxes != fusible:
        yield (
            f"{softmaxes - fusible} of {softmaxes} Softmax nodes are not between two MatMuls: "
            "TensorRT does not fuse such attention"
        )


def _float64(model: onnx.ModelProto) -> Iterator[str]:
    graph = model.graph
    for tensor in graph.initializer:
        if tensor.data_type == FLOAT64:
            yield f"initialiser {tensor.name!r} is float64"
    for value in graph.value_info:
        if value.type.tensor_type.elem_type == FLOAT64:
            yield f"tensor {value.name!r} is float64"


def _tensor_bytes(tensor: onnx.TensorProto) -> int:
    elements = 1
    for dim in tensor.dims:
        elements *= dim
    return int(elements * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
