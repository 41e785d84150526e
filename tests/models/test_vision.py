"""Stem, blocks and head compute what the timm model itself computes."""

from __future__ import annotations

import pytest
import torch

from tests.mlp_kinds import BACKBONES, SIZE, make


@pytest.mark.parametrize("kind", BACKBONES)
def test_parts_equal_the_whole(kind):
    model = make(kind)
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        tokens = model.backbone.forward_features(images)
        expected = model.backbone.forward_head(tokens, pre_logits=True)
        features, patches = model(images)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    if kind == "average_pool":  # its tokens are never normalised
        assert patches is None
    else:
        prefix = model.spec.num_prefix_tokens
        torch.testing.assert_close(patches, tokens[:, prefix:], rtol=1e-5, atol=1e-6)
        assert patches.shape == (2, 16, 32)


def test_prefix_and_suffix_compose():
    model = make("eva_mixed_rope")
    images = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        state = model.run_blocks(model.stem(images), 0, 2)
        suffix = model.head(model.run_blocks(state, 2).tokens).features
        torch.testing.assert_close(suffix, model(images).features)
