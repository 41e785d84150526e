"""Importance equals the plain definition, whatever the micro-batch."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

from ampdeploy.config import PruneConfig
from ampdeploy.prune.criterion import CRITERIA
from ampdeploy.prune.moments import collect
from ampdeploy.prune.score import importance
from tests.mlp_kinds import SIZE, make


def plain_importance(model, images, config):
    """One backward through one graph over the whole batch, as the paper writes it."""
    caught = {}

    def catch(index):
        def hook(_module, args):
            (hidden,) = args
            hidden.retain_grad()
            caught[index] = hidden

        return hook

    handles = [
        model.backbone.get_submodule(site.fc_out).register_forward_pre_hook(catch(site.block))
        for site in model.spec.sites
    ]
    CRITERIA[config.criterion](model(images).features, config.inv_temperature).backward()
    for handle in handles:
        handle.remove()
    return [
        (caught[site.block] * caught[site.block].grad).sum(dim=1).abs().mean(dim=0).detach()
        for site in model.spec.sites
    ]


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("kind", ["plain", "packed_swiglu", "eva_split_gate"])
def test_equals_the_definition_at_every_micro_batch(kind, criterion):
    model = make(kind)
    images = torch.randn(6, 3, SIZE, SIZE)
    for micro in (6, 4, 1):
        config = PruneConfig(criterion=criterion, batch_size=6, micro_batch_size=micro)
        got = importance(model, [images], config, count=6)
        expected = plain_importance(model, images, config)
        for ours, theirs in zip(got, expected, strict=True):
            assert ours.dtype == torch.float32
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-8)


def test_two_batches_are_averaged_over_images():
    model = make("plain")
    images = torch.randn(8, 3, SIZE, SIZE)
    config = PruneConfig(batch_size=4, micro_batch_size=4)
    both = importance(model, images.split(4), config, count=8)
    first = importance(model, [images[:4]], config, count=4)
    second = importance(model, [images[4:]], config, count=4)
    for a, b, mean in zip(first, second, both, strict=True):
        torch.testing.assert_close((a + b) / 2, mean)


def test_the_model_is_left_as_it_was():
    model = make("plain")
    model.backbone.cls_token.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    before = {name: t.clone() for name, t in model.state_dict().items()}
    importance(model, [torch.randn(4, 3, SIZE, SIZE)], PruneConfig(batch_size=4), count=4)
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("pass_", ["importance", "moments"])
def test_activations_are_freed_batch_by_batch_without_the_garbage_collector(pass_):
    model = make("plain")
    alive = []
    model.blocks[1].mlp.act.register_forward_hook(
        lambda _module, _args, output: alive.append(weakref.ref(output))
    )
    batches = [torch.randn(4, 3, SIZE, SIZE) for _ in range(3)]
    gc.collect()
    gc.disable()
    try:
        if pass_ == "importance":
            importance(model, batches, PruneConfig(batch_size=4, micro_batch_size=2), count=12)
        else:
            collect(model, batches, count=12)
    finally:
        gc.enable()
    assert len(alive) >= 3
    assert not any(reference() is not None for reference in alive)
