"""What each part of the default is worth: one thing changed at a time, at equal size.

Scores: all with the least-squares fold and the allocation from predicted curves, so that only the
choice of neurons differs. Allocations: all with the default score and the fold. Repairs: all with
the default's neurons.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ampdeploy.errors import DataError
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import Budget
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.moments import BlockMoments
from ampdeploy.prune.search import SearchResult
from ampdeploy.prune.select import curve_of, error_curve, metric_weight, rank
from ampdeploy.prune.slim import top_neurons
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.methods import amp, ours
from benchmarks.compression.methods.variance import MOMENTS
from benchmarks.compression.widths import uniform

Score = Callable[[Bench, int, Tensor, BlockMoments], Tensor]
"""(bench, block, fc_out weight (C, H), weighted moments) -> score (H,), high is kept."""


def _weights(model: VisionModel) -> list[Tensor]:
    linears = [model.backbone.get_submodule(site.fc_out) for site in model.spec.sites]
    return [linear.weight.detach() for linear in linears if isinstance(linear, nn.Linear)]


def _random(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * bench.seed + block)
    return torch.rand(weight.shape[1], generator=generator)


def _entropy(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    scores: list[Tensor] = bench.get(amp.SCORES)
    return scores[block]


def _variance(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    return moments.covariance.diagonal()


def _energy(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    """Mean square of the activation times the squared norm of the weights that read it."""
    square = moments.covariance.diagonal().double() + moments.mean.square()
    return square * weight.double().square().sum(dim=0)


def _second_order(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    """Centred second-order Taylor term of the loss of cosine, by random projections: what losing
    this neuron alone costs, with its mean made up for."""
    return metric_weight(weight, moments.metric).square().sum(dim=0) * (
        moments.covariance.diagonal().double()
    )


def _cholesky(bench: Bench, block: int, weight: Tensor, moments: BlockMoments) -> Tensor:
    """Pivoted Cholesky of the activations' covariance: each time the neuron that those before
    explain least. Columns are not weighted by what reads them."""
    residual = moments.covariance.diagonal().double().clone()
    columns = torch.zeros(len(residual), len(residual), dtype=torch.float64)
    scores = torch.zeros(len(residual))
    for step in range(len(residual)):
        pivot = int(residual.argmax())
        scores[pivot] = len(residual) - step
        column = moments.covariance[pivot].double() - columns[:, :step] @ columns[pivot, :step]
        column = column / residual[pivot].clamp(min=1e-30).sqrt()
        columns[:, step] = column
        residual = (residual - column.square()).clamp(min=0)
        residual[pivot] = -1  # never again
        residual[scores > 0] = -1
    return scores


def _by_curves(
    bench: Bench, budget: Budget, scores: Sequence[Tensor], moments: Sequence[BlockMoments]
) -> list[Tensor]:
    """Neurons by `scores`, widths by their predicted error curves."""
    curves = []
    for weight, score, block in zip(_weights(bench.dense), scores, moments, strict=True):
        order = score.argsort(descending=True, stable=True)
        curves.append(error_curve(weight, block, order).numpy())
    widths = allocate(curves, budget)
    return [top_neurons(score, width) for score, width in zip(scores, widths, strict=True)]


def _scored(score: Score) -> Callable[[Bench, Budget], Pruned]:
    def prune(bench: Bench, budget: Budget) -> Pruned:
        moments = bench.get(ours.RANKING).moments
        scores = [
            score(bench, index, weight, block).cpu()
            for index, (weight, block) in enumerate(
                zip(_weights(bench.dense), moments, strict=True)
            )
        ]
        kept = _by_curves(bench, budget, scores, moments)
        return Pruned(model=fold(bench.copy(), kept, moments, method="least-squares"))

    return prune


def _plain(bench: Bench, budget: Budget) -> Pruned:
    """The default's elimination with all tokens alike and errors in the output's own units."""
    moments: list[BlockMoments] = bench.get(MOMENTS)
    pairs = zip(_weights(bench.dense), moments, strict=True)
    scores = [rank(weight, block) for weight, block in pairs]
    kept = _by_curves(bench, budget, scores, moments)
    return Pruned(model=fold(bench.copy(), kept, moments, method="least-squares"))


def _uniform(bench: Bench, budget: Budget) -> Pruned:
    ranking = bench.get(ours.RANKING)
    kept = uniform(ranking.scores, budget)
    return Pruned(model=fold(bench.copy(), kept, ranking.moments, method="least-squares"))


def _corrected(exponent: float, *, by_kl: bool = False) -> Callable[[Bench, Budget], Pruned]:
    """Curves times (measured / predicted) to the power of `exponent`."""

    def prune(bench: Bench, budget: Budget) -> Pruned:
        ranking = bench.get(ours.RANKING)
        result: SearchResult = bench.get(ours.SEARCH)[budget.neurons][0]
        curves = []
        for score, block in zip(ranking.scores, result.measurements, strict=True):
            measured = block.measured.kl if by_kl else block.measured.total
            if measured is None:
                raise DataError("KL needs three images or more to measure on. Use more --images.")
            ratio = measured / block.predicted if block.predicted > 0 else 1.0
            curves.append(curve_of(score).double().numpy() * ratio**exponent)
        widths = allocate(curves, budget)
        kept = [top_neurons(s, width) for s, width in zip(ranking.scores, widths, strict=True)]
        return Pruned(model=fold(bench.copy(), kept, ranking.moments, method="least-squares"))

    return prune


def _repaired(method: str) -> Callable[[Bench, Budget], Pruned]:
    def prune(bench: Bench, budget: Budget) -> Pruned:
        ranking = bench.get(ours.RANKING)
        result: SearchResult = bench.get(ours.SEARCH)[budget.neurons][0]
        return Pruned(model=fold(bench.copy(), result.kept, ranking.moments, method=method))

    return prune


def _row(name: str, label: str, prune: Callable[[Bench, Budget], Pruned], *parts: Part) -> Method:
    return Method(name=name, label=label, prune=prune, parts=parts)


METHODS = (
    _row("score-random", "score: random", _scored(_random), ours.RANKING),
    _row("score-variance", "score: variance", _scored(_variance), ours.RANKING),
    _row("score-energy", "score: activation energy x weight norm", _scored(_energy), ours.RANKING),
    _row("score-cholesky", "score: pivoted Cholesky", _scored(_cholesky), ours.RANKING),
    _row(
        "score-entropy",
        "score: entropy-Taylor (AMP)",
        _scored(_entropy),
        ours.RANKING,
        amp.SCORES,
    ),
    _row("score-second-order", "score: second-order Taylor", _scored(_second_order), ours.RANKING),
    _row("score-plain", "elimination, all tokens alike, no metric", _plain, MOMENTS),
    _row("allocation-uniform", "allocation: uniform", _uniform, ours.RANKING),
    _row(
        "allocation-predicted",
        "allocation: predicted curves",
        _corrected(0),
        ours.RANKING,
        ours.SEARCH,
    ),
    _row(
        "allocation-half", "allocation: half corrected", _corrected(0.5), ours.RANKING, ours.SEARCH
    ),
    _row(
        "allocation-measured",
        "allocation: fully corrected",
        _corrected(1),
        ours.RANKING,
        ours.SEARCH,
    ),
    _row(
        "allocation-kl",
        "allocation: corrected by KL",
        _corrected(1, by_kl=True),
        ours.RANKING,
        ours.SEARCH,
    ),
    _row("repair-none", "repair: none", _repaired("none"), ours.RANKING, ours.SEARCH),
    _row(
        "repair-mean-shift",
        "repair: mean-shift",
        _repaired("mean-shift"),
        ours.RANKING,
        ours.SEARCH,
    ),
    ours.OURS_FOLD,
    ours.OURS,
)
