"""Where operators are booked, by name, by weights, and by neighbours."""

from __future__ import annotations

import pytest

from ampdeploy.explain import result as kinds
from ampdeploy.explain.graph_work import operators_of_graph
from ampdeploy.explain.places import Place, place_all, split_scope
from ampdeploy.explain.work import Operator, Tensor

X = Tensor(dtype="float", shape=(2, 2))


def operator(name, op_type, operands=2):
    return Operator(name=name, op_type=op_type, inputs=(X,) * operands, outputs=(X,))


@pytest.mark.parametrize(
    ("name", "scope"),
    [
        ("blocks.3.mlp.fc1/MatMul", (3, "mlp.fc1")),
        ("blocks.11.attn/MatMul/MatMulScaleFusion/", (11, "attn")),
        ("blocks.0/Add_2", (0, "")),
        ("/blocks/blocks.4/attn/qkv/MatMul", (4, "attn.qkv")),
        ("model.backbone.blocks.2.attn.qkv.bias", (2, "attn.qkv.bias")),
        ("blocks.5.mlp.act/Gelu/GeluFusion", (5, "mlp.act")),
        ("patch_embed.proj/Conv", None),
        ("Transpose_token_3", None),
    ],
)
def test_scope_of_a_name(name, scope):
    assert split_scope(name) == scope


@pytest.mark.parametrize(
    ("name", "op_type", "kind"),
    [
        ("blocks.1.attn.qkv/MatMul", "MatMul", kinds.QKV),
        ("blocks.1.attn.q_proj/Gemm", "Gemm", kinds.QKV),
        ("blocks.1.attn.proj/Add", "Add", kinds.PROJ),
        ("blocks.1.attn/Softmax", "Softmax", kinds.SCORES),
        ("blocks.1.attn/q_norm/LayerNormalization", "LayerNormalization", kinds.NORM),
        ("blocks.1.mlp.fc1/MatMul", "MatMul", kinds.FC1),
        ("blocks.1.mlp.fc1_x/MatMul", "MatMul", kinds.FC1),
        ("blocks.1.mlp.fc1_g/MatMul", "MatMul", kinds.GATE),
        ("blocks.1.mlp.fc2/Add", "Add", kinds.FC2),
        ("blocks.1.mlp/Mul", "Mul", kinds.MLP_ELEMENTWISE),
        ("blocks.1.norm2/LayerNormalization", "LayerNormalization", kinds.NORM),
        ("blocks.1.ls1/Mul", "Mul", kinds.ELEMENTWISE),
        ("blocks.1/Add", "Add", kinds.ELEMENTWISE),
    ],
)
def test_kind_by_name(name, op_type, kind):
    assert place_all([operator(name, op_type)], {})[name] == Place(block=1, kind=kind)


def test_a_product_with_weights_in_attention_is_before_the_softmax_qkv_and_after_it_proj():
    found = place_all(
        [
            operator("blocks.0.attn/MatMul", "MatMul", operands=1),
            operator("blocks.0.attn/MatMul_2", "MatMul"),
            operator("blocks.0.attn/Softmax", "Softmax", operands=1),
            operator("blocks.0.attn/MatMul_3", "MatMul"),
            operator("blocks.0.attn/MatMul_4", "MatMul", operands=1),
        ],
        {},
    )
    assert [place.kind for place in found.values()] == [
        kinds.QKV, kinds.SCORES, kinds.SCORES, kinds.SCORES, kinds.PROJ
    ]  # fmt: skip


def test_nameless_nodes_are_placed_by_weights_and_then_by_neighbours():
    found = place_all(
        [
            operator("conv2d_nchwc", "Conv"),
            operator("Concat", "Concat"),
            operator("node_7", "MatMul"),
            operator("Transpose_token_3", "Transpose"),
            operator("blocks.2.attn/Softmax", "Softmax"),
            operator("stray", "Mul"),
            operator("blocks.2.mlp.fc1/MatMul", "MatMul"),
            operator("Split", "Split"),
            operator("blocks.2.mlp/Mul", "Mul"),
            operator("Slice", "Slice"),
        ],
        {"node_7": ["model.backbone.blocks.2.attn.qkv.weight"]},
    )
    assert found == {
        "conv2d_nchwc": Place(block=None, kind=kinds.PATCH_EMBEDDING),
        "Concat": Place(block=None, kind=kinds.REST),
        "node_7": Place(block=2, kind=kinds.QKV),
        "Transpose_token_3": Place(block=2, kind=kinds.SCORES),
        "blocks.2.attn/Softmax": Place(block=2, kind=kinds.SCORES),
        "stray": Place(block=2, kind=kinds.ELEMENTWISE),
        "blocks.2.mlp.fc1/MatMul": Place(block=2, kind=kinds.FC1),
        "Split": Place(block=2, kind=kinds.MLP_ELEMENTWISE),
        "blocks.2.mlp/Mul": Place(block=2, kind=kinds.MLP_ELEMENTWISE),
        "Slice": Place(block=None, kind=kinds.REST),
    }


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
def test_every_linear_layer_of_a_real_export_is_found_once_a_block(pair_of, kind):
    operators = operators_of_graph(pair_of(kind).baseline, 1)
    places = place_all(operators, {})
    wanted = {kinds.QKV, kinds.PROJ, kinds.FC1, kinds.FC2}
    wanted |= {kinds.GATE} if kind == "eva_split_gate" else set()
    for block in range(3):
        products = [
            places[o.name].kind for o in operators
            if o.is_product and places[o.name].block == block
        ]  # fmt: skip
        assert sorted(products) == sorted([*wanted, kinds.SCORES, kinds.SCORES])
