"""Preprocessing against its definition, augmentation against its promises."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from ampdeploy.data.transforms import eval_transform, train_transform
from ampdeploy.errors import ConfigError
from tests.data.samples import halves, make_spec, noise


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(61, 40), (40, 61), (20, 20)])
def test_eval_transform_is_timms(interpolation, size):
    """The models were trained and published with timm's preprocessing."""
    spec = make_spec(interpolation=interpolation)
    theirs = create_transform(
        input_size=spec.image_size,
        interpolation=interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
    )
    ours = eval_transform(spec)(noise(1, size))
    assert ours.shape == (3, 24, 24)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs(noise(1, size)))


def test_eval_transform_normalises():
    colour = eval_transform(make_spec())(Image.new("RGB", (30, 50), (255, 0, 51)))
    expected = torch.tensor([(1 - 0.5) / 0.2, (0 - 0.4) / 0.25, (0.2 - 0.3) / 0.5])
    torch.testing.assert_close(colour, expected[:, None, None].expand(3, 24, 24))


def test_resize_before_crop_is_rounded():
    """24 / 0.7 = 34.3: a 34 x 34 image is cropped without being resized."""
    image = noise(2, (34, 34))
    spec = make_spec(crop_pct=0.7, mean=(0.0,) * 3, std=(1.0,) * 3)
    pixels = np.asarray(image)[5:29, 5:29].transpose(2, 0, 1) / np.float32(255)
    torch.testing.assert_close(eval_transform(spec)(image), torch.tensor(pixels))


def test_unknown_interpolation():
    with pytest.raises(ConfigError, match="asks for interpolation 'random'"):
        eval_transform(make_spec(interpolation="random"))


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
