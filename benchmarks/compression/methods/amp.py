"""AMP (arXiv 2603.08100): its score at a uniform ratio, its search as published, and both repaired.

The published search takes a threshold, not a size. Thresholds are swept on the first seed until
they land near every size asked for, and used for the other seeds; each row is the nearest that its
seed reached, with its true size. One search is charged to a row, not the sweep that found it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from ampdeploy.artifacts import prepare_folder, read_json, write_json
from ampdeploy.models.profile import count_params
from ampdeploy.progress import log
from ampdeploy.prune.amp import search
from ampdeploy.prune.budget import Budget
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.score import importance
from ampdeploy.prune.slim import top_neurons
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.meter import Cost
from benchmarks.compression.methods.variance import MOMENTS
from benchmarks.compression.widths import uniform

# Searches of the first seed, all sizes together: each runs the suffix of the network 72 times.
MOST_SEARCHES = 10

# A size is met when a search lands within this share of the hidden neurons.
NEAR_ENOUGH = 0.005

# How far to go beyond the largest or smallest threshold tried.
STRIDE = 4.0


def _scores(bench: Bench) -> list[Tensor]:
    batches = bench.images.split(bench.config.batch_size)
    return importance(bench.dense, batches, bench.config, count=len(bench.images))


SCORES = Part(name="AMP scores", make=_scores)


@dataclass(frozen=True, kw_only=True)
class Found:
    """One search with one threshold."""

    threshold: float
    widths: list[int]
    cost: Cost

    @property
    def neurons(self) -> int:
        """Hidden neurons that stay, in all blocks."""
        return sum(self.widths)


def next_threshold(
    found: dict[float, int], targets: Sequence[float], tolerance: float, start: float
) -> float | None:
    """Which threshold to try next, so that every target has a search near it.

    Works on the target that is worst met: between the two thresholds around it, by interpolation
    in the logarithm; beyond the last one by a stride.

    Args:
        found: Hidden neurons kept, by threshold tried; falling, mostly.
        targets: Neurons to land on.
        tolerance: Neurons by which a target may be missed.
        start: The first threshold.

    Returns:
        None when every target is met or cannot be met more closely.
    """
    if not found:
        return start
    for target in sorted(targets, key=lambda t: -min(abs(n - t) for n in found.values())):
        if min(abs(n - target) for n in found.values()) <= tolerance:
            return None
        proposed = _towards(target, found)
        if proposed is not None:
            return proposed
    return None


def _towards(target: float, found: dict[float, int]) -> float | None:
    tried = sorted(found)
    if all(found[threshold] > target for threshold in tried):
        return tried[-1] * STRIDE
    if all(found[threshold] < target for threshold in tried):
        return tried[0] / STRIDE
    for low, high in itertools.pairwise(tried):
        above, below = found[low], found[high]
        if above >= target >= below and above > below:
            if high / low < 1.02:  # a step of the curve: nothing lies between
                return None
            share = min(max((above - target) / (above - below), 0.1), 0.9)
            return math.exp(math.log(low) + share * math.log(high / low))
    return None


class Searches:
    """AMP's searches of one seed, kept on disk, because one takes minutes."""

    def __init__(self, bench: Bench, seed: int) -> None:
        self.bench = bench
        self.folder = bench.notes / f"amp-seed-{seed}"
        prepare_folder(self.folder)
        self.found: dict[float, Found] = {}
        for path in sorted(self.folder.glob("*.json")):
            stored = read_json(path)
            if stored["identity"] == bench.identities[seed]:
                cost = Cost(**stored["cost"])
                found = Found(threshold=stored["threshold"], widths=stored["widths"], cost=cost)
                self.found[found.threshold] = found

    def run(self, threshold: float) -> None:
        """Search with `threshold`, on the first batch of the criterion."""
        bench = self.bench
        config = dataclasses.replace(bench.config, threshold=threshold)
        images = bench.images[: config.batch_size]
        model = bench.copy()
        with bench.meter() as meter:
            result = search(
                model,
                images.split(config.micro_batch_size),
                bench.get(SCORES),
                config,
                images=len(images),
            )
        widths = [len(kept) for kept in result.kept]
        found = Found(threshold=threshold, widths=widths, cost=meter.cost)
        self.found[threshold] = found
        write_json(
            self.folder / f"{threshold:.6e}.json",
            {
                "identity": bench.identities[bench.seed],
                "threshold": threshold,
                "neurons": found.neurons,
                "params": count_params(model),
                "widths": widths,
                "cost": dataclasses.asdict(meter.cost),
            },
        )
        log.info("  AMP threshold %.3g keeps %d neurons", threshold, found.neurons)

    def nearest(self, neurons: float) -> Found:
        """The search that kept closest to so many neurons; of several, the lowest threshold."""
        return min(
            self.found.values(), key=lambda found: (abs(found.neurons - neurons), found.threshold)
        )


def _searches(bench: Bench) -> Searches:
    searches = Searches(bench, bench.seed)
    targets = [budget.neurons for budget in bench.budgets.values()]
    reference = Searches(bench, bench.first_seed)
    if bench.seed != bench.first_seed and reference.found:
        for threshold in {reference.nearest(target).threshold for target in targets}:
            if threshold not in searches.found:
                searches.run(threshold)
        return searches
    tolerance = NEAR_ENOUGH * sum(site.hidden for site in bench.dense.spec.sites)
    while len(searches.found) < MOST_SEARCHES:
        neurons = {threshold: found.neurons for threshold, found in searches.found.items()}
        proposed = next_threshold(neurons, targets, tolerance, bench.config.threshold)
        if proposed is None:
            break
        searches.run(proposed)
    return searches


SEARCHES = Part(name="AMP searches", make=_searches, metered=False)


def _uniform(bench: Bench, budget: Budget) -> Pruned:
    return Pruned(model=bench.slim(uniform(bench.get(SCORES), budget)))


def _kept(bench: Bench, budget: Budget) -> tuple[list[Tensor], Cost]:
    found: Found = bench.get(SEARCHES).nearest(budget.neurons)
    pairs = zip(bench.get(SCORES), found.widths, strict=True)
    return [top_neurons(score, width) for score, width in pairs], found.cost


def _published(bench: Bench, budget: Budget) -> Pruned:
    kept, cost = _kept(bench, budget)
    return Pruned(model=bench.slim(kept), charged=cost)


def _mean_shift(bench: Bench, budget: Budget) -> Pruned:
    kept, cost = _kept(bench, budget)
    model = fold(bench.copy(), kept, bench.get(MOMENTS), method="mean-shift")
    return Pruned(model=model, charged=cost)


UNIFORM = Method(name="amp-uniform", label="AMP score, uniform", prune=_uniform, parts=(SCORES,))
PUBLISHED = Method(
    name="amp",
    label="AMP as published",
    prune=_published,
    parts=(SCORES, SEARCHES),
    exact=False,
)
MEAN_SHIFT = Method(
    name="amp-mean-shift",
    label="AMP + mean-shift",
    prune=_mean_shift,
    parts=(SCORES, SEARCHES, MOMENTS),
    exact=False,
)
