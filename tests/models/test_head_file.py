"""Heads in every kind of file, and files that are none."""

from __future__ import annotations

import json
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from ampdeploy.errors import ArtifactError
from ampdeploy.models.head_file import read_head

WEIGHT = np.arange(12, dtype=np.float32).reshape(3, 4)
BIAS = np.array([1, 2, 3], np.float32)
NAMES = ["ant", "bee", "cow"]


def tensors(prefix="", dtype=torch.float32):
    weight, bias = torch.from_numpy(WEIGHT).to(dtype), torch.from_numpy(BIAS).to(dtype)
    return {f"{prefix}weight": weight, f"{prefix}bias": bias}


def check(head, *, classes):
    np.testing.assert_array_equal(head.weight, WEIGHT)
    np.testing.assert_array_equal(head.bias, BIAS)
    assert head.classes == classes
    assert len(head.sha256) == 64


def test_safetensors_with_class_names_in_the_metadata(tmp_path):
    path = tmp_path / "head.safetensors"
    save_file(tensors(dtype=torch.bfloat16), path, metadata={"classes": json.dumps(NAMES)})
    check(read_head(path), classes=tuple(NAMES))


def test_npz_with_and_without_class_names(tmp_path):
    path = tmp_path / "head.npz"
    np.savez(path, weight=WEIGHT, bias=BIAS, classes=np.array(NAMES))
    check(read_head(path), classes=tuple(NAMES))
    np.savez(path, weight=WEIGHT, bias=BIAS)
    check(read_head(path), classes=None)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_a_pickled_state_dict_under_its_usual_wrappers(tmp_path, wrapper):
    state = tensors("fc.")
    torch.save({wrapper: state} if wrapper else state, tmp_path / "head.pth")
    check(read_head(tmp_path / "head.pth"), classes=None)


def test_the_head_of_a_whole_timm_classifier_reads_what_the_backbone_gives(tmp_path):
    """`features` is what timm's head takes, so its own logits come out."""
    import timm

    from ampdeploy.models.build import build_model

    torch.manual_seed(0)
    classifier = timm.create_model("test_vit", num_classes=7).eval()
    torch.nn.init.normal_(classifier.head.weight)  # as new, it is all but 0
    save_file(classifier.state_dict(), tmp_path / "whole.safetensors")
    head = read_head(tmp_path / "whole.safetensors")
    model = build_model("timm:test_vit")
    backbone = {k: v for k, v in classifier.state_dict().items() if not k.startswith("head.")}
    model.backbone.load_state_dict(backbone, strict=True)
    images = torch.rand(2, 3, 160, 160)
    with torch.inference_mode():
        features = model(images).features.numpy().astype(np.float64)
        expected = classifier(images).numpy()
    np.testing.assert_allclose(features @ head.weight.T + head.bias, expected, atol=1e-4)


def test_weights_without_a_head_are_said_to_have_none(tmp_path, tiny_model):
    save_file(tiny_model.backbone.state_dict(), tmp_path / "backbone.safetensors")
    with pytest.raises(ArtifactError, match="holds no classification head"):
        read_head(tmp_path / "backbone.safetensors")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"weight": WEIGHT}, r"weight of shape \(3, 4\) and a bias of shape None"),
        ({"weight": WEIGHT, "bias": BIAS[:2]}, r"bias of shape \(2,\)"),
        ({"weight": WEIGHT[0], "bias": BIAS}, r"weight of shape \(4,\)"),
        ({"weight": WEIGHT[:1], "bias": BIAS[:1]}, "two or more"),
        ({"weight": WEIGHT * np.nan, "bias": BIAS}, "NaN"),
        ({"weight": WEIGHT, "bias": BIAS, "head.weight": WEIGHT}, "several heads"),
        ({"weight": WEIGHT, "bias": BIAS, "classes": np.array(NAMES[:2])}, "2 different names"),
        ({"weight": WEIGHT, "bias": BIAS, "classes": np.array(["a", "a", "b"])}, "2 different"),
        ({"weight": WEIGHT, "bias": BIAS, "classes": np.arange(3)}, "not a list of names"),
    ],
)
def test_arrays_that_are_no_head_are_refused(tmp_path, arrays, message):
    np.savez(tmp_path / "head.npz", **arrays)
    with pytest.raises(ArtifactError, match=message):
        read_head(tmp_path / "head.npz")


def test_files_that_cannot_be_heads_are_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"is no \.safetensors"):
        read_head(tmp_path / "head.onnx")
    with pytest.raises(ArtifactError, match="there is no head file"):
        read_head(tmp_path / "head.npz")
    for name in ("head.npz", "head.pth", "head.safetensors"):
        (tmp_path / name).write_bytes(b"rubbish" * 10)
        with pytest.raises(ArtifactError, match=r"not an npz archive|cannot be read"):
            read_head(tmp_path / name)
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ArtifactError, match="holds a list"):
        read_head(tmp_path / "list.pth")


def test_code_in_a_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "was-run"), "w"))

    with open(tmp_path / "head.pth", "wb") as handle:
        pickle.dump(Evil(), handle)
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_head(tmp_path / "head.pth")
    assert not (tmp_path / "was-run").exists()
