"""Fixtures of the pruning tests."""

from __future__ import annotations

import logging

import pytest
import torch


@pytest.fixture
def said(caplog):
    """What ampdeploy logs, as `caplog`."""
    logger = logging.getLogger("ampdeploy")
    before = logger.propagate
    logger.propagate = True
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        yield caplog
    logger.propagate = before


class BlockCounter:
    """Counts how many images go through one block, in the models given and copies of them."""

    def __init__(self, *models):
        self.count = 0
        self._handles = [
            block.register_forward_pre_hook(self._add) for model in models for block in model.blocks
        ]

    def _add(self, _module, args):
        if not args[0].is_meta:  # profiling, where nothing is computed
            self.count += len(args[0])

    def __deepcopy__(self, memo):
        return self  # so that a copied model counts here too

    def __enter__(self):
        return self

    def __exit__(self, *_error):
        for handle in self._handles:
            handle.remove()


@pytest.fixture
def count_blocks():
    return BlockCounter


@pytest.fixture
def unchanged():
    """`unchanged(model)` is a context in which nothing about `model` may change for good."""
    from contextlib import contextmanager

    @contextmanager
    def check(model):
        spec = model.spec
        modules = dict(model.named_modules())
        before = {name: t.clone() for name, t in model.state_dict().items()}
        flags = [p.requires_grad for p in model.parameters()]
        yield
        assert model.spec == spec
        assert dict(model.named_modules()) == modules
        after = model.state_dict()
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [p.requires_grad for p in model.parameters()] == flags
        assert all(p.grad is None for p in model.parameters())

    return check
