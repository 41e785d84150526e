"""From a model name to a `VisionModel` with its `ModelSpec`, without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import timm
import torch
from torch import nn

from ampdeploy.errors import ConfigError, UnknownNameError, UnsupportedModelError
from ampdeploy.models.registry import TIMM_PREFIX, close_matches, lookup
from ampdeploy.models.sites import find_sites
from ampdeploy.models.spec import ModelSpec
from ampdeploy.models.vision import VisionModel, check_backbone


def timm_source(name: str) -> str:
    """timm's name for `name`, checked to exist.

    Raises:
        UnknownNameError: Neither the registry nor timm knows it.
    """
    entry = lookup(name)
    timm_name = entry.timm_name if entry else name[len(TIMM_PREFIX) :]
    if not timm.is_model(timm_name.split(".")[0]):
        raise UnknownNameError(
            f"timm {timm.__version__} has no model {timm_name!r}."
            f"{close_matches(timm_name, timm.list_models())} "
            "List them with: python -c 'import timm; print(timm.list_models(\"vit_*\"))'"
        )
    return timm_name


def build_model(
    name: str, *, image_size: int | None = None, device: str | torch.device = "cpu"
) -> VisionModel:
    """The model `name` with random weights, in eval mode.

    Args:
        name: A registry name or ``timm:<name>``.
        image_size: Side of the square input, pixels; None takes the registry's (224 for all
            registered names) or timm's own for ``timm:`` names.
        device: ``"meta"`` builds it without memory.

    Raises:
        UnknownNameError: No such model.
        UnsupportedModelError: It is not a ViT, or its MLPs cannot be slimmed exactly.
        ConfigError: The image size does not fit the patch size.
    """
    timm_name = timm_source(name)
    entry = lookup(name)
    size = image_size or (entry.image_size if entry else None)
    backbone = _create(timm_name, size, device)
    cfg = dict(backbone.pretrained_cfg)
    if entry and entry.crop_pct:
        cfg["crop_pct"] = entry.crop_pct
        cfg["crop_mode"] = "center"  # an override is a whole transform, published as such
    if entry:
        cfg["license"] = entry.licence
    return wrap_backbone(backbone, name=name, timm_name=timm_name, cfg=cfg, image_size=size)


def wrap_backbone(
    backbone: Any, *, name: str, timm_name: str, cfg: dict[str, Any], image_size: int | None = None
) -> VisionModel:
    """A timm ViT or EVA module as a `VisionModel`, in eval mode.

    Args:
        backbone: The module, without a classification head.
        name: What to call it in messages and files.
        timm_name: timm's architecture and tag.
        cfg: timm's pretrained configuration: input_size, mean, std, crop_pct, interpolation, and
            crop_mode, which is ``center`` when absent.
        image_size: Side of the square input, pixels; None takes `cfg`'s.

    Raises:
        UnsupportedModelError: It is not a ViT, or its MLPs cannot be slimmed exactly.
        ConfigError: The image size does not fit the patch size.
    """
    check_backbone(backbone, name)
    _check_activation(backbone, timm_name, cfg)
    size = image_size or cfg["input_size"][-1]
    patch = backbone.patch_embed.patch_size[0]
    height, width = backbone.patch_embed.img_size or (size, size)
    if height != width:
        raise UnsupportedModelError(
            f"{name} takes images of {height} x {width} pixels; ampdeploy handles square inputs. "
            "Give --image-size to build it at a square size."
        )
    if size % patch:
        raise ConfigError(
            f"image size {size} is not a multiple of the patch size {patch} of {name}. "
            f"Use {size // patch * patch} or {(size // patch + 1) * patch}."
        )
    spec = ModelSpec(
        name=name,
        timm_name=timm_name,
        licence=cfg.get("license") or "unknown",
        image_size=size,
        mean=tuple(cfg["mean"]),
        std=tuple(cfg["std"]),
        crop_pct=cfg["crop_pct"],
        crop_mode=cfg.get("crop_mode") or "center",
        interpolation=cfg["interpolation"],
        pooling=str(getattr(backbone, "global_pool", "token")),
        feature_dim=int(backbone.num_features),
        num_prefix_tokens=int(backbone.num_prefix_tokens),
        # With a norm after average pooling (fc_norm) the tokens themselves are never normalised.
        has_patch_features=not isinstance(backbone.norm, nn.Identity),
        sites=find_sites(backbone),
    )
    return VisionModel(backbone, spec).eval()


def _check_activation(backbone: Any, timm_name: str, cfg: dict[str, Any]) -> None:
    """Refuse to compute another network than the one the weights were trained as.

    timm keeps two architectures for weights of OpenAI's CLIP and its kin, with GELU and QuickGELU,
    and says in a note which of them is the original.
    """
    wanted = any("use quickgelu model variant" in note for note in cfg.get("notes") or ())
    if wanted and "quickgelu" not in timm_name:
        original = timm_name.replace("_clip_", "_clip_quickgelu_")
        raise UnsupportedModelError(
            f"the weights of {timm_name} were trained with QuickGELU, and this architecture has "
            f"{type(backbone.blocks[0].mlp.act).__name__}. Use timm:{original}."
        )


def _create(timm_name: str, size: int | None, device: str | torch.device) -> Any:
    options: dict[str, Any] = {"num_classes": 0}
    if size is not None:
        options["img_size"] = size
    with torch.device(device):
        try:
            return timm.create_model(timm_name, pretrained=False, **options)
        except TypeError as error:  # not a ViT: its constructor takes no img_size
            if "img_size" not in str(error):
                raise
            return timm.create_model(timm_name, pretrained=False, num_classes=0)
        except RuntimeError as error:
            if "Invalid pretrained tag" not in str(error):
                raise
            raise UnknownNameError(f"timm: {error}.") from error
        except AssertionError as error:
            raise ConfigError(
                f"timm cannot build {timm_name} at image size {size}: {error}"
            ) from error


def with_sites(spec: ModelSpec, hidden: list[int]) -> ModelSpec:
    """`spec` with the hidden widths of a slimmed model, one per block."""
    sites = tuple(
        dataclasses.replace(site, hidden=width)
        for site, width in zip(spec.sites, hidden, strict=True)
    )
    return dataclasses.replace(spec, sites=sites)
