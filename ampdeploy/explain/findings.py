"""From numbers to sentences. No sentence without the numbers that it rests on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from ampdeploy.bench.intervals import difference_of_medians
from ampdeploy.explain.compare import roofline_s
from ampdeploy.explain.evidence import (
    Evidence,
    interval,
    share,
    simultaneous,
    times,
)
from ampdeploy.explain.interleave import spread
from ampdeploy.explain.result import FC1, FC2, GATE, MIXED, MLP_KINDS, PROJ, QKV, Finding
from ampdeploy.explain.structure import activation, attention, fused_across, widths

SHRANK = 0.95  # predicted to take at most this share of its time: a change worth looking for
NAMED = 3  # cells that a sentence names
BUSY = 0.2  # (p90 - p10) / p50 above which the machine was not quiet


def find_all(found: Evidence) -> tuple[Finding, ...]:
    """What explains the speed-up, the largest causes first."""
    return tuple(
        finding
        for rule in (
            _prediction, _amdahl, _not_faster, attention, activation, widths, _memory_bound,
            _overhead, fused_across, _noise,
        )
        for finding in rule(found)
    )  # fmt: skip


def _prediction(e: Evidence) -> Iterator[Finding]:
    flops = share(e.total.pruned.flops, e.total.baseline.flops)
    if not flops or e.total.predicted is None or e.total.measured is None:
        return
    yield Finding(
        code="prediction",
        says=(
            f"FLOPs alone promise {times(flops)}, the prediction per operator is "
            f"{times(e.total.predicted)}; the operators are {times(e.total.measured.value)}"
            f"{interval(e.total.measured)} faster, and a whole call without the profiler "
            f"{times(e.latency.value)}{interval(e.latency)}."
        ),
        numbers={
            "flops_ratio": flops,
            "predicted_ratio": e.total.predicted,
            "operators_ratio": e.total.measured.value,
            "latency_ratio": e.latency.value,
        },
    )


def _amdahl(e: Evidence) -> Iterator[Finding]:
    total = e.baseline.total_ms()
    # What is fused across kinds may hold some of an MLP: as a part of it, the bound stays a bound.
    inside = (*MLP_KINDS, MIXED)
    outside = 1 - share(e.baseline.total_ms(*inside), total)
    after = 1 - share(e.pruned.total_ms(*inside), e.pruned.total_ms())
    if not 0 < outside < 1:
        return
    yield Finding(
        code="outside_mlp",
        says=(
            f"{outside:.0%} of the baseline's operator time is outside the MLPs, so pruning them "
            f"can never give more than {1 / outside:.2f}x; of the pruned model's it is {after:.0%}."
        ),
        numbers={
            "outside_share_baseline": outside,
            "outside_share_pruned": after,
            "most_speedup": 1 / outside,
            "baseline_operators_ms": total,
        },
    )


def _not_faster(e: Evidence) -> Iterator[Finding]:
    shrank = [
        (cell, cell.measured, cell.predicted)
        for cell in e.cells
        if cell.measured is not None and cell.predicted is not None and cell.predicted <= SHRANK
    ]
    if not shrank:
        return
    # Among a hundred cells, five 95% intervals miss by chance alone.
    shrank = [(cell, simultaneous(m, len(shrank)), predicted) for cell, m, predicted in shrank]
    behind = [
        (cell, measured, cell.pruned_ms - cell.baseline_ms * predicted)
        for cell, measured, predicted in shrank
        if measured.ci95_low is not None and measured.ci95_low > predicted
    ]
    behind.sort(key=lambda item: -item[2])
    no_faster = sum((m.ci95_low or 0) >= 1 for _, m, _ in shrank)
    undecided = sum((m.ci95_high or 1) >= 1 > (m.ci95_low or 0) for _, m, _ in shrank)
    # Over all of them: the sum of those that came out slow would be biased by their choice.
    lost = sum(cell.pruned_ms - cell.baseline_ms * predicted for cell, _, predicted in shrank)
    named = "; ".join(
        f"block {cell.block} {cell.kind} {times(measured.value)}{interval(measured)} for "
        f"{times(cell.predicted or 1)} predicted"
        for cell, measured, _ in behind[:NAMED]
    )
    listed = f": {named}" if behind else ""
    yield Finding(
        code="shrank_but",
        says=(
            f"{len(shrank)} parts (a kind in a block) shrank: {no_faster} of them did not get "
            f"faster, {undecided} cannot be told from unchanged, and {len(behind)} are surely "
            f"slower than predicted{listed}. Together they take {lost:+.2f} ms a call over the "
            f"prediction. Intervals hold for all {len(shrank)} at once (Bonferroni)."
        ),
        numbers={
            "shrank": len(shrank),
            "not_faster": no_faster,
            "undecided": undecided,
            "less_than_predicted": len(behind),
            "lost_ms": lost,
        },
    )


def _memory_bound(e: Evidence) -> Iterator[Finding]:
    if e.machine is None:
        return
    bound = [
        o for o in e.pruned.operators
        if o.work.flops / e.machine.flops_per_s < o.work.bytes / e.machine.bytes_per_s
    ]  # fmt: skip
    products = [o for o in e.pruned.operators if o.place.kind in (FC1, GATE, FC2, QKV, PROJ)]
    total = e.pruned.total_ms()
    if not bound or not products:
        return
    ms, products_ms = (
        float(np.median(np.sum([o.ms for o in group], axis=0))) for group in (bound, products)
    )
    least = 1e3 * sum(roofline_s(o.work, e.machine) for o in products)
    # A kernel that takes less than the profiler's microsecond has no rate.
    rate = sum(o.work.bytes for o in bound) / max(ms, 1e-3) * 1e3
    yield Finding(
        code="memory_bound",
        says=(
            f"{len(bound)} of {len(e.pruned.operators)} operators move more than they compute: "
            f"{ms:.2f} ms, {share(ms, total):.0%} of the pruned model's time, at "
            f"{rate / 1e9:.1f} GB/s (a plain Add here: {e.machine.bytes_per_s / 1e9:.1f}). Fewer "
            f"FLOPs do not make them faster, fewer bytes do. The linear layers take "
            f"{products_ms:.2f} ms; at the rate of a large product they would take {least:.2f} ms."
        ),
        numbers={
            "operators": len(bound),
            "ms": ms,
            "share": share(ms, total),
            "bytes_per_s": rate,
            "linear_ms": products_ms,
            "linear_least_ms": least,
        },
    )


def _overhead(e: Evidence) -> Iterator[Finding]:
    calls = [
        model.run_ms - np.sum([o.ms for o in model.operators], axis=0)
        for model in (e.baseline, e.pruned)
    ]
    outside = [float(np.median(between_ms)) for between_ms in calls]
    change = difference_of_medians(*calls)
    says = (
        f"Between operators a call of the pruned model spends {outside[1]:.2f} ms under the "
        f"profiler ({len(e.pruned.operators)} operators; baseline {outside[0]:.2f} ms)"
    )
    low, high = change.ci95_low, change.ci95_high
    if low is not None and high is not None:
        verdict = "does not change measurably" if low <= 0 <= high else "changes"
        says += f", which pruning {verdict} ({change.value:+.3f} ms [{low:+.3f}, {high:+.3f}])"
    numbers: dict[str, float | int] = {
        "between_pruned_ms": outside[1],
        "between_baseline_ms": outside[0],
        "between_change_ms": change.value,
        "operators": len(e.pruned.operators),
    }
    if e.other_batch is not None:
        size, dense, slim = e.other_batch
        here = [float(np.median(m.latency_ms)) / e.batch for m in (e.baseline, e.pruned)]
        says += (
            f". Per image, batch {e.batch} takes {here[0]:.2f} -> {here[1]:.2f} ms "
            f"({here[0] / here[1]:.2f}x), batch {size} {dense / size:.2f} -> {slim / size:.2f} ms "
            f"({dense / slim:.2f}x)"
        )
        numbers |= {
            "per_image_baseline_ms": here[0],
            "per_image_pruned_ms": here[1],
            "other_batch": size,
            "other_batch_per_image_baseline_ms": dense / size,
            "other_batch_per_image_pruned_ms": slim / size,
        }
    yield Finding(code="overhead", says=f"{says}.", numbers=numbers)


def _noise(e: Evidence) -> Iterator[Finding]:
    values: Sequence[float] = spread(np.stack([e.baseline.latency_ms, e.pruned.latency_ms], axis=1))
    if max(values) <= BUSY:
        return
    yield Finding(
        code="busy",
        says=(
            f"The machine was busy: (p90 - p10) / p50 of a call is {values[0]:.0%} for the "
            f"baseline and {values[1]:.0%} for the pruned model. Trust the intervals, not the "
            "last digit; more --runs narrow them."
        ),
        numbers={"spread_baseline": values[0], "spread_pruned": values[1]},
    )
