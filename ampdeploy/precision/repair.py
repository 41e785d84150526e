"""A typed FP16 graph that was seen to be right, the cheapest that is, or a refusal.

Starts from what the rules ask for; where that is not enough, `ladder` finds islands of FP32.
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
from ampdeploy.device.engine.network_precision import MIN_HALF_SHARE
from ampdeploy.errors import VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.precision.compare import Judgement, Reference, judge
from ampdeploy.precision.emulate import emulation
from ampdeploy.precision.graph import GEMMS, HALF, block_outputs, load_model, weights
from ampdeploy.precision.ladder import OUTSIDE, Islands, find_islands
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

JUDGE_BATCH = 2


@dataclass(frozen=True, kw_only=True)
class Attempt:
    """One variant of the graph that was tried."""

    islands: Islands
    """Block -> kinds of nodes in FP32 by repair; `ladder.OUTSIDE`: stem and head."""
    judgement: Judgement


@dataclass(frozen=True, kw_only=True)
class Typed:
    """A typed graph that passed."""

    model: ir.Model
    decisions: list[Decision]
    weights: dict[str, WeightFacts]
    judgement: Judgement
    attempts: list[Attempt]
    islands: Islands


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

    def make(self, islands: Islands) -> tuple[ir.Model, list[Decision]]:
        """The typed graph with these islands, and why each node is what it is."""
        model = load_model(self.path)
        extra = [
            Island(None, kinds, "repair of stem and head")
            if block == OUTSIDE
            else Island(block, kinds, f"repair of block {block}")
            for block, kinds in islands.items()
        ]
        decisions = decide(model, [*self.rules, *extra])
        apply_types(model, decisions)
        return model, decisions

    def judge(self, islands: Islands) -> Judgement:
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
    islands, judgement = find_islands(shop.judge, config.min_cosine_p1)
    if not judgement.passes(config.min_cosine_p1):
        _refuse(path, judgement, config)
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


def _refuse(path: Path, judgement: Judgement, config: PrecisionConfig) -> NoReturn:
    bar = config.min_cosine_p1
    faults = {name: seen.fault(bar) for name, seen in judgement.outputs.items()}
    listed = "; ".join(f"{name}: {fault}" for name, fault in faults.items() if fault)
    block = judgement.first_failing(bar)
    where = ""
    if block is not None:
        fault = judgement.blocks[block].fault(bar)
        where = f" Block {block} is the first to fail, with it and all before it in FP32: {fault}."
    advice = "Build with --precision fp32."
    if not any(seen.not_finite for seen in judgement.outputs.values()):
        advice = (
            "Lower --min-cosine-p1 if that is close enough for you, or build with --precision fp32."
        )
    raise VerificationError(
        f"{path.name} cannot be typed to FP16: its outputs are further from PyTorch than a cosine "
        f"p1 of {bar:g} allows ({listed}).{where} No FP16 file was written. {advice}"
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
    islands: Islands,
) -> None:
    outputs = "; ".join(f"{name} {seen}" for name, seen in judgement.outputs.items())
    log.info("typed %s: %d nodes not plain FP16; %s", path.name, len(decisions), outputs)
    for block, kinds in islands.items():
        where = "stem and head keep" if block == OUTSIDE else f"block {block} keeps"
        log.info("        %s in FP32: %s", where, ", ".join(sorted(kinds)))


def to_plain(typed: Typed, ranges: Mapping[str, float], config: PrecisionConfig) -> dict[str, Any]:
    """What `precision.json` holds: every decision with its reason, and the evidence."""
    worst = sorted(ranges.items(), key=lambda item: -item[1])[:20]
    flawed = [facts for facts in typed.weights.values() if facts.fault]
    return {
        "precision": config.precision,
        "bar": {"cosine_p1": config.min_cosine_p1, "headroom": config.headroom},
        "decisions": [dataclasses.asdict(decision) for decision in typed.decisions],
        "islands": _islands(typed.islands),
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
                "islands": _islands(attempt.islands),
                "outputs": _judgement(attempt.judgement)["outputs"],
            }
            for attempt in typed.attempts
        ],
    }


def _islands(islands: Islands) -> dict[str, list[str]]:
    return {
        "outside" if block == OUTSIDE else str(block): sorted(kinds)
        for block, kinds in islands.items()
    }


def _judgement(judgement: Judgement) -> dict[str, Any]:
    return {
        "blocks": {str(b): dataclasses.asdict(seen) for b, seen in judgement.blocks.items()},
        "outputs": {name: dataclasses.asdict(seen) for name, seen in judgement.outputs.items()},
    }
