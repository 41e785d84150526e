"""The sequential re-fit: the scale of a block's output, and what solving it again gains."""

from __future__ import annotations

import pytest
import torch

from ampdeploy.errors import VerificationError
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.moments import collect
from ampdeploy.prune.refit import RIDGE, _LeastSquares, _tail_scale, refit
from tests.mlp_kinds import BACKBONES, SIZE, make

IMAGES = 32
POST_NORM = "eva_post_norm"


def images_of(count=IMAGES, seed=1):
    return torch.randn(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def make_pair(kind, width=32):
    """(dense, folded slim model, images)."""
    dense, images = make(kind), images_of()
    moments = collect(dense, images.split(16), count=IMAGES)
    generator = torch.Generator().manual_seed(3)
    kept = [
        torch.randperm(site.hidden, generator=generator)[:width].sort().values
        for site in dense.spec.sites
    ]
    return dense, fold(make(kind), kept, moments, method="least-squares"), images


def state_of(model, count=2):
    with torch.no_grad():
        return model.stem(images_of(count))


@torch.no_grad()
def stream_errors(dense, model, images):
    """Per block, the relative squared difference behind it."""
    ours, theirs = model.stem(images), dense.stem(images)
    errors = []
    for block in range(dense.spec.depth):
        ours, theirs = model.run_block(block, ours), dense.run_block(block, theirs)
        difference = (ours.tokens - theirs.tokens).double().square().sum()
        errors.append(float(difference / theirs.tokens.double().square().sum()))
    return errors


def fc_out(model, block):
    return model.backbone.get_submodule(model.spec.sites[block].fc_out)


@pytest.mark.parametrize("kind", BACKBONES)
def test_tail_scale_is_the_layer_scale_or_one_or_none(kind):
    model = make(kind)
    for index, block in enumerate(model.blocks):
        scale = _tail_scale(model, index, state_of(model))
        if kind == POST_NORM:
            assert scale is None
        else:
            gamma = getattr(getattr(block, "ls2", None), "gamma", torch.ones(32))
            torch.testing.assert_close(scale, gamma.detach())
    scaled = [hasattr(getattr(block, "ls2", None), "gamma") for block in model.blocks]
    assert scaled == [kind in ("packed_swiglu", "registers")] * 3


def test_tail_scale_of_evas_own_layer_scale():
    from timm.models.eva import Eva

    from ampdeploy.models.build import wrap_backbone
    from tests.mlp_kinds import CFG

    torch.manual_seed(0)
    backbone = Eva(
        img_size=SIZE, patch_size=14, num_classes=0, embed_dim=32, depth=2, num_heads=2,
        init_values=0.3, use_rot_pos_emb=True, global_pool="token",
    )  # fmt: skip
    with torch.no_grad():
        for block in backbone.blocks:
            block.gamma_2.copy_(torch.randn(32))
            block.gamma_2[7] = 0
    model = wrap_backbone(backbone, name="test:eva", timm_name="test", cfg=CFG)
    for index, block in enumerate(model.blocks):
        torch.testing.assert_close(
            _tail_scale(model, index, state_of(model)), block.gamma_2.detach()
        )


def test_tail_scale_leaves_no_trace():
    model = make("registers")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    _tail_scale(model, 1, state_of(model))
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not fc_out(model, 1)._forward_hooks


@pytest.mark.parametrize("kind", [kind for kind in BACKBONES if kind != POST_NORM])
def test_the_refit_brings_the_stream_back_to_the_dense_one(kind):
    dense, model, images = make_pair(kind)
    folded = stream_errors(dense, model, images)
    trace = refit(dense, model, images.split(5), ridge=1e-3)
    refitted = stream_errors(dense, model, images)
    assert [entry.block for entry in trace] == [0, 1, 2]
    assert all(entry.skipped is None for entry in trace)
    assert all(entry.error_after < entry.error_before for entry in trace)
    # What is on record is what a fresh run of both models finds.
    assert [entry.error_after for entry in trace] == pytest.approx(refitted, rel=1e-3)
    assert trace[0].error_before == pytest.approx(folded[0], rel=1e-3)
    assert refitted[-1] < 0.95 * folded[-1]


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu"])
def test_one_block_is_a_ridge_regression_of_what_is_missing(kind):
    """Block 0 against normal equations in float64, LayerScale included."""
    ridge = 0.05
    dense, model, images = make_pair(kind)
    caught = []
    handle = fc_out(model, 0).register_forward_hook(
        lambda _m, args, output: caught.append((args[0], output))
    )
    with torch.no_grad():
        ours = model.run_block(0, model.stem(images)).tokens
        theirs = dense.run_block(0, dense.stem(images)).tokens
    handle.remove()
    h_Tk = caught[0][0].detach().flatten(0, 1).double()
    gamma = getattr(getattr(model.blocks[0], "ls2", None), "gamma", torch.ones(32))
    missing_TC = ((theirs - ours) / gamma.detach()).flatten(0, 1).double()
    centred = h_Tk - h_Tk.mean(dim=0)
    covariance = centred.T @ centred / len(h_Tk)
    penalty = ridge * covariance.diagonal().mean() * torch.eye(len(covariance)).double()
    cross = centred.T @ (missing_TC - missing_TC.mean(dim=0)) / len(h_Tk)
    weight = torch.linalg.solve(covariance + penalty, cross).T
    bias = missing_TC.mean(dim=0) - weight @ h_Tk.mean(dim=0)
    expected_weight = fc_out(model, 0).weight.detach() + weight
    expected_bias = fc_out(model, 0).bias.detach() + bias
    refit(dense, model, images.split(7), ridge=ridge)
    scale = float(expected_weight.abs().max())
    torch.testing.assert_close(
        fc_out(model, 0).weight.detach().double(), expected_weight, rtol=1e-3, atol=1e-4 * scale
    )
    torch.testing.assert_close(
        fc_out(model, 0).bias.detach().double(), expected_bias, rtol=1e-3, atol=1e-4 * scale
    )


def test_a_model_that_has_not_changed_stays_as_it_is():
    dense, model = make("plain"), make("plain")
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trace = refit(dense, model, images_of(8).split(4))
    assert [entry.error_before for entry in trace] == [0, 0, 0]
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "swiglu_no_bias", "eva_split_gate"])
def test_nothing_but_the_second_linear_changes(kind):
    dense, model, images = make_pair(kind)
    second = tuple(f"{site.fc_out}.{n}" for site in model.spec.sites for n in ("weight", "bias"))
    before = {name: t.clone() for name, t in model.backbone.state_dict().items()}
    dense_before = {name: t.clone() for name, t in dense.state_dict().items()}
    spec = model.spec
    refit(dense, model, images.split(8))
    after = model.backbone.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == set(second)
    assert model.spec == spec
    assert all(torch.equal(dense_before[name], t) for name, t in dense.state_dict().items())
    assert not any(fc_out(model, b)._forward_pre_hooks for b in range(3))


def test_blocks_that_end_in_a_norm_are_skipped_and_it_is_said():
    dense, model, images = make_pair(POST_NORM)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    trace = refit(dense, model, images.split(8))
    assert all(entry.skipped for entry in trace)
    assert all(entry.error_before == entry.error_after > 0 for entry in trace)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


def test_a_channel_whose_scale_is_zero_is_left_out():
    dense, model, images = make_pair("registers")
    with torch.no_grad():
        for candidate in (dense, model):
            candidate.blocks[1].ls2.gamma[4] = 0
    trace = refit(dense, model, images.split(8), ridge=1e-3)
    assert all(entry.error_after < entry.error_before for entry in trace)
    assert bool(torch.isfinite(fc_out(model, 1).weight).all())


def test_an_enormous_ridge_keeps_the_folded_weights():
    dense, model, images = make_pair("plain")
    before = fc_out(model, 0).weight.detach().clone()
    refit(dense, model, images.split(8), ridge=1e9)
    torch.testing.assert_close(fc_out(model, 0).weight.detach(), before, rtol=0, atol=1e-5)


@pytest.mark.parametrize("where", ["dense", "slim"])
def test_values_that_are_not_finite_are_refused(where):
    dense, model, images = make_pair("plain")
    broken = dense if where == "dense" else model
    with torch.no_grad():
        broken.blocks[1].attn.proj.bias[0] = torch.nan
    with pytest.raises(VerificationError, match=r"block 1 .*--repair fold"):
        refit(dense, model, images.split(8))


def test_an_outlier_channel_does_not_switch_the_refit_off():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4000, 64, generator=generator)
    hidden[:, 7] *= 1000
    weight = torch.randn(16, 64, generator=generator)
    sums = _LeastSquares(64, 16, torch.device("cpu"))
    sums.add(hidden, hidden @ weight.T)
    found, _ = sums.solve(RIDGE)
    others = [column for column in range(64) if column != 7]
    left = (found.float() - weight)[:, others].square().sum() / weight[:, others].square().sum()
    plain = _LeastSquares(64, 16, torch.device("cpu"))
    hidden[:, 7] /= 1000
    plain.add(hidden, hidden @ weight.T)
    alone, _ = plain.solve(RIDGE)
    assert (alone.float() - weight).square().sum() / weight.square().sum() < 0.02
    # A thousand times the variance of the others is what one channel may count for.
    assert left < 0.5
