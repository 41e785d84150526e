"""What the hidden neurons of every block do together, in one pass over the calibration images.

The least-squares fold and the choice of neurons need, per block, the mean and covariance of h and
how much an error of the MLP's output matters. Both come from one forward and one backward: a
random projection of the unit features is sent back through the dense model, and the gradient u
that arrives at the output of an MLP's second linear weighs each token.

An error d of that output at token t moves the unit features by J_t d, so
1 - cosine = 1/2 |sum_t J_t d_t|^2 to second order. With E[u u^T] = J^T J over the projections
(the Gauss-Newton matrix) and errors taken as independent between tokens, this is
1/2 sum_t d_t^T E[u_t u_t^T] d_t. It is kept as the product of a weight per token, |u_t|^2, and one
metric per block, as K-FAC factors it (arXiv 1503.05671).

Tensor legend: B images, N tokens, P patches, H hidden neurons, C model width.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ampdeploy.errors import AmpDeployError, VerificationError
from ampdeploy.models.device import free_memory
from ampdeploy.models.vision import Features, VisionModel
from ampdeploy.progress import task

# Share of a plain average in the weights of tokens. Tokens that the features do not depend on at
# all (the patches of the last block, where only CLS is read) still say how neurons go together.
PLAIN_SHARE = 0.05

# Added to every token's weight: a block that the features do not depend on at all (its LayerScale
# is 0) is averaged plainly instead of over nothing. Others have weights many powers above it.
NO_WEIGHT = 1e-30


@dataclass(frozen=True, kw_only=True)
class BlockMoments:
    """First and second moments of h in one block, and what its output's errors cost."""

    mean: Tensor
    """(H,) float64: weighted mean of h over tokens."""
    covariance: Tensor
    """(H, H) float32: weighted covariance of h."""
    metric: Tensor | None
    """(C, C) float32: sum over an image's tokens of E[u u^T], in units where
    1/2 trace(metric @ error covariance) predicts 1 - cosine; None without sensitivity."""
    tokens: int
    """Tokens that were seen, of all images."""


class _Sums:
    """Running sums of one block, in float32 on the device, shifted so that they do not cancel."""

    def __init__(self, site_hidden: int, width: int, device: torch.device) -> None:
        self.second = torch.zeros(site_hidden, site_hidden, device=device)
        self.first = torch.zeros(site_hidden, device=device, dtype=torch.float64)
        self.metric = torch.zeros(width, width, device=device)
        self.shift: Tensor | None = None
        # A tensor on the device, so that nothing waits for it batch by batch.
        self.weight = torch.zeros((), device=device, dtype=torch.float64)
        self.tokens = 0

    def add(self, hidden_TH: Tensor, weight_T: Tensor) -> None:
        if self.shift is None:
            # h of a ViT has channels with a mean far larger than their spread.
            self.shift = (weight_T @ hidden_TH) / weight_T.sum().clamp(min=1e-30)
        centred_TH = hidden_TH - self.shift
        weighted_TH = centred_TH * weight_T[:, None]
        self.second.addmm_(weighted_TH.T, centred_TH)
        self.first += weighted_TH.sum(dim=0, dtype=torch.float64)
        self.weight += weight_T.sum(dtype=torch.float64)
        self.tokens += len(weight_T)

    def result(self, name: str, images: int, *, with_metric: bool) -> BlockMoments:
        assert self.shift is not None  # the block has run, since there were images
        total = float(self.weight)
        offset = self.first / total
        covariance = self.second.double() / total - torch.outer(offset, offset)
        del self.second  # as large as the result: not both for all blocks at once
        if not bool(torch.isfinite(covariance).all()):
            raise VerificationError(
                f"{name}: activations or gradients are NaN or infinite on the calibration images. "
                "Check the weights with `ampdeploy eval` in float32."
            )
        return BlockMoments(
            mean=(self.shift.double() + offset),
            covariance=covariance.float(),
            metric=(self.metric / images) if with_metric else None,
            tokens=self.tokens,
        )


class _Collector:
    """Hooks that feed h, and the gradient of every second linear's output, into the sums."""

    def __init__(self, model: VisionModel, *, sensitivity: bool) -> None:
        self.model = model
        self.sensitivity = sensitivity
        device = next(model.parameters()).device
        self.sums = []
        for site in model.spec.sites:
            linear = model.backbone.get_submodule(site.fc_out)
            assert isinstance(linear, nn.Linear)
            self.sums.append(_Sums(site.hidden, linear.out_features, device))

    @contextmanager
    def hooks(self) -> Iterator[None]:
        handles = [
            self.model.backbone.get_submodule(site.fc_out).register_forward_hook(self._catch(index))
            for index, site in enumerate(self.model.spec.sites)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _catch(self, index: int) -> Any:
        sums = self.sums[index]

        def hook(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            hidden_TH = args[0].detach().flatten(0, -2).float()
            if not self.sensitivity:
                sums.add(hidden_TH, torch.ones(len(hidden_TH), device=hidden_TH.device))
                return None
            # The parameters are frozen, so the graph has to begin somewhere: at the first MLP.
            if not output.requires_grad:
                output = output.detach().requires_grad_()

            def on_gradient(gradient_BNC: Tensor) -> None:
                gradient_BNC = gradient_BNC.float()
                gradient_TC = gradient_BNC.flatten(0, -2)
                sums.metric.addmm_(gradient_TC.T, gradient_TC)
                weight_BN = gradient_BNC.square().sum(dim=-1)
                # Per image, so that it does not matter which images share a micro-batch.
                plain_B1 = PLAIN_SHARE * weight_BN.mean(dim=1, keepdim=True) + NO_WEIGHT
                sums.add(hidden_TH, ((1 - PLAIN_SHARE) * weight_BN + plain_B1).flatten())

            output.register_hook(on_gradient)
            return output

        return hook


def _projection(features: Features, generator: torch.Generator) -> Tensor:
    """A random projection of the unit features: of the pooled one, and of all patches together
    with the same weight, so that neither is kept at the other's expense."""
    parts = [(features.features, 1.0)]
    if features.patch_features is not None:
        patches = features.patch_features
        parts.append((patches, patches.shape[1] ** -0.5))
    # Drawn image by image, so that the noise does not depend on the micro-batches.
    noise = [
        [torch.randn(values.shape[1:], generator=generator) for values, _ in parts]
        for _ in features.features
    ]
    total = features.features.new_zeros(())
    for (values, scale), drawn in zip(parts, zip(*noise, strict=True), strict=True):
        unit = F.normalize(values.float(), dim=-1)
        total = total + scale * (torch.stack(drawn).to(values.device) * unit).sum()
    return total


def _check_memory(model: VisionModel, device: torch.device) -> None:
    """Refuse early what cannot end well: the moments of all blocks are held at once."""
    width = model.spec.feature_dim
    needed = sum(4 * (site.hidden**2 + width**2) for site in model.spec.sites)
    free = free_memory(device)
    if needed > free:
        raise AmpDeployError(
            f"the moments of {model.spec.name}'s {model.spec.depth} blocks take "
            f"{needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}. Use a machine "
            "or --device with more memory, or --search amp, which needs none."
        )


def collect(
    model: VisionModel,
    batches: Iterable[Tensor],
    *,
    count: int,
    sensitivity: bool = True,
    seed: int = 0,
) -> list[BlockMoments]:
    """Moments of h in every block of the dense `model`.

    Memory does not grow with the images: H x H and C x C numbers per block, float32. How the
    images are split into micro-batches changes nothing beyond rounding.

    Args:
        model: The dense model; unchanged afterwards, its parameters' `requires_grad` included.
        batches: Images in micro-batches (b, 3, S, S), on any device.
        count: How many images `batches` holds, for the progress bar.
        sensitivity: Weigh tokens and fill `metric` by a backward pass; False: every token counts
            the same and only a forward runs.
        seed: Of the random projections.

    Returns:
        One entry per block, first to last, on the model's device.

    Raises:
        AmpDeployError: The moments do not fit into memory.
        VerificationError: There were no images, or an activation is not finite.
    """
    device = next(model.parameters()).device
    _check_memory(model, device)
    trained = [(p, p.requires_grad) for p in model.parameters()]
    collector = _Collector(model, sensitivity=sensitivity)
    # On the CPU, so that every device projects alike.
    generator = torch.Generator().manual_seed(seed)
    images = 0
    try:
        model.requires_grad_(False)
        with task("moments", count) as progress, collector.hooks():
            for batch in batches:
                with torch.set_grad_enabled(sensitivity):
                    features = model(batch.to(device))
                    if sensitivity:
                        _projection(features, generator).backward()
                del features  # and with it the graph, before the next one is built
                images += len(batch)
                progress.advance(len(batch))
    finally:
        for parameter, required in trained:
            parameter.requires_grad_(required)
    if not images:
        raise VerificationError("no calibration images were given, so there are no moments.")
    return [
        sums.result(site.name, images, with_metric=sensitivity)
        for sums, site in zip(collector.sums, model.spec.sites, strict=True)
    ]
