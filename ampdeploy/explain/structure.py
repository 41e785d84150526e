"""Findings about how the graph is built and run: fusions, and widths."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ampdeploy.explain.evidence import (
    Evidence,
    interval,
    is_apart,
    next_multiple,
    plain_interval,
    share,
    times,
)
from ampdeploy.explain.result import MIXED, MLP_ELEMENTWISE, SCORES, Finding


def attention(e: Evidence) -> Iterator[Finding]:
    """Whether the runtime runs attention as one operator."""
    blocks = len(e.pruned.widths)
    total, scores = e.pruned.total_ms(), e.pruned.total_ms(SCORES)
    count = sum(o.place.kind == SCORES for o in e.pruned.operators)
    if not blocks or not count:
        return
    if e.pruned.fused_attention >= blocks:
        says = f"Attention is fused, one operator in each of {blocks} blocks"
    elif e.pruned.fused_attention:
        says = f"Attention is fused in {e.pruned.fused_attention} of {blocks} blocks"
    else:
        says = f"Attention is not fused: {count / blocks:.0f} operators a block between q, k, v "
        says += "and the projection"
    yield Finding(
        code="attention",
        says=f"{says}; {scores:.2f} ms, {share(scores, total):.0%} of the pruned model's time.",
        numbers={
            "fused_blocks": e.pruned.fused_attention,
            "blocks": blocks,
            "operators_per_block": count / blocks,
            "scores_ms": scores,
            "scores_share": share(scores, total),
        },
    )


def activation(e: Evidence) -> Iterator[Finding]:
    """A GELU that runs as several operators."""
    probe = e.activation_probe
    if probe is None:
        return
    parts = [o for o in e.pruned.operators if o.place.kind == MLP_ELEMENTWISE]
    ms = float(np.median(np.sum([o.ms for o in parts], axis=0)))
    total = e.pruned.total_ms()
    saved = ms * (1 - probe.ratio.value)
    yield Finding(
        code="activation_in_parts",
        says=(
            f"GELU is not fused: {len(parts) / max(len(e.pruned.widths), 1):.0f} elementwise "
            f"operators a block take {ms:.2f} ms, {share(ms, total):.1%} of the pruned model's "
            f"time. Timed alone at width {probe.width}, the runtime's own GELU takes "
            f"{probe.fused_ms:.3f} ms where the parts take {probe.ms:.3f} ms"
            f" ({times(probe.ratio.value)}{interval(probe.ratio)}): at that ratio {saved:.2f} ms a "
            "call. `ampdeploy export --opset 20` writes GELU as one operator."
        ),
        numbers={
            "parts_ms": ms,
            "parts_share": share(ms, total),
            "alone_ms": probe.ms,
            "alone_fused_ms": probe.fused_ms,
            "ratio": probe.ratio.value,
            "saved_ms": saved,
        },
    )


def widths(e: Evidence) -> Iterator[Finding]:
    """Widths off the tiles of the target's kernels, and what a tile is worth."""
    multiple = e.width_multiple
    off = {block: w for block, w in e.pruned.widths.items() if w % multiple}
    where = ", ".join(f"block {block}: {width}" for block, width in off.items())
    numbers: dict[str, float | int] = {
        "multiple": multiple,
        "off_tile_blocks": len(off),
        "blocks": len(e.pruned.widths),
    }
    if not e.pruned.widths:
        return
    if off:
        says = f"{len(off)} widths are no multiple of {multiple} ({where})"
    else:
        says = f"All {len(e.pruned.widths)} widths are multiples of {multiple}"
    probes = e.width_probes or ()
    if off and not probes:
        better = {b: next_multiple(w, multiple) for b, w in off.items()}
        listed = ", ".join(f"{off[b]} -> {w}" for b, w in better.items())
        says += f". Next wider multiples: {listed}; what they would give is not measured on a GPU"
    for probe in probes:
        what = "" if probe.blocks else ", one neuron off a tile for comparison,"
        says += (
            f". The two products alone take {probe.ms:.3f} ms at width {probe.width}{what} and "
            f"{probe.other_ms:.3f} ms at {probe.other_width} "
            f"(time ratio {probe.ratio.value:.3f}{plain_interval(probe.ratio)}"
            f"{'' if is_apart(probe.ratio) else ': no difference that can be told'})"
        )
        numbers[f"ratio_{probe.width}_to_{probe.other_width}"] = probe.ratio.value
    yield Finding(code="widths", says=f"{says}.", numbers=numbers)


def fused_across(e: Evidence) -> Iterator[Finding]:
    """Time that cannot be given to one kind of operator."""
    mixed, total = e.pruned.total_ms(MIXED), e.pruned.total_ms()
    if not mixed:
        return
    yield Finding(
        code="fused_across",
        says=(
            f"{mixed:.2f} ms, {share(mixed, total):.0%} of the pruned model's time, is in layers "
            "that the runtime fused across kinds of operator; what is inside cannot be told apart."
        ),
        numbers={"ms": mixed, "share": share(mixed, total)},
    )
