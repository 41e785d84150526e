"""Importance of every hidden neuron of every block, in one forward and backward.

Source: AMP, arXiv 2603.08100, section 3.3: I_j = mean over images of
|sum over tokens h_j * dE/dh_j|, with h the input of the MLP's second linear.

Tensor legend: B images, N tokens, H hidden neurons, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ampdeploy.config import PruneConfig
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import task
from ampdeploy.prune.criterion import CRITERIA, Criterion


class _HiddenTaylor:
    """Catches h at every `fc_out` and sums |sum_N h * dE/dh| as its gradient arrives."""

    def __init__(self, model: VisionModel) -> None:
        self.model = model
        device = next(model.parameters()).device
        self.sums = [torch.zeros(site.hidden, device=device) for site in model.spec.sites]

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            self.model.backbone.get_submodule(site.fc_out).register_forward_pre_hook(
                self._catch(index)
            )
            for index, site in enumerate(self.model.spec.sites)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _catch(self, index: int) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            (hidden_BNH,) = args
            # The parameters are frozen, so the graph has to begin somewhere: at the first h.
            if not hidden_BNH.requires_grad:
                hidden_BNH = hidden_BNH.detach().requires_grad_()

            # Not the tensor that carries the hook: that would keep itself alive for ever.
            values_BNH = hidden_BNH.detach()

            def on_gradient(gradient_BNH: Tensor) -> None:
                taylor_BH = torch.einsum("bnh,bnh->bh", values_BNH.float(), gradient_BNH.float())
                self.sums[index] += taylor_BH.abs().sum(dim=0)

            hidden_BNH.register_hook(on_gradient)
            return (hidden_BNH,)

        return hook


def _feature_gradient(
    model: VisionModel, images: Tensor, criterion: Criterion, config: PruneConfig
) -> Tensor:
    """dE/dz (B, C) of a whole batch, computed without keeping any activation."""
    with torch.no_grad():
        features = torch.cat(
            [model(micro).features for micro in images.split(config.micro_batch_size)]
        )
    features.requires_grad_()
    criterion(features, config.inv_temperature).backward()
    assert features.grad is not None
    return features.grad


def importance(
    model: VisionModel, batches: Iterable[Tensor], config: PruneConfig, *, count: int
) -> list[Tensor]:
    """Score every hidden neuron of `model`.

    The criterion couples all B images of a batch, but B activations need not be held at once: the
    gradient of E with respect to z comes from a first pass without activations, and is then sent
    back through micro-batches. The result is that of one backward pass over the whole batch.

    Args:
        model: The dense model; unchanged afterwards, its parameters' `requires_grad` included.
        batches: Image batches of exactly `config.batch_size`, (B, 3, S, S), on any device.
        config: Criterion, temperature and sizes.
        count: How many images `batches` holds, for the progress bar.

    Returns:
        Per block, a float32 tensor (H,) on the CPU.
    """
    criterion = CRITERIA[config.criterion]
    device = next(model.parameters()).device
    trained = [(p, p.requires_grad) for p in model.parameters()]
    taylor = _HiddenTaylor(model)
    images_seen = 0
    try:
        model.requires_grad_(False)
        with task("score", count) as progress:
            for batch in batches:
                images = batch.to(device)
                gradient = _feature_gradient(model, images, criterion, config)
                with taylor.hooks():
                    for micro, micro_gradient in zip(
                        images.split(config.micro_batch_size),
                        gradient.split(config.micro_batch_size),
                        strict=True,
                    ):
                        model(micro).features.backward(micro_gradient)
                        progress.advance(len(micro))
                images_seen += len(images)
    finally:
        for parameter, required in trained:
            parameter.requires_grad_(required)
    return [(total_H / max(images_seen, 1)).cpu() for total_H in taylor.sums]
