"""Divergences that are zero only where nothing changed, against loops that spell them out."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from ampdeploy.models.vision import Features
from ampdeploy.prune.criterion import entropy
from ampdeploy.prune.divergence import Divergence, divergence, masked_kl


def random_features(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kl_by_loops(dense, pruned, inv_temperature):
    """The sum written out, in Python's floats."""

    def distribution(features, i):
        unit = [[x / math.sqrt(sum(y * y for y in row)) for x in row] for row in features.tolist()]
        weights = {
            j: math.exp(inv_temperature * sum(a * b for a, b in zip(unit[i], unit[j], strict=True)))
            for j in range(len(unit))
            if j != i
        }
        return {j: weight / sum(weights.values()) for j, weight in weights.items()}

    total = 0.0
    for i in range(len(dense)):
        p, q = distribution(dense, i), distribution(pruned, i)
        total += sum(p[j] * math.log(p[j] / q[j]) for j in p)
    return total / len(dense)


@pytest.mark.parametrize("inv_temperature", [1.0, 15.0, 20.0])
@pytest.mark.parametrize("images", [3, 4, 9])
def test_masked_kl_is_the_sum_written_out(images, inv_temperature):
    dense, pruned = random_features(images, 5), random_features(images, 5, seed=1)
    expected = kl_by_loops(dense, pruned, inv_temperature)
    assert expected > 0
    assert float(masked_kl(dense, pruned, inv_temperature)) == pytest.approx(expected, rel=1e-4)


def test_masked_kl_is_zero_for_equal_similarities_and_for_nothing_else():
    dense = random_features(8, 6)
    assert float(masked_kl(dense, dense, 20.0)) == pytest.approx(0, abs=1e-6)
    # Neither length nor a common rotation changes who resembles whom.
    rotation, _ = torch.linalg.qr(random_features(6, 6, seed=2))
    lengths = torch.arange(1.0, 9.0)[:, None]
    assert float(masked_kl(dense, lengths * dense @ rotation, 20.0)) == pytest.approx(0, abs=1e-5)
    moved = dense.clone()
    moved[0] = -moved[0]
    assert float(masked_kl(dense, moved, 20.0)) > 0.1


def test_order_of_images_and_direction():
    dense, pruned = random_features(7, 5), random_features(7, 5, seed=1)
    shuffled = torch.randperm(7, generator=torch.Generator().manual_seed(0))
    forward = float(masked_kl(dense, pruned, 5.0))
    assert float(masked_kl(dense[shuffled], pruned[shuffled], 5.0)) == pytest.approx(
        forward, rel=1e-5
    )
    # A divergence, not a distance: it is weighed by where the dense model looks.
    assert abs(float(masked_kl(pruned, dense, 5.0)) - forward) > 1e-3


def test_what_lowers_the_entropy_can_be_far_from_the_dense_model():
    """AMP accepts any fall: here images that were twins end with nothing in common."""
    dense = F.one_hot(torch.arange(8) // 2, 8).float()
    pruned = F.one_hot(torch.arange(8), 8).float()
    assert float(entropy(pruned, 20.0)) < float(entropy(dense, 20.0)) - 0.5
    # From certainty about the twin to none about seven others.
    assert float(masked_kl(dense, pruned, 20.0)) == pytest.approx(math.log(7), abs=1e-3)
    found = divergence([Features(dense, None)], [Features(pruned, None)], 20.0)
    assert found.cosine > 0.5


def test_losses_of_cosine_by_hand():
    ours = Features(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), torch.tensor([[[2.0, 0.0]]] * 2))
    theirs = Features(torch.tensor([[0.0, 3.0], [2.0, 2.0]]), torch.tensor([[[-1.0, 0.0]]] * 2))
    found = divergence([ours], [theirs], 20.0)
    assert found.cosine == pytest.approx((1 + 0) / 2, abs=1e-6)
    assert found.patch_cosine == pytest.approx(2)
    assert found.kl is None  # each of two images has but one other
    assert found.total == pytest.approx(2.5, abs=1e-6)
    swapped = divergence([theirs], [ours], 20.0)
    assert (swapped.cosine, swapped.patch_cosine) == (found.cosine, found.patch_cosine)


def test_micro_batches_are_joined_and_equal_models_do_not_diverge():
    features, patches = random_features(7, 5), random_features(7, 4, 5, seed=3)
    other = Features(random_features(7, 5, seed=1), random_features(7, 4, 5, seed=2))
    whole = Features(features, patches)

    def split(parts, size):
        return [Features(*pair) for pair in zip(*(t.split(size) for t in parts), strict=True)]

    once = divergence([whole], [other], 20.0)
    often = divergence(split(whole, 3), split(other, 3), 20.0)
    for name in ("cosine", "patch_cosine", "kl"):
        assert getattr(once, name) == pytest.approx(getattr(often, name), rel=1e-5)
    same = divergence(split(whole, 2), [whole], 20.0)
    assert [same.cosine, same.patch_cosine, same.kl] == pytest.approx([0, 0, 0], abs=1e-6)


def test_models_without_patches_have_one_loss():
    features = Features(random_features(4, 5), None)
    other = Features(random_features(4, 5, seed=1), None)
    found = divergence([features], [other], 20.0)
    assert found.patch_cosine is None
    assert found.total == found.cosine
    assert Divergence(cosine=0.25, patch_cosine=0.5, kl=None).total == 0.75


def test_half_precision_is_compared_in_float32():
    features, other = random_features(6, 8).bfloat16(), random_features(6, 8, seed=1).bfloat16()
    half = divergence([Features(features, None)], [Features(other, None)], 20.0)
    full = divergence([Features(features.float(), None)], [Features(other.float(), None)], 20.0)
    assert half == full
