"""From a dense model and the neurons to keep to the slim model that ships."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ampdeploy.config import PruneConfig
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import log
from ampdeploy.prune.compensate import fold, too_poor
from ampdeploy.prune.divergence import Divergence, divergence
from ampdeploy.prune.moments import BlockMoments
from ampdeploy.prune.refit import BlockRefit, refit
from ampdeploy.prune.slim import put_linears, site_linears


@dataclass(frozen=True, kw_only=True)
class Repair:
    """What the repair did, judged on images that it was not fitted on."""

    method: str
    """``refit``, ``least-squares``, ``mean-shift`` or ``none``: what the model now has."""
    folded: Divergence
    refitted: Divergence | None
    """None where no re-fit was asked for."""
    mean_shifted: tuple[int, ...]
    """Blocks with too few calibration tokens for least squares: only the mean was made up for."""
    blocks: tuple[BlockRefit, ...]
    block_forwards: int
    """Deterministic cost: one image through one block counts 1."""


@torch.no_grad()
def slim_and_repair(
    dense: VisionModel,
    kept: Sequence[Tensor],
    moments: Sequence[BlockMoments],
    fit: Iterable[Tensor],
    verify: Sequence[Tensor],
    config: PruneConfig,
) -> tuple[VisionModel, Repair]:
    """The slim model, folded and re-fitted as `config.repair` says.

    The re-fit is kept only where it brings the features of other images closer.

    Args:
        dense: Unchanged afterwards.
        kept: Per block, sorted indices of the neurons that stay.
        moments: Per block, of the dense model.
        fit: Calibration images in micro-batches (b, 3, S, S).
        verify: Others, in micro-batches.
        config: For the repair and 1 / tau.
    """
    device = next(dense.parameters()).device
    verify = [batch.to(device) for batch in verify]
    reference = [dense(batch) for batch in verify]
    model = fold(copy.deepcopy(dense), kept, moments, method=config.fold)

    shifted = _poor_blocks(kept, moments) if config.fold == "least-squares" else ()

    def judge() -> Divergence:
        return divergence(reference, [model(batch) for batch in verify], config.inv_temperature)

    folded = judge()
    depth = model.spec.depth
    forwards = 2 * depth * sum(len(batch) for batch in verify)
    if config.repair != "refit":
        return model, Repair(
            method=config.fold,
            folded=folded,
            refitted=None,
            mean_shifted=shifted,
            blocks=(),
            block_forwards=forwards,
        )
    before = [site_linears(model.backbone, site) for site in model.spec.sites]
    fitted = 0

    def counted() -> Iterator[Tensor]:
        nonlocal fitted
        for batch in fit:
            fitted += len(batch)
            yield batch

    blocks = refit(dense, model, counted())
    refitted = judge()
    method = "refit"
    if not refitted.total < folded.total:  # NaN does not pay either
        log.info(
            "        the re-fit does not pay on other images (loss of cosine of pooled "
            "and patch features %.4f, folded %.4f); the fold is kept",
            refitted.total,
            folded.total,
        )
        method = config.fold
        for linears in before:
            put_linears(model.backbone, linears)
    forwards += depth * sum(len(batch) for batch in verify)
    # Every block: the dense one, the slim one before (unless it was skipped) and after its own
    # re-fit, and one image to see what its output is scaled by.
    forwards += sum(2 if entry.skipped else 3 for entry in blocks) * fitted + depth
    return model, Repair(
        method=method,
        folded=folded,
        refitted=refitted,
        mean_shifted=shifted,
        blocks=tuple(blocks),
        block_forwards=forwards,
    )


def _poor_blocks(kept: Sequence[Tensor], moments: Sequence[BlockMoments]) -> tuple[int, ...]:
    """Blocks that the fold only shifts, said in the log."""
    poor = tuple(
        index
        for index, (indices, block) in enumerate(zip(kept, moments, strict=True))
        if too_poor(block, indices)
    )
    if poor:
        log.warning(
            "%d tokens of calibration images cannot settle the %d neurons of block %s; there only "
            "the mean of the pruned ones is made up for. More --calib-images would help",
            moments[poor[0]].tokens,
            len(kept[poor[0]]),
            ", ".join(map(str, poor)),
        )
    return poor
