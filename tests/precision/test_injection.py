"""Models that break in FP16: each is repaired or refused, and none passes wrong."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from onnxscript import ir

from ampdeploy.errors import VerificationError
from ampdeploy.export.write import write_graph
from ampdeploy.precision.compare import agreement, judge
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import block_outputs, load_model
from ampdeploy.precision.ranges import measure_ranges
from ampdeploy.precision.repair import type_graph
from ampdeploy.precision.rules import Decision, Norms, Softmax, decide
from ampdeploy.precision.typed import apply_types
from tests.precision.conftest import (
    FP16,
    large_gate,
    large_residuals,
    large_token,
    large_weight,
    native,
    passing_offset,
    tiny_scale,
)

BROKEN = {
    "residual stream": ("plain", large_residuals, "range"),
    "swiglu product": ("packed_swiglu", large_gate, "range"),
    "overflowing weight": ("plain", large_weight, "weights"),
    "subnormal layer scale": ("registers", tiny_scale, "weights"),
    "cls token": ("plain", large_token, "weights"),
    "passing offset": ("plain", passing_offset, "island"),
}


def naive(path):
    """FP16 with norms and softmax in FP32, and nothing else looked at: what a converter does."""
    model = load_model(path)
    with np.errstate(over="ignore"):
        apply_types(model, decide(model, [Norms(), Softmax()]))
    return model


def emulate(model, case):
    names = {b: v.name for b, v in block_outputs(load_model(case.path)).items()}
    with emulation(model, near=case.path, watch=list(names.values())) as emulated:
        return judge(emulated.run(case.reference.images), case.reference, names)


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_model_is_repaired_and_says_why(case, name, tmp_path):
    kind, break_it, rule = BROKEN[name]
    made = case(kind, break_it)
    typed = made.typed()
    assert rule in {decision.rule for decision in typed.decisions}
    assert typed.judgement.passes(FP16.min_cosine_p1)
    assert bool(typed.islands) == (rule == "island")
    # Judged once more, from the file: what was written is what was judged.
    path = tmp_path / "typed.onnx"
    write_graph(typed.model, path)
    onnx.checker.check_model(str(path), full_check=True)
    again = emulate(ir.load(path), made)
    assert again == typed.judgement


@pytest.mark.parametrize("name", ["residual stream", "swiglu product", "overflowing weight"])
def test_the_same_model_is_wrong_when_nobody_looks(case, name):
    kind, break_it, _ = BROKEN[name]
    made = case(kind, break_it)
    judgement = emulate(naive(made.path), made)
    assert not judgement.passes(FP16.min_cosine_p1)
    assert sum(seen.not_finite for seen in judgement.blocks.values()) > 0


def test_a_repair_is_the_least_that_is_enough(case):
    """The offset is lost in the residual adds; nothing else has to be FP32."""
    made = case("plain", passing_offset)
    assert not emulate(naive(made.path), made).passes(FP16.min_cosine_p1)
    typed = made.typed()
    assert set(typed.islands) <= {0, 1}
    assert all(kinds <= {"residual", "pointwise"} for kinds in typed.islands.values())
    reasons = {d.reason for d in typed.decisions if d.rule == "island"}
    assert reasons <= {"repair of block 0: FP32", "repair of block 1: FP32"}


def test_a_scaled_product_that_is_an_output_keeps_its_scale(case):
    made = case("plain")
    model = load_model(made.path)
    node = next(n for n in model.graph if n.name == "blocks.2.mlp.fc2/MatMul")
    model.graph.outputs.append(node.outputs[0])
    name = node.outputs[0].name
    with emulation(load_model(made.path), near=made.path, watch=[name]) as exact:
        expected = exact.run(made.reference.images)[name]
    apply_types(model, [Decision(node=node.name, block=2, rule="range", reason="a test", scale=3)])
    with emulation(model, near=made.path, watch=[]) as emulated:
        found = emulated.run(made.reference.images)[name]
    assert agreement(found, expected).passes(FP16.min_cosine_p1)


def test_the_runtimes_own_kernels_hide_the_overflow_that_the_emulation_shows(case, tmp_path):
    made = case("packed_swiglu", large_gate)
    path = tmp_path / "naive.onnx"
    write_graph(naive(made.path), path)
    batch = made.reference.images
    hidden = native(path, batch)["features"]
    assert np.isfinite(hidden).all()
    assert agreement(hidden, made.reference.outputs["features"]).cosine_p1 > 0.99
    shown = emulate(naive(made.path), made).outputs["features"]
    assert shown.not_finite or shown.cosine_p1 < 0.9


def test_a_product_that_would_overflow_is_scaled_and_stays_fp16(case):
    typed = case("packed_swiglu", large_gate).typed()
    scaled = [decision for decision in typed.decisions if decision.scale]
    assert scaled
    assert all("mlp.fc2" in decision.node for decision in scaled)
    for node in typed.model.graph:
        if node.name in {decision.node for decision in scaled}:
            assert {v.dtype for v in node.inputs} == {ir.DataType.FLOAT16}


def test_a_norm_taken_apart_is_kept_in_fp32(case, tmp_path):
    made = case("plain", large_norm_input)
    path = tmp_path / "apart.onnx"
    model = load_model(made.path)
    take_norms_apart(model)
    write_graph(model, path)
    ranges = measure_ranges(path, made.reference.images)
    moved = dataclasses.replace(made, path=path, ranges=ranges)
    blind = load_model(path)
    apply_types(blind, decide(blind, [Softmax()]))
    assert not emulate(blind, moved).passes(FP16.min_cosine_p1)
    typed = moved.typed()
    assert typed.judgement.passes(FP16.min_cosine_p1)
    assert {"ReduceMean", "Sqrt"} <= {
        node.op_type
        for node in typed.model.graph
        if node.name in {decision.node for decision in typed.decisions}
    }


def large_norm_input(backbone) -> None:
    """Residuals of a few hundred: their squares are beyond FP16, they themselves are not."""
    for block in backbone.blocks:
        block.mlp.fc2.weight.mul_(300)


def take_norms_apart(model: ir.Model) -> None:
    """Replace every LayerNormalization by what old exporters write."""
    graph = model.graph

    def constant(name, value, dtype=np.float32):
        if name not in graph.initializers:
            tensor = ir.tensor(np.asarray(value, dtype=dtype), name=name)
            graph.register_initializer(ir.Value(name=name, const_value=tensor))
            graph.initializers[name].type = ir.TensorType(tensor.dtype)
        return graph.initializers[name]

    for node in [node for node in graph if node.op_type == "LayerNormalization"]:
        x, weight, bias = node.inputs
        axes = constant("last_axis", [-1], np.int64)
        eps = constant("norm_eps", node.attributes["epsilon"].as_float())
        made = []

        def add(op, *inputs, node=node, x=x, made=made):
            new = ir.node(op, inputs, name=f"{node.name}_{op}_{len(made)}")
            new.outputs[0].name = new.name
            new.outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
            made.append(new)
            return new.outputs[0]

        centred = add("Sub", x, add("ReduceMean", x, axes))
        variance = add("ReduceMean", add("Mul", centred, centred), axes)
        normed = add("Div", centred, add("Sqrt", add("Add", variance, eps)))
        result = add("Add", add("Mul", normed, weight), bias)
        graph.insert_before(node, made)
        old = node.outputs[0]
        for user, position in list(old.uses()):
            user.replace_input_with(position, result)
        for position, output in enumerate(graph.outputs):
            if output is old:
                graph.outputs[position] = result
        graph.remove(node, safe=True)


def test_what_no_repair_reaches_is_refused(case):
    made = case("plain")
    exacting = dataclasses.replace(FP16, min_cosine_p1=1.0)
    with pytest.raises(VerificationError, match=r"cannot be typed to FP16.*--precision fp32") as no:
        made.typed(exacting)
    assert no.value.exit_code == 3


def test_fp32_in_all_but_name_is_refused(case):
    def all_large(backbone):
        for block in backbone.blocks:
            for linear in (block.attn.qkv, block.attn.proj, block.mlp.fc1, block.mlp.fc2):
                linear.weight[0, 0] = 1e5

    made = case("plain", all_large)
    with pytest.raises(VerificationError, match="that is no FP16 model"):
        made.typed()


def test_a_reference_of_another_model_is_refused(case):
    made = case("plain")
    other = {name: -value for name, value in made.reference.outputs.items()}
    wrong = dataclasses.replace(made.reference, outputs=other)
    with pytest.raises(VerificationError, match="cosine p1"):
        type_graph(made.path, made.ranges, wrong, FP16)
