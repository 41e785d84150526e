"""This package's default, and the same without the sequential re-fit.

The steps of `ampdeploy.prune.compress.compress`, so that what does not depend on the size is done
once: moments and the scores of neurons for all sizes, the search of a size for both rows. Every
row is charged for all of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ampdeploy.prune.budget import Budget
from ampdeploy.prune.compress import scores_of, split_calibration
from ampdeploy.prune.moments import BlockMoments, collect
from ampdeploy.prune.repair import slim_and_repair
from ampdeploy.prune.search import SearchResult, search
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.meter import Cost


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """What all sizes start from."""

    fit: Sequence[Tensor]
    """Calibration images in micro-batches; `verify` likewise."""
    verify: Sequence[Tensor]
    measure: Sequence[Tensor]
    moments: list[BlockMoments]
    scores: list[Tensor]


def _rank(bench: Bench) -> Ranking:
    split = split_calibration(len(bench.images))
    fit, measure, verify = (
        part.split(bench.config.micro_batch_size)
        for part in bench.images.split([split.fit, split.measure, split.verify])
    )
    moments = collect(bench.dense, fit, count=split.fit)
    return Ranking(
        fit=fit,
        measure=measure,
        verify=verify,
        moments=moments,
        scores=scores_of(bench.dense, moments),
    )


RANKING = Part(name="weighted moments and scores", make=_rank)


def _search(bench: Bench) -> dict[float, tuple[SearchResult, Cost]]:
    ranking: Ranking = bench.get(RANKING)
    found = {}
    for budget in bench.budgets.values():
        with bench.meter() as meter:
            result = search(
                bench.dense,
                ranking.moments,
                ranking.scores,
                ranking.measure,
                ranking.verify,
                budget,
                bench.config,
            )
        found[budget.neurons] = (result, meter.cost)
    return found


SEARCH = Part(name="divergence searches", make=_search, metered=False)


def _prune(repair: str) -> Callable[[Bench, Budget], Pruned]:
    def prune(bench: Bench, budget: Budget) -> Pruned:
        ranking: Ranking = bench.get(RANKING)
        result, cost = bench.get(SEARCH)[budget.neurons]
        config = dataclasses.replace(bench.config, repair=repair)
        model, _ = slim_and_repair(
            bench.dense,
            result.kept,
            ranking.moments,
            [*ranking.fit, *ranking.measure],
            ranking.verify,
            config,
        )
        return Pruned(model=model, charged=cost)

    return prune


OURS = Method(name="ours", label="ampdeploy", prune=_prune("refit"), parts=(RANKING, SEARCH))
OURS_FOLD = Method(
    name="ours-fold",
    label="ampdeploy without re-fit",
    prune=_prune("fold"),
    parts=(RANKING, SEARCH),
)
