"""Every registered name is what its publishers say it is."""

from __future__ import annotations

import pytest

from ampdeploy.errors import ConfigError, UnknownNameError, UnsupportedModelError
from ampdeploy.models.build import build_model
from ampdeploy.models.profile import profile_model
from ampdeploy.models.registry import REGISTRY, lookup
from tests.conftest import TINY

# Published figures are rounded to two or three digits, with or without the classifier head.
TOLERANCE = 0.016


@pytest.mark.parametrize("name", REGISTRY)
def test_size_and_cost_match_the_published_figures(name):
    published = REGISTRY[name].published
    profile = profile_model(build_model(name, device="meta", image_size=published.image_size))
    flops = profile.flops - (0 if published.counts_attention else profile.attention_flops)
    assert profile.params == pytest.approx(published.params, rel=TOLERANCE)
    assert flops == pytest.approx(published.flops, rel=TOLERANCE)


@pytest.mark.parametrize("name", REGISTRY)
def test_every_block_has_one_site_at_the_default_size(name):
    model = build_model(name, device="meta")
    spec = model.spec
    assert spec.image_size == 224
    assert len(spec.sites) == len(model.blocks) == spec.depth
    assert [site.block for site in spec.sites] == list(range(spec.depth))
    assert all(
        model.backbone.get_submodule(site.fc_out).in_features == site.hidden for site in spec.sites
    )
    assert spec.has_patch_features
    assert spec.licence in {"Apache-2.0", "MIT"}


def test_dinov2_giant_is_gated_and_the_others_are_plain():
    gated = {name for name in REGISTRY if build_model(name, device="meta").spec.sites[0].gated}
    assert gated == {"dinov2_g", "dinov2_g_reg"}


def test_slim_profile_counts_only_what_is_left():
    import torch

    from ampdeploy.prune.slim import slim

    model = build_model("dinov2_g", device="meta")
    dense = profile_model(model)
    slim(model, [torch.arange(site.hidden // 2) for site in model.spec.sites])
    half = profile_model(model)
    removed = sum(3 * 1536 * 2048 + 2 * 2048 for _ in range(40))
    assert dense.params - half.params == removed
    assert dense.flops - half.flops == 2 * 257 * sum(3 * 1536 * 2048 for _ in range(40))


def test_unknown_name_offers_close_matches():
    with pytest.raises(UnknownNameError, match="dinov2_s") as caught:
        lookup("dinov2-s")
    assert caught.value.exit_code == 2
    with pytest.raises(UnknownNameError, match="vit_tiny_patch16_224"):
        build_model("timm:vit_tny_patch16_224")
    with pytest.raises(UnknownNameError, match="timm:<name>"):
        lookup("timm:")
    with pytest.raises(UnknownNameError, match="pretrained tag"):
        build_model("timm:vit_tiny_patch16_224.no_such_tag")


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:swin_tiny_patch4_window7_224"])
def test_a_model_that_is_no_plain_vit_is_refused(name):
    with pytest.raises(UnsupportedModelError, match="not a plain ViT"):
        build_model(name, device="meta")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("timm:eva02_base_patch14_224", "LayerNorm over the hidden neurons"),
        ("timm:vit_large_patch14_xp_224", "LayerNorm over the hidden neurons|no separate"),
        ("timm:vit_base_patch16_18x2_224", "no separate `mlp`"),
    ],
)
def test_an_mlp_that_cannot_be_slimmed_exactly_is_refused(name, reason):
    import timm

    if not timm.is_model(name[5:]):
        pytest.skip(f"this timm has no {name}")
    with pytest.raises(UnsupportedModelError, match=reason):
        build_model(name, device="meta")


def test_image_size_must_fit_the_patches():
    with pytest.raises(ConfigError, match="210 or 224"):
        build_model("dinov2_s", image_size=220, device="meta")


def test_image_size_changes_the_tokens():
    assert profile_model(build_model(TINY, image_size=64, device="meta")).tokens == 17
