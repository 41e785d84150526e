"""A typed ONNX graph on the GPU without an ONNX runtime: node by node, with PyTorch's kernels.

Every tensor has the type that the graph gives it, and that is checked after every node: an FP16
node computes in the GPU's real FP16. What computes shapes is done on the host, once per batch
size, so a call can be captured as a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from onnxscript import ir
from torch import Tensor, nn

from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.precision.graph import load_model

TORCH_TYPE = {ir.DataType.FLOAT: torch.float32, ir.DataType.FLOAT16: torch.float16}

Value = Any
"""A Tensor on the device, or a numpy array of integers on the host."""


class InterpretedGraph(nn.Module):
    """The graph of an ONNX file as a module; its weights are buffers."""

    def __init__(self, path: Path, device: torch.device, *, watch: Sequence[str] = ()) -> None:
        """Load a graph that ampdeploy exported or typed.

        Args:
            path: The ``.onnx`` file.
            device: Where to compute.
            watch: Inner tensors to return after the outputs.

        Raises:
            ArtifactError: The file cannot be used, or has an operator that is not known here.
        """
        super().__init__()
        graph = load_model(path).graph
        unknown = sorted({node.op_type for node in graph if node.op_type not in _OPERATORS})
        if unknown:
            raise ArtifactError(
                f"{path.name} has operators that are not known here: {', '.join(unknown)}. Add "
                "them to benchmarks/gpu/interpret.py."
            )
        self._nodes = list(graph)
        self.names = [value.name or "" for value in graph.outputs]
        self.names += [name for name in watch if name not in self.names]
        self._constants: dict[str, Value] = {}
        for position, (name, value) in enumerate(graph.initializers.items()):
            assert value.const_value is not None
            array = value.const_value.numpy()
            if value.dtype not in TORCH_TYPE:
                self._constants[name] = array
                continue
            # Copied: the array may lie in a file that is mapped read-only.
            self.register_buffer(f"weight_{position}", torch.from_numpy(array.copy()).to(device))
            self._constants[name] = self.get_buffer(f"weight_{position}")
        self._dead_after = _last_uses(self._nodes, {*self.names, *self._constants})

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, S, S) float32 to the outputs and the watched tensors, as `names` has them.

        Raises:
            VerificationError: A tensor came out in another type than the graph says.
        """
        values: dict[str, Value] = {**self._constants, IMAGES: images}
        for node, dead in zip(self._nodes, self._dead_after, strict=True):
            given = [None if v is None else values[v.name or ""] for v in node.inputs]
            attributes = {name: a.value for name, a in node.attributes.items()}
            found = _OPERATORS[node.op_type](*given, **attributes)
            several = found if isinstance(found, tuple) else (found,)
            for value, result in zip(node.outputs, several, strict=True):
                values[value.name or ""] = _checked(node, value, result)
            for name in dead:
                del values[name]
        return tuple(values[name] for name in self.names)


def _last_uses(nodes: list[ir.Node], kept: set[str]) -> list[list[str]]:
    """Per node, the tensors that nobody reads after it."""
    last: dict[str, int] = {}
    for position, node in enumerate(nodes):
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                last[value.name or ""] = position
    dead: list[list[str]] = [[] for _ in nodes]
    for name, position in last.items():
        if name not in kept and name != IMAGES:
            dead[position].append(name)
    return dead


def _checked(node: ir.Node, value: ir.Value, found: Value) -> Value:
    expected = TORCH_TYPE.get(value.dtype) if value.dtype is not None else None
    seen = found.dtype if isinstance(found, Tensor) else None
    if seen != expected:
        raise VerificationError(
            f"{node.name} ({node.op_type}) gave {seen}, and the graph says {value.dtype}. This "
            "interpreter, or the graph, is wrong."
        )
    return found


def _cast(x: Value, to: int, **_: Any) -> Value:
    wanted = TORCH_TYPE.get(ir.DataType(to))
    if wanted is None or not isinstance(x, Tensor):
        raise VerificationError(f"Cast of {type(x).__name__} to {ir.DataType(to)} is not known.")
    return x.to(wanted)


def _shape(x: Tensor, start: int = 0, end: int | None = None) -> np.ndarray:
    return np.array(x.shape[start:end], dtype=np.int64)


def _concat(*parts: Value, axis: int) -> Value:
    if isinstance(parts[0], Tensor):
        return torch.cat(parts, dim=axis)
    return np.concatenate(parts, axis=axis)


def _gather(x: Value, index: np.ndarray, axis: int = 0) -> Value:
    if not isinstance(x, Tensor):
        return np.take(x, index, axis=axis)
    if index.ndim == 0:
        return x.select(axis, int(index))
    chosen = torch.from_numpy(np.ascontiguousarray(index)).to(x.device)
    found = x.index_select(axis, chosen.flatten())
    return found.unflatten(axis, index.shape)


def _slice(
    x: Value, starts: np.ndarray, ends: np.ndarray, axes: Any = None, steps: Any = None
) -> Value:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    chosen = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        chosen[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(chosen)]


def _reshape(x: Tensor, shape: np.ndarray, allowzero: int = 0) -> Tensor:
    sizes = [int(size) for size in shape]
    if not allowzero:
        sizes = [x.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    return x.reshape(sizes)


def _split(x: Tensor, sizes: Any = None, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    if sizes is None:
        return x.chunk(num_outputs, dim=axis)
    return x.split([int(size) for size in sizes], dim=axis)


def _squeeze(x: Value, axes: np.ndarray) -> Value:
    for axis in sorted((int(axis) % x.ndim for axis in axes), reverse=True):
        x = x.squeeze(axis)
    return x


def _unsqueeze(x: Value, axes: np.ndarray) -> Value:
    rank = x.ndim + len(axes)
    for axis in sorted(int(axis) % rank for axis in axes):
        x = x.unsqueeze(axis) if isinstance(x, Tensor) else np.expand_dims(x, axis)
    return x


def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    strides: Sequence[int],
    pads: Sequence[int],
    dilations: Sequence[int],
    group: int,
    **_: Any,
) -> Tensor:
    if any(pads):
        raise VerificationError(f"Conv with pads {list(pads)} is not known; patches have none.")
    return F.conv2d(x, weight, bias, stride=list(strides), dilation=list(dilations), groups=group)


def _layer_norm(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    **_: Any,
) -> Tensor:
    return F.layer_norm(x, x.shape[axis:], scale, bias, epsilon)


def _expand(x: Tensor, shape: np.ndarray) -> Tensor:
    wanted = np.broadcast_shapes(tuple(x.shape), tuple(int(size) for size in shape))
    return x.expand(wanted)


_OPERATORS: dict[str, Callable[..., Value]] = {
    "Add": lambda a, b: a + b,
    "Cast": _cast,
    "Concat": _concat,
    "Conv": _conv,
    "Div": lambda a, b: a / b,
    "Erf": torch.erf,
    "Expand": _expand,
    "Gather": _gather,
    "Gelu": lambda x, approximate="none": F.gelu(x, approximate=approximate),
    "Identity": lambda x: x,
    "LayerNormalization": _layer_norm,
    "MatMul": lambda a, b: a @ b,
    "Mul": lambda a, b: a * b,
    "Neg": lambda x: -x,
    "ReduceMean": lambda x, axes, keepdims=1: x.mean(
        [int(axis) for axis in axes], keepdim=bool(keepdims)
    ),
    "Reshape": _reshape,
    "Shape": _shape,
    "Sigmoid": torch.sigmoid,
    "Slice": _slice,
    "Softmax": lambda x, axis=-1: x.softmax(axis),
    "Split": _split,
    "Squeeze": _squeeze,
    "Sub": lambda a, b: a - b,
    "Tanh": torch.tanh,
    "Transpose": lambda x, perm: x.permute(*perm),
    "Unsqueeze": _unsqueeze,
}
