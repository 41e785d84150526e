"""Running what was deployed: pictures in, features out."""

from __future__ import annotations

import numpy as np
import pytest

import ampdeploy
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.errors import ArtifactError, DataError
from ampdeploy.export.onnx import export_onnx
from ampdeploy.targets.base import get_target


@pytest.fixture
def exported(tiny_model, tmp_path):
    export_onnx(tiny_model, tmp_path / "model.onnx", opset=18)
    return tmp_path / "model.onnx"


def test_pictures_become_the_features_that_an_evaluation_sees(exported, tiny_model, calib_data):
    images = scan_folder(calib_data / "val", limit=3, seed=0)
    pixels = load_all(images, tiny_model.spec).numpy()
    with get_target("ort").open(exported, threads=1) as runner:
        expected = runner.run(pixels)
    with ampdeploy.open_model(exported, threads=1) as model:
        found = model([record.path for record in images.records])
        assert model.runner.image_size == tiny_model.spec.image_size
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values)
    with pytest.raises(RuntimeError, match="closed"):
        model.runner.run(pixels)


def test_no_pictures_are_refused(exported, calib_data):
    with ampdeploy.open_model(exported, threads=1) as model:
        for nothing in ([], "a.jpg"):
            with pytest.raises(DataError, match="list of at least one"):
                model(nothing)


@pytest.mark.parametrize(
    ("name", "match"),
    [("missing.onnx", "there is no file"), ("slim.safetensors", "ampdeploy.load_slim")],
)
def test_what_cannot_be_opened_says_what_can(name, match, tmp_path):
    if name.startswith("slim"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ArtifactError, match=match):
        ampdeploy.open_model(tmp_path / name)


def test_a_folder_that_is_no_installation_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"install\.json"):
        ampdeploy.open_model(tmp_path)
