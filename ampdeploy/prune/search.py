"""Divergence search: which widths lose least, at an exact budget.

1. Every block's error curve is predicted from its moments, without running the model
   (`select.error_curve`), and the budget is spent where it costs least (`allocate`).
2. Each block alone, folded at the width it got, is put into the dense model, and the divergence of
   the output is measured, from that block's cached input on, on images that the moments do not
   hold: the fold fits its own too well. Measured over predicted says what the prediction missed,
   such as errors that add up over tokens.
3. The curves are corrected by that ratio, in full, by half (its square root) or not at all: a full
   correction is right for small cuts, where blocks do not disturb each other; for large ones it
   makes early blocks too narrow, whose errors all later blocks then see.
4. Each allocation is folded as a whole and judged on images that nothing before has seen. The best
   one is the result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ampdeploy.config import PruneConfig
from ampdeploy.errors import VerificationError
from ampdeploy.models.vision import BlockState, Features, VisionModel
from ampdeploy.progress import task
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.block_inputs import BlockInputs, memory_budget
from ampdeploy.prune.budget import Budget
from ampdeploy.prune.compensate import fold, folded_linear
from ampdeploy.prune.divergence import Divergence, divergence
from ampdeploy.prune.moments import BlockMoments
from ampdeploy.prune.select import curve_of
from ampdeploy.prune.slim import put_linears, restored, slim_linears, top_neurons

# How much of the measured correction to believe: exponents of (measured / predicted).
EXPONENTS = (0.0, 0.5, 1.0)


@dataclass(frozen=True, kw_only=True)
class BlockMeasurement:
    """One block, alone, at the width that the predicted curves gave it."""

    block: int
    width: int
    predicted: float
    """Loss of cosine, pooled plus patches, by the curve."""
    measured: Divergence


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """Widths for the whole model, judged on unseen images."""

    exponent: float
    widths: tuple[int, ...]
    verified: Divergence


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """The widths found, and everything that was tried."""

    kept: list[Tensor]
    """Per block, first to last: sorted indices of the neurons that stay."""
    measurements: tuple[BlockMeasurement, ...]
    allocations: tuple[Allocation, ...]
    chosen: int
    """Position of the result in `allocations`."""
    measured_images: int
    verified_images: int
    block_forwards: int
    """Deterministic cost: one image through one block counts 1."""


@torch.no_grad()
def search(
    model: VisionModel,
    moments: Sequence[BlockMoments],
    scores: Sequence[Tensor],
    measure: Sequence[Tensor],
    verify: Sequence[Tensor],
    budget: Budget,
    config: PruneConfig,
) -> SearchResult:
    """Find widths and neurons; `model` is dense and unchanged afterwards.

    Args:
        model: Dense.
        moments: Per block.
        scores: Per block, (H,) from `select.rank`.
        measure: Images that the moments do not hold, in micro-batches (b, 3, S, S).
        verify: Others, that decide.
        budget: Total, grid and limits.
        config: For 1 / tau and the kind of fold.
    """
    device = next(model.parameters()).device
    method = config.fold
    curves = [curve_of(score).double().numpy() for score in scores]
    widths = allocate(curves, budget)
    measurements, forwards = _measure_blocks(
        model,
        moments,
        _kept(scores, widths),
        [float(curve[width]) for curve, width in zip(curves, widths, strict=True)],
        [batch.to(device) for batch in measure],
        config,
    )
    dense = [model(batch.to(device)) for batch in verify]
    images = sum(len(batch) for batch in verify)
    allocations: list[Allocation] = []
    with task("verify", len(EXPONENTS)) as progress:
        for exponent in EXPONENTS:
            corrected = [
                curve * _correction(measurement) ** exponent
                for curve, measurement in zip(curves, measurements, strict=True)
            ]
            widths = allocate(corrected, budget)
            with restored(model):
                fold(model, _kept(scores, widths), moments, method=method)
                pruned = [model(batch.to(device)) for batch in verify]
            found = divergence(dense, pruned, config.inv_temperature)
            if not math.isfinite(found.total):
                raise VerificationError(
                    f"a folded model with widths {widths} gives features that are not finite. "
                    "Check the weights with `ampdeploy eval` in float32, or use --repair "
                    "mean-shift."
                )
            allocations.append(Allocation(exponent=exponent, widths=tuple(widths), verified=found))
            progress.advance()
    best = min(range(len(allocations)), key=lambda index: allocations[index].verified.total)
    return SearchResult(
        kept=_kept(scores, allocations[best].widths),
        measurements=tuple(measurements),
        allocations=tuple(allocations),
        chosen=best,
        measured_images=sum(len(batch) for batch in measure),
        verified_images=images,
        block_forwards=forwards + images * model.spec.depth * (1 + len(EXPONENTS)),
    )


def _kept(scores: Sequence[Tensor], widths: Sequence[int]) -> list[Tensor]:
    return [top_neurons(score, width) for score, width in zip(scores, widths, strict=True)]


def _fc_out(model: VisionModel, path: str) -> nn.Linear:
    linear = model.backbone.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear


def _correction(measurement: BlockMeasurement) -> float:
    """Measured over predicted; 1 where the block stayed dense and there is nothing to compare."""
    if measurement.predicted <= 0 or measurement.measured.total <= 0:
        return 1.0
    return measurement.measured.total / measurement.predicted


def _measure_blocks(
    model: VisionModel,
    moments: Sequence[BlockMoments],
    kept: Sequence[Tensor],
    predicted: Sequence[float],
    batches: list[Tensor],
    config: PruneConfig,
) -> tuple[list[BlockMeasurement], int]:
    """The divergence that each block causes alone, and the block-forwards it took."""
    depth = model.spec.depth
    images = sum(len(batch) for batch in batches)
    inputs = BlockInputs(model, batches, images, memory_budget(batches[0].device))
    dense: list[Features] = []
    forwards = 0

    def suffix(block: int, states: list[BlockState]) -> list[Features]:
        nonlocal forwards
        forwards += (depth - block) * images
        return [model.head(model.run_blocks(state, block).tokens) for state in states]

    result = []
    with task("measure", depth) as progress:
        for site in reversed(model.spec.sites):
            states = inputs.take(site.block)
            if not dense:
                dense = suffix(site.block, states)
            indices = kept[site.block]
            linears = slim_linears(model.backbone, site, indices)
            linears[site.fc_out] = folded_linear(
                _fc_out(model, site.fc_out),
                moments[site.block],
                indices,
                method=config.fold,
            )
            with restored(model):
                put_linears(model.backbone, linears)
                found = divergence(dense, suffix(site.block, states), config.inv_temperature)
            result.append(
                BlockMeasurement(
                    block=site.block,
                    width=len(indices),
                    predicted=predicted[site.block],
                    measured=found,
                )
            )
            progress.advance()
    # `inputs` counts block calls per micro-batch; all of them are of all images together.
    return result[::-1], forwards + inputs.block_forwards * images // max(len(batches), 1)
