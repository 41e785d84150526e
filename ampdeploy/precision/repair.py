"""A typed FP16 graph that was seen to be right, the cheapest that is, or a refusal.

Starts from what the rules ask for. Where the result misses the bar, the first block that does is
found and its parts are moved to FP32 one kind at a time, cheapest first, until it agrees; if no
kind alone is enough, the whole block is. Islands that turn out not to be needed are taken back.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from onnxscript import ir

from ampdeploy.config import PrecisionConfig
from ampdeploy.device.network_precision import MIN_HALF_SHARE
from ampdeploy.errors import VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.precision.compare import Judgement, Reference, judge
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import GEMMS, HALF, KINDS, block_outputs, load_model, weights
from ampdeploy.precision.rules import (
    Decision,
    GatedProducts,
    Island,
    Norms,
    Ranges,
    Softmax,
    WeightFacts,
    Weights,
    decide,
    scan_weights,
)
from ampdeploy.precision.typed import apply_types
from ampdeploy.progress import log, track

# What a block's repair moves to FP32, cheapest first. Norms and softmax are FP32 already.
LADDER: tuple[tuple[str, ...], ...] = (
    ("residual",),
    ("pointwise",),
    ("residual", "pointwise"),
    ("attention",),
    ("linear",),
    KINDS,
)
JUDGE_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One variant of the graph that was tried."""

    islands: dict[int, tuple[str, ...]]
    """Block -> kinds of nodes in FP32 by repair."""
    judgement: Judgement


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A typed graph that passed."""

    model: ir.Model
    decisions: list[Decision]
    weights: dict[str, WeightFacts]
    judgement: Judgement
    attempts: list[Attempt]
    islands: dict[int, tuple[str, ...]]


class _Workshop:
    """One graph and its reference; makes variants and judges them."""

    def __init__(
        self,
        path: Path,
        ranges: Mapping[str, float],
        reference: Reference,
        config: PrecisionConfig,
    ) -> None:
        self.path = path
        self.reference = reference
        self.config = config
        model = load_model(path)
        self.names = {block: value.name or "" for block, value in block_outputs(model).items()}
        self.weights = scan_weights(model)
        self.rules = [
            Norms(),
            Softmax(),
            GatedProducts(),
            Weights(self.weights),
            Ranges(ranges, config.headroom),
        ]
        self.attempts: list[Attempt] = []

    def make(self, islands: Mapping[int, tuple[str, ...]]) -> tuple[ir.Model, list[Decision]]:
        """The typed graph with these islands, and why each node is what it is."""
        model = load_model(self.path)
        extra = [
            Island(block, kinds, f"repair of block {block}") for block, kinds in islands.items()
        ]
        decisions = decide(model, [*self.rules, *extra])
        apply_types(model, decisions)
        return model, decisions

    def judge(self, islands: Mapping[int, tuple[str, ...]]) -> Judgement:
        """What the graph with these islands computes, against PyTorch."""
        model, _ = self.make(islands)
        images = self.reference.images
        parts: dict[str, list[np.ndarray]] = {}
        starts = range(0, len(images), JUDGE_BATCH)
        with emulation(model, near=self.path, watch=list(self.names.values())) as emulated:
            for start in track(starts, "judge FP16", len(starts)):
                for name, value in emulated.run(images[start : start + JUDGE_BATCH]).items():
                    parts.setdefault(name, []).append(value)
        found = {name: np.concatenate(values) for name, values in parts.items()}
        judgement = judge(found, self.reference, self.names)
        self.attempts.append(Attempt(islands=dict(islands), judgement=judgement))
        return judgement


def type_graph(
    path: Path, ranges: Mapping[str, float], reference: Reference, config: PrecisionConfig
) -> Typed:
    """Type the float32 graph at `path` to FP16, so that it agrees with PyTorch.

    Args:
        path: Float32 ONNX file, exported by ampdeploy.
        ranges: By `ranges.measure_ranges`, on calibration images.
        reference: PyTorch's results for held-out images.
        config: How close it must be.

    Raises:
        VerificationError: No variant passes, or none with most of the work in FP16; the message
            says which block fails, and how.
        ArtifactError: The file cannot be used.
    """
    shop = _Workshop(path, ranges, reference, config)
    islands: dict[int, tuple[str, ...]] = {}
    judgement = shop.judge(islands)
    while not judgement.passes(config.min_cosine_p1):
        block = _worst_block(judgement, islands, config.min_cosine_p1)
        if block is None:
            _refuse(path, judgement, config)
        islands, judgement = _repair_block(shop, islands, block, judgement)
    islands, judgement = _take_back(shop, islands, judgement)
    model, decisions = shop.make(islands)
    share = half_share(model)
    if share < MIN_HALF_SHARE:
        raise VerificationError(
            f"{path.name} is right only with {1 - share:.0%} of its linears' weights in FP32 "
            f"({_reasons(decisions)}): that is no FP16 model. No FP16 file was written; build with "
            "--precision fp32."
        )
    _say(path, decisions, judgement, islands)
    return Typed(
        model=model,
        decisions=decisions,
        weights=shop.weights,
        judgement=judgement,
        attempts=shop.attempts,
        islands=islands,
    )


def _worst_block(
    judgement: Judgement, islands: Mapping[int, tuple[str, ...]], bar: float
) -> int | None:
    """Where to repair next: the first block that fails; where that is FP32 already, or only an
    output fails, the one before it in which most is lost. None: everything was tried."""
    failing = judgement.first_failing(bar)
    if failing is not None and islands.get(failing) != KINDS:
        return failing
    losses = {
        block: loss
        for block, loss in judgement.losses().items()
        if islands.get(block) != KINDS and (failing is None or block < failing)
    }
    return max(losses, key=lambda block: losses[block]) if losses else None


def _repair_block(
    shop: _Workshop,
    islands: dict[int, tuple[str, ...]],
    block: int,
    before: Judgement,
) -> tuple[dict[int, tuple[str, ...]], Judgement]:
    """The first rung with which this block and those before it agree; else the whole block.

    Where no block fails but an output does, a rung is enough only if it mends the output: every
    round of the repair either goes on to a later block or uses one up.
    """
    bar = shop.config.min_cosine_p1
    only_outputs = before.first_failing(bar) is None
    log.info("        block %d in FP16: %s; repairing", block, before.blocks[block])
    for kinds in LADDER:
        tried = {**islands, block: kinds}
        judgement = shop.judge(tried)
        failing = judgement.first_failing(bar)
        agrees = not only_outputs and (failing is None or failing > block)
        if agrees or judgement.passes(bar):
            break
    return tried, judgement


def _take_back(
    shop: _Workshop, islands: dict[int, tuple[str, ...]], judgement: Judgement
) -> tuple[dict[int, tuple[str, ...]], Judgement]:
    """Drop islands that later ones made unnecessary."""
    if len(islands) < 2:
        return islands, judgement
    for block in list(islands):
        fewer = {other: kinds for other, kinds in islands.items() if other != block}
        without = shop.judge(fewer)
        if without.passes(shop.config.min_cosine_p1):
            islands, judgement = fewer, without
    return islands, judgement


def _refuse(path: Path, judgement: Judgement, config: PrecisionConfig) -> NoReturn:
    outputs = "; ".join(f"{name}: {seen}" for name, seen in judgement.outputs.items())
    block = judgement.first_failing(config.min_cosine_p1)
    where = "" if block is None else f" Block {block} is the first to fail, even in FP32:"
    seen = "" if block is None else f" {judgement.blocks[block]}."
    raise VerificationError(
        f"{path.name} cannot be typed to FP16: its outputs miss cosine p1 "
        f"{config.min_cosine_p1:g} to PyTorch ({outputs}).{where}{seen} No FP16 file was written. "
        "Lower --min-cosine-p1 if that is close enough for you, or build with --precision fp32."
    )


def half_share(model: ir.Model) -> float:
    """Of the weights of a typed graph's linears, the share that is multiplied in FP16."""
    half = total = 0
    for node in model.graph:
        if node.op_type not in GEMMS:
            continue
        for value in weights(node):
            size = math.prod(value.shape or ())
            total += size
            half += size if value.dtype == HALF else 0
    return half / total if total else 0.0


def _reasons(decisions: list[Decision]) -> str:
    found = Counter(decision.rule for decision in decisions if decision.scale is None)
    return ", ".join(f"{rule}: {count} nodes" for rule, count in found.most_common())


def _say(
    path: Path,
    decisions: list[Decision],
    judgement: Judgement,
    islands: Mapping[int, tuple[str, ...]],
) -> None:
    outputs = "; ".join(f"{name} {seen}" for name, seen in judgement.outputs.items())
    log.info("typed %s: %d nodes not plain FP16; %s", path.name, len(decisions), outputs)
    for block, kinds in islands.items():
        log.info("        block %d keeps its %s in FP32", block, ", ".join(kinds))


def to_plain(typed: Typed, ranges: Mapping[str, float], config: PrecisionConfig) -> dict[str, Any]:
    """What `precision.json` holds: every decision with its reason, and the evidence."""
    worst = sorted(ranges.items(), key=lambda item: -item[1])[:20]
    flawed = [facts for facts in typed.weights.values() if facts.fault]
    return {
        "precision": config.precision,
        "bar": {"cosine_p1": config.min_cosine_p1, "headroom": config.headroom},
        "decisions": [dataclasses.asdict(decision) for decision in typed.decisions],
        "islands": {str(block): list(kinds) for block, kinds in typed.islands.items()},
        "largest_tensors": dict(worst),
        "image_input": IMAGES,
        "weights": {
            "tensors": len(typed.weights),
            "subnormal_values": sum(facts.subnormal for facts in typed.weights.values()),
            "flushed_values": sum(facts.flushed for facts in typed.weights.values()),
            "kept_fp32": [dataclasses.asdict(facts) for facts in flawed],
        },
        "judgement": _judgement(typed.judgement),
        "attempts": [
            {
                "islands": {str(block): list(kinds) for block, kinds in attempt.islands.items()},
                "outputs": _judgement(attempt.judgement)["outputs"],
            }
            for attempt in typed.attempts
        ],
    }


def _judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "blocks": {str(b): dataclasses.asdict(seen) for b, seen in judgement.blocks.items()},
        "outputs": {name: dataclasses.asdict(seen) for name, seen in judgement.outputs.items()},
    }
