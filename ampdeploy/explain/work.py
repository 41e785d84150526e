"""What one operator has to do, from the shapes that go in and come out of it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ampdeploy.explain.result import Work

# Bytes of an element, by ONNX Runtime's names in a profile, ONNX's and TensorRT's.
_BYTES = {
    "float": 4, "double": 8, "float16": 2, "bfloat16": 2, "int64": 8, "int32": 4, "int8": 1,
    "uint8": 1, "bool": 1, "uint64": 8, "uint32": 4, "int16": 2, "uint16": 2,
}  # fmt: skip

PRODUCTS = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm", "MatMulBnb4", "TransposeMatMul")
_CONVOLUTIONS = ("Conv", "FusedConv", "NhwcConv", "NhwcFusedConv")
_ATTENTIONS = ("Attention", "MultiHeadAttention", "PackedMultiHeadAttention", "QAttention")


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """An operand or result."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes; an unknown type counts as float32."""
        return self.size * _BYTES.get(self.dtype, 4)


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator as it is run."""

    name: str
    op_type: str
    inputs: tuple[Tensor, ...]
    """ONNX Runtime leaves weights out that it has repacked for its kernels."""
    outputs: tuple[Tensor, ...]

    @property
    def is_product(self) -> bool:
        """Whether it multiplies matrices."""
        return self.op_type in PRODUCTS


def is_attention(op_type: str) -> bool:
    """Whether an operator is a whole attention in one."""
    return op_type in _ATTENTIONS


def inner_size(operator: Operator) -> int:
    """K of a product (M, K) x (K, N), whatever of it is transposed; 0 where there is none."""
    if not (operator.is_product and operator.inputs and operator.outputs):
        return 0
    left, out = operator.inputs[0].shape, operator.outputs[0].shape
    if len(left) < 2 or len(out) < 2:
        return left[-1] if left else 0
    return left[-1] * left[-2] // max(out[-2], 1)


def work_of(operator: Operator) -> Work:
    """FLOPs and bytes of one call of `operator`.

    FLOPs are 2 * multiply-accumulates of products, convolutions and attention; all else has 0, as
    in the published figures of models. Bytes are those of all inputs and outputs, and of the
    weights that the runtime has put away.
    """
    moved = sum(tensor.nbytes for tensor in (*operator.inputs, *operator.outputs))
    if not operator.outputs or not operator.inputs:
        return Work(bytes=moved, operators=1)
    out, first = operator.outputs[0], operator.inputs[0]
    flops = 0
    if operator.is_product:
        inner = inner_size(operator)
        flops = 2 * out.size * inner
        if len(operator.inputs) == 1:
            moved += inner * out.shape[-1] * _BYTES.get(out.dtype, 4)
    elif operator.op_type in _CONVOLUTIONS and len(operator.inputs) > 1:
        flops = 2 * out.size * math.prod(operator.inputs[1].shape[1:])
    elif is_attention(operator.op_type):
        flops = _attention_flops(operator, first, out)
    return Work(flops=flops, bytes=moved, operators=1)


def _attention_flops(operator: Operator, first: Tensor, out: Tensor) -> int:
    """Both products of softmax(q k^T) v; with com.microsoft's Attention also q, k and v."""
    weights = operator.inputs[1] if len(operator.inputs) > 1 else None
    makes_qkv = operator.op_type != "MultiHeadAttention" and (
        weights is None or len(weights.shape) == 2
    )
    if makes_qkv:
        products = 2 * first.size * 3 * out.shape[-1]
        return products + 4 * out.size * first.shape[-2]
    keys = first.shape[-2] if weights is None else weights.shape[-2]
    return 4 * out.size * keys
