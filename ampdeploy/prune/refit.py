"""Sequential re-fit: every block's second linear solved once more, against the dense model.

The fold predicts pruned neurons from kept ones on the dense model's own activations. In the slim
model the errors of earlier blocks have changed what a block sees. So from the first block to the
last, the second linear is solved again for the whole residual stream: given the slim model's h,
its output shall be what brings the residual stream back to the dense model's. Errors of earlier
blocks, attention's included, are corrected on the way.

The solve is a ridge regression of the remaining difference, so that with few images it stays at
the folded weights.

Tensor legend: B images, N tokens, T tokens of all images, k kept neurons, C model width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ampdeploy.errors import VerificationError
from ampdeploy.models.vision import BlockState, VisionModel
from ampdeploy.progress import task
from ampdeploy.prune.compensate import make_linear
from ampdeploy.prune.slim import put_linears

# Ridge towards the folded weights, relative to the mean variance of h. Larger than the fold's:
# the target holds the errors of all blocks before, most of which this block cannot see.
RIDGE = 0.1

# Variances above this multiple of the median count as much as that in their mean.
OUTLIER = 1000.0


@dataclass(frozen=True, kw_only=True)
class BlockRefit:
    """What the re-fit of one block did, on the images it was fitted on."""

    block: int
    error_before: float
    """Squared difference to the dense residual stream behind this block, relative to the dense
    stream's own square; all blocks before are re-fitted already."""
    error_after: float
    skipped: str | None = None
    """Why the block was left alone; None where it was fitted."""


class _LeastSquares:
    """Ridge regression of r (T, C) on h (T, k), from running sums in float32."""

    def __init__(self, inputs: int, outputs: int, device: torch.device) -> None:
        self.hh = torch.zeros(inputs, inputs, device=device)
        self.rh = torch.zeros(outputs, inputs, device=device)
        self.h = torch.zeros(inputs, device=device, dtype=torch.float64)
        self.r = torch.zeros(outputs, device=device, dtype=torch.float64)
        self.shift: Tensor | None = None
        self.count = 0

    def add(self, hidden_Tk: Tensor, residual_TC: Tensor) -> None:
        if self.shift is None:
            self.shift = hidden_Tk.mean(dim=0)
        hidden_Tk = hidden_Tk - self.shift
        self.hh.addmm_(hidden_Tk.T, hidden_Tk)
        self.rh.addmm_(residual_TC.T, hidden_Tk)
        self.h += hidden_Tk.sum(dim=0, dtype=torch.float64)
        self.r += residual_TC.sum(dim=0, dtype=torch.float64)
        self.count += len(hidden_Tk)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """(C, k) and (C,), float64: the weight and bias to be added."""
        assert self.shift is not None
        mean_h, mean_r = self.h / self.count, self.r / self.count
        covariance = self.hh.double() / self.count - torch.outer(mean_h, mean_h)
        cross = self.rh.double() / self.count - torch.outer(mean_r, mean_h)
        variance = covariance.diagonal().clamp(min=0)
        # A few outlier channels must not set the ridge of all the others.
        moving = variance[variance > 0]
        if len(moving):
            variance = variance.clamp(max=OUTLIER * moving.median())
        penalty = ridge * variance.mean().clamp(min=torch.finfo(torch.float64).tiny)
        identity = torch.eye(len(variance), dtype=torch.float64, device=variance.device)
        factor = torch.linalg.cholesky(covariance + penalty * identity)
        weight = torch.cholesky_solve(cross.T, factor).T
        return weight, mean_r - weight @ (mean_h + self.shift.double())


def _tail_scale(model: VisionModel, block: int, state: BlockState) -> Tensor | None:
    """What one unit of the second linear's output adds to each channel of the block's output.

    A block may scale that output per channel (LayerScale) before it joins the residual stream.
    Asked of autograd and not of the block's class: with d output / d y diagonal and the same for
    all tokens, the gradient of (r . output) is r times that diagonal, for a random r.

    Returns:
        (C,), or None where the tail is anything else, such as a norm.
    """
    caught: list[Tensor] = []

    def hook(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        caught.append(output.detach().requires_grad_())
        return caught[-1]

    fc_out = model.backbone.get_submodule(model.spec.sites[block].fc_out)
    handle = fc_out.register_forward_hook(hook)
    one = BlockState(state.tokens[:1].detach(), state.rope)
    try:
        with torch.enable_grad():
            output = model.run_block(block, one).tokens
            sign_NC = torch.sign(
                torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(0))
            ).to(output.device)
            (gradient,) = torch.autograd.grad((output[0] * sign_NC).sum(), caught[0])
    finally:
        handle.remove()
    scale_NC = gradient[0] * sign_NC
    scale = scale_NC[0]
    return scale if torch.allclose(scale_NC, scale.expand_as(scale_NC), rtol=1e-4) else None


@torch.no_grad()
def refit(
    dense: VisionModel,
    model: VisionModel,
    batches: Iterable[Tensor],
    *,
    ridge: float = RIDGE,
) -> list[BlockRefit]:
    """Solve every second linear of `model` again, first block to last, in place.

    Costs one forward of each model plus one of the slim blocks. The residual streams of both
    models are held for all images, 2 * B * N * C numbers.

    Args:
        dense: The model to come back to.
        model: Slim and folded, on the same device.
        batches: Calibration images in micro-batches (b, 3, S, S).
        ridge: Pull towards the present weights, in units of the mean variance of h.

    Returns:
        One entry per block.

    Raises:
        VerificationError: A difference is not finite.
    """
    device = next(model.parameters()).device
    theirs = [dense.stem(batch.to(device)) for batch in batches]
    ours = list(theirs)
    trace = []
    with task("re-fit", model.spec.depth) as progress:
        for block in range(model.spec.depth):
            for index, state in enumerate(theirs):
                theirs[index] = dense.run_block(block, state)
            scale = _tail_scale(model, block, ours[0])
            before = None
            if scale is not None:
                before = _refit_block(model, block, ours, theirs, scale, ridge)
            error = _RelativeError(device)
            for index, (mine, their) in enumerate(zip(ours, theirs, strict=True)):
                ours[index] = model.run_block(block, mine)
                error.add(their.tokens - ours[index].tokens, their.tokens)
            after = error.value
            if not math.isfinite(after):
                raise _not_finite(block)
            trace.append(
                BlockRefit(
                    block=block,
                    error_before=after if before is None else before,
                    error_after=after,
                    skipped=None if before is not None else "its output is not added as it is",
                )
            )
            progress.advance()
    return trace


def _not_finite(block: int) -> VerificationError:
    return VerificationError(
        f"the re-fit of block {block} ended in values that are not finite. Build without it: "
        "--repair fold."
    )


class _RelativeError:
    """Squared difference to the dense residual stream, over the square of the latter."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, dtype=torch.float64, device=device)

    def add(self, difference: Tensor, dense: Tensor) -> None:
        # Norms, not sums of squares in float64: those write every number out again, twice as wide.
        norms = [torch.linalg.vector_norm(part.float()) for part in (difference, dense)]
        self.sums += torch.stack(norms).double().square()

    @property
    def value(self) -> float:
        return float(self.sums[0] / self.sums[1])


def _refit_block(
    model: VisionModel,
    block: int,
    inputs: list[BlockState],
    targets: list[BlockState],
    scale: Tensor,
    ridge: float,
) -> float:
    """Solve one block; returns the relative error before."""
    path = model.spec.sites[block].fc_out
    linear = model.backbone.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    # A channel that is scaled by 0 cannot be corrected.
    inverse = torch.where(scale == 0, 0.0, 1 / scale.float())
    sums = _LeastSquares(linear.in_features, linear.out_features, scale.device)
    error = _RelativeError(scale.device)
    caught: list[Tensor] = []
    handle = linear.register_forward_pre_hook(lambda _module, args: caught.append(args[0]))
    try:
        for state, target in zip(inputs, targets, strict=True):
            difference = target.tokens - model.run_block(block, state).tokens
            hidden_Tk = caught.pop().flatten(0, -2).float()
            sums.add(hidden_Tk, difference.flatten(0, -2).float() * inverse)
            error.add(difference, target.tokens)
    finally:
        handle.remove()
    try:
        weight, bias = sums.solve(ridge)
    except torch.linalg.LinAlgError as failed:
        raise _not_finite(block) from failed
    weight += linear.weight.double()
    if linear.bias is not None:
        bias += linear.bias.double()
    dtype = linear.weight.dtype
    put_linears(model.backbone, {path: make_linear(weight.to(dtype), bias.to(dtype), like=linear)})
    return error.value
