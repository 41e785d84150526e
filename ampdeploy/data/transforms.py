"""From a decoded image to the tensor a model reads."""

from __future__ import annotations

from collections.abc import Callable

import torch
from PIL.Image import Image
from timm.data import create_transform
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2  # type: ignore[import-untyped]

from ampdeploy.errors import ConfigError
from ampdeploy.models.spec import ModelSpec

Transform = Callable[[Image], Tensor]

# timm takes any other word for "center".
CROP_MODES = ("center", "squash", "border")

# Colour part of DINOv2's augmentation (dinov2/data/augmentations.py, `color_jittering` and the
# global crops): brightness, contrast, saturation, hue.
_JITTER = (0.4, 0.4, 0.2, 0.1)
_JITTER_P = 0.8
_GREYSCALE_P = 0.2
_BLUR_KERNEL = 9  # pixels
_BLUR_SIGMA = (0.1, 2.0)  # pixels
_BLUR_P = 0.5
_SOLARISE_THRESHOLD = 128  # of 255
_SOLARISE_P = 0.2


def eval_transform(spec: ModelSpec) -> Transform:
    """The model's own preprocessing, as timm does it: resize, centre crop, normalise.

    Built by timm itself: its weights were published with this, to the pixel.

    Returns:
        RGB image -> (3, S, S) float32 with S = ``spec.image_size``. Same image, same tensor.

    Raises:
        ConfigError: The model asks for an interpolation or a crop mode that is not known here.
    """
    _interpolation(spec)
    if spec.crop_mode not in CROP_MODES:
        raise ConfigError(
            f"{spec.name} asks for crop mode {spec.crop_mode!r}; known are "
            f"{', '.join(CROP_MODES)}. Choose another pretrained tag of the model."
        )
    transform: Transform = create_transform(
        input_size=spec.image_size,
        interpolation=spec.interpolation,
        mean=spec.mean,
        std=spec.std,
        crop_pct=spec.crop_pct,
        crop_mode=spec.crop_mode,
    )
    return transform


def train_transform(spec: ModelSpec, *, min_scale: float, strong: bool) -> Transform:
    """The augmentation of distillation (AMP, appendix): a random crop and flip.

    All randomness comes from torch's global CPU generator.

    Args:
        spec: Size, interpolation and normalisation.
        min_scale: Smallest share of the image's area a crop may have, in (0, 1].
        strong: Also jitter colours, drop them, blur and solarise, as DINOv2 does.

    Returns:
        RGB image -> (3, S, S) float32 with S = ``spec.image_size``.

    Raises:
        ConfigError: The model asks for an interpolation that torchvision does not have.
    """
    crop = v2.RandomResizedCrop(
        spec.image_size,
        scale=(min_scale, 1.0),
        interpolation=_interpolation(spec),
        antialias=True,
    )
    colours = [
        v2.RandomApply([v2.ColorJitter(*_JITTER)], p=_JITTER_P),
        v2.RandomGrayscale(p=_GREYSCALE_P),
        v2.RandomApply([v2.GaussianBlur(_BLUR_KERNEL, sigma=_BLUR_SIGMA)], p=_BLUR_P),
        v2.RandomSolarize(_SOLARISE_THRESHOLD, p=_SOLARISE_P),
    ]
    return v2.Compose(
        [crop, v2.RandomHorizontalFlip(), *(colours if strong else []), *_to_tensor(spec)]
    )


def _to_tensor(spec: ModelSpec) -> list[torch.nn.Module]:
    return [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(mean=list(spec.mean), std=list(spec.std)),
    ]


def _interpolation(spec: ModelSpec) -> InterpolationMode:
    try:
        return InterpolationMode(spec.interpolation)
    except ValueError as error:
        known = ", ".join(mode.value for mode in InterpolationMode)
        raise ConfigError(
            f"{spec.name} asks for interpolation {spec.interpolation!r}; torchvision has {known}. "
            "Choose another pretrained tag of the model."
        ) from error
