"""How far a pruned model's features are from the dense model's, on the same images.

Entropy (AMP) is no divergence: any fall of it is accepted. These are zero only where nothing
changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ampdeploy.models.vision import Features


@dataclass(frozen=True, kw_only=True)
class Divergence:
    """Means over the images that were compared."""

    cosine: float
    """1 - cosine of the pooled features."""
    patch_cosine: float | None
    """1 - cosine of the patch features, over all patches; None where the model has none."""
    kl: float | None
    """`masked_kl`; None with fewer than three images, where nothing is left to compare."""

    @property
    def total(self) -> float:
        """What the search minimises: both losses of cosine, with the same weight."""
        return self.cosine + (self.patch_cosine or 0.0)


def masked_kl(dense: Tensor, pruned: Tensor, inv_temperature: float) -> Tensor:
    """Mean KL(p_dense || p_pruned) of how an image spreads over the others, itself left out.

    With itself included, as in AMP's entropy, the pair of an image with itself takes most of the
    probability and hides the rest.

    Args:
        dense: (B, C) pooled features, B of 3 or more.
        pruned: (B, C), the same images.
        inv_temperature: 1 / tau.
    """

    def log_p(features: Tensor) -> Tensor:
        unit = F.normalize(features.float(), dim=-1)
        # Logits of the B - 1 others: masked entries would make 0 * -inf.
        others = ~torch.eye(len(unit), dtype=torch.bool, device=unit.device)
        logits = (inv_temperature * unit @ unit.T)[others].view(len(unit), -1)
        return F.log_softmax(logits, dim=-1)

    return F.kl_div(log_p(pruned), log_p(dense), log_target=True, reduction="batchmean")


def divergence(
    dense: Sequence[Features], pruned: Sequence[Features], inv_temperature: float
) -> Divergence:
    """Compare two models on the same micro-batches."""

    def loss(ours: Tensor, theirs: Tensor) -> float:
        # Half the squared distance of the unit features is 1 - cosine, without the cancellation.
        difference = F.normalize(ours.float(), dim=-1) - F.normalize(theirs.float(), dim=-1)
        return float(difference.square().sum(dim=-1).mean() / 2)

    def joined(parts: Sequence[Features], name: str) -> Tensor:
        return torch.cat([getattr(part, name) for part in parts])

    features = joined(dense, "features"), joined(pruned, "features")
    has_patches = dense[0].patch_features is not None
    return Divergence(
        cosine=loss(*features),
        patch_cosine=loss(joined(dense, "patch_features"), joined(pruned, "patch_features"))
        if has_patches
        else None,
        kl=float(masked_kl(*features, inv_temperature)) if len(features[0]) > 2 else None,
    )
