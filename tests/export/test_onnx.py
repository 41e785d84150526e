from __future__ import annotations

import json

import onnx
import pytest
import torch
from torch import nn

from ampdeploy.artifacts import sha256_file
from ampdeploy.errors import AmpDeployError, UnsupportedModelError
from ampdeploy.export.graph import check_graph, count_norms
from ampdeploy.export.names import data_path
from ampdeploy.export.onnx import export_onnx, reference_outputs
from ampdeploy.export.verify import verify_onnx
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import count_params
from tests.conftest import TINY
from tests.export.conftest import OPSET
from tests.mlp_kinds import BACKBONES, make

TOLERANCES = {"max_relative_diff": 1e-4, "min_cosine": 0.999999}


def slim(linear: nn.Linear, *, rows: int | None = None, columns: int | None = None) -> nn.Linear:
    weight = linear.weight[:rows, :columns]
    small = nn.Linear(weight.shape[1], weight.shape[0])
    small.weight = nn.Parameter(weight.detach().clone())
    small.bias = nn.Parameter(linear.bias[:rows].detach().clone())
    return small


def randomise(model: nn.Module) -> None:
    with torch.no_grad():  # fresh biases are all zero, and equal tensors are stored once
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)


@pytest.mark.parametrize("kind", BACKBONES)
def test_every_kind_passes_the_gates_and_computes_what_torch_computes(exported, kind):
    case = exported(kind)
    facts = check_graph(case.path, norms=count_norms(case.model))
    assert facts.nodes == case.facts.nodes
    assert facts.opset == case.facts.opset == OPSET
    expected = ("features", "patch_features")
    assert case.facts.outputs == expected[: 1 + case.model.spec.has_patch_features]
    comparisons = verify_onnx(
        case.path, case.images.numpy(), case.reference, batches=(1, 2, 5), **TOLERANCES
    )
    assert [(c.batch, c.output) for c in comparisons] == [
        (batch, name) for batch in (1, 2, 5) for name in case.facts.outputs
    ]


def test_attention_is_written_out_with_q_scaled_once(exported):
    nodes = onnx.load(exported("plain").path).graph.node
    attention = [node.op_type for node in nodes if node.name.startswith("blocks.0.attn/")]
    assert attention.count("Mul") == 1
    assert attention.count("MatMul") == 2
    assert attention.count("Softmax") == 1
    assert "Sqrt" not in attention
    assert [op for op in attention if op in ("Mul", "MatMul")] == ["Mul", "MatMul", "MatMul"]


@pytest.mark.parametrize("kind", ["eva_split_gate", "eva_mixed_rope"])
def test_rotary_embedding_is_a_constant(exported, kind):
    operators = exported(kind).facts.nodes
    assert not {"Sin", "Cos", "Range", "Tile"} & set(operators)


def test_node_names_say_which_module(exported):
    names = [node.name for node in onnx.load(exported("plain").path).graph.node]
    assert len(names) == len(set(names))
    assert {"blocks.0.mlp.fc1/MatMul", "blocks.2.norm2/LayerNormalization"} <= set(names)


def test_the_model_is_left_as_it_was(tmp_path, tiny_model):
    tiny_model.train()
    tiny_model.backbone.blocks[1].eval()
    tiny_model.backbone.blocks[2].attn.fused_attn = False
    before = [(m.training, getattr(m, "fused_attn", None)) for m in tiny_model.modules()]
    export_onnx(tiny_model, tmp_path / "model.onnx", opset=OPSET)
    after = [(m.training, getattr(m, "fused_attn", None)) for m in tiny_model.modules()]
    assert after == before
    assert any(fused for _, fused in before)


def test_same_model_same_bytes_without_traces_of_this_machine(exported, tmp_path):
    case = exported("packed_swiglu")
    again = tmp_path / "other-name.onnx"
    export_onnx(make("packed_swiglu"), again, opset=OPSET)
    content = again.read_bytes()
    assert content == case.path.read_bytes()
    for trace in (b'File "', b".py", b"site-packages", str(tmp_path).encode(), b"class_hierarchy"):
        assert trace not in content


def test_the_file_explains_itself(exported):
    case = exported("plain")
    proto = onnx.load(case.path)
    facts = {entry.key: entry.value for entry in proto.metadata_props}
    assert proto.producer_name == "ampdeploy"
    assert facts["model"] == "test:plain"
    assert facts["licence"] == "none"
    assert int(facts["image_size"]) == case.model.spec.image_size
    assert tuple(json.loads(facts["mean"])) == case.model.spec.mean
    assert tuple(json.loads(facts["std"])) == case.model.spec.std


def test_fewer_parameters_make_a_smaller_file_that_still_computes_right(tmp_path):
    torch.manual_seed(0)
    model = build_model(TINY)
    randomise(model)
    dense_params = count_params(model)
    dense = export_onnx(model, tmp_path / "dense.onnx", opset=OPSET)
    assert dense.file_bytes == (tmp_path / "dense.onnx").stat().st_size
    assert dense.file_bytes == pytest.approx(4 * dense_params, rel=0.03)

    mlp = model.backbone.blocks[1].mlp
    mlp.fc1 = slim(mlp.fc1, rows=7)
    mlp.fc2 = slim(mlp.fc2, columns=7)
    path = tmp_path / "slim.onnx"
    slimmed = export_onnx(model, path, opset=OPSET)
    removed = dense_params - count_params(model)
    assert removed > 0
    assert dense.file_bytes - slimmed.file_bytes == pytest.approx(4 * removed, rel=0.03)

    check_graph(path, norms=count_norms(model))
    images = torch.randn(3, 3, model.spec.image_size, model.spec.image_size)
    reference = reference_outputs(model, images)
    verify_onnx(path, images.numpy(), reference, batches=(1, 2), **TOLERANCES)


def test_weights_too_large_for_one_file_go_next_to_it(exported, tmp_path):
    case = exported("registers")
    path = tmp_path / "model.onnx"
    facts = export_onnx(case.model, path, opset=OPSET, single_file_limit=1000)
    data = data_path(path)
    assert facts.external_data
    assert facts.file_bytes == path.stat().st_size + data.stat().st_size
    assert {entry.name for entry in tmp_path.iterdir()} == {"model.onnx", "model.onnx.data"}

    moved = tmp_path / "moved"
    moved.mkdir()
    for file in (path, data):
        file.rename(moved / file.name)
    check_graph(moved / path.name, norms=count_norms(case.model))
    verify_onnx(
        moved / path.name, case.images.numpy(), case.reference, batches=(1, 2), **TOLERANCES
    )

    export_onnx(case.model, path, opset=OPSET, single_file_limit=1000)
    assert sha256_file(path) == sha256_file(moved / path.name)
    assert sha256_file(data) == sha256_file(moved / data.name)


def test_a_single_file_replaces_graph_and_data(exported, tmp_path):
    case = exported("plain")
    path = tmp_path / "model.onnx"
    export_onnx(case.model, path, opset=OPSET, single_file_limit=1000)
    assert not export_onnx(case.model, path, opset=OPSET).external_data
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.onnx"]


def test_newer_opset(tmp_path, tiny_model):
    facts = export_onnx(tiny_model, tmp_path / "model.onnx", opset=20)
    assert check_graph(tmp_path / "model.onnx", norms=count_norms(tiny_model)).opset == 20
    assert facts.opset == 20


def test_the_terminal_stays_quiet(tmp_path, tiny_model, capfd):
    export_onnx(tiny_model, tmp_path / "model.onnx", opset=OPSET)
    assert capfd.readouterr() == ("", "")


def test_half_precision_weights_are_refused(tmp_path, tiny_model):
    with pytest.raises(UnsupportedModelError, match="float16"):
        export_onnx(tiny_model.half(), tmp_path / "model.onnx", opset=OPSET)


def test_an_unwritable_folder_is_a_user_error(tmp_path, tiny_model):
    with pytest.raises(AmpDeployError, match="cannot write"):
        export_onnx(tiny_model, tmp_path / "absent" / "model.onnx", opset=OPSET)


class Undecided(nn.Module):
    """What the exporter cannot trace: a branch on the values of the tokens."""

    def forward(self, tokens):
        return tokens * 2 if tokens.sum() > 0 else tokens


def test_a_failed_export_shows_torchs_error_and_leaves_nothing_behind(tmp_path, tiny_model):
    tiny_model.backbone.blocks[0].mlp = Undecided()
    with pytest.raises(Exception, match=r"[Dd]ata-dependent") as caught:
        export_onnx(tiny_model, tmp_path / "model.onnx", opset=OPSET)
    assert not isinstance(caught.value, AmpDeployError)
    assert list(tmp_path.iterdir()) == []
    assert all(block.attn.fused_attn for block in tiny_model.blocks)


def test_reference_covers_more_images_than_one_batch(exported):
    case = exported("plain")
    images = torch.cat([case.images] * 4)[:19]
    many = reference_outputs(case.model, images)
    for name, expected in case.reference.items():
        assert many[name].shape == (19, *expected.shape[1:])
        assert abs(many[name][15:] - expected[:4]).max() < 1e-5
