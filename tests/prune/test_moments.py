"""Moments against direct float64 sums and brute-force autograd; what is predicted comes true."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ampdeploy.errors import VerificationError
from ampdeploy.prune.moments import PLAIN_SHARE, collect
from tests.mlp_kinds import BACKBONES, SIZE, make

IMAGES = 6


def images_of(count=IMAGES, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def traced(model, images):
    """(features, per block h (B, N, H), per block the second linear's output (B, N, C)), with a
    graph from the features back to the outputs."""
    hidden, outputs, handles = [], [], []

    def hook(_module, args, output):
        hidden.append(args[0].detach())
        outputs.append(output)

    for site in model.spec.sites:
        module = model.backbone.get_submodule(site.fc_out)
        handles.append(module.register_forward_hook(hook))
    features = model(images)
    for handle in handles:
        handle.remove()
    return features, hidden, outputs


def unit_parts(features):
    """What the sensitivity is of: the unit pooled feature, and all unit patches, which count as
    much as it together."""
    parts = [F.normalize(features.features, dim=-1)]
    if features.patch_features is not None:
        patches = features.patch_features
        parts.append(F.normalize(patches, dim=-1) / patches.shape[1] ** 0.5)
    return parts


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
def test_unweighted_moments_are_those_of_numpy(kind):
    model = make(kind)
    images = images_of()
    got = collect(model, images.split(4), count=IMAGES, sensitivity=False)
    with torch.no_grad():
        _, hidden, _ = traced(model, images)
    for ours, h_BNH in zip(got, hidden, strict=True):
        h_TH = h_BNH.flatten(0, 1).double()
        assert ours.metric is None
        assert ours.tokens == len(h_TH) == IMAGES * 17
        assert (ours.mean.dtype, ours.covariance.dtype) == (torch.float64, torch.float32)
        torch.testing.assert_close(ours.mean, h_TH.mean(dim=0), rtol=1e-5, atol=1e-6)
        expected = torch.cov(h_TH.T, correction=0)
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(ours.covariance.double(), expected, rtol=1e-4, atol=1e-6 * scale)


def test_a_mean_far_above_the_spread_does_not_cancel():
    model = make("plain")
    site = model.spec.sites[0]
    with torch.no_grad():
        # GELU is the identity up there, so h = 1000 + something of order 1.
        model.backbone.get_submodule(site.fc_in[0]).bias += 1000.0
    images = images_of()
    got = collect(model, images.split(4), count=IMAGES, sensitivity=False)[0]
    with torch.no_grad():
        _, hidden, _ = traced(model, images)
    expected = torch.cov(hidden[0].flatten(0, 1).double().T, correction=0)
    assert float(got.mean.min()) > 900
    assert float(expected.diagonal().max()) < 100
    difference = (got.covariance.double() - expected).abs().max()
    assert float(difference) < 1e-4 * float(expected.diagonal().mean())


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "average_pool", "eva_post_norm"])
def test_weighted_moments_follow_their_definition(kind):
    model = make(kind)
    images = images_of()
    got = collect(model, images.split(4), count=IMAGES, seed=5)
    # One graph over all images at once, and the same noise, drawn image by image.
    features, hidden, outputs = traced(model, images)
    parts = unit_parts(features)
    generator = torch.Generator().manual_seed(5)
    noise = [[torch.randn(p.shape[1:], generator=generator) for p in parts] for _ in images]
    total = sum(
        (part * torch.stack([per_image[index] for per_image in noise])).sum()
        for index, part in enumerate(parts)
    )
    gradients = torch.autograd.grad(total, outputs)
    for ours, h_BNH, gradient_BNC in zip(got, hidden, gradients, strict=True):
        energy_BN = gradient_BNC.double().square().sum(dim=-1)
        weight_BN = (1 - PLAIN_SHARE) * energy_BN + PLAIN_SHARE * energy_BN.mean(1, keepdim=True)
        weight_T = weight_BN.flatten() / weight_BN.sum()
        h_TH = h_BNH.flatten(0, 1).double()
        mean = weight_T @ h_TH
        expected = (h_TH - mean).T @ ((h_TH - mean) * weight_T[:, None])
        torch.testing.assert_close(ours.mean, mean, rtol=1e-4, atol=1e-5)
        scale = float(expected.diagonal().max())
        torch.testing.assert_close(ours.covariance.double(), expected, rtol=1e-3, atol=1e-5 * scale)
        u_TC = gradient_BNC.flatten(0, 1).double()
        metric = u_TC.T @ u_TC / IMAGES
        scale = float(metric.diagonal().max())
        torch.testing.assert_close(ours.metric.double(), metric, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("sensitivity", [True, False])
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_micro_batch_changes_nothing_but_rounding(kind, sensitivity):
    model = make(kind)
    images = images_of()
    options = {"count": IMAGES, "sensitivity": sensitivity}
    whole = collect(model, [images], **options)
    for size in (1, 4):
        parts = collect(model, images.split(size), **options)
        for a, b in zip(whole, parts, strict=True):
            assert a.tokens == b.tokens
            torch.testing.assert_close(a.mean, b.mean, rtol=1e-3, atol=1e-5)
            scale = float(a.covariance.diagonal().max())
            torch.testing.assert_close(a.covariance, b.covariance, rtol=1e-3, atol=1e-5 * scale)
            if sensitivity:
                scale = float(a.metric.diagonal().max())
                torch.testing.assert_close(a.metric, b.metric, rtol=1e-3, atol=1e-5 * scale)


def test_the_metric_is_the_gauss_newton_matrix():
    """Over many projections of one image, E[u u^T] is J^T J summed over tokens."""
    model = make("registers")
    image = images_of(1)
    block = 1
    copies = 3000
    got = collect(model, image.expand(copies, -1, -1, -1).split(500), count=copies)[block].metric
    state = model.run_blocks(model.stem(image), 0, block)
    path = model.spec.sites[block].fc_out
    caught = []
    handle = model.backbone.get_submodule(path).register_forward_hook(
        lambda _m, _a, output: caught.append(output)
    )
    with torch.no_grad():
        model.run_block(block, state)
    handle.remove()

    def outputs_from(mlp_output):
        handle = model.backbone.get_submodule(path).register_forward_hook(
            lambda _m, _a, _output: mlp_output
        )
        features = model.head(model.run_blocks(state, block).tokens)
        handle.remove()
        return torch.cat([part.flatten() for part in unit_parts(features)])

    jacobian = torch.autograd.functional.jacobian(outputs_from, caught[0])  # (outputs, 1, N, C)
    j_RC = jacobian.flatten(0, -2)
    expected = j_RC.T @ j_RC
    assert float((got - expected).norm() / expected.norm()) < 0.1
    assert float(got.trace() / expected.trace()) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("kind", ["plain", "average_pool", "eva_post_norm"])
def test_the_metric_predicts_the_loss_of_cosine(kind):
    """Independent noise of a known covariance on an MLP's output costs 1/2 trace(metric cov)."""
    model = make(kind)
    images = images_of(64)
    moments = collect(model, images.split(32), count=len(images))
    with torch.no_grad():
        dense = unit_parts(model(images))
    for site, block in zip(model.spec.sites, moments, strict=True):
        generator = torch.Generator().manual_seed(7)
        channels = torch.rand(32, generator=generator) + 0.1
        # Small enough that the loss is quadratic in it.
        sigma_C = channels * (2e-3 / float(block.metric.trace())) ** 0.5
        predicted = 0.5 * float((block.metric.diagonal() * sigma_C.square()).sum())

        def disturb(_module, _args, output, sigma_C=sigma_C, generator=generator):
            return output + sigma_C * torch.randn(output.shape, generator=generator)

        measured = 0.0
        handle = model.backbone.get_submodule(site.fc_out).register_forward_hook(disturb)
        with torch.no_grad():
            for _ in range(4):
                parts = unit_parts(model(images))
                for ours, theirs in zip(parts, dense, strict=True):
                    lost = (ours - theirs).double().square().flatten(1).sum(dim=1).mean() / 2
                    measured += float(lost) / 4
        handle.remove()
        assert measured == pytest.approx(predicted, rel=0.15), site.name


def test_the_model_is_left_as_it_was():
    model = make("eva_mixed_rope")
    model.backbone.cls_token.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    collect(model, [images_of()], count=IMAGES)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    modules = [model.backbone.get_submodule(site.fc_out) for site in model.spec.sites]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in modules)


@pytest.mark.parametrize("sensitivity", [True, False])
def test_activations_that_are_not_finite_are_refused(sensitivity):
    model = make("plain")
    flags = [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        model.backbone.get_submodule(model.spec.sites[1].fc_in[0]).weight[3, 5] = torch.nan
    with pytest.raises(VerificationError, match=r"blocks\.\d\.mlp: .*ampdeploy eval"):
        collect(model, [images_of()], count=IMAGES, sensitivity=sensitivity)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_a_block_without_any_influence_has_plain_moments():
    model = make("registers")
    with torch.no_grad():
        model.blocks[1].ls2.gamma.zero_()
    images = images_of()
    dead = collect(model, images.split(4), count=IMAGES)[1]
    plain = collect(model, images.split(4), count=IMAGES, sensitivity=False)[1]
    assert not dead.metric.any()
    torch.testing.assert_close(dead.mean, plain.mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(dead.covariance, plain.covariance, rtol=1e-3, atol=1e-6)


def test_no_images_are_refused():
    with pytest.raises(VerificationError, match="no calibration images"):
        collect(make("plain"), [], count=0)


def test_the_seed_decides_the_projections():
    model = make("plain")
    images = images_of()
    first, again, other = (
        collect(model, [images], count=IMAGES, seed=seed)[0].metric for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.allclose(first, other)
