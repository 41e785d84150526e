"""One shape for every supported backbone: stem, a list of blocks, head.

Tensor legend: B images, N tokens (prefix + patches), P patches, C model width.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from ampdeploy.errors import UnsupportedModelError
from ampdeploy.models.spec import ModelSpec


class BlockState(NamedTuple):
    """What one block hands to the next."""

    tokens: Tensor
    """(B, N, C)"""
    rope: Tensor | None
    """Rotary position embedding: shared by all blocks, or indexed by block (rope_mixed)."""


class Features(NamedTuple):
    """What a deployed model returns."""

    features: Tensor
    """(B, C): pooled, normalised by the model's own final norm, before projection or head."""
    patch_features: Tensor | None
    """(B, P, C) after the final norm, or None where the model has no patch tokens to offer."""


class VisionModel(nn.Module):
    """A timm ViT or EVA backbone cut into stem, blocks and head.

    Calling it maps images (B, 3, S, S) to `Features`. The parts let score, search and distil run
    a prefix or a suffix of the network without knowing its family.
    """

    backbone: Any
    """The timm module; its state dict is what checkpoints hold."""

    def __init__(self, backbone: nn.Module, spec: ModelSpec) -> None:
        super().__init__()
        self.backbone = backbone
        self.spec = spec

    @property
    def blocks(self) -> nn.ModuleList:
        """The transformer blocks, first to last."""
        blocks: nn.ModuleList = self.backbone.blocks
        return blocks

    def stem(self, images: Tensor) -> BlockState:
        """Images (B, 3, S, S) to the tokens that enter block 0."""
        backbone = self.backbone
        tokens = backbone.patch_embed(images)
        embedded = backbone._pos_embed(tokens)
        # timm's Eva returns (tokens, rope); VisionTransformer returns tokens alone.
        tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)
        return BlockState(backbone.norm_pre(tokens), rope)

    def run_block(self, index: int, state: BlockState) -> BlockState:
        """One block, (B, N, C) to (B, N, C)."""
        block = self.blocks[index]
        if state.rope is None:
            return BlockState(block(state.tokens), None)
        rope = state.rope[index] if getattr(self.backbone, "rope_mixed", False) else state.rope
        return BlockState(block(state.tokens, rope=rope), state.rope)

    def run_blocks(self, state: BlockState, start: int = 0, stop: int | None = None) -> BlockState:
        """Blocks `start` (inclusive) to `stop` (exclusive, default the last)."""
        for index in range(start, len(self.blocks) if stop is None else stop):
            state = self.run_block(index, state)
        return state

    def head(self, tokens: Tensor) -> Features:
        """Final norm and pooling of the last block's output."""
        backbone = self.backbone
        normed = backbone.norm(tokens)
        features = backbone.forward_head(normed, pre_logits=True)
        if not self.spec.has_patch_features:
            return Features(features, None)
        return Features(features, normed[:, self.spec.num_prefix_tokens :])

    def forward_tokens(self, images: Tensor) -> Tensor:
        """Tokens (B, N, C) before the final norm: what distillation compares."""
        return self.run_blocks(self.stem(images)).tokens

    def forward(self, images: Tensor) -> Features:
        return self.head(self.forward_tokens(images))


def check_backbone(backbone: nn.Module, name: str) -> None:
    """Refuse a timm model that is not cut the way `VisionModel` cuts it.

    Raises:
        UnsupportedModelError: Naming the part that is missing.
    """
    parts = ("patch_embed", "_pos_embed", "norm_pre", "blocks", "norm", "forward_head")
    missing = [part for part in parts if not hasattr(backbone, part)]
    if missing:
        raise UnsupportedModelError(
            f"{name} ({type(backbone).__name__}) is not a plain ViT: it has no "
            f"{', '.join(missing)}. ampdeploy prunes timm's VisionTransformer and Eva families."
        )
