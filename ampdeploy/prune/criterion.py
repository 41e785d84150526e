"""Label-free criteria: how sharply the images of one batch tell each other apart.

Source: AMP, arXiv 2603.08100, section 3.2. z is the pooled feature (B, C) before any projection.
s_ij = z_i . z_j of the normalised features, p_i = softmax_j(s_ij / tau), the pair of an image with
itself included, always in float32.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Criterion = Callable[[Tensor, float], Tensor]


def log_similarity(features: Tensor, inv_temperature: float) -> Tensor:
    """log p of shape (B, B): row i is how image i spreads over the batch."""
    normalised = F.normalize(features.float(), dim=-1)
    return F.log_softmax(inv_temperature * normalised @ normalised.T, dim=-1)


def entropy(features: Tensor, inv_temperature: float) -> Tensor:
    """AMP's criterion E = -1/B sum_ij p_ij log p_ij, a float32 scalar in [0, log B].

    E depends on B, so B belongs to every number that is reported.
    """
    log_p = log_similarity(features, inv_temperature)
    return -(log_p.exp() * log_p).sum(dim=-1).mean()


def cross_entropy(features: Tensor, inv_temperature: float) -> Tensor:
    """The one-hot baseline that AMP replaces: -1/B sum_i log p_ii, each image its own class."""
    return -log_similarity(features, inv_temperature).diagonal().mean()


CRITERIA: dict[str, Criterion] = {"entropy": entropy, "cross-entropy": cross_entropy}


def batched(
    criterion: Criterion, features: Tensor, inv_temperature: float, batch_size: int
) -> float:
    """Mean of `criterion` over consecutive batches of exactly `batch_size` images.

    Args:
        criterion: One of `CRITERIA`.
        features: (N, C); N is a multiple of `batch_size`, which the caller sees to.
        inv_temperature: 1 / tau.
        batch_size: B.
    """
    values = [criterion(batch, inv_temperature) for batch in features.split(batch_size)]
    return float(torch.stack(values).mean())
