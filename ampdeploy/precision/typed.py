"""Give every tensor of a graph its type: FP16 but where a decision says FP32.

Written for this, not taken from `onnxruntime.transformers.float16`: that converter clips weights
that overflow without failing, casts around every excluded node in pairs, and loads models above
2 GB whole.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from onnxscript import ir

from ampdeploy.precision.graph import FLOAT, HALF, MOVEMENT, activations, is_float, is_weight
from ampdeploy.precision.rules import Decision

SUFFIX = {HALF: "fp16", FLOAT: "fp32"}


def apply_types(model: ir.Model, decisions: Iterable[Decision]) -> None:
    """Type `model` in place: casts where types meet, each value cast once; inputs and outputs of
    the graph stay float32.

    Args:
        model: Float32, as exported.
        decisions: By `rules.decide`.
    """
    _Typing(model, {decision.node: decision for decision in decisions}).run()


class _Typing:
    def __init__(self, model: ir.Model, decisions: dict[str, Decision]) -> None:
        self.graph = model.graph
        self.decisions = decisions
        self.casts: dict[tuple[int, ir.DataType], ir.Value] = {}
        self.stored: dict[tuple[str, ir.DataType], ir.Value] = {}

    def run(self) -> None:
        for node in list(self.graph):
            if any(is_float(value) for value in node.outputs):
                self._type_node(node)
        for position, value in enumerate(list(self.graph.outputs)):
            if value.dtype == HALF:
                self._float_output(position, value)
        for name, value in list(self.graph.initializers.items()):
            if is_float(value) and not value.uses():
                del self.graph.initializers[name]

    def _type_node(self, node: ir.Node) -> None:
        if node.op_type == "Cast":
            return  # says itself what it makes, of whatever it is given
        decision = self.decisions.get(node.name or "")
        if decision is not None and decision.scale is not None:
            self._scaled(node, decision.scale)
            return
        wanted = FLOAT if decision is not None else HALF
        if node.op_type in MOVEMENT:
            wanted = FLOAT if decision is not None else self._moved(node)
        elif not activations(node):
            wanted = FLOAT if not any(is_float(v) for v in node.inputs) else wanted
        for position, value in enumerate(node.inputs):
            if value is not None and is_float(value):
                node.replace_input_with(position, self._as(value, wanted, before=node))
        for value in node.outputs:
            if is_float(value):
                value.dtype = wanted

    @staticmethod
    def _moved(node: ir.Node) -> ir.DataType:
        """Movement keeps the type it is given; where types meet (Concat), the wider one."""
        types = {value.dtype for value in activations(node)}
        return FLOAT if FLOAT in types else HALF

    def _scaled(self, node: ir.Node, exponent: int) -> None:
        """(x * 2^-k) @ W in FP16, times 2^k in FP32: exact but for values that become subnormal."""
        (value,) = activations(node)
        wide = self._as(value, FLOAT, before=node)
        down = self._factor(-exponent)
        small = self._insert("Mul", [wide, down], FLOAT, f"{node.name}/scale_down", before=node)
        for position, given in enumerate(list(node.inputs)):
            if given is value:
                node.replace_input_with(position, self._as(small, HALF, before=node))
            elif given is not None and is_float(given):
                node.replace_input_with(position, self._as(given, HALF, before=node))
        (result,) = node.outputs
        users = list(result.uses())
        outputs = [place for place, value in enumerate(self.graph.outputs) if value is result]
        name = result.name
        if outputs:
            result.name = f"{name}_product"
        result.dtype = HALF
        back = ir.node(
            "Cast", [result], {"to": int(FLOAT)}, name=f"{node.name}/scaled", num_outputs=1
        )
        up = ir.node("Mul", [back.outputs[0], self._factor(exponent)], name=f"{node.name}/scale_up")
        for new, suffix in ((back, "scaled"), (up, "scale_up")):
            new.outputs[0].name = f"{result.name}_{suffix}"
            new.outputs[0].type = ir.TensorType(FLOAT)
            new.outputs[0].shape = result.shape
        self.graph.insert_after(node, [back, up])
        for user, position in users:
            user.replace_input_with(position, up.outputs[0])
        for place in outputs:  # outputs keep their name, and are float32 already
            up.outputs[0].name = name
            self.graph.outputs[place] = up.outputs[0]

    def _factor(self, exponent: int) -> ir.Value:
        name = f"two_to_{exponent}".replace("-", "minus_")
        if name not in self.graph.initializers:
            tensor = ir.tensor(np.array(2.0**exponent, dtype=np.float32), name=name)
            value = ir.Value(name=name, const_value=tensor, type=ir.TensorType(FLOAT))
            value.shape = ir.Shape([])
            self.graph.register_initializer(value)
        return self.graph.initializers[name]

    def _as(self, value: ir.Value, wanted: ir.DataType, *, before: ir.Node) -> ir.Value:
        if value.dtype == wanted:
            return value
        if is_weight(value):
            return self._stored(value, wanted)
        key = (id(value), wanted)
        if key not in self.casts:
            name = f"{value.name}_{SUFFIX[wanted]}"
            self.casts[key] = self._insert(
                "Cast", [value], wanted, name, before=before, attributes={"to": int(wanted)}
            )
        return self.casts[key]

    def _stored(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        """The weight in another type; the copy that nobody uses is dropped at the end."""
        key = (value.name or "", wanted)
        if key not in self.stored:
            assert value.const_value is not None
            name = f"{value.name}_{SUFFIX[wanted]}"
            tensor = ir.tensor(value.const_value.numpy().astype(wanted.numpy()), name=name)
            copy = ir.Value(name=name, const_value=tensor, type=ir.TensorType(wanted))
            copy.shape = value.shape
            self.graph.register_initializer(copy)
            self.stored[key] = copy
        return self.stored[key]

    def _insert(
        self,
        kind: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType,
        name: str,
        *,
        before: ir.Node,
        attributes: dict[str, int] | None = None,
    ) -> ir.Value:
        node = ir.node(kind, inputs, attributes or {}, name=name)
        output = node.outputs[0]
        output.name = name
        output.type = ir.TensorType(dtype)
        output.shape = inputs[0].shape
        self.graph.insert_before(before, node)
        return output

    def _float_output(self, position: int, value: ir.Value) -> None:
        """Outputs keep their name and stay float32."""
        name = value.name
        value.name = f"{name}_fp16"
        cast = ir.node("Cast", [value], {"to": int(FLOAT)}, name=f"{name}/Cast")
        cast.outputs[0].name = name
        cast.outputs[0].type = ir.TensorType(FLOAT)
        cast.outputs[0].shape = value.shape
        self.graph.append(cast)
        self.graph.outputs[position] = cast.outputs[0]
