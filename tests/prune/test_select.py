"""Elimination against Optimal Brain Surgeon done naively; the curve against least squares."""

from __future__ import annotations

import pytest
import torch

from ampdeploy.errors import VerificationError
from ampdeploy.prune.moments import BlockMoments
from ampdeploy.prune.select import (
    SHRINKAGE,
    UPDATE_EVERY,
    curve_of,
    eliminate,
    error_curve,
    metric_weight,
    rank,
    shrunk_factor,
)
from ampdeploy.prune.slim import top_neurons

WIDTH = 12


def make_moments(hidden_TH, *, metric=None):
    hidden_TH = hidden_TH.double()
    return BlockMoments(
        mean=hidden_TH.mean(dim=0),
        covariance=torch.cov(hidden_TH.T, correction=0).float(),
        metric=metric,
        tokens=len(hidden_TH),
    )


def random_case(hidden, *, tokens=None, seed=0, with_metric=True):
    """(weight, moments, h): correlated neurons of very different scale."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(hidden, hidden, generator=generator) / hidden**0.5
    mixing += torch.diag(torch.rand(hidden, generator=generator) * 2)
    h_TH = torch.randn(tokens or 8 * hidden, hidden, generator=generator) @ mixing + 0.7
    weight = torch.randn(WIDTH, hidden, generator=generator)
    root = torch.randn(WIDTH, WIDTH, generator=generator)
    metric = root @ root.T if with_metric else None
    return weight, make_moments(h_TH, metric=metric), h_TH


def shrunk(moments, shrinkage=SHRINKAGE):
    factor = shrunk_factor(moments.covariance, shrinkage)
    return factor @ factor.T


def residual(weight, covariance, metric, kept):
    """1/2 trace(metric @ error covariance) with the pruned neurons predicted from `kept`."""
    weight, covariance = weight.double(), covariance.double()
    hidden = weight.shape[1]
    pruned = torch.tensor(sorted(set(range(hidden)) - set(kept.tolist())), dtype=torch.int64)
    left = covariance[pruned][:, pruned]
    if len(kept):
        cross = covariance[pruned][:, kept]
        left = left - cross @ torch.linalg.solve(covariance[kept][:, kept], cross.T)
    metric = torch.eye(len(weight)).double() if metric is None else metric.double()
    out = weight[:, pruned]
    return float((metric @ out @ left @ out.T).trace() / 2)


def naive_surgeon(weight, moments):
    """Order of removal, with the inverse taken anew at every step, and every step's costs."""
    covariance = shrunk(moments)
    weight = metric_weight(weight, moments.metric)
    remaining = list(range(weight.shape[1]))
    removed, costs = [], []
    while len(remaining) > 1:
        inverse = torch.linalg.inv(covariance[remaining][:, remaining])
        cost = weight.square().sum(dim=0) / inverse.diagonal()
        q = int(cost.argmin())
        weight = weight - torch.outer(weight[:, q], inverse[q] / inverse[q, q])
        weight = torch.cat([weight[:, :q], weight[:, q + 1 :]], dim=1)
        removed.append(remaining.pop(q))
        costs.append(cost.tolist())
    return removed + remaining, costs


@pytest.mark.parametrize("with_metric", [True, False])
@pytest.mark.parametrize("hidden", [2, 7, UPDATE_EVERY, UPDATE_EVERY + 1, 3 * UPDATE_EVERY + 5])
def test_elimination_is_optimal_brain_surgeon(hidden, with_metric):
    weight, moments, _ = random_case(hidden, seed=hidden, with_metric=with_metric)
    expected, costs = naive_surgeon(weight, moments)
    # No near-ties, or rounding could decide.
    assert all(sorted(c)[1] > 1.0001 * sorted(c)[0] for c in costs)
    order = eliminate(weight, moments)
    assert order.dtype == torch.int64
    assert order.flip(0).tolist() == expected


@pytest.mark.parametrize("with_metric", [True, False])
def test_the_curve_is_the_least_squares_residual_at_every_width(with_metric):
    hidden = 20
    weight, moments, _ = random_case(hidden, with_metric=with_metric)
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(2))
    curve = error_curve(weight, moments, order)
    assert curve.shape == (hidden + 1,)
    assert curve.dtype == torch.float64
    covariance = shrunk(moments)
    expected = [residual(weight, covariance, moments.metric, order[:k]) for k in range(hidden + 1)]
    torch.testing.assert_close(curve, torch.tensor(expected).double(), rtol=1e-6, atol=1e-9)
    assert bool((curve.diff() <= 0).all())
    assert curve[-1] == 0


def test_the_curve_is_what_a_regression_on_the_tokens_leaves():
    hidden = 10
    weight, moments, h_TH = random_case(hidden, with_metric=False)
    order = torch.randperm(hidden, generator=torch.Generator().manual_seed(2))
    curve = error_curve(weight, moments, order, shrinkage=0)
    h_TH, weight = h_TH.double(), weight.double()
    target = h_TH @ weight.T
    for k in range(hidden + 1):
        inputs = torch.cat([h_TH[:, order[:k]], torch.ones(len(h_TH), 1).double()], dim=1)
        fitted = inputs @ torch.linalg.lstsq(inputs, target).solution
        expected = float((target - fitted).square().sum(dim=1).mean() / 2)
        assert float(curve[k]) == pytest.approx(expected, rel=1e-4, abs=2e-5 * float(curve[0]))


def test_eliminated_neurons_cost_less_than_random_ones():
    weight, moments, _ = random_case(60)
    ours = error_curve(weight, moments, eliminate(weight, moments))
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        chance = error_curve(weight, moments, torch.randperm(60, generator=generator))
        assert float(ours[30]) < 0.5 * float(chance[30])


def test_of_two_copies_one_goes_first_and_costs_nothing():
    weight, _, h_TH = random_case(40)
    h_TH[:, 33] = h_TH[:, 4]
    weight[:, 33] = 3 * weight[:, 4]
    moments = make_moments(h_TH)
    order = eliminate(weight, moments)
    assert int(order[-1]) in (4, 33)
    curve = error_curve(weight, moments, order)
    # Of what its absence alone would cost, only the ridge's share.
    alone = 0.5 * float(weight[:, 33].square().sum() * moments.covariance[33, 33])
    assert 0 < float(curve[39]) < 3 * SHRINKAGE * alone
    assert float(curve[38]) > 3 * float(curve[39])
    # The other one now does the work of both.
    survivor = ({4, 33} - {int(order[-1])}).pop()
    assert order.tolist().index(survivor) < 30


def test_a_neuron_that_never_moves_is_free():
    weight, _, h_TH = random_case(20)
    h_TH[:, 7] = 2.5  # only a bias
    moments = make_moments(h_TH)
    order = eliminate(weight, moments)
    assert int(order[-1]) == 7
    curve = error_curve(weight, moments, order)
    assert 0 <= float(curve[-2]) < 1e-3 * float(curve[-3])


def test_neurons_that_all_never_move_are_free():
    weight, _, _ = random_case(20)
    moments = make_moments(torch.full((50, 20), 2.5))
    order = eliminate(weight, moments)
    assert sorted(order.tolist()) == list(range(20))
    assert float(error_curve(weight, moments, order)[0]) < 1e-3


def test_a_thousandfold_channel_does_not_drown_the_rest():
    hidden = 40
    weight, moments, h_TH = random_case(hidden)
    h_TH[:, 11] *= 1000
    scaled = make_moments(h_TH, metric=moments.metric)
    weight_scaled = weight.clone()
    weight_scaled[:, 11] /= 1000  # the same function
    order, order_scaled = eliminate(weight, moments), eliminate(weight_scaled, scaled)
    curve = error_curve(weight, moments, order)
    curve_scaled = error_curve(weight_scaled, scaled, order_scaled)
    assert order_scaled.tolist() == order.tolist()
    torch.testing.assert_close(curve_scaled, curve, rtol=2e-3, atol=1e-9)
    # With the weight as it was, it matters a thousand times as much and goes last.
    assert int(eliminate(weight, scaled)[0]) == 11


@pytest.mark.parametrize("tokens", [5, 30, 59])
def test_fewer_tokens_than_neurons_still_give_an_order(tokens):
    hidden = 60
    weight, moments, _ = random_case(hidden, tokens=tokens)
    order = eliminate(weight, moments)
    assert sorted(order.tolist()) == list(range(hidden))
    curve = error_curve(weight, moments, order)
    assert bool(torch.isfinite(curve).all())
    assert bool((curve.diff() <= 0).all())
    # What has rank tokens - 1 is explained by that many neurons.
    assert float(curve[tokens - 1]) < 2e-2 * float(curve[0])


def test_scores_are_the_curve_in_the_order_of_keeping():
    weight, moments, _ = random_case(50)
    scores = rank(weight, moments)
    assert scores.dtype == torch.float32
    order = eliminate(weight, moments)
    curve = error_curve(weight, moments, order)
    torch.testing.assert_close(curve_of(scores), curve.float())
    for width in (1, 16, 49):
        kept = top_neurons(scores, width)
        assert kept.tolist() == sorted(order[:width].tolist())
        left = residual(weight, shrunk(moments), moments.metric, kept)
        assert left == pytest.approx(float(curve[width]), rel=1e-5)


def test_a_covariance_that_is_none_is_refused():
    with pytest.raises(VerificationError, match="no Cholesky factor"):
        shrunk_factor(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))
    with pytest.raises(VerificationError, match="no Cholesky factor"):
        shrunk_factor(torch.full((3, 3), torch.nan))


def test_eigenvalues_rounded_below_zero_are_survived():
    # float32 sums of few tokens have eigenvalues slightly below zero.
    h_TH = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    covariance = torch.cov(h_TH.T, correction=0)
    covariance -= 2e-4 * torch.eye(50)
    factor = shrunk_factor(covariance)
    assert bool(torch.isfinite(factor).all())
    difference = factor @ factor.T - covariance.double()
    assert float(difference.abs().max()) < 0.2 * float(covariance.diagonal().max())
