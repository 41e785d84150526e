"""The whole of pruning as one call: moments, order, search, fold, re-fit.

The pipeline runs the same steps as stages that can be resumed (`stages/prune.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ampdeploy.config import HELD_OUT_IMAGES, HELD_OUT_SHARE, PruneConfig
from ampdeploy.errors import ConfigError, DataError
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import task
from ampdeploy.prune.budget import plan_budget
from ampdeploy.prune.moments import BlockMoments, collect
from ampdeploy.prune.repair import Repair, slim_and_repair
from ampdeploy.prune.search import SearchResult, search
from ampdeploy.prune.select import rank


@dataclass(frozen=True, kw_only=True)
class Compressed:
    """A pruned model and how it came about."""

    model: VisionModel
    kept: list[Tensor]
    """Per block, sorted indices of the dense model's neurons that are left."""
    search: SearchResult
    repair: Repair
    block_forwards: int
    """Deterministic cost of all images together: one image through one block counts 1, backward
    passes not counted (there is one of each block per image)."""


@dataclass(frozen=True, kw_only=True)
class Split:
    """How many calibration images do what, in this order."""

    fit: int
    """Moments; with `measure`, the re-fit too."""
    measure: int
    """Measure what each block costs. Not those of the moments: the fold fits these too well, most
    of all in the last blocks, which few tokens matter to."""
    verify: int
    """Judge allocations and the re-fit."""


def split_calibration(images: int) -> Split:
    """Share out `images` calibration images."""
    fewest, most = HELD_OUT_IMAGES
    held_out = min(max(int(images * HELD_OUT_SHARE), fewest), most)
    return Split(fit=images - 2 * held_out, measure=held_out, verify=held_out)


def scores_of(model: VisionModel, moments: Sequence[BlockMoments]) -> list[Tensor]:
    """Per block, the scores (H,) of its neurons (`select.rank`)."""
    scores = []
    with task("rank", model.spec.depth) as progress:
        for site, block in zip(model.spec.sites, moments, strict=True):
            linear = model.backbone.get_submodule(site.fc_out)
            assert isinstance(linear, nn.Linear)
            scores.append(rank(linear.weight.detach(), block))
            progress.advance()
    return scores


def compress(
    model: VisionModel, images: Tensor, config: PruneConfig, *, multiple: int = 16
) -> Compressed:
    """Prune `model` to the budget of `config`.

    Args:
        model: Dense, on the device to work on; unchanged afterwards.
        images: Calibration images (B, 3, S, S), preprocessed, in an order that means nothing: see
            `split_calibration`.
        config: Budget, repair and sizes.
        multiple: Grid of the widths where `config` does not say.

    Raises:
        ConfigError: The budget cannot be met, or another search is asked for.
        DataError: Too few images.
    """
    if config.search != "divergence":
        raise ConfigError(
            f"compress meets a budget, which search {config.search!r} cannot. Leave it out, or "
            "use `ampdeploy.build`."
        )
    if len(images) < config.fewest_images:
        raise DataError(
            f"{len(images)} calibration images are too few; the search needs "
            f"{config.fewest_images} or more, and 256 for a good result."
        )
    budget = plan_budget(model, config, multiple=config.width_multiple or multiple)
    split = split_calibration(len(images))
    fit, measure, verify = (
        part.split(config.micro_batch_size)
        for part in images.split([split.fit, split.measure, split.verify])
    )
    moments = collect(model, fit, count=split.fit)
    scores = scores_of(model, moments)
    found = search(model, moments, scores, measure, verify, budget, config)
    slim, repair = slim_and_repair(model, found.kept, moments, [*fit, *measure], verify, config)
    return Compressed(
        model=slim,
        kept=found.kept,
        search=found,
        repair=repair,
        block_forwards=model.spec.depth * split.fit + found.block_forwards + repair.block_forwards,
    )
