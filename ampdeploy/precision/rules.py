"""Which nodes may not compute in FP16, and why. One class per rule.

A rule looks at one node and returns a reason, or None. The remedies are two: the node computes in
FP32, or, for a linear whose values are too large but whose work is most of the model's, its input
is scaled down by a power of two before the FP16 product and the result scaled back after it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from onnxscript import ir

from ampdeploy.precision.graph import (
    NORM,
    SOFTMAX,
    activations,
    block_of,
    computes,
    float_outputs,
    kind_of,
    typed_nodes,
    weights,
)

FP16_MAX = 65504.0
# Below it FP16 has fewer than its 11 bits, and less and less the smaller the value.
FP16_MIN_NORMAL = 2.0**-14
# Half of FP16's spacing is 2**-11 of a value; weights of one size lose about 0.6 of that together.
# Twice as much means that many of them are subnormal.
MAX_WEIGHT_ERROR = 2.0**-10
# Pointwise operations of one activation function: tanh GELU, the longest, has seven in a row.
ACTIVATION_STEPS = 8
# What a norm is made of where it was taken apart: squares and their means.
NORM_PARTS = frozenset(("ReduceMean", "ReduceSum", "ReduceL2", "Pow", "Sqrt", "Reciprocal"))


@dataclass(frozen=True, kw_only=True)
class Decision:
    """One node that does not simply become FP16."""

    node: str
    block: int | None
    rule: str
    reason: str
    scale: int | None = None
    """Compute in FP16 with the input times ``2**-scale``; None: compute in FP32."""


@dataclass(frozen=True, kw_only=True)
class WeightFacts:
    """One stored tensor, as FP16 would hold it."""

    name: str
    abs_max: float
    overflow: int
    """Values beyond FP16's largest."""
    subnormal: int
    """Values, not 0, below FP16's smallest normal one: they lose bits."""
    flushed: int
    """Of those, the ones that become 0."""
    relative_error: float
    """Norm of what rounding changes, over the norm of the tensor."""

    @property
    def fault(self) -> str | None:
        """Why it must stay FP32."""
        if self.overflow:
            return f"{self.overflow} values beyond 65504, the largest is {self.abs_max:.3g}"
        if self.relative_error > MAX_WEIGHT_ERROR:
            return (
                f"{self.subnormal} values are subnormal in FP16 and {self.flushed} become 0: it "
                f"would change by {self.relative_error:.1e}"
            )
        return None


def scan_weight(value: ir.Value) -> WeightFacts:
    """What FP16 does to one initialiser."""
    assert value.const_value is not None
    exact = np.asarray(value.const_value.numpy(), dtype=np.float32)
    with np.errstate(over="ignore"):
        rounded = exact.astype(np.float16).astype(np.float32)
    size = np.abs(exact)
    fits = size <= FP16_MAX
    lost = np.linalg.norm((exact - np.where(fits, rounded, exact)).astype(np.float64))
    norm = np.linalg.norm(exact.astype(np.float64))
    return WeightFacts(
        name=value.name or "",
        abs_max=float(size.max(initial=0.0)),
        overflow=int((~fits).sum()),
        subnormal=int(((size < FP16_MIN_NORMAL) & (size > 0)).sum()),
        flushed=int(((rounded == 0) & (size > 0)).sum()),
        relative_error=float(lost / norm) if norm else 0.0,
    )


def scan_weights(model: ir.Model) -> dict[str, WeightFacts]:
    """`scan_weight` of every float tensor that is stored, by name."""
    found: dict[str, WeightFacts] = {}
    for node in typed_nodes(model):
        for value in weights(node):
            if value.name not in found:
                found[value.name or ""] = scan_weight(value)
    return found


class Rule(ABC):
    """One reason for a node to stay out of plain FP16."""

    name: ClassVar[str]
    about_movement: ClassVar[bool] = False
    """Whether it also looks at nodes that compute nothing, such as the one that repeats the CLS
    token."""

    def decide(self, node: ir.Node) -> Decision | None:
        """The decision about `node`, or None where the rule has nothing against FP16."""
        reason = self.reason(node)
        if reason is None:
            return None
        return Decision(
            node=node.name or "",
            block=block_of(node),
            rule=self.name,
            reason=reason,
            scale=self.scale(node),
        )

    @abstractmethod
    def reason(self, node: ir.Node) -> str | None:
        """Why not FP16."""

    def scale(self, node: ir.Node) -> int | None:
        """Power of two by which the input is scaled down; None: compute in FP32."""
        return None


class Norms(Rule):
    """LayerNorm sums squares: FP16 overflows there at values of 256 and loses small variances.

    Under strong typing the precision of the computation is that of the input.
    """

    name = "norm"

    def reason(self, node: ir.Node) -> str | None:
        if node.op_type == NORM:
            return "a norm sums squares: FP32"
        if node.op_type in NORM_PARTS:
            return f"{node.op_type} is part of a norm taken apart: FP32"
        inputs = activations(node)
        if node.op_type == "Mul" and len(inputs) == 2 and inputs[0] is inputs[1]:
            return "a square, as norms taken apart have them: FP32"
        return None


class Softmax(Rule):
    """exp and its sum."""

    name = "softmax"

    def reason(self, node: ir.Node) -> str | None:
        return "exp and its sum: FP32" if node.op_type == SOFTMAX else None


class GatedProducts(Rule):
    """silu(g) * u of SwiGLU: two activations multiplied reach the product of their ranges."""

    name = "gated product"

    def reason(self, node: ir.Node) -> str | None:
        inputs = activations(node)
        if node.op_type != "Mul" or len(inputs) != 2 or inputs[0] is inputs[1]:
            return None
        # x * sigmoid(x) and x * (1 + erf(x)) are activation functions: no larger than their input.
        if _leads_to(inputs[0], inputs[1]) or _leads_to(inputs[1], inputs[0]):
            return None
        return "the product of two activations, the gate's and the value's: FP32"


def _leads_to(value: ir.Value, source: ir.Value, steps: int = ACTIVATION_STEPS) -> bool:
    """Whether `value` is computed from `source` within a few pointwise steps."""
    if value is source:
        return True
    producer = value.producer()
    if producer is None or not steps or kind_of(producer) not in ("pointwise", "residual"):
        return False
    return any(_leads_to(v, source, steps - 1) for v in activations(producer))


class Weights(Rule):
    """Stored tensors that FP16 cannot hold."""

    name = "weights"
    about_movement = True

    def __init__(self, facts: Mapping[str, WeightFacts]) -> None:
        self._facts = facts

    def reason(self, node: ir.Node) -> str | None:
        for value in weights(node):
            fault = self._facts[value.name or ""].fault
            if fault:
                return f"{value.name}: {fault}"
        return None


class Ranges(Rule):
    """Tensors that leave FP16's range on real images, with room for images not seen."""

    name = "range"

    def __init__(self, ranges: Mapping[str, float], headroom: float) -> None:
        self._ranges = ranges
        self._headroom = headroom

    def _largest(self, node: ir.Node) -> tuple[float, str]:
        values = [*activations(node), *float_outputs(node)]
        return max((self._ranges.get(v.name or "", 0.0), v.name or "") for v in values)

    def reason(self, node: ir.Node) -> str | None:
        largest, name = self._largest(node)
        if largest * self._headroom <= FP16_MAX:
            return None
        remedy = "scaled around the product" if self.scale(node) is not None else "FP32"
        return f"{name} reaches {largest:.3g}, times {self._headroom:g} for other images: {remedy}"

    def scale(self, node: ir.Node) -> int | None:
        # Not Gemm, nor Conv: their bias would be scaled back with the product.
        if kind_of(node) != "linear" or node.op_type != "MatMul":
            return None
        largest, _ = self._largest(node)
        return max(1, math.ceil(math.log2(largest * self._headroom / FP16_MAX)))


class Island(Rule):
    """Kinds of nodes in one block that the repair moves to FP32."""

    name = "island"

    def __init__(self, block: int | None, kinds: Iterable[str], reason: str) -> None:
        self.block = block
        self.kinds = frozenset(kinds)
        self._reason = reason

    def reason(self, node: ir.Node) -> str | None:
        inside = block_of(node) == self.block and kind_of(node) in self.kinds
        return f"{self._reason}: FP32" if inside else None


def decide(model: ir.Model, rules: Sequence[Rule]) -> list[Decision]:
    """What becomes of every node that does not simply become FP16.

    The first rule that gives FP32 wins; a scaled product is only chosen where no rule does.
    """
    decisions = []
    for node in typed_nodes(model):
        asked = rules if computes(node) else [rule for rule in rules if rule.about_movement]
        found = [decision for rule in asked for decision in [rule.decide(node)] if decision]
        found.sort(key=lambda decision: decision.scale is not None)
        decisions += found[:1]
    return decisions
