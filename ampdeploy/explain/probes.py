"""Small graphs timed alone through ONNX Runtime: a claim about a shape is measured, not guessed."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.explain.interleave import ratio, run_pairs
from ampdeploy.explain.result import ActivationProbe, Machine, WidthProbe
from ampdeploy.export.session import open_session
from ampdeploy.optional import require

PAIRS = 40
PEAK_SIDE = 1024  # of the square product; large enough for every kernel to reach its rate
_FLOAT_BYTES = 4
_OPSET = 18
_IR_VERSION = 8  # what every ONNX Runtime in scope reads


def measure_machine(tokens: int, width: int, *, threads: int | None) -> Machine:
    """Rates of a large matrix product, and of adding two tensors as large as the model's own.

    The addition has the size of a hidden layer of the model, so that it finds its operands in the
    same cache, or not, as the model's elementwise operators.

    Args:
        tokens: Rows of the model's matrices.
        width: Hidden width of the dense model.
        threads: CPU threads; None: ONNX Runtime's choice.
    """
    side = PEAK_SIDE
    weights = {"w": _noise(side, side)}
    product = _session([("MatMul", ("x", "w"), "y", "")], (side, side), weights, threads)
    adding = _session([("Add", ("x", "x2"), "y", "")], (tokens, width), {}, threads, ("x", "x2"))
    samples_ms = run_pairs(product, adding, PAIRS)
    product_s, adding_s = np.median(samples_ms, axis=0) / 1e3
    return Machine(
        flops_per_s=float(2 * side**3 / product_s),
        bytes_per_s=float(3 * tokens * width * _FLOAT_BYTES / adding_s),
        how=(
            f"ONNX Runtime, median of {PAIRS} calls: a float32 MatMul of {side} x {side} x {side}, "
            f"and an Add of two float32 tensors of {tokens} x {width}"
        ),
    )


def probe_width(
    width: int,
    other: int,
    blocks: Iterable[int],
    *,
    tokens: int,
    token_width: int,
    threads: int | None,
) -> WidthProbe:
    """Time both products of an MLP, (tokens, token_width) -> width -> token_width, at two widths.

    Args:
        width: Hidden width of the model.
        other: Hidden width to compare it with.
        blocks: That have `width`.
        tokens: Rows of the matrices.
        token_width: Width of the tokens.
        threads: CPU threads; None: ONNX Runtime's choice.
    """
    calls = [_mlp(tokens, token_width, hidden, threads) for hidden in (width, other)]
    samples_ms = run_pairs(calls[0], calls[1], PAIRS)
    ms, other_ms = np.median(samples_ms, axis=0)
    return WidthProbe(
        width=width,
        blocks=tuple(blocks),
        other_width=other,
        ms=float(ms),
        other_ms=float(other_ms),
        ratio=ratio(samples_ms),
        pairs=PAIRS,
    )


def _mlp(tokens: int, token_width: int, hidden: int, threads: int | None) -> Callable[[], object]:
    weights = {"w1": _noise(token_width, hidden), "w2": _noise(hidden, token_width)}
    nodes = [("MatMul", ("x", "w1"), "h", ""), ("MatMul", ("h", "w2"), "y", "")]
    return _session(nodes, (tokens, token_width), weights, threads)


def probe_gelu(tokens: int, width: int, *, threads: int | None) -> ActivationProbe:
    """Time GELU as five operators against ONNX Runtime's own one, on (tokens, width).

    The five are in the order in which torch's exporter writes them: x * (0.5 * (1 + erf(x / √2))).
    """
    constants = {
        "root": np.float32(math.sqrt(2)), "one": np.float32(1), "half": np.float32(0.5),
    }  # fmt: skip
    several = [
        ("Div", ("x", "root"), "a", ""), ("Erf", ("a",), "b", ""), ("Add", ("b", "one"), "c", ""),
        ("Mul", ("half", "c"), "d", ""), ("Mul", ("x", "d"), "y", ""),
    ]  # fmt: skip
    shape = (tokens, width)
    # Without optimisation, or a later ONNX Runtime might fuse what is to be timed apart.
    parts = _session(several, shape, constants, threads, optimise=False)
    fused = _session([("Gelu", ("x",), "y", "com.microsoft")], shape, {}, threads)
    samples_ms = run_pairs(parts, fused, PAIRS)
    ms, fused_ms = np.median(samples_ms, axis=0)
    return ActivationProbe(
        width=width, ms=float(ms), fused_ms=float(fused_ms), ratio=ratio(samples_ms), pairs=PAIRS
    )


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


def _session(
    nodes: Sequence[tuple[str, tuple[str, ...], str, str]],
    shape: tuple[int, ...],
    constants: dict[str, Any],
    threads: int | None,
    inputs: tuple[str, ...] = ("x",),
    *,
    optimise: bool = True,
) -> Callable[[], object]:
    """A call of a small graph from `inputs`, all of `shape`, to ``y``.

    Args:
        nodes: (operator, inputs, output, domain).
        shape: Of the inputs.
        constants: Initialisers.
        threads: CPU threads.
        inputs: Their names.
        optimise: Let ONNX Runtime rewrite it.
    """
    onnx = require("onnx", needed_by="ampdeploy explain")
    helper, float32 = onnx.helper, onnx.TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(op, list(ins), [out], domain=domain) for op, ins, out, domain in nodes],
        "probe",
        [helper.make_tensor_value_info(name, float32, list(shape)) for name in inputs],
        [helper.make_tensor_value_info("y", float32, None)],
        [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()],
    )
    opsets = [helper.make_opsetid("", _OPSET), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION)
    with tempfile.TemporaryDirectory(prefix="ampdeploy-explain-") as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(model, str(path))
        session = open_session(path, threads=threads, optimise=optimise)
    feeds = {name: _noise(*shape) for name in inputs}
    return lambda: session.run(None, feeds)
