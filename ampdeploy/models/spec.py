"""What the rest of ampdeploy needs to know about a model. No torch here: plain facts."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class MlpSite:
    """One MLP whose hidden neurons can be removed exactly.

    A hidden neuron is one channel of h, the input of the second linear (`fc_out`). Removing it
    means removing its row from every linear in `fc_in` and its column from `fc_out`.
    """

    block: int
    """Index of the transformer block."""
    name: str
    """Path of the MLP module inside the backbone, e.g. ``blocks.3.mlp``."""
    fc_in: tuple[str, ...]
    """Paths of the linears that produce h: one for a plain or packed MLP, two for a split gate."""
    fc_out: str
    """Path of the linear that reads h."""
    hidden: int
    """Width of h (after the gate, for gated MLPs)."""
    gated: bool = False
    """h is act(gate) * value."""
    packed: bool = False
    """Gate and value are the two halves of one linear with 2 * hidden rows."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Everything score, search, slim, distil and export may ask about a model."""

    name: str
    """The name the user gave: a registry name or ``timm:<name>``."""
    timm_name: str
    """Architecture and pretrained tag for timm, e.g. ``vit_small_patch14_dinov2.lvd142m``."""
    licence: str
    """Licence of the pretrained weights, as published; ``unknown`` when timm does not say."""
    image_size: int
    """Side of the square input, pixels."""
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    crop_pct: float
    """Images are scaled to floor(image_size / crop_pct) pixels before the centre crop."""
    crop_mode: str
    """What is scaled to that, in timm's words: ``center`` the short side, ``squash`` both sides,
    ``border`` the long side, the rest being filled with the mean colour."""
    interpolation: str
    """``bicubic`` or ``bilinear``."""
    pooling: str
    """How `features` is pooled from the tokens: ``token`` (CLS), ``avg``, ``map``, ..."""
    feature_dim: int
    """Width of `features`, before any projection or classification head."""
    num_prefix_tokens: int
    """CLS and register tokens in front of the patch tokens."""
    has_patch_features: bool
    sites: tuple[MlpSite, ...]

    @property
    def depth(self) -> int:
        """Number of prunable blocks."""
        return len(self.sites)

    def to_json(self) -> dict[str, Any]:
        """Plain data for `--json` and the manifest."""
        return dataclasses.asdict(self)
