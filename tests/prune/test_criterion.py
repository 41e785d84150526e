"""The criteria on batches whose values are known."""

from __future__ import annotations

import math

import pytest
import torch

from ampdeploy.prune.criterion import batched, cross_entropy, entropy


def test_identical_features_reach_log_b():
    features = torch.ones(8, 4)
    assert entropy(features, 20.0) == pytest.approx(math.log(8), rel=1e-6)
    assert cross_entropy(features, 20.0) == pytest.approx(math.log(8), rel=1e-6)


def test_orthogonal_features_by_hand():
    # p_ii = e^20 / (e^20 + 3), p_ij = 1 / (e^20 + 3)
    features = 3.0 * torch.eye(4)
    p_self = math.exp(2) / (math.exp(2) + 3)
    p_other = 1 / (math.exp(2) + 3)
    expected = -(p_self * math.log(p_self) + 3 * p_other * math.log(p_other))
    assert entropy(features, 2.0) == pytest.approx(expected, rel=1e-6)
    assert cross_entropy(features, 2.0) == pytest.approx(-math.log(p_self), rel=1e-6)


def test_half_precision_features_are_compared_in_float32():
    features = torch.randn(8, 16, dtype=torch.float16)
    assert entropy(features, 20.0).dtype == torch.float32
    torch.testing.assert_close(entropy(features, 20.0), entropy(features.float(), 20.0))


def test_batched_is_the_mean_over_whole_batches():
    features = torch.randn(12, 5)
    expected = (entropy(features[:6], 15.0) + entropy(features[6:], 15.0)) / 2
    assert batched(entropy, features, 15.0, 6) == pytest.approx(float(expected))
