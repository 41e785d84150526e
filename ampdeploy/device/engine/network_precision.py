"""What a parsed network computes in: the proof that FP16 was built when FP16 was asked for.

A strongly typed network is a promise of TensorRT: it may fuse layers and choose kernels, but not
types. So the types of the network, which can be read without a GPU, are those of the engine. Where
there is a GPU, the engine's own inspector is asked as well (`read_engine_outputs`).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ampdeploy.device.engine.manifest import PrecisionFacts
from ampdeploy.device.engine.onnx_types import initializers
from ampdeploy.errors import AmpDeployError, VerificationError

HALF, FLOAT = "HALF", "FLOAT"

# Of all weights that are multiplied, the share that must be multiplied in FP16. An FP32 product
# takes at least twice the time of an FP16 one on every GPU in scope, so below two thirds the FP32
# products take more than half of the time, and nobody would call that an FP16 engine. A third is
# room for the FP32 islands that verification may ask for.
MIN_HALF_SHARE = 2 / 3
# Below this it is worth a word.
USUAL_HALF_SHARE = 0.9
# Kernels take a few MB; a plan that is larger than its typed weights by more holds other ones.
PLAN_ALLOWANCE_BYTES = 64 << 20
PLAN_ALLOWANCE_RATIO = 1.25

SHOWN_LAYERS = 5

_GEMMS = ("MATRIX_MULTIPLY", "CONVOLUTION", "EINSUM")
# What stands between a weight and its product without changing its values.
_PASSED_ON = ("SHUFFLE", "SQUEEZE", "UNSQUEEZE", "IDENTITY", "CAST")
_INTEGERS = ("INT32", "INT64", "BOOL", "UINT8")
_BYTES = {
    "FLOAT": 4, "HALF": 2, "BF16": 2, "INT64": 8, "INT32": 4, "INT8": 1, "UINT8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Gemm:
    """A matrix multiplication or convolution of the network."""

    name: str
    computes_in: str
    weights: int
    """Elements of the constants it multiplies with; 0: a product of activations."""
    weight_name: str | None
    """The constant, named as the ONNX initialiser; a convolution's has no name."""
    weight_type: str | None


def read_precision(trt: Any, network: Any, onnx: Path, *, asked: str) -> PrecisionFacts:
    """Read the types of a parsed network, and make sure that they are what was asked for.

    Args:
        trt: The TensorRT module.
        network: The parsed `INetworkDefinition`.
        onnx: The file that it was parsed from.
        asked: ``fp16`` or ``fp32``.

    Raises:
        VerificationError: FP16 was asked for and most is FP32, or the other way round, or
            TensorRT's parser did not keep a type.
        ArtifactError: `onnx` cannot be read.
    """
    layers = [network.get_layer(i) for i in range(network.num_layers)]
    gemms = list(_gemms(trt, layers))
    declared = initializers(onnx)
    weights: Counter[str] = Counter()
    for gemm in gemms:
        weights[gemm.computes_in] += gemm.weights
    total = sum(weights.values())
    onnx_bytes: Counter[str] = Counter()
    for tensor in declared:
        onnx_bytes[tensor.dtype] += tensor.nbytes
    facts = PrecisionFacts(
        asked=asked,
        layers=_count_layers(layers),
        gemm_layers=dict(Counter(gemm.computes_in for gemm in gemms)),
        gemm_weights={kind: count for kind, count in weights.items() if count},
        half_share=round(weights[HALF] / total, 4) if total else 0.0,
        weight_bytes=_weight_bytes(trt, layers),
        onnx_weight_bytes=dict(onnx_bytes),
    )
    _check_asked(facts, onnx)
    half = {tensor.name for tensor in declared if tensor.dtype == "FLOAT16"}
    _check_kept(gemms, half, onnx)
    return facts


def _check_asked(facts: PrecisionFacts, onnx: Path) -> None:
    share = facts.half_share
    if facts.asked == "fp16" and share < MIN_HALF_SHARE:
        raise VerificationError(
            f"FP16 was asked for, and {share:.0%} of the weights of {onnx.name} would be "
            f"multiplied in FP16; at least {MIN_HALF_SHARE:.0%} must be. Give the typed graph "
            "(model.fp16.onnx), not the exported one; if this is it, so much of it has to stay "
            "FP32 that --precision fp32 is what you want."
        )
    if facts.asked == "fp32" and HALF in facts.gemm_layers:
        raise VerificationError(
            f"FP32 was asked for, and {facts.gemm_layers[HALF]} matrix products of {onnx.name} are "
            "FP16. Give the graph as it was exported (model.onnx), or ask for --precision fp16."
        )


def _check_kept(gemms: list[Gemm], half: set[str], onnx: Path) -> None:
    """Weights that are FP16, in the file or in the network, must be multiplied in FP16."""
    widened = [
        gemm
        for gemm in gemms
        if gemm.weights
        and gemm.computes_in != HALF
        and (gemm.weight_type == HALF or gemm.weight_name in half)
    ]
    if widened:
        shown = ", ".join(f"{gemm.name} ({gemm.computes_in})" for gemm in widened[:SHOWN_LAYERS])
        raise VerificationError(
            f"{len(widened)} matrix products of {onnx.name} have FP16 weights and are not computed "
            f"in FP16: {shown}. Either the graph casts them back, or TensorRT's parser did; type "
            "the graph again."
        )


def precision_warnings(facts: PrecisionFacts, plan_bytes: int) -> list[str]:
    """What is not wrong but should be known."""
    found = []
    if facts.asked == "fp16" and facts.half_share < USUAL_HALF_SHARE:
        found.append(f"only {facts.half_share:.0%} of the weights are multiplied in FP16")
    typed = sum(facts.weight_bytes.values())
    if plan_bytes > typed * PLAN_ALLOWANCE_RATIO + PLAN_ALLOWANCE_BYTES:
        found.append(
            f"the plan has {plan_bytes / 1e6:.0f} MB for {typed / 1e6:.0f} MB of typed weights: "
            "TensorRT keeps weights in more than one form"
        )
    return found


def _gemms(trt: Any, layers: list[Any]) -> Iterator[Gemm]:
    producers = {}
    for layer in layers:
        for i in range(layer.num_outputs):
            producers[layer.get_output(i).name] = layer
    for layer in layers:
        if layer.type.name not in _GEMMS:
            continue
        inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
        constants = [
            source for tensor in inputs if tensor is not None
            for source in [_constant_behind(tensor, producers)] if source is not None
        ]  # fmt: skip
        weights = sum(_volume(source.get_output(0).shape) for source in constants)
        kernel_type = None
        if layer.type.name == "CONVOLUTION":
            kernel = _as(layer, trt.IConvolutionLayer).kernel
            weights += int(kernel.size)
            kernel_type = _numpy_type(kernel) if kernel.size else None
        yield Gemm(
            name=layer.name,
            computes_in=inputs[0].dtype.name,
            weights=weights,
            weight_name=constants[0].name if constants else None,
            weight_type=constants[0].get_output(0).dtype.name if constants else kernel_type,
        )


def _constant_behind(tensor: Any, producers: dict[str, Any]) -> Any:
    """The constant layer that `tensor` is a view or a cast of; None: it depends on the input."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type.name in _PASSED_ON:
        layer = producers.get(layer.get_input(0).name)
    return layer if layer is not None and layer.type.name == "CONSTANT" else None


def _as(layer: Any, kind: type) -> Any:
    # `get_layer` returns the base class; NVIDIA's samples change the class as well.
    layer.__class__ = kind
    return layer


def _numpy_type(weights: Any) -> str:
    return {"float16": HALF, "float32": FLOAT}.get(str(weights.dtype), str(weights.dtype).upper())


def _volume(shape: Any) -> int:
    return math.prod(int(dim) for dim in shape)


def _count_layers(layers: list[Any]) -> dict[str, dict[str, int]]:
    counts: dict[str, Counter[str]] = {}
    for layer in layers:
        kind = layer.get_output(0).dtype.name if layer.num_outputs else "none"
        if kind not in _INTEGERS and layer.type.name != "CONSTANT":
            counts.setdefault(layer.type.name, Counter())[kind] += 1
    return {name: dict(count) for name, count in sorted(counts.items())}


def _weight_bytes(trt: Any, layers: list[Any]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for layer in layers:
        if layer.type.name == "CONSTANT":
            tensor = layer.get_output(0)
            total[tensor.dtype.name] += _volume(tensor.shape) * _BYTES.get(tensor.dtype.name, 1)
        elif layer.type.name == "CONVOLUTION":
            convolution = _as(layer, trt.IConvolutionLayer)
            for weights in (convolution.kernel, convolution.bias):
                if weights.size:
                    total[_numpy_type(weights)] += int(weights.nbytes)
    return dict(total)


def read_engine_outputs(
    trt: Any, engine: Any, *, asked: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, int]:
    """Types of what the layers of a built engine put out, as its inspector says.

    Without an execution context whose shapes are set, TensorRT 10 says "N/A due to dynamic shapes"
    of every layer. https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html

    Not run yet: it needs a GPU.

    Args:
        trt: The TensorRT module.
        engine: Deserialised; built with detailed profiling verbosity.
        asked: ``fp16`` or ``fp32``.
        shapes: Input -> shape to inspect it at.

    Returns:
        ``HALF``, ``FLOAT`` or ``other`` -> number of outputs.

    Raises:
        VerificationError: FP16 was asked for, and layers put out FP32 alone.
        AmpDeployError: The inspector says nothing that can be read.
    """
    inspector = engine.create_engine_inspector()
    if inspector:
        inspector.execution_context = _context_at(engine, shapes)
    text = inspector.get_engine_information(trt.LayerInformationFormat.JSON) if inspector else ""
    try:
        layers = json.loads(text or "{}").get("Layers", [])
    except ValueError as error:
        raise AmpDeployError(f"TensorRT's engine inspector gave no JSON: {error}.") from error
    outputs = [
        output for layer in layers if isinstance(layer, dict) for output in layer.get("Outputs", [])
    ]
    if not outputs:
        raise AmpDeployError("TensorRT's engine inspector names no layer's outputs.")
    found = dict(Counter(_type_in_words(output) for output in outputs))
    if not {HALF, FLOAT} & set(found):
        said = _said_type(outputs[0])
        raise AmpDeployError(
            f"TensorRT's engine inspector names the type of no layer's output; it says {said!r}."
        )
    if asked == "fp16" and HALF not in found:
        raise VerificationError(
            f"FP16 was asked for, and no layer of the built engine puts out FP16: {found}."
        )
    return found


def _context_at(engine: Any, shapes: Mapping[str, tuple[int, ...]]) -> Any:
    context = engine.create_execution_context()
    if context is None:
        raise AmpDeployError("TensorRT makes no execution context to inspect the engine with.")
    for name, shape in shapes.items():
        if not context.set_input_shape(name, shape):
            raise AmpDeployError(f"TensorRT refuses {name!r} of shape {shape} for its inspection.")
    return context


def _said_type(output: dict[str, Any]) -> str:
    keys = ("Format/Datatype", "Datatype")
    return " ".join(str(output[key]) for key in keys if key in output)


def _type_in_words(output: dict[str, Any]) -> str:
    # "Half", "Row major linear FP16 format", "Channel major FP16 format where channel % 8 == 0"
    words = _said_type(output).lower()
    if "half" in words or "fp16" in words:
        return HALF
    return FLOAT if "float" in words or "fp32" in words else "other"
