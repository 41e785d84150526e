"""Predicted against measured: every kind of operator in every block of the two models."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import numpy as np

from ampdeploy.explain.interleave import ratio
from ampdeploy.explain.profiled import ProfiledModel, Timed
from ampdeploy.explain.result import KINDS, Cell, Machine, Work

ROOFLINE = (
    "roofline: an operator takes max(FLOPs / F, bytes / B), F and B measured on this machine "
    "(`machine`); the predicted ratio of a part is that sum for the pruned model over that for "
    "the baseline. Of several parts: baseline's measured times, each times its predicted ratio"
)
WORK_RATIO = (
    "work: time is in proportion to FLOPs where a part has matrix products, else to bytes. Of "
    "several parts: baseline's measured times, each times its predicted ratio"
)

Key = tuple[int | None, str]


def roofline_s(work: Work, machine: Machine) -> float:
    """Least seconds that one operator can take (Williams et al., 2009)."""
    return max(work.flops / machine.flops_per_s, work.bytes / machine.bytes_per_s)


def make_cells(
    baseline: ProfiledModel, pruned: ProfiledModel, machine: Machine | None
) -> tuple[Cell, ...]:
    """One cell for each (block, kind) that either model has, in order.

    Args:
        baseline: The dense model.
        pruned: The pruned one, profiled in the same loop.
        machine: Rates for the roofline; None: by work alone.
    """
    groups = [_by_key(model) for model in (baseline, pruned)]
    keys = sorted(set(groups[0]) | set(groups[1]), key=_order)
    return tuple(
        _cell(key, "cell", groups[0].get(key, []), groups[1].get(key, []), machine) for key in keys
    )


def _by_key(model: ProfiledModel) -> dict[Key, list[Timed]]:
    groups: dict[Key, list[Timed]] = defaultdict(list)
    for operator in model.operators:
        groups[operator.place.block, operator.place.kind].append(operator)
    return groups


def _order(key: Key) -> tuple[int, int]:
    block, kind = key
    return -1 if block is None else block, KINDS.index(kind)


def _cell(
    key: tuple[int | None, str | None],
    scope: str,
    baseline: Sequence[Timed],
    pruned: Sequence[Timed],
    machine: Machine | None,
) -> Cell:
    predicted = _predict(baseline, pruned, machine)
    return _filled(key, scope, baseline, pruned, predicted)


def _filled(
    key: tuple[int | None, str | None],
    scope: str,
    baseline: Sequence[Timed],
    pruned: Sequence[Timed],
    predicted: float | None,
) -> Cell:
    why = {} if predicted is not None else {"predicted": "the baseline has no such work"}
    measured = None
    both = [_sum_ms(operators) for operators in (baseline, pruned)]
    # The profiler counts whole microseconds: a call of nothing but reshapes may take none.
    if baseline and pruned and min(both[0].min(), both[1].min()) > 0:
        measured = ratio(np.stack(both, axis=1))
    else:
        why["measured"] = "one of the models spends no measurable time here"
    if key[0] is None:
        why["block"] = "all blocks" if scope in ("kind", "all") else "outside the blocks"
    if key[1] is None:
        why["kind"] = "all kinds"
    return Cell(
        block=key[0],
        kind=key[1],
        scope=scope,
        baseline=_sum_work(baseline),
        pruned=_sum_work(pruned),
        baseline_ms=float(np.median(both[0])) if baseline else 0.0,
        pruned_ms=float(np.median(both[1])) if pruned else 0.0,
        measured=measured,
        predicted=predicted,
        why=why,
    )


def _sum_ms(operators: Sequence[Timed]) -> np.ndarray:
    return np.sum([operator.ms for operator in operators], axis=0) if operators else np.zeros(1)


def _sum_work(operators: Sequence[Timed]) -> Work:
    return sum((operator.work for operator in operators), Work())


def _predict(
    baseline: Sequence[Timed], pruned: Sequence[Timed], machine: Machine | None
) -> float | None:
    """Predicted time ratio of one cell; None when the baseline does nothing there."""
    if machine is not None:
        dense, slim = (
            sum(roofline_s(operator.work, machine) for operator in operators)
            for operators in (baseline, pruned)
        )
    else:
        works = [_sum_work(operators) for operators in (baseline, pruned)]
        by_flops = works[0].flops > 0
        dense, slim = (work.flops if by_flops else work.bytes for work in works)
    return slim / dense if dense else None


def sum_cells(
    baseline: ProfiledModel,
    pruned: ProfiledModel,
    cells: Sequence[Cell],
    *,
    scope: str,
) -> tuple[Cell, ...]:
    """`cells` put together: ``kind`` over all blocks, ``block`` over all kinds, or ``all``."""
    part_of: Callable[[int | None, str | None], tuple[int | None, str | None]] = {
        "kind": lambda block, kind: (None, kind),
        "block": lambda block, kind: (block, None),
        "all": lambda block, kind: (None, None),
    }[scope]
    wanted: dict[tuple[int | None, str | None], list[Cell]] = defaultdict(list)
    for cell in cells:
        if scope == "block" and cell.block is None:
            continue
        wanted[part_of(cell.block, cell.kind)].append(cell)
    result = []
    for key, parts in wanted.items():
        dense, slim = (
            [o for o in model.operators if part_of(o.place.block, o.place.kind) == key]
            for model in (baseline, pruned)
        )
        result.append(_filled(key, scope, dense, slim, _predict_sum(parts)))
    if scope == "kind":
        result.sort(key=lambda cell: KINDS.index(str(cell.kind)))
    return tuple(result)


def _predict_sum(parts: Sequence[Cell]) -> float | None:
    before = sum(cell.baseline_ms for cell in parts)
    # What only the pruned model runs has no prediction; it is counted as measured.
    after = sum(
        cell.pruned_ms if cell.predicted is None else cell.baseline_ms * cell.predicted
        for cell in parts
    )
    return after / before if before else None
