from __future__ import annotations

import contextlib

import onnx
import pytest
import torch
from torch import nn

from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.export.graph import check_graph, count_norms
from ampdeploy.export.onnx import export_onnx
from tests.export.conftest import OPSET
from tests.mlp_kinds import make

HEADER = '<ir_version: 10, opset_import: ["" : 18]>'
WITH_IF = """
bad (float[batch, 3, 8, 8] images) => (float[batch, 3] features) {
  pooled = ReduceMean <keepdims = 0> (images, axes)
  total = ReduceSum <keepdims = 0> (images)
  positive = Greater (total, zero)
  features = If (positive) <
    then_branch = yes () => (float[batch, 3] a) { a = Identity (pooled) },
    else_branch = no () => (float[batch, 3] b) { b = Neg (pooled) }
  >
}
"""
MANY_FAULTS = """
bad (float[2, 3, 8, 8] images, int64[2] repeats) => (double[n, m] features, float[2] other) {
  pooled = ReduceMean <keepdims = 0> (images, axes)
  wide = Cast <to = 11> (pooled)
  features = Tile (wide, repeats)
  other = ReduceMean <keepdims = 0> (pooled, last)
}
"""


def write(path, text, **constants):
    model = onnx.parser.parse_model(HEADER + text)
    for name, (kind, values) in constants.items():
        dims = [] if name == "zero" else [len(values)]
        model.graph.initializer.append(onnx.helper.make_tensor(name, kind, dims, values))
    onnx.save(model, path)
    return path


@pytest.fixture
def with_if(tmp_path):
    return write(
        tmp_path / "if.onnx",
        WITH_IF,
        axes=(onnx.TensorProto.INT64, [2, 3]),
        zero=(onnx.TensorProto.FLOAT, [0.0]),
    )


def test_control_flow_is_refused(with_if):
    with pytest.raises(VerificationError, match=r"is If: control flow"):
        check_graph(with_if, norms=None)


def test_all_failures_are_in_one_message(tmp_path):
    path = write(
        tmp_path / "bad.onnx",
        MANY_FAULTS,
        axes=(onnx.TensorProto.INT64, [2, 3]),
        last=(onnx.TensorProto.INT64, [1]),
    )
    with pytest.raises(VerificationError) as caught:
        check_graph(path, norms=3)
    message = str(caught.value)
    for expected in (
        "its inputs are ['images', 'repeats']",
        "its outputs are ['features', 'other']",
        "images has the fixed batch 2",
        "features is DOUBLE",
        "only the batch may be dynamic",
        "Tile whose repeats 'repeats' are computed",
        "0 LayerNormalization nodes, the model runs 3",
        "tensor 'wide' is float64",
    ):
        assert expected in message


def test_invalid_onnx_is_refused(tmp_path):
    path = write(
        tmp_path / "dangling.onnx",
        "bad (float[b, 3, 8, 8] images) => (float[b, 3] features) { features = Relu (absent) }",
    )
    with pytest.raises(VerificationError, match="the ONNX checker refuses it"):
        check_graph(path, norms=None)


class TakenApart(nn.Module):
    """LayerNorm as older exporters wrote it."""

    def __init__(self, norm: nn.LayerNorm) -> None:
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = (centred * centred).mean(-1, keepdim=True)
        return centred / torch.sqrt(variance + self.eps) * self.weight + self.bias


def test_a_norm_taken_apart_is_noticed(tmp_path):
    model = make("plain")
    norms = count_norms(model)
    assert norms == 2 * model.spec.depth + 1
    model.backbone.blocks[1].norm2 = TakenApart(model.backbone.blocks[1].norm2)
    export_onnx(model, tmp_path / "model.onnx", opset=OPSET)
    with pytest.raises(VerificationError, match=f"{norms - 1} LayerNorm.* runs {norms} norms"):
        check_graph(tmp_path / "model.onnx", norms=norms)


def test_attention_that_is_not_written_out_as_it_should_is_noticed(tmp_path, monkeypatch):
    """From a fused SDPA the exporter scales q and k by a root each."""
    model = make("plain")
    monkeypatch.setattr("ampdeploy.export.onnx.explicit_attention", contextlib.nullcontext)
    for block in model.backbone.blocks:
        block.attn.fused_attn = True
    export_onnx(model, tmp_path / "model.onnx", opset=OPSET)
    with pytest.raises(VerificationError, match="scales q and k by a root each"):
        check_graph(tmp_path / "model.onnx", norms=None)


def test_softmax_that_no_product_follows_is_noticed(tmp_path):
    path = write(
        tmp_path / "softmax.onnx",
        """noise (float[b, 3, 8, 8] images) => (float[b, 3] features) {
            axes = Constant <value = int64[2] {2, 3}> ()
            mean = ReduceMean <keepdims = 0> (images, axes)
            features = Softmax (mean)
        }""",
    )
    with pytest.raises(VerificationError, match="1 of 1 Softmax nodes"):
        check_graph(path, norms=None)


def test_only_norms_that_run_are_counted():
    model = make("plain")
    model.backbone.blocks[0].unused = nn.LayerNorm(32)
    assert count_norms(model) == 2 * model.spec.depth + 1


def test_facts_add_up(exported):
    case = exported("plain")
    facts = check_graph(case.path, norms=None)
    assert facts.norms == facts.nodes["LayerNormalization"] == count_norms(case.model)
    params = 4 * sum(parameter.numel() for parameter in case.model.parameters())
    assert facts.weight_bytes == pytest.approx(params, rel=0.01)
    assert facts.initializers > 0
    assert facts.outputs == case.facts.outputs


@pytest.mark.parametrize("content", [b"", b"this is not ONNX\n" * 20, None])
def test_files_that_are_not_onnx(exported, tmp_path, content):
    path = tmp_path / "model.onnx"
    whole = exported("plain").path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    with pytest.raises(ArtifactError, match="Export it again"):
        check_graph(path, norms=None)


def test_missing_file(tmp_path):
    with pytest.raises(ArtifactError, match="there is no ONNX file"):
        check_graph(tmp_path / "model.onnx", norms=None)
