"""FLOPs and bytes from shapes, against hand counts and against torch's own counter."""

from __future__ import annotations

import pytest

from ampdeploy.errors import ArtifactError
from ampdeploy.explain.graph_work import operators_of_graph
from ampdeploy.explain.work import Operator, Tensor, inner_size, work_of
from ampdeploy.models.profile import profile_model
from tests.targets.onnx_samples import write_linear_model


def operator(op_type, inputs, outputs, dtype="float"):
    return Operator(
        name="n",
        op_type=op_type,
        inputs=tuple(Tensor(dtype=dtype, shape=shape) for shape in inputs),
        outputs=tuple(Tensor(dtype=dtype, shape=shape) for shape in outputs),
    )


@pytest.mark.parametrize(
    ("op_type", "inputs", "outputs", "flops"),
    [
        ("MatMul", [(2, 7, 4)], [(2, 7, 5)], 2 * 2 * 7 * 4 * 5),  # weights put away
        ("MatMul", [(2, 7, 4), (4, 5)], [(2, 7, 5)], 2 * 2 * 7 * 4 * 5),
        ("FusedMatMul", [(3, 7, 4), (3, 5, 4)], [(3, 7, 5)], 2 * 3 * 7 * 4 * 5),  # transB
        ("FusedMatMul", [(3, 4, 7), (3, 4, 5)], [(3, 7, 5)], 2 * 3 * 7 * 4 * 5),  # transA
        ("Gemm", [(7, 4), (4, 5), (5,)], [(7, 5)], 2 * 7 * 4 * 5),
        ("Conv", [(1, 3, 4, 4), (8, 3, 2, 2), (8,)], [(1, 8, 2, 2)], 2 * 8 * 4 * 3 * 4),
        # q, k, v: 2 * 6 * 8 * 24; both products: 4 * 6 * 6 * 8
        ("Attention", [(1, 6, 8), (8, 24), (24,)], [(1, 6, 8)], 2304 + 1152),
        ("MultiHeadAttention", [(1, 6, 8), (1, 9, 8), (1, 9, 8)], [(1, 6, 8)], 4 * 6 * 9 * 8),
        ("Add", [(7, 5), (5,)], [(7, 5)], 0),
    ],
)
def test_flops_of_one_operator(op_type, inputs, outputs, flops):
    assert work_of(operator(op_type, inputs, outputs)).flops == flops


def test_bytes_count_operands_results_and_weights_that_were_put_away():
    assert work_of(operator("Add", [(7, 5), (5,)], [(7, 5)])).bytes == 4 * (35 + 5 + 35)
    listed = work_of(operator("MatMul", [(7, 4), (4, 5)], [(7, 5)]))
    assert work_of(operator("MatMul", [(7, 4)], [(7, 5)])).bytes == listed.bytes
    assert work_of(operator("MatMul", [(7, 4)], [(7, 5)], "float16")).bytes == listed.bytes // 2


def test_inner_size_is_only_that_of_products():
    assert inner_size(operator("MatMul", [(2, 7, 4)], [(2, 7, 5)])) == 4
    assert inner_size(operator("Add", [(7, 4)], [(7, 4)])) == 0


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_has_the_flops_that_torch_counts(pair_of, kind, batch):
    pair = pair_of(kind)
    for model, file in ((pair.dense, pair.baseline), (pair.pruned, pair.slim)):
        counted = sum(work_of(node).flops for node in operators_of_graph(file, batch))
        assert counted == batch * profile_model(model).flops


def test_a_graph_whose_shapes_contradict_is_refused(tmp_path):
    import onnx

    path = tmp_path / "model.onnx"
    write_linear_model(path)
    model = onnx.load(path)
    model.graph.initializer[0].dims[:] = [5, 5]
    onnx.save(model, path)
    with pytest.raises(ArtifactError, match="cannot be worked out"):
        operators_of_graph(path, 1)
