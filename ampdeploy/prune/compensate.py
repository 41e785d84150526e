"""Give the neurons that stay what they can take over from those that go.

h of a pruned neuron is predicted from the kept ones by least squares, and the prediction is
folded into the second linear: with mu and C the mean and covariance of h, S kept and P pruned,
B = C_PS (C_SS + ridge)^-1, the columns of S get + W_P B and the bias + W_P (mu_P - B mu_S). The
shape of the network does not change. With B = 0 only the mean is made up for (mean-shift).

Sources: least-squares reconstruction of pruned channels (He et al., arXiv 1707.06168); Optimal
Brain Surgeon for the closed form. Variance-based pruning of ViTs repairs the mean alone.

Tensor legend: H hidden neurons, C model width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ampdeploy.config import FOLDS
from ampdeploy.errors import ConfigError
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.moments import BlockMoments
from ampdeploy.prune.select import SHRINKAGE, shrunk_factor
from ampdeploy.prune.slim import check_indices, gather, put_linears, slim

# Tokens that the moments must rest on, per kept neuron. Below, the regression would follow the
# noise of the calibration images, and only the mean is made up for.
TOKENS_PER_NEURON = 2.0


def least_squares(
    weight: Tensor, moments: BlockMoments, kept: Tensor, *, shrinkage: float = SHRINKAGE
) -> tuple[Tensor, Tensor]:
    """The second linear's columns after the fold, and what its bias gains.

    Args:
        weight: (C, H) of the dense second linear.
        moments: Of its input.
        kept: (k,) sorted indices of the neurons that stay.
        shrinkage: Ridge, see `select.shrunk_factor`.

    Returns:
        (C, k) and (C,), float64.
    """
    weight = weight.double()
    pruned = _others(kept, weight.shape[1])
    covariance = moments.covariance.double()
    # The pruned rows are not shrunk: the ridge is on the predictors alone.
    factor = shrunk_factor(covariance[kept][:, kept], shrinkage)
    predictor_SP = torch.cholesky_solve(covariance[kept][:, pruned], factor)
    folded = weight[:, kept] + weight[:, pruned] @ predictor_SP.T
    missing = moments.mean[pruned] - predictor_SP.T @ moments.mean[kept]
    return folded, weight[:, pruned] @ missing


def mean_shift(weight: Tensor, moments: BlockMoments, kept: Tensor) -> tuple[Tensor, Tensor]:
    """As `least_squares` with B = 0: the columns unchanged, the bias with the pruned mean."""
    weight = weight.double()
    pruned = _others(kept, weight.shape[1])
    return weight[:, kept], weight[:, pruned] @ moments.mean[pruned]


def _others(kept: Tensor, hidden: int) -> Tensor:
    absent = torch.ones(hidden, dtype=torch.bool, device=kept.device)
    absent[kept] = False
    return absent.nonzero().squeeze(1)


def too_poor(moments: BlockMoments, kept: Tensor) -> bool:
    """Whether least squares on so many neurons would follow the noise of so few tokens."""
    return len(kept) < len(moments.mean) and moments.tokens < TOKENS_PER_NEURON * len(kept)


def folded_linear(
    linear: nn.Linear, moments: BlockMoments, kept: Tensor, *, method: str
) -> nn.Linear:
    """The second linear with only the `kept` columns, repaired.

    Args:
        linear: Dense, (C, H); not changed.
        moments: Of its input.
        kept: (k,) sorted indices.
        method: ``least-squares``, ``mean-shift`` or ``none``. Least squares becomes mean-shift
            where the moments are `too_poor`.
    """
    kept = kept.to(linear.weight.device)
    if len(kept) == linear.in_features:
        return linear
    if method == "none":
        return gather(linear, columns=kept)
    weight = linear.weight.detach()
    settled = method == "least-squares" and not too_poor(moments, kept)
    repair = least_squares if settled else mean_shift
    columns, bias = repair(weight, moments, kept)
    if linear.bias is not None:
        bias = bias + linear.bias.detach()
    return make_linear(columns.to(weight.dtype), bias.to(weight.dtype), like=linear)


def make_linear(weight: Tensor, bias: Tensor, *, like: nn.Linear) -> nn.Linear:
    """A linear with these parameters, in the mode of `like`."""
    result: nn.Linear = nn.utils.skip_init(
        nn.Linear, weight.shape[1], weight.shape[0], device=weight.device, dtype=weight.dtype
    )
    with torch.no_grad():
        result.weight.copy_(weight)
        assert result.bias is not None
        result.bias.copy_(bias)
    return result.train(like.training)


def fold(
    model: VisionModel, kept: Sequence[Tensor], moments: Sequence[BlockMoments], *, method: str
) -> VisionModel:
    """Slim `model` in place and make up for what was removed.

    Args:
        model: Dense.
        kept: Per block, sorted indices of the neurons that stay.
        moments: Per block, of the dense model.
        method: ``least-squares``, ``mean-shift`` or ``none``, see `folded_linear`.

    Raises:
        ConfigError: An unknown method.
        ArtifactError: The indices do not fit the model.
    """
    if method not in FOLDS:
        raise ConfigError(f"unknown fold {method!r}. Known: {', '.join(FOLDS)}.")
    check_indices(model, kept)
    repaired = {}
    for site, indices, block in zip(model.spec.sites, kept, moments, strict=True):
        linear = model.backbone.get_submodule(site.fc_out)
        assert isinstance(linear, nn.Linear)
        repaired[site.fc_out] = folded_linear(linear, block, indices, method=method)
    slim(model, kept)
    put_linears(model.backbone, repaired)
    return model
