"""Which hidden neurons to keep, given that what is left will be re-fitted.

Backward elimination: again and again the neuron whose removal costs least is taken out, with the
remaining columns of the second linear re-fitted each time. For one step this is Optimal Brain
Surgeon (Hassibi and Stork, 1992) with a whole neuron as the unit, as ZipLM (arXiv 2302.04089) and
SlimGPT do for language models; the error is measured in the metric of `moments`, so that it
predicts the loss of cosine at the model's output.

Tensor legend: H hidden neurons, C model width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from ampdeploy.errors import VerificationError
from ampdeploy.prune.moments import BlockMoments

# Neurons taken out between two updates of the whole inverse. Only speed depends on it.
UPDATE_EVERY = 32

# Ridge on every neuron's own variance. It keeps the solve stable where neurons are copies of each
# other, and being relative, survives channels a thousand times as large as the rest.
SHRINKAGE = 1e-4


def shrunk_factor(covariance: Tensor, shrinkage: float = SHRINKAGE) -> Tensor:
    """Lower Cholesky factor, float64, of `covariance` (H, H) with a ridge on each channel.

    A channel that never moves gets a trace of the median one's variance; the mean would be an
    outlier channel's, and drown the others. With fewer tokens than neurons the covariance is
    singular, and after rounding not even semidefinite: the ridge then grows tenfold until it
    factors.

    Raises:
        VerificationError: It never does, so the values are broken.
    """
    covariance = covariance.double()
    variance = covariance.diagonal().clamp(min=0)
    moving = variance[variance > 0]
    floor = 1e-6 * (moving.median() if len(moving) else 1.0)
    while shrinkage <= 1:
        factor, failed = torch.linalg.cholesky_ex(
            covariance + torch.diag(shrinkage * variance + floor)
        )
        if not failed:
            return factor
        shrinkage *= 10
    raise VerificationError(
        "the activations' covariance is no covariance: it has no Cholesky factor even with its "
        "diagonal doubled. Check the weights with `ampdeploy eval` in float32."
    )


def metric_weight(weight: Tensor, metric: Tensor | None) -> Tensor:
    """R @ weight with R^T R = metric: (C, H), whose squared norms are errors in that metric."""
    weight = weight.double()
    if metric is None:
        return weight
    values, vectors = torch.linalg.eigh(metric.double())
    return (vectors * values.clamp(min=0).sqrt()).T @ weight


def eliminate(weight: Tensor, moments: BlockMoments, *, shrinkage: float = SHRINKAGE) -> Tensor:
    """Order in which to keep the neurons of one block.

    Args:
        weight: (C, H) of the second linear.
        moments: Of its input.
        shrinkage: Ridge, see `shrunk_factor`.

    Returns:
        (H,) int64 on the CPU: a permutation, the neuron to be kept longest first. The first k of
        it are the best k found, for every k.
    """
    # float32 from here on: the inverse was taken in float64, and every step only removes from it.
    inverse = torch.cholesky_inverse(shrunk_factor(moments.covariance, shrinkage)).float()
    weights = metric_weight(weight, moments.metric).float()
    remaining = torch.arange(len(inverse), device=inverse.device)
    removed: list[Tensor] = []
    with _one_thread():
        while len(remaining) > 1:
            steps = min(UPDATE_EVERY, len(remaining) - 1)
            taken, inverse, weights = _take_out(inverse, weights, steps)
            removed.append(remaining[taken])
            alive = torch.ones_like(remaining, dtype=torch.bool)
            alive[taken] = False
            remaining = remaining[alive]
    return torch.cat([*removed, remaining]).flip(0).cpu()


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Many small operations: handing each to several threads takes longer than doing it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _take_out(inverse: Tensor, weights: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """Remove `steps` neurons one by one; the inverse and the weights are updated once at the end.

    Within, only what the choice needs is kept up to date: each neuron's diagonal entry of the
    inverse and the squared norm of its weights. Columns are brought up to date when needed from
    those taken out before.

    Returns:
        (their positions, the inverse without them, the weights without them).
    """
    n = len(inverse)
    diagonal = inverse.diagonal().clone()
    norms = weights.square().sum(dim=0)
    alive = torch.ones(n, dtype=torch.bool, device=inverse.device)
    columns = inverse.new_zeros(n, steps)  # of the inverse, at the time of each removal
    vectors = weights.new_zeros(len(weights), steps)
    scale = inverse.new_zeros(steps)  # 1 / the diagonal entry at that time
    taken = torch.zeros(steps, dtype=torch.int64, device=inverse.device)
    for step in range(steps):
        cost = (norms / diagonal).masked_fill(~alive, torch.inf)
        q = cost.argmin()
        past, past_vectors = columns[:, :step], vectors[:, :step]
        mixed = past[q] * scale[:step]
        column = inverse[:, q] - past @ mixed
        vector = weights[:, q] - past_vectors @ mixed
        ratio = column / column[q]
        # Products of the current weights with `vector`, without forming the current weights.
        products = weights.T @ vector - past @ ((past_vectors.T @ vector) * scale[:step])
        norms = (norms - 2 * products * ratio + vector.square().sum() * ratio.square()).clamp(min=0)
        diagonal = (diagonal - column * ratio).clamp(min=torch.finfo(torch.float32).tiny)
        columns[:, step], vectors[:, step], scale[step] = column, vector, 1 / column[q]
        taken[step] = q
        alive[q] = False
    scaled = columns[alive] * scale
    inverse = inverse[alive][:, alive] - scaled @ columns[alive].T
    weights = weights[:, alive] - vectors @ scaled.T
    return taken, inverse, weights


def error_curve(
    weight: Tensor, moments: BlockMoments, order: Tensor, *, shrinkage: float = SHRINKAGE
) -> Tensor:
    """Predicted loss of cosine for every width, after the fold, without running the model.

    With the neurons in `order` and covariance = L L^T, what k kept neurons cannot explain is in
    the columns of L from k on: the error at width k is half the squared norm of those columns of
    R W L. One Cholesky gives every width.

    Args:
        weight: (C, H) of the second linear.
        moments: Of its input.
        order: (H,), the neuron to be kept longest first, from any criterion.
        shrinkage: Ridge, see `shrunk_factor`.

    Returns:
        (H + 1,) float64 on the CPU: entry k is the error with the first k of `order` kept, falling
        to 0 at H. With a metric it predicts 1 - cosine of the pooled feature, plus that of the
        patches where there are any; without, half the squared error of the MLP's output.
    """
    order = order.to(weight.device)
    factor = shrunk_factor(moments.covariance[order][:, order], shrinkage)
    output = weight.double()[:, order] @ factor
    weighed = output if moments.metric is None else moments.metric.double() @ output
    explained = (output * weighed).sum(dim=0).clamp(min=0)
    missing = explained.flip(0).cumsum(0).flip(0) / 2
    return torch.cat([missing, missing.new_zeros(1)]).cpu()


def rank(weight: Tensor, moments: BlockMoments) -> Tensor:
    """Score of every neuron of one block: its `top_neurons` are the best found at any width.

    Args:
        weight: (C, H) of the second linear.
        moments: Of its input.

    Returns:
        (H,) float32 on the CPU: the predicted loss of cosine once this neuron, and all that score
        lower, are gone and the rest is re-fitted. So the scores are the block's error curve too.
    """
    order = eliminate(weight, moments)
    scores = torch.empty(len(order), dtype=torch.float32)
    scores[order] = error_curve(weight, moments, order)[:-1].float()
    return scores


def curve_of(scores: Tensor) -> Tensor:
    """(H + 1,) error at every width, from the scores (H,) that `rank` gave."""
    return torch.cat([scores.sort(descending=True).values, scores.new_zeros(1)])
