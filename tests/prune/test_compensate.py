"""The fold against regression on the tokens themselves, exact where exactness is possible."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ampdeploy.checkpoint import load_model, save_model
from ampdeploy.config import FOLDS
from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.export.onnx import export_onnx, reference_outputs
from ampdeploy.export.verify import verify_onnx
from ampdeploy.models.build import build_model
from ampdeploy.prune.compensate import (
    TOKENS_PER_NEURON,
    fold,
    least_squares,
    mean_shift,
    too_poor,
)
from ampdeploy.prune.moments import collect
from ampdeploy.prune.slim import slim
from tests.mlp_kinds import BACKBONES, NO_BIAS, SIZE, make

IMAGES = 24
KEPT = 24


def images_of(count=IMAGES, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def random_kept(model, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(site.hidden, generator=generator)[: KEPT + 2 * site.block].sort().values
        for site in model.spec.sites
    ]


@torch.no_grad()
def hidden_of(model, images):
    """Per block, h (T, H) float64 and the second linear's output (T, C) float64."""
    caught, handles = [], []
    for site in model.spec.sites:
        handles.append(
            model.backbone.get_submodule(site.fc_out).register_forward_hook(
                lambda _m, args, output: caught.append(
                    (args[0].flatten(0, 1).double(), output.flatten(0, 1).double())
                )
            )
        )
    model(images)
    for handle in handles:
        handle.remove()
    return caught


def fc_out(model, block):
    return model.backbone.get_submodule(model.spec.sites[block].fc_out)


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "swiglu_no_bias", "eva_split_gate"])
def test_least_squares_is_the_regression_on_the_tokens(kind):
    model = make(kind)
    images = images_of()
    moments = collect(model, images.split(8), count=IMAGES, sensitivity=False)
    kept = random_kept(model)
    for site, indices, block, (h_TH, output_TC) in zip(
        model.spec.sites, kept, moments, hidden_of(model, images), strict=True
    ):
        linear = fc_out(model, site.block)
        columns, bias = least_squares(linear.weight.detach(), block, indices, shrinkage=0)
        if linear.bias is not None:
            bias = bias + linear.bias.detach()
        inputs = torch.cat([h_TH[:, indices], torch.ones(len(h_TH), 1).double()], dim=1)
        solution = torch.linalg.lstsq(inputs, output_TC).solution
        # Up to the covariance's float32, the predictions and what they leave agree.
        ours = h_TH[:, indices] @ columns.T + bias
        best = inputs @ solution
        left = (output_TC - best).square().sum()
        assert float((output_TC - ours).square().sum() / left) == pytest.approx(1, abs=1e-6)
        assert float((ours - best).square().sum() / left) < 1e-4
        # And it is worth it: the mean alone leaves more, nothing most.
        shift, mean = mean_shift(linear.weight.detach(), block, indices)
        old = 0 if linear.bias is None else linear.bias.detach().double()
        by_mean = (output_TC - h_TH[:, indices] @ shift.T - mean - old).square().sum()
        by_nothing = (output_TC - h_TH[:, indices] @ shift.T - old).square().sum()
        assert float(left) < 0.95 * float(by_mean) < float(by_nothing)


def test_mean_shift_keeps_the_mean_of_the_output():
    model = make("plain")
    images = images_of()
    moments = collect(model, [images], count=IMAGES, sensitivity=False)
    kept = random_kept(model)
    dense = hidden_of(model, images)
    columns = [fc_out(model, block).weight[:, kept[block]].clone() for block in range(3)]
    fold(model, kept, moments, method="mean-shift")
    for block in range(3):
        assert torch.equal(fc_out(model, block).weight, columns[block])
    # Up to the first block nothing else has changed.
    _, output_TC = hidden_of(model, images)[0]
    torch.testing.assert_close(output_TC.mean(0), dense[0][1].mean(0), rtol=0, atol=1e-5)


@torch.no_grad()
def make_redundant(model):
    """Every odd neuron becomes a copy of the even one before it, with a weight of its own; the
    last one never moves. Returns the even ones."""
    kept = []
    for site in model.spec.sites:
        even = torch.arange(0, site.hidden, 2)
        for path in site.fc_in:
            linear = model.backbone.get_submodule(path)
            halves = (0, site.hidden) if site.packed else (0,)
            for start in halves:
                linear.weight[start + even + 1] = linear.weight[start + even]
                linear.weight[start + site.hidden - 1] = 0
                if linear.bias is not None:
                    linear.bias[start + even + 1] = linear.bias[start + even]
                    linear.bias[start + site.hidden - 1] = 1.5
        kept.append(even)
    return kept


@pytest.mark.parametrize("kind", BACKBONES)
def test_the_folded_model_is_the_dense_one_where_pruned_neurons_are_linear_in_kept_ones(kind):
    model = make(kind)
    kept = make_redundant(model)
    images = images_of()
    moments = collect(model, images.split(8), count=IMAGES)
    unseen = images_of(4, seed=9)
    with torch.no_grad():
        dense = model(unseen)
        plain = slim(make_copy(kind, model), kept)(unseen)
        fold(model, kept, moments, method="least-squares")
        folded = model(unseen)
    assert [site.hidden for site in model.spec.sites] == [len(k) for k in kept]
    for ours, unfolded, theirs in zip(folded, plain, dense, strict=True):
        if theirs is None:
            continue
        # The ridge costs a ten-thousandth; without the fold all of it is lost.
        lost = float((ours - theirs).norm() / theirs.norm())
        assert lost < 2e-3
        assert float((unfolded - theirs).norm() / theirs.norm()) > max(50 * lost, 0.02)


def make_copy(kind, model):
    copy = make(kind)
    copy.load_state_dict(model.state_dict())
    return copy


@pytest.mark.parametrize("kind", BACKBONES)
def test_folding_never_loses_against_not_folding(kind):
    """On calibration images and as a whole model: least squares < mean-shift < nothing."""
    images = images_of(48)
    model = make(kind)
    moments = collect(model, images.split(16), count=len(images))
    with torch.no_grad():
        dense = model(images).features
    kept = random_kept(model)
    loss = {}
    for method in FOLDS:
        candidate = fold(make(kind), kept, moments, method=method)
        assert [site.hidden for site in candidate.spec.sites] == [len(k) for k in kept]
        with torch.no_grad():
            features = candidate(images).features
        loss[method] = float((1 - F.cosine_similarity(features, dense, dim=-1)).mean())
    assert loss["least-squares"] < loss["mean-shift"] < loss["none"]


def test_the_first_block_is_never_worse_on_what_it_was_fitted_on():
    """For one block by itself this is a theorem, at every width and for any neurons."""
    images = images_of(16)
    model = make("plain")
    moments = collect(model, [images], count=16, sensitivity=False)
    h_TH, output_TC = hidden_of(model, images)[0]
    weight, bias = fc_out(model, 0).weight.detach(), fc_out(model, 0).bias.detach().double()
    for width in (1, 2, 30, 64, 100, 127):
        kept = torch.randperm(128, generator=torch.Generator().manual_seed(width))[:width]
        kept = kept.sort().values
        errors = []
        for repair in (least_squares, mean_shift):
            columns, extra = repair(weight, moments[0], kept)
            prediction = h_TH[:, kept] @ columns.T + bias + extra
            errors.append(float((output_TC - prediction).square().sum()))
        prediction = h_TH[:, kept] @ weight[:, kept].double().T + bias
        errors.append(float((output_TC - prediction).square().sum()))
        assert errors[0] <= errors[1] <= errors[2], width


def test_too_few_tokens_fall_back_to_the_mean():
    model = make("plain")
    moments = collect(model, [images_of(4)], count=4)
    assert moments[0].tokens == 68 == TOKENS_PER_NEURON * 34
    widths = [34, 35, 128]  # enough tokens; too few; dense, where nothing is to be settled
    kept = [torch.arange(width) for width in widths]
    assert [too_poor(m, k) for m, k in zip(moments, kept, strict=True)] == [False, True, False]
    folded = fold(make("plain"), kept, moments, method="least-squares")
    shifted = fold(make("plain"), kept, moments, method="mean-shift")
    for block, equal in enumerate([False, True, True]):
        ours, theirs = fc_out(folded, block), fc_out(shifted, block)
        assert torch.equal(ours.weight, theirs.weight) == equal
        assert torch.equal(ours.bias, theirs.bias) == equal


def test_one_outlier_channel_leaves_the_fold_of_the_others_alone():
    model, scaled = make("plain"), make("plain")
    site = model.spec.sites[0]
    with torch.no_grad():
        # GELU is the identity up there: a channel with a spread a thousand times that of others.
        for candidate, scale in ((model, 1.0), (scaled, 1000.0)):
            linear = candidate.backbone.get_submodule(site.fc_in[0])
            linear.bias[5] = 60.0
            linear.weight[5] *= scale
            linear.bias[5] *= scale
            candidate.backbone.get_submodule(site.fc_out).weight[:, 5] /= scale
    images, kept = images_of(), torch.arange(48)
    columns = []
    for candidate in (model, scaled):
        moments = collect(candidate, [images], count=IMAGES, sensitivity=False)[0]
        columns.append(least_squares(fc_out(candidate, 0).weight.detach(), moments, kept)[0])
    columns[1][:, 5] *= 1000
    difference = (columns[1] - columns[0]).norm() / columns[0].norm()
    assert float(difference) < 1e-3


def test_biases_that_appear_survive_the_checkpoint_and_the_export(tmp_path):
    torch.manual_seed(0)
    model = build_model(NO_BIAS, image_size=64)
    images = torch.randn(12, 3, 64, 64)
    moments = collect(model, images.split(4), count=12)
    kept = [torch.arange(16 + 8 * site.block) for site in model.spec.sites]
    assert all(fc_out(model, block).bias is None for block in range(model.spec.depth))
    fold(model, kept, moments, method="least-squares")
    assert all(float(fc_out(model, b).bias.detach().abs().max()) > 0 for b in range(len(kept)))

    path = tmp_path / "slim.safetensors"
    save_model(model, path, kept=kept)
    loaded = load_model(path)
    assert loaded.spec == model.spec
    ours, theirs = model.backbone.state_dict(), loaded.backbone.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    with torch.no_grad():
        assert torch.equal(model(images).features, loaded(images).features)

    onnx = tmp_path / "model.onnx"
    export_onnx(loaded, onnx, opset=18)
    compared = verify_onnx(
        onnx,
        images[:3].numpy(),
        reference_outputs(model, images[:3]),
        batches=(1, 3),
        max_relative_diff=1e-3,
        min_cosine=0.99999,
    )
    assert {c.output for c in compared} == {"features", "patch_features"}


def test_a_dense_width_leaves_the_linear_as_it_is():
    model = make("swiglu_no_bias")
    moments = collect(model, [images_of(8)], count=8)
    before = fc_out(model, 1)
    kept = [torch.arange(20), torch.arange(128), torch.arange(20)]
    fold(model, kept, moments, method="least-squares")
    assert fc_out(model, 1) is before
    assert fc_out(model, 1).bias is None
    assert fc_out(model, 0).bias is not None


def test_modes_and_types_are_kept():
    model = make("plain").train()
    moments = collect(make("plain"), [images_of(8)], count=8)
    model = model.to(torch.bfloat16)
    fold(model, [torch.arange(20)] * 3, moments, method="least-squares")
    assert fc_out(model, 0).weight.dtype == fc_out(model, 0).bias.dtype == torch.bfloat16
    assert fc_out(model, 0).training


def test_an_unknown_method_and_foreign_indices_change_nothing():
    model = make("plain")
    moments = collect(model, [images_of(8)], count=8)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    with pytest.raises(ConfigError, match="unknown fold 'median'"):
        fold(model, [torch.arange(20)] * 3, moments, method="median")
    with pytest.raises(ArtifactError, match=r"within 0\.\.127"):
        fold(model, [torch.arange(20)] * 2 + [torch.tensor([128])], moments, method="none")
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
