"""Options that cannot be run are refused when they are made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ampdeploy.config import (
    BUDGETS,
    DEFAULT_PARAMS_CUT,
    FOLDS,
    REPAIRS,
    BenchConfig,
    BuildConfig,
    DataConfig,
    DistillConfig,
    ExportConfig,
    ModelConfig,
    PruneConfig,
    from_json,
    sizes_to_test,
    to_json,
)
from ampdeploy.errors import ConfigError
from ampdeploy.targets.base import target_names


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
        (lambda: PruneConfig(search="ampp"), "unknown search 'ampp'.*'amp'"),
        (lambda: PruneConfig(repair="folds"), "unknown repair 'folds'.*'fold'"),
        (lambda: PruneConfig(params_cut=0.2, flops_cut=0.2), "--params-cut and --flops-cut are"),
        (lambda: PruneConfig(search="amp", mlp_keep=0.5), "--mlp-keep asks for a size"),
        (lambda: PruneConfig(width_multiple=0), "width multiple is 0"),
        (lambda: PruneConfig(min_width=-8), "min width is -8"),
        (lambda: DataConfig(calib=Path("c"), calib_images=0), "calib images is 0"),
        (lambda: DataConfig(calib=Path("c"), eval_images=-3), "eval images is -3"),
        (lambda: DataConfig(calib=Path("c"), seed=-1), "seed is -1"),
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
            lambda: build_config(prune=PruneConfig(search="amp", batch_size=300)),
            "batch of 300 is larger than the 256 calibration images.*Lower --batch",
        ),
        (
            lambda: build_config(data=DataConfig(calib=Path("c"), calib_images=15)),
            "needs 16 calibration images, more than the 15",
        ),
        (
            # The batch fits, but the repair needs images to be judged on.
            lambda: build_config(
                data=DataConfig(calib=Path("c"), calib_images=8),
                prune=PruneConfig(search="amp", batch_size=8, repair="fold"),
            ),
            "needs 16 calibration images, more than the 8.*Raise --calib-images",
        ),
    ],
)
def test_refused(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("value", [0, 1, -1, 1.2, 40, float("nan"), float("inf")])
@pytest.mark.parametrize("budget", BUDGETS)
def test_budgets_are_shares(budget, value):
    option = "--" + budget.replace("_", "-")
    with pytest.raises(ConfigError, match=f"{option} is {value}; it is a share between 0 and 1"):
        PruneConfig(**{budget: value})


def test_what_is_asked_for_is_one_budget():
    assert PruneConfig().budget == ("params_cut", DEFAULT_PARAMS_CUT)
    for budget in BUDGETS:
        assert PruneConfig(**{budget: 0.25}).budget == (budget, 0.25)


def test_the_repair_follows_the_search():
    assert (PruneConfig().repair, PruneConfig().fold) == ("refit", "least-squares")
    published = PruneConfig(search="amp")
    assert (published.repair, published.fold) == ("none", "none")
    assert PruneConfig(search="amp", repair="mean-shift").fold == "mean-shift"
    assert {PruneConfig(repair=repair).fold for repair in REPAIRS} == set(FOLDS)


def test_images_that_cannot_be_done_without():
    assert PruneConfig().fewest_images == 16
    assert PruneConfig(repair="none").fewest_images == 16  # the search shares them out
    assert PruneConfig(search="amp", batch_size=4).fewest_images == 4
    assert PruneConfig(search="amp", batch_size=4, repair="fold").fewest_images == 16
    assert PruneConfig(search="amp", batch_size=64, repair="fold").fewest_images == 64


def test_the_grid_of_widths_suits_the_target():
    widths = {target: build_config(target=target).width_multiple for target in target_names()}
    gpus = ("ort-cuda", "torch-cuda", "trt", "trt-rtx")
    assert widths == {"ort": 16, "torch": 16, **dict.fromkeys(gpus, 64)}
    asked = build_config(target="ort-cuda", prune=PruneConfig(width_multiple=128))
    assert asked.width_multiple == 128


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


@pytest.mark.parametrize("option", ["width_multiple", "min_width"])
def test_amps_search_has_no_grid_of_its_own(option):
    with pytest.raises(ConfigError, match=option.replace("_", "-")):
        PruneConfig(search="amp", **{option: 16})


def test_a_run_from_before_there_were_budgets_stays_amps():
    config = BuildConfig(
        model=ModelConfig(name="dinov2_s"), data=DataConfig(calib=Path("images")), out=Path("run")
    )
    data = to_json(config)
    for name in ("search", "params_cut", "flops_cut", "mlp_keep", "repair"):
        del data["prune"][name]
    assert (from_json(data).prune.search, from_json(data).prune.repair) == ("amp", "none")


def test_twenty_and_twenty_point_zero_are_one_value():
    whole = PruneConfig(inv_temperature=20, threshold=1)
    assert to_json(whole) == to_json(PruneConfig(inv_temperature=20.0, threshold=1.0))
    given = to_json(PruneConfig.for_model("dinov2_s"))
    assert json.dumps(given) == json.dumps(to_json(PruneConfig()))


@pytest.mark.parametrize("value", ["0.4", True, [0.4]])
def test_a_budget_that_is_no_number_is_refused(value):
    with pytest.raises(ConfigError, match=r"params cut is .*give a number"):
        PruneConfig(params_cut=value)


@pytest.mark.parametrize(
    ("batch", "sizes"),
    [
        ((1, 1, 1), (1,)),
        ((1, 2, 5), (1, 2, 3, 4, 5)),
        ((4, 24, 100), (*range(4, 17), 24, 32, 64, 100)),
        ((40, 40, 64), (40, 64)),
    ],
)
def test_engines_are_tested_at_every_small_batch(batch, sizes):
    assert sizes_to_test(batch) == sizes
