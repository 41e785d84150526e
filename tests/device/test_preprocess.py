"""Preparing images without torch gives the same bits as timm does with it."""

from __future__ import annotations

import dataclasses

import numpy as np
import onnx
import pytest
from PIL import Image

from ampdeploy.data.decode import open_rgb
from ampdeploy.data.transforms import eval_transform
from ampdeploy.device.preprocess import (
    FIELDS,
    Preprocessing,
    preprocessing_of,
    read_preprocessing,
)
from ampdeploy.errors import ArtifactError, ConfigError, DataError
from ampdeploy.export.onnx import export_onnx
from tests.device.engine_samples import write_graph

SHAPES = [(224, 224), (300, 200), (200, 301), (640, 47), (33, 35), (97, 256)]


def noise(width, height):
    rng = np.random.default_rng(width * height)
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [1.0, 0.875, 0.9])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_the_same_bits_as_timm(tiny_model, crop_mode, crop_pct, interpolation):
    ways = {"crop_mode": crop_mode, "crop_pct": crop_pct, "interpolation": interpolation}
    colours = {"mean": (0.48, 0.45, 0.41), "std": (0.27, 0.26, 0.28)}
    theirs = eval_transform(dataclasses.replace(tiny_model.spec, **ways, **colours))
    ours = Preprocessing(image_size=tiny_model.spec.image_size, **ways, **colours)
    for shape in SHAPES:
        image = noise(*shape)
        expected, found = theirs(image).numpy(), ours(image)
        assert found.dtype == np.float32
        assert found.flags.c_contiguous
        assert np.array_equal(expected, found), shape


def test_files_images_and_arrays_are_one(tiny_model, calib_data):
    spec = tiny_model.spec
    ours = Preprocessing(image_size=56, **{name: getattr(spec, name) for name in FIELDS})
    file = sorted((calib_data / "val").rglob("*.jpg"))[0]
    picture = open_rgb(file)
    found = ours(file)
    assert found.shape == (3, 56, 56)
    for same in (str(file), picture, np.asarray(picture)):
        assert np.array_equal(ours(same), found)


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "P", "CMYK", "L"])
def test_an_opened_image_is_prepared_as_its_file(mode, tmp_path):
    suffix = "jpg" if mode == "CMYK" else "png"
    path = tmp_path / f"x.{suffix}"
    image = noise(60, 70)
    if mode == "RGBA":
        image.putalpha(90)
    elif mode == "I;16":
        image = Image.fromarray(np.arange(60 * 70, dtype=np.uint16).reshape(70, 60) * 15)
    else:
        image = image.convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    image.save(path, exif=exif)
    ours = Preprocessing(
        image_size=56,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        crop_mode="center",
        interpolation="bicubic",
    )
    with Image.open(path) as opened:
        assert np.array_equal(ours(opened), ours(path))


@pytest.mark.parametrize(
    ("picture", "match"),
    [
        (np.zeros((3, 8, 8), np.uint8), r"\(3, 8, 8\) and type uint8 is no picture"),
        (np.zeros((8, 8, 3), np.float32), "type float32 is no picture"),
        (7, "int is no picture"),
        ("missing.jpg", "cannot use image missing.jpg"),
    ],
)
def test_what_is_no_picture_is_refused(picture, match):
    ours = Preprocessing(
        image_size=56,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        crop_pct=1.0,
        crop_mode="center",
        interpolation="bicubic",
    )
    with pytest.raises(DataError, match=match):
        ours(picture)
    for field, value in (("crop_mode", "tile"), ("interpolation", "best")):
        with pytest.raises(ConfigError, match=value):
            dataclasses.replace(ours, **{field: value})


def test_an_export_says_how_its_images_are_prepared(tiny_model, tmp_path):
    path = tmp_path / "model.onnx"
    export_onnx(tiny_model, path, opset=18)
    facts = preprocessing_of(path)
    spec = tiny_model.spec
    assert read_preprocessing(facts, 56, where=path) == Preprocessing(
        image_size=56, **{name: getattr(spec, name) for name in FIELDS}
    )


def test_a_graph_that_does_not_say_is_refused(tmp_path):
    nodes = [onnx.helper.make_node("GlobalAveragePool", ["images"], ["features"])]
    path = write_graph(tmp_path / "other.onnx", nodes, {})
    assert preprocessing_of(path) == {}
    with pytest.raises(ArtifactError, match="does not say how its images are prepared"):
        read_preprocessing({}, 56, where=path)
