"""Which blocks need FP32 islands, and of what kind: a search over judgements.

The first block that fails gets its parts back in FP32, one kind at a time, cheapest first, until it
agrees; if none is enough, the whole block is. Where that does not help either, what it is given is
already wrong: the block before it in which most is lost comes next. Each step adds to the islands,
so the search ends. What turns out not to be needed is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ampdeploy.precision.compare import Judgement
from ampdeploy.precision.graph import KINDS
from ampdeploy.progress import log

# Kinds of nodes, cheapest first. Norms and softmax are FP32 already.
LADDER: tuple[frozenset[str], ...] = (
    frozenset({"residual"}),
    frozenset({"pointwise"}),
    frozenset({"residual", "pointwise"}),
    frozenset({"attention"}),
    frozenset({"linear"}),
    frozenset(KINDS),
)
WHOLE = LADDER[-1]
# Stands for stem and head.
OUTSIDE = -1

Islands = Mapping[int, frozenset[str]]
Judge = Callable[[Islands], Judgement]


def find_islands(judge: Judge, bar: float) -> tuple[dict[int, frozenset[str]], Judgement]:
    """The islands with which every output passes.

    Args:
        judge: Block (or `OUTSIDE`) -> kinds in FP32, to how the graph with them agrees.
        bar: Cosine that the first percentile must reach.

    Returns:
        The islands and their judgement; the judgement does not pass where nothing is left to try.
    """
    islands: dict[int, frozenset[str]] = {}
    judgement = judge(islands)
    while not judgement.passes(bar):
        block = _next_block(judgement, islands, bar)
        if block is None:
            return islands, judgement
        before = islands.get(block, frozenset())
        islands, judgement = _climb(judge, islands, block, judgement, bar)
        assert islands[block] > before  # or the search would not end
    return _take_back(judge, islands, judgement, bar)


def _next_block(judgement: Judgement, islands: Islands, bar: float) -> int | None:
    """Where to repair next; None: everything was tried."""
    failing = judgement.first_failing(bar)
    if failing is not None and islands.get(failing) != WHOLE:
        return failing
    losses = {b: loss for b, loss in judgement.losses().items() if islands.get(b) != WHOLE}
    earlier = {b: loss for b, loss in losses.items() if failing is None or b < failing}
    # What fails for good inside may still come right in the output: later blocks are tried too.
    for candidates in (earlier, losses):
        if candidates:
            return max(candidates, key=lambda block: candidates[block])
    return None if islands.get(OUTSIDE) == WHOLE else OUTSIDE


def _climb(
    judge: Judge, islands: Islands, block: int, before: Judgement, bar: float
) -> tuple[dict[int, frozenset[str]], Judgement]:
    """The first rung for `block` that mends what fails; else the whole block."""
    failing = before.first_failing(bar)
    seen = before.blocks.get(block)
    log.info("        block %d in FP16: %s; repairing", block, seen or "outside all blocks")
    has = islands.get(block, frozenset())
    rungs = [has | rung for rung in LADDER if not rung <= has]
    for kinds in rungs:
        tried = {**islands, block: kinds}
        judgement = judge(tried)
        still = judgement.first_failing(bar)
        # Nothing before the failing block changes for the worse by more FP32 in or before it.
        mended = failing is not None and (still is None or still > failing)
        if mended or judgement.passes(bar):
            break
    return tried, judgement


def _take_back(
    judge: Judge, islands: dict[int, frozenset[str]], judgement: Judgement, bar: float
) -> tuple[dict[int, frozenset[str]], Judgement]:
    """Make each island as small as the others allow; later ones may have made it unnecessary."""
    if len(islands) < 2:
        return islands, judgement  # its rung was the first that was enough
    for block in list(islands):
        without = {other: kinds for other, kinds in islands.items() if other != block}
        smaller = [without, *({**without, block: r} for r in LADDER if r < islands[block])]
        for tried in smaller:
            found = judge(tried)
            if found.passes(bar):
                islands, judgement = tried, found
                break
    return islands, judgement
