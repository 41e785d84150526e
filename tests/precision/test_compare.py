"""What counts as agreeing: direction, length, and nothing broken."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.errors import DataError
from ampdeploy.precision.compare import Reference, agreement

BAR = 0.999


def vectors(count=1000, width=32):
    return np.random.default_rng(0).normal(size=(count, width)).astype(np.float32)


def test_equal_is_perfect_and_zero_equals_zero():
    x = vectors()
    x[3] = 0
    found = agreement(x.copy(), x)
    assert (found.cosine_min, found.error_p99, found.not_finite) == (1.0, 0.0, 0)
    assert found.passes(1.0)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda x: x / 128, "relative error"),  # a power of two that nobody scaled back
        (lambda x: x * 1.2, "relative error"),
        (lambda x: np.where(np.arange(len(x))[:, None] < 5, -x, x), "smallest cosine"),
        (lambda x: np.where(np.arange(len(x))[:, None] < 20, -x, x), "cosine p1"),
        (lambda x: np.where(np.arange(len(x))[:, None] < 1, np.nan, x), "NaN or infinite"),
        (lambda x: np.where(x > 3, np.inf, x), "NaN or infinite"),
        (lambda x: np.zeros_like(x), "cosine p1"),
        (lambda x: x + 0.1, "cosine p1"),
    ],
)
def test_what_is_wrong_is_named(spoil, fault):
    x = vectors()
    assert fault in (agreement(spoil(x), x).fault(BAR) or "")


def test_rounding_to_fp16_passes():
    x = vectors()
    assert agreement(x.astype(np.float16), x).passes(BAR)


def test_a_lower_bar_lets_more_pass():
    x = vectors()
    noisy = x + np.random.default_rng(1).normal(size=x.shape) * 0.1
    assert not agreement(noisy, x).passes(BAR)
    assert agreement(noisy, x).passes(0.98)


def test_no_images_judge_nothing():
    with pytest.raises(DataError, match="at least one"):
        Reference(images=np.zeros((0, 3, 8, 8), np.float32), blocks={}, outputs={})
