"""AMP's adaptive search: how narrow can each block be?

Source: AMP, arXiv 2603.08100, section 3.3. Blocks go from last to first; neurons are ranked by
importance; a binary search finds the narrowest width at which the criterion rises by no more than
the threshold over its value before this block.

While block l is searched, blocks 0..l-1 are still dense, so their output never changes: it is
computed once (`BlockInputs`) and only blocks l..L-1 run for a candidate. The published procedure
runs all L blocks for every candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ampdeploy.config import PruneConfig
from ampdeploy.models.build import with_sites
from ampdeploy.models.vision import BlockState, VisionModel
from ampdeploy.progress import task
from ampdeploy.prune.block_inputs import BlockInputs, memory_budget
from ampdeploy.prune.criterion import CRITERIA, batched
from ampdeploy.prune.slim import put_linears, site_linears, slim_linears, top_neurons


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One width tried for one block."""

    block: int
    width: int
    value: float
    """The criterion with this width."""
    limit: float
    """The largest value that would have been accepted."""
    accepted: bool


@dataclass(kw_only=True)
class SearchResult:
    """What the search found, and everything it tried."""

    kept: list[Tensor]
    """Per block, first to last: sorted indices of the neurons that stay."""
    dense_value: float
    final_value: float
    candidates: list[Candidate] = field(default_factory=list)
    images: int = 0
    block_forwards_per_image: int = 0
    """Deterministic cost: how many times one image went through one block."""


def narrowest_width(
    hidden: int, steps: int, limit: float, evaluate: Callable[[int], float]
) -> tuple[int, float | None, list[tuple[int, float]]]:
    """Binary search for the narrowest width whose value stays within `limit`.

    Args:
        hidden: The dense width H; widths tried lie on a grid of H / 2**steps.
        steps: Halvings.
        limit: Largest acceptable value.
        evaluate: Value of the criterion at a width.

    Returns:
        (width, its value, every (width, value) tried in order). When nothing passes, the width
        is `hidden` and the value None: the block stays dense and so does the baseline. A width
        is returned only if it was itself evaluated and passed, whatever the curve looks like.
    """
    left, right = 0, hidden
    accepted: float | None = None
    tried = []
    for _ in range(steps):
        middle = (left + right) // 2
        if middle in (left, right):
            break
        value = evaluate(middle)
        tried.append((middle, value))
        if value <= limit:  # NaN compares false, so a broken candidate is never accepted
            right, accepted = middle, value
        else:
            left = middle
    return right, accepted, tried


@torch.no_grad()
def search(
    model: VisionModel,
    batches: Iterable[Tensor],
    scores: list[Tensor],
    config: PruneConfig,
    *,
    images: int,
) -> SearchResult:
    """Find every block's width, from last to first.

    `model` is slimmed along the way: afterwards it is the pruned model.

    Args:
        model: The dense model.
        batches: Calibration images in micro-batches (b, 3, S, S), in a fixed order.
        scores: Per block, importance (H,) from `score.importance`.
        config: Criterion, threshold and steps.
        images: How many images `batches` holds; a multiple of `config.batch_size`.
    """
    device = next(model.parameters()).device
    criterion = CRITERIA[config.criterion]
    inputs = BlockInputs(
        model, (batch.to(device) for batch in batches), images, memory_budget(device)
    )
    depth = model.spec.depth
    forwards = 0
    micro_batches = 0

    def evaluate_suffix(block: int, states: list[BlockState]) -> float:
        nonlocal forwards, micro_batches
        features = torch.cat(
            [model.head(model.run_blocks(state, block).tokens).features for state in states]
        )
        micro_batches = len(states)
        forwards += (depth - block) * len(states)
        return batched(criterion, features, config.inv_temperature, config.batch_size)

    result = SearchResult(kept=[], dense_value=float("nan"), final_value=float("nan"))
    with task("search", depth * config.steps) as progress:
        for site in reversed(model.spec.sites):
            states = inputs.take(site.block)
            if site.block == depth - 1:
                result.dense_value = result.final_value = evaluate_suffix(site.block, states)
            limit = result.final_value + config.threshold
            dense = site_linears(model.backbone, site)
            score = scores[site.block]

            def evaluate(width: int) -> float:
                put_linears(model.backbone, dense)  # noqa: B023 - called within this iteration
                kept = top_neurons(score, width)  # noqa: B023
                put_linears(model.backbone, slim_linears(model.backbone, site, kept))  # noqa: B023
                value = evaluate_suffix(site.block, states)  # noqa: B023
                progress.advance()
                return value

            width, value, tried = narrowest_width(site.hidden, config.steps, limit, evaluate)
            put_linears(model.backbone, dense)
            kept = top_neurons(score, width)
            put_linears(model.backbone, slim_linears(model.backbone, site, kept))
            result.kept.insert(0, kept)
            result.candidates += [
                Candidate(
                    block=site.block, width=w, value=v, limit=limit, accepted=bool(v <= limit)
                )
                for w, v in tried
            ]
            if value is not None:
                result.final_value = value
            progress.note(f"block {site.block}: {width}/{site.hidden}")
    model.spec = with_sites(model.spec, [len(kept) for kept in result.kept])
    result.images = images
    result.block_forwards_per_image = (forwards + inputs.block_forwards) // max(micro_batches, 1)
    return result
