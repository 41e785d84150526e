"""Preprocessing against its definition, augmentation against its promises."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from ampdeploy.data.decode import open_rgb
from ampdeploy.data.transforms import eval_transform, train_transform
from ampdeploy.errors import ConfigError
from ampdeploy.models.build import build_model, wrap_backbone
from tests.conftest import TINY
from tests.data.samples import halves, make_spec, noise
from tests.mlp_kinds import CFG

TAGS = [
    "eva_giant_patch14_336.clip_ft_in1k",  # squash, 1.0
    "vit_medium_patch16_gap_384.sw_in12k_ft_in1k",  # squash, 0.95
    "vit_base_patch16_224.augreg_in21k_ft_in1k",  # center, 0.9
    "vit_small_patch14_dinov2.lvd142m",  # center, 1.0
    "vit_base_patch16_224_miil.in21k_ft_in1k",  # center, 0.875, bilinear
]


@pytest.mark.parametrize("tag", TAGS)
def test_a_tags_transform_is_timms(tag, calib_data):
    """From the tag's own configuration, which the spec carries, to the last bit of real images."""
    model = build_model(f"timm:{tag}", device="meta")
    theirs = create_transform(**resolve_model_data_config(model.backbone))
    ours = eval_transform(model.spec)
    size = model.spec.image_size
    for path in sorted((calib_data / "val").rglob("*.jpg"))[::40]:
        tensor = ours(open_rgb(path))
        assert (tensor.shape, tensor.dtype) == ((3, size, size), torch.float32)
        assert torch.equal(tensor, theirs(open_rgb(path)))


def test_crop_mode_of_specs():
    squash = "timm:eva_giant_patch14_336.clip_ft_in1k"
    assert build_model(squash, device="meta").spec.crop_mode == "squash"
    dinov2 = build_model("dinov2_s", device="meta").spec
    assert (dinov2.crop_mode, dinov2.crop_pct) == ("center", 0.875)
    backbone = build_model(TINY, device="meta").backbone
    for given, expected in (({}, "center"), ({"crop_mode": "border"}, "border")):
        cfg = {**CFG, "input_size": (3, 160, 160), **given}
        spec = wrap_backbone(backbone, name="test", timm_name="test", cfg=cfg).spec
        assert spec.crop_mode == expected


def by_hand(image: Image.Image, crop_mode: str, scale: int, mean) -> Image.Image:
    """The middle 24 x 24 pixels, on the mean colour, of what each mode promises to scale."""
    width, height = image.size
    if crop_mode == "squash":
        size = (scale, scale)
    elif crop_mode == "border":
        size = (round(scale * width / max(image.size)), round(scale * height / max(image.size)))
    else:
        size = (scale * width // min(image.size), scale * height // min(image.size))
    canvas_size = (max(24, size[0]), max(24, size[1]))
    canvas = Image.new("RGB", canvas_size, tuple(round(255 * value) for value in mean))
    corner = tuple((outer - inner) // 2 for outer, inner in zip(canvas_size, size, strict=True))
    canvas.paste(image.resize(size, Image.Resampling.BICUBIC), corner)
    left, top = (round((side - 24) / 2) for side in canvas_size)
    return canvas.crop((left, top, left + 24, top + 24))


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("crop_pct", [0.7, 0.75, 0.875, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (20, 20), (640, 20)])
def test_crop_modes(crop_mode, crop_pct, size):
    spec = make_spec(crop_mode=crop_mode, crop_pct=crop_pct)
    image = noise(1, size)
    pixels = np.asarray(by_hand(image, crop_mode, math.floor(24 / crop_pct), spec.mean)) / 255
    expected = torch.tensor((pixels - spec.mean) / spec.std).permute(2, 0, 1).float()
    torch.testing.assert_close(eval_transform(spec)(image), expected)


def test_eval_transform_normalises():
    colour = eval_transform(make_spec())(Image.new("RGB", (30, 50), (255, 0, 51)))
    expected = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0.2 - 0.3) / 0.5])
    torch.testing.assert_close(colour, expected[:, None, None].expand(3, 24, 24))


def test_scale_before_crop_is_rounded_down():
    """24 / 0.9 = 26.7: a 26 x 26 image is cropped without being resized."""
    image = noise(2, (26, 26))
    spec = make_spec(crop_pct=0.9, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = np.asarray(image)[1:25, 1:25].transpose(2, 0, 1) / np.float32(255)
    torch.testing.assert_close(eval_transform(spec)(image), torch.tensor(pixels))


def test_unknown_interpolation():
    with pytest.raises(ConfigError, match="asks for interpolation 'random'"):
        eval_transform(make_spec(interpolation="random"))


def test_unknown_crop_mode():
    """timm would take it for ``center``."""
    with pytest.raises(ConfigError, match=r"sample asks for crop mode 'centre'; known are center,"):
        eval_transform(make_spec(crop_mode="centre"))


@pytest.mark.parametrize("strong", [False, True])
def test_augmentation_draws_from_torch_alone(strong):
    transform = train_transform(make_spec(), min_scale=0.05, strong=strong)
    image = noise(3, (50, 40))

    def draw(seed: int, other: int) -> torch.Tensor:
        torch.manual_seed(seed)
        random.seed(other)
        np.random.seed(other)
        return torch.stack([transform(image) for _ in range(8)])

    first = draw(0, other=1)
    assert first.shape == (8, 3, 24, 24)
    assert first.dtype == torch.float32
    assert torch.equal(first, draw(0, other=2))
    assert not torch.equal(first, draw(1, other=1))
    assert len({item.numpy().tobytes() for item in first}) == 8


def test_min_scale_bounds_the_crop():
    """With an area of at least 0.9, both halves of the picture stay in every crop."""
    torch.manual_seed(0)
    spec = make_spec(mean=(0.0,) * 3, std=(1.0,) * 3)

    def crops_with_both_colours(min_scale: float) -> int:
        transform = train_transform(spec, min_scale=min_scale, strong=False)
        crops = [transform(halves((64, 64))) for _ in range(60)]
        return sum(bool(crop[0].max() > 0.8 and crop[0].min() < 0.1) for crop in crops)

    assert crops_with_both_colours(0.9) == 60
    assert crops_with_both_colours(0.05) < 58


def test_strong_changes_colours_and_weak_does_not():
    torch.manual_seed(0)
    spec = make_spec(mean=(0.0,) * 3, std=(1.0,) * 3)
    flat = Image.new("RGB", (40, 40), (200, 100, 50))
    colour = torch.tensor([200.0, 100.0, 50.0]) / 255

    def changed(strong: bool) -> int:
        transform = train_transform(spec, min_scale=0.5, strong=strong)
        seen = [transform(flat).mean((1, 2)) for _ in range(40)]
        return sum(not torch.allclose(mean, colour, atol=1e-3) for mean in seen)

    assert changed(strong=False) == 0
    assert 25 <= changed(strong=True) < 40
