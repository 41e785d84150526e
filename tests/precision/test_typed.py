"""Typing, ranges and emulation on every kind of model."""

from __future__ import annotations

from collections import Counter

import numpy as np
import onnx
import pytest
import torch
from onnxscript import ir

from ampdeploy.errors import ArtifactError, DataError, VerificationError
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.write import write_graph
from ampdeploy.precision import emulate
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import GEMMS, MOVEMENT, block_outputs, kind_of, load_model
from ampdeploy.precision.ranges import measure_ranges
from ampdeploy.precision.repair import to_plain
from ampdeploy.precision.rules import GatedProducts, Ranges, scan_weight
from tests.mlp_kinds import BACKBONES, make
from tests.precision.conftest import FP16, images

HALF, FLOAT = ir.DataType.FLOAT16, ir.DataType.FLOAT


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_kind_of_model_is_typed_and_right(case, kind, tmp_path):
    made = case(kind)
    typed = made.typed()
    assert typed.judgement.passes(0.9999)
    assert typed.islands == {}
    graph = typed.model.graph
    for node in graph:
        floats = {v.dtype for v in (*node.inputs, *node.outputs) if v.dtype in (HALF, FLOAT)}
        if node.op_type == "Cast":
            assert floats == {HALF, FLOAT}
        else:
            assert len(floats) <= 1, node  # nothing mixes types without a cast
        if node.op_type in GEMMS:
            assert floats == {HALF}
        if node.op_type in ("LayerNormalization", "Softmax"):
            assert floats == {FLOAT}
    assert {v.dtype for v in (*graph.inputs, *graph.outputs)} == {FLOAT}
    path = tmp_path / "typed.onnx"
    size, _ = write_graph(typed.model, path)
    onnx.checker.check_model(str(path), full_check=True)
    assert size < 0.7 * made.path.stat().st_size


def test_each_value_is_cast_once(case):
    graph = case("plain").typed().model.graph
    casts = Counter((n.inputs[0].name, n.outputs[0].dtype) for n in graph if n.op_type == "Cast")
    assert set(casts.values()) == {1}


def test_the_same_graph_gives_the_same_bytes(case, tmp_path):
    made = case("packed_swiglu")
    for name in ("a", "b"):
        write_graph(made.typed().model, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_ranges_are_those_of_the_tensors(case):
    made = case("packed_swiglu")
    pixels = images(5, seed=3)
    found = measure_ranges(made.path, pixels.numpy(), batch=2)
    model = made.model
    with torch.inference_mode():
        state = model.stem(pixels)
        for index, value in block_outputs(load_model(made.path)).items():
            state = model.run_block(index, state)
            expected = state.tokens.abs().max().item()
            assert found[value.name] == pytest.approx(expected, rel=1e-5)
    assert found["images"] == pixels.abs().max().item()


def test_ranges_of_a_broken_model_are_refused(case):
    def break_it(backbone):
        backbone.blocks[1].mlp.fc1.weight[0, 0] = float("inf")

    with pytest.raises(DataError, match="not finite in float32"):
        case("plain", break_it)


def test_no_images_is_an_error(case):
    with pytest.raises(DataError, match="at least one"):
        measure_ranges(case("plain").path, np.zeros((0, 3, 56, 56), np.float32))


def test_emulated_operations_are_fp16_to_the_bit(case):
    """Elementwise results equal NumPy's own float16 arithmetic on the same inputs."""
    made = case("plain")
    model = made.typed().model
    node = next(n for n in model.graph if kind_of(n) == "residual")
    a, b = node.inputs
    names = [a.name, b.name, node.outputs[0].name]
    with emulation(model, near=made.path, watch=names) as emulated:
        found = emulated.run(made.reference.images)
    x, y, z = (found[name].astype(np.float16) for name in names)
    assert np.array_equal(x + y, z)


CONSTANTS = {
    "axes": np.array([2]), "zero": np.array([0]), "one": np.array([1]), "ones": np.ones(4, int),
    "condition": np.array(True), "pads": np.array([0, 0, 0, 0, 0, 0, 0, 1]),
    "shape": np.array([0, -1]), "width": np.array([3, 5]), "parts": np.array([28, 28]),
}  # fmt: skip
# How each operator that only moves values is called, after its first input.
MOVES = {
    "Concat": (["large"], {"axis": 0}), "Expand": (["ones"], {}), "Flatten": ([], {}),
    "Gather": (["zero"], {"axis": 2}), "Identity": ([], {}), "Pad": (["pads"], {}),
    "Reshape": (["shape"], {}), "Slice": (["zero", "one", "axes"], {}),
    "Split": (["parts"], {"axis": 2}), "Squeeze": (["axes"], {}), "Tile": (["ones"], {}),
    "Transpose": ([], {}), "Unsqueeze": (["axes"], {}), "Where": (["large"], {}),
}  # fmt: skip


def test_every_operator_that_moves_values_is_tried():
    assert set(MOVES) == set(MOVEMENT)


@pytest.mark.parametrize("operator", MOVES)
def test_a_value_that_overflowed_stays_so_wherever_it_is_moved(operator, tmp_path):
    """1.5 * 5e4 is beyond FP16, whatever lies between it and what makes it small again."""
    others, attributes = MOVES[operator]
    first = "row" if operator == "Squeeze" else "large"
    inputs = ["condition", first, *others] if operator == "Where" else [first, *others]
    count = 2 if operator == "Split" else 1
    moved = ["moved", *(f"moved{i}" for i in range(1, count))]
    make = onnx.helper.make_node
    nodes = [
        make("Cast", ["images"], ["half"], to=onnx.TensorProto.FLOAT16),
        make("Mul", ["half", "factor"], ["large"]),
        make("Slice", ["large", "zero", "one", "axes"], ["row"]),
        make(operator, inputs, moved, **attributes),
        make("Mul", ["moved", "small"], ["back"]),
        make("Cast", ["back"], ["features"], to=onnx.TensorProto.FLOAT),
    ]
    value = onnx.helper.make_tensor_value_info
    constants = [onnx.numpy_helper.from_array(v, name) for name, v in CONSTANTS.items()]
    constants += [
        onnx.numpy_helper.from_array(np.array(v, np.float16), name)
        for name, v in (("factor", 5e4), ("small", 1e-3))
    ]
    graph = onnx.helper.make_graph(
        nodes,
        "moves",
        [value("images", onnx.TensorProto.FLOAT, [1, 3, 56, 56])],
        [value("features", onnx.TensorProto.FLOAT, None)],
        constants,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model = onnx.shape_inference.infer_shapes(model)
    with emulation(ir.from_proto(model), near=tmp_path / "x.onnx", watch=[]) as emulated:
        found = emulated.run(np.full((1, 3, 56, 56), 1.5, np.float32))["features"]
    assert np.isposinf(found).any()
    assert not np.isclose(found, 75).any()


def test_a_runtime_that_does_not_round_is_found_out(case, monkeypatch):
    """As one that drops the casts: the canary then comes back finite."""
    made = case("plain")
    model = made.typed().model

    def without_casts(graph):
        add(graph)
        for n in graph:
            if n.name == f"{emulate.CANARY}_half":
                n.attributes["to"] = ir.AttrInt64("to", int(FLOAT))
                n.outputs[0].dtype = FLOAT

    add = emulate._add_canary
    monkeypatch.setattr(emulate, "_add_canary", without_casts)
    with (
        emulation(model, near=made.path, watch=[]) as emulated,
        pytest.raises(VerificationError, match="removes the rounding"),
    ):
        emulated.run(made.reference.images)


@pytest.mark.parametrize(
    ("values", "overflow", "subnormal", "flushed", "fails"),
    [
        ([1.0, 0.3, -2.0], 0, 0, 0, False),
        ([1.0, 70000.0], 1, 0, 0, True),
        ([1.0, 1e-6], 0, 1, 0, False),
        ([1e-6, 3.3e-7], 0, 2, 0, True),
        ([1e-9, 1e-9], 0, 2, 2, True),
        ([0.0, 0.0], 0, 0, 0, False),
    ],
)
def test_weights_are_scanned(values, overflow, subnormal, flushed, fails):
    tensor = ir.tensor(np.array(values, np.float32), name="w")
    facts = scan_weight(ir.Value(name="w", const_value=tensor))
    assert (facts.overflow, facts.subnormal, facts.flushed) == (overflow, subnormal, flushed)
    assert (facts.fault is not None) == fails


def test_the_evidence_is_plain_json(case):
    import json

    made = case("registers")
    typed = made.typed()
    plain = json.loads(json.dumps(to_plain(typed, made.ranges, FP16), allow_nan=False))
    assert len(plain["judgement"]["blocks"]) == 3
    assert set(plain["judgement"]["outputs"]) == {"features", "patch_features"}
    assert {decision["rule"] for decision in plain["decisions"]} >= {"norm", "softmax"}
    assert all(decision["reason"] for decision in plain["decisions"])


def test_a_graph_of_somebody_else_is_refused(tmp_path):
    node = onnx.helper.make_node("Relu", ["images"], ["features"], name="relu")
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("images", kind, [1, 3])],
        [onnx.helper.make_tensor_value_info("features", kind, [1, 3])],
    )
    path = tmp_path / "other.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    with pytest.raises(ArtifactError, match="names the blocks"):
        block_outputs(load_model(path))


@pytest.mark.parametrize(
    ("op", "large", "expected"),
    [
        ("MatMul", 3e5, 5),  # 3e5 * 4 / 65504 is between 2**4 and 2**5
        ("MatMul", 1e4, None),
        ("Gemm", 3e5, None),  # its bias would be scaled back with the product
        ("Add", 3e5, None),
    ],
)
def test_only_a_product_without_bias_is_scaled(op, large, expected):
    def value(name, stored=False):
        tensor = ir.tensor(np.ones((2, 2), np.float32), name=name) if stored else None
        return ir.Value(name=name, const_value=tensor, type=ir.TensorType(FLOAT))

    node = ir.node(op, [value("x"), value("w", stored=True)], name="blocks.0.mlp.fc2/it")
    node.outputs[0].name, node.outputs[0].type = "y", ir.TensorType(FLOAT)
    rule = Ranges({"x": large, "y": 1.0}, headroom=4.0)
    decision = rule.decide(node)
    assert (decision is None) == (large * 4 <= 65504)
    if decision is not None:
        assert decision.scale == expected


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_activation_functions_are_no_gated_products(approximate, tmp_path):
    """x * Phi(x), however it is written, is no larger than x."""
    model = make("plain")
    for block in model.backbone.blocks:
        block.mlp.act = torch.nn.GELU(approximate=approximate)
    path = tmp_path / "model.onnx"
    export_onnx(model, path, opset=18)
    graph = load_model(path)
    assert not [node for node in graph.graph if GatedProducts().decide(node)]
