"""What a typed graph computes in real FP16, on a CPU.

ONNX Runtime's CPU kernels hide FP16: where it has none for an operator it computes in float32 and
drops the casts between neighbours, so a value of 120000 passes through FP16 tensors unharmed, at
every optimisation level. Here every FP16 node computes in float32 and its result is rounded to
FP16 by a cast of its own, which no rewriting may remove: 120000 becomes infinite. For one
operation that is FP16 to the bit (float32 has more than twice its digits). Sums are emulated with
float32 accumulators, as most tensor core kernels have them; one that accumulates in FP16 loses
more, which only the device can tell: an engine is tested there before it is trusted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from onnxscript import ir

from ampdeploy.errors import VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.export.write import scratch_session
from ampdeploy.precision.graph import FLOAT, HALF, is_float, is_weight
from ampdeploy.precision.rules import FP16_MAX

CANARY = "ampdeploy_canary"


class Emulation:
    """A typed graph, open for running."""

    def __init__(self, session: Any, names: list[str]) -> None:
        self._session = session
        self._names = names

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs and watched tensors of one batch (B, 3, S, S), as float32.

        Raises:
            VerificationError: The runtime did not round to FP16: nothing it says can be trusted.
        """
        found = self._session.run([CANARY, *self._names], {IMAGES: images})
        if not np.isinf(found[0]):
            raise VerificationError(
                f"this ONNX Runtime computed {float(found[0])} where FP16 ends at {FP16_MAX:.0f}: "
                "it removes the rounding, so FP16 cannot be checked with it. Use another version."
            )
        return {
            name: np.asarray(value, dtype=np.float32)
            for name, value in zip(self._names, found[1:], strict=True)
        }


@contextlib.contextmanager
def emulation(model: ir.Model, *, near: Path, watch: list[str]) -> Iterator[Emulation]:
    """Open a typed graph for running in real FP16.

    Args:
        model: By `typed.apply_types`; changed, and of no use afterwards.
        near: A file in whose folder the graph may lie meanwhile.
        watch: Inner tensors to return besides the outputs.
    """
    values = {value.name: value for node in model.graph for value in node.outputs}
    names = [value.name or "" for value in model.graph.outputs]
    model.graph.outputs.extend(values[name] for name in watch if name not in names)
    _round_everywhere(model.graph)
    _add_canary(model.graph)
    with scratch_session(model, near=near, optimise=False) as session:
        yield Emulation(session, list(dict.fromkeys([*names, *watch])))


def _round_everywhere(graph: ir.Graph) -> None:
    wide: dict[int, ir.Value] = {}

    def widened(value: ir.Value, before: ir.Node) -> ir.Value:
        if id(value) not in wide:
            wide[id(value)] = _cast(graph, value, FLOAT, f"{value.name}_wide", before=before)
        return wide[id(value)]

    for node in list(graph):
        halves = [value for value in node.outputs if value.dtype == HALF]
        reads = [value for value in node.inputs if value is not None and value.dtype == HALF]
        # Nodes that only move values, too: ONNX Runtime has no FP16 kernel for some of them, and
        # takes out again the casts that it then inserts, together with ours.
        if node.op_type == "Cast" or not (halves or reads):
            continue
        for position, value in enumerate(node.inputs):
            if value is not None and value.dtype == HALF:
                node.replace_input_with(position, widened(value, node))
        for value in halves:
            _round_result(graph, node, value)


def _round_result(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """`value` becomes the float32 result; a cast after it takes over its name and its readers."""
    users, name = list(value.uses()), value.name
    value.name = f"{name}_exact"
    value.dtype = FLOAT
    rounding = ir.node("Cast", [value], {"to": int(HALF)}, name=f"{name}_rounding")
    rounded = rounding.outputs[0]
    rounded.name = name
    rounded.type = ir.TensorType(HALF)
    rounded.shape = value.shape
    graph.insert_after(node, rounding)
    for user, position in users:
        user.replace_input_with(position, rounded)
    for position, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[position] = rounded


def _cast(
    graph: ir.Graph, value: ir.Value, dtype: ir.DataType, name: str, *, before: ir.Node | None
) -> ir.Value:
    node = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
    output = node.outputs[0]
    output.name = name
    output.type = ir.TensorType(dtype)
    output.shape = value.shape
    if before is None or is_weight(value):
        # A weight is read by many nodes: its cast comes before all of them.
        graph.insert_before(graph[0], node) if len(graph) else graph.append(node)
    else:
        graph.insert_before(before, node)
    return output


def _add_canary(graph: ir.Graph) -> None:
    """A value that must overflow, computed from the images so that nothing can fold it away."""
    images = next(value for value in graph.inputs if value.name == IMAGES and is_float(value))

    def constant(value: float) -> ir.Value:
        name = f"{CANARY}_{value:g}"
        tensor = ir.tensor(np.array(value, dtype=np.float32), name=name)
        made = ir.Value(name=name, const_value=tensor, type=ir.TensorType(FLOAT))
        graph.register_initializer(made)
        return made

    top = ir.node("ReduceMax", [images], {"keepdims": 0}, name=f"{CANARY}_top")
    nothing = ir.node("Mul", [top.outputs[0], constant(0.0)], name=f"{CANARY}_nothing")
    large = ir.node("Add", [nothing.outputs[0], constant(2 * FP16_MAX)], name=f"{CANARY}_large")
    half = ir.node("Cast", [large.outputs[0]], {"to": int(HALF)}, name=f"{CANARY}_half")
    back = ir.node("Cast", [half.outputs[0]], {"to": int(FLOAT)}, name=CANARY)
    back.outputs[0].name = CANARY
    back.outputs[0].type = ir.TensorType(FLOAT)
    back.outputs[0].shape = ir.Shape([])
    graph.extend([top, nothing, large, half, back])
    graph.outputs.append(back.outputs[0])
