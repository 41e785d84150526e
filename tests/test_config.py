"""Options that cannot be run are refused when they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ampdeploy.config import (
    BenchConfig,
    BuildConfig,
    DataConfig,
    DistillConfig,
    ExportConfig,
    ModelConfig,
    PruneConfig,
    from_json,
    to_json,
)
from ampdeploy.errors import ConfigError


def build_config(**changes):
    fields = {"model": ModelConfig(name="dinov2_s"), "data": DataConfig(calib=Path("c"))}
    return BuildConfig(**{**fields, **changes})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PruneConfig(criterion="entrpy"), "unknown criterion 'entrpy'.*'entropy'"),
        (lambda: PruneConfig(batch_size=1), "leaves nothing to compare"),
        (lambda: PruneConfig(threshold=-1), "threshold is -1"),
        (lambda: PruneConfig(steps=0), "steps is 0"),
        (lambda: DataConfig(calib=Path("c"), calib_images=0), "calib images is 0"),
        (lambda: DataConfig(calib=Path("c"), eval_images=-3), "eval images is -3"),
        (lambda: ModelConfig(name="x", image_size=0), "image size is 0"),
        (lambda: DistillConfig(epochs=-1), "epochs is -1"),
        (lambda: DistillConfig(min_scale=2), "min scale is 2"),
        (lambda: DistillConfig(autocast="fp8"), "unknown autocast 'fp8'"),
        (lambda: ExportConfig(opset=13), "opset 13"),
        (lambda: ExportConfig(verify_batches=()), "verify batches"),
        (lambda: BenchConfig(batch_sizes=(0,)), "batch sizes"),
        (lambda: BenchConfig(threads=0), "threads is 0"),
        (lambda: build_config(target="ort-cud"), "unknown target 'ort-cud'.*'ort-cuda'"),
        (
            lambda: build_config(prune=PruneConfig(batch_size=300)),
            "batch of 300 is larger than the 256 calibration images",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.exit_code == 2


def test_default_folder_names_model_and_target():
    assert build_config().folder == Path("runs/dinov2_s-ort")
    odd = build_config(model=ModelConfig(name="timm:vit/x"))
    assert odd.folder == Path("runs/timm-vit-x-ort")


def test_config_survives_json():
    config = build_config(
        data=DataConfig(calib=Path("/c"), eval=Path("/e"), eval_images=7),
        distill=DistillConfig(epochs=2, images=Path("/i")),
        bench=BenchConfig(batch_sizes=(1, 4)),
        out=Path("/out"),
    )
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


def test_options_of_another_version_are_named():
    data = to_json(build_config())
    data["prune"]["future"] = 1
    with pytest.raises(ConfigError, match="future"):
        from_json(data)


def test_a_build_takes_the_recipe_of_its_model_where_none_is_given():
    clip = build_config(model=ModelConfig(name="openclip_g"))
    assert clip.prune.inv_temperature == 15
    assert not clip.distill.strong_augment
    assert PruneConfig.for_model("openclip_g", threshold=0.5).threshold == 0.5
    assert build_config().prune == PruneConfig()  # the defaults are DINOv2's


def test_strings_are_taken_as_paths():
    data = DataConfig(calib="c", eval="e")
    assert (data.calib, data.eval) == (Path("c"), Path("e"))
    assert build_config(out="o").folder == Path("o")
