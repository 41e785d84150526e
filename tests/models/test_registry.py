"""Every registered name is what its publishers say it is."""

from __future__ import annotations

import pytest
from timm.models.vision_transformer import VisionTransformer

from ampdeploy.errors import ConfigError, UnknownNameError, UnsupportedModelError
from ampdeploy.models.build import build_model, wrap_backbone
from ampdeploy.models.profile import profile_model
from ampdeploy.models.registry import REGISTRY, lookup, recipe_of
from tests.conftest import TINY
from tests.mlp_kinds import CFG

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


def test_an_input_that_is_not_square_is_refused():
    backbone = VisionTransformer(
        img_size=(56, 28), patch_size=14, embed_dim=8, depth=1, num_heads=1
    )
    with pytest.raises(UnsupportedModelError, match="56 x 28"):
        wrap_backbone(backbone, name="t", timm_name="t", cfg=CFG)


def test_image_size_must_fit_the_patches():
    with pytest.raises(ConfigError, match="210 or 224"):
        build_model("dinov2_s", image_size=220, device="meta")


def test_image_size_changes_the_tokens():
    assert profile_model(build_model(TINY, image_size=64, device="meta")).tokens == 17


def test_activations_are_those_the_weights_were_trained_with():
    quick = {
        name
        for name in REGISTRY
        if type(build_model(name, device="meta").blocks[0].mlp.act).__name__ == "QuickGELU"
    }
    assert quick == {"clip_l14"}


def test_a_tag_whose_weights_want_quickgelu_is_refused_without_it():
    with pytest.raises(UnsupportedModelError, match="vit_base_patch32_clip_quickgelu_224"):
        build_model("timm:vit_base_patch32_clip_224.openai", device="meta")
    build_model("timm:vit_base_patch32_clip_quickgelu_224.openai", device="meta")


def test_each_family_gets_its_published_recipe():
    assert recipe_of("dinov2_g").threshold == 5e-3
    assert recipe_of("dinov2_g").strong_augment
    assert (recipe_of("openclip_g").inv_temperature, recipe_of("openclip_g").threshold) == (
        15,
        0.01,
    )
    assert recipe_of("eva02_clip_e").threshold == 2e-3
    assert recipe_of("timm:vit_small_patch16_dinov3") is recipe_of("dinov2_s")
    assert not recipe_of("timm:vit_base_patch16_224").strong_augment
