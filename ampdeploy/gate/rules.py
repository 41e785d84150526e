"""The rules that `ampdeploy gate` knows, and limits as users write them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ampdeploy.errors import ConfigError, UnknownNameError
from ampdeploy.gate import values
from ampdeploy.gate.finding import Finding, Value, decide
from ampdeploy.gate.units import (
    COSINE,
    COUNT,
    JOULES,
    MILLISECONDS,
    POINTS,
    RATE,
    RATIO,
    SHARE,
    SIZE,
    Unit,
)
from ampdeploy.gate.values import BATCH, METRIC
from ampdeploy.models.registry import close_matches
from ampdeploy.report.result import Report

ALL = "all"
"""Instead of a batch size or a metric: those that are not named."""


@dataclass(frozen=True, kw_only=True)
class RuleKind:
    """A rule without its limit; its name starts with ``max-`` or ``min-``."""

    name: str
    help: str
    unit: Unit
    read: values.Read
    scope: str = ""
    """What one limit can be given each: `BATCH` sizes, `METRIC`s, or nothing."""

    @property
    def at_most(self) -> bool:
        """Whether the limit is the largest value allowed."""
        return self.name.startswith("max-")


_KINDS = (
    RuleKind(
        name="max-latency-ratio", unit=RATIO, scope=BATCH,
        read=values.paired_ratio("latency", "timing"),
        help="Latency end to end, pruned / baseline.",
    ),
    RuleKind(
        name="max-compute-ratio", unit=RATIO, scope=BATCH,
        read=values.paired_ratio("compute", "timing"),
        help="The same of the device's part alone.",
    ),
    RuleKind(
        name="max-cuda-graph-ratio", unit=RATIO, scope=BATCH,
        read=values.paired_ratio("cuda_graph_compute", "cuda_graph_timing"),
        help="The same, launched as one CUDA graph.",
    ),
    RuleKind(
        name="min-throughput-ratio", unit=RATIO, scope=BATCH,
        read=values.paired_ratio("throughput", "throughput_timing"),
        help="Throughput, pruned / baseline.",
    ),
    RuleKind(
        name="max-p50-ms", unit=MILLISECONDS, scope=BATCH, read=values.latency("latency_ms", "p50"),
        help="Median latency end to end.",
    ),
    RuleKind(
        name="max-p90-ms", unit=MILLISECONDS, scope=BATCH, read=values.latency("latency_ms", "p90"),
        help="90th percentile of the same.",
    ),
    RuleKind(
        name="max-p99-ms", unit=MILLISECONDS, scope=BATCH, read=values.latency("latency_ms", "p99"),
        help="99th percentile of the same; needs 500 calls.",
    ),
    RuleKind(
        name="max-compute-p50-ms", unit=MILLISECONDS, scope=BATCH,
        read=values.latency("compute_ms", "p50"), help="Median of the device's part.",
    ),
    RuleKind(
        name="max-compute-p99-ms", unit=MILLISECONDS, scope=BATCH,
        read=values.latency("compute_ms", "p99"), help="99th percentile of the device's part.",
    ),
    RuleKind(
        name="min-throughput", unit=RATE, scope=BATCH, read=values.throughput,
        help="Images per second.",
    ),
    RuleKind(
        name="max-params", unit=COUNT, read=values.exact("params"), help="Parameters, e.g. 14M."
    ),
    RuleKind(
        name="min-params-cut", unit=SHARE, read=values.cut("params"),
        help="Share of the parameters that must be gone, e.g. 30%.",
    ),
    RuleKind(name="max-flops", unit=COUNT, read=values.exact("flops"), help="FLOPs per image."),
    RuleKind(
        name="min-flops-cut", unit=SHARE, read=values.cut("flops"),
        help="Share of the FLOPs that must be gone.",
    ),
    RuleKind(
        name="max-file-size", unit=SIZE, read=values.exact("file_bytes"), help="E.g. 60MB."
    ),
    RuleKind(
        name="max-file-ratio", unit=RATIO, read=values.exact_ratio("file_bytes"),
        help="File size, pruned / baseline.",
    ),
    RuleKind(
        name="max-memory", unit=SIZE, read=values.point("pruned", "memory_bytes"),
        help="Peak memory above the runtime's own, e.g. 200MB.",
    ),
    RuleKind(
        name="max-memory-ratio", unit=RATIO, read=values.point("ratio", "memory"),
        help="The same, pruned / baseline.",
    ),
    RuleKind(
        name="max-energy", unit=JOULES, read=values.point("pruned", "energy_j_per_image"),
        help="Joules per image, e.g. 0.5J.",
    ),
    RuleKind(
        name="max-energy-ratio", unit=RATIO, read=values.point("ratio", "energy"),
        help="The same, pruned / baseline.",
    ),
    RuleKind(
        name="min-cosine-mean", unit=COSINE, read=values.fidelity("cosine_mean"),
        help="Mean cosine of the features to the baseline's.",
    ),
    RuleKind(
        name="min-cosine-p1", unit=COSINE, read=values.fidelity("cosine_p1"),
        help="1st percentile of the same; needs 368 images to pass.",
    ),
    RuleKind(
        name="min-cosine-min", unit=COSINE, read=values.fidelity("cosine_min"),
        help="Of the worst image.",
    ),
    RuleKind(
        name="min-patch-cosine-mean", unit=COSINE, read=values.fidelity("patch_cosine_mean"),
        help="Mean cosine of the patch features.",
    ),
    RuleKind(
        name="min-patch-cosine-p1", unit=COSINE, read=values.fidelity("patch_cosine_p1"),
        help="1st percentile of the same.",
    ),
    RuleKind(
        name="min-knn-agreement", unit=SHARE, read=values.fidelity("knn_agreement"),
        help="Share of nearest neighbours that both models agree on.",
    ),
    RuleKind(
        name="max-accuracy-drop", unit=POINTS, scope=METRIC, read=values.accuracy_drop,
        help="Baseline minus pruned, percentage points.",
    ),
    RuleKind(
        name="min-accuracy", unit=SHARE, scope=METRIC, read=values.accuracy,
        help="Of the pruned model, e.g. 80%.",
    ),
)  # fmt: skip

KINDS = {kind.name: kind for kind in _KINDS}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A rule with its limits."""

    kind: RuleKind
    limits: dict[str, float]
    """Batch size, metric or `ALL` -> limit."""

    def check(self, report: Report) -> list[Finding]:
        """Hold the report against every limit; each gives at least one finding.

        Raises:
            ArtifactError: A number of the report is none.
        """
        found = self.kind.read(report)
        named = [key for key in self.limits if key != ALL]
        if values.ONE in found:  # one number, or one reason why there are none
            one = found[values.ONE]
            return [self._decide(key, self._left_out(key, report) or one) for key in named or [ALL]]
        judged = {
            key: found.get(key) or self._left_out(key, report) or self._unknown(found)
            for key in named
        }
        if ALL in self.limits:
            judged |= {key: value for key, value in found.items() if key not in judged}
            # Asked for, so that its absence is no reason to pass.
            absent = values.left_out(report, self.kind.scope)
            judged |= {key: Value.missing(why) for key, why in absent.items() if key not in judged}
        return [self._decide(key, value) for key, value in judged.items()]

    def _left_out(self, key: str, report: Report) -> Value | None:
        why = values.why_absent(report, self.kind.scope, key)
        return Value.missing(why) if why else None

    def _unknown(self, found: values.Values) -> Value:
        what = "batch sizes" if self.kind.scope == BATCH else "metrics"
        return Value.missing(f"the report has the {what} {', '.join(found)}")

    def _decide(self, key: str, value: Value) -> Finding:
        limit = self.limits[key if key in self.limits else ALL]
        label = values.label(self.kind.scope, key)
        return decide(
            f"{self.kind.name} {self.kind.unit.show(limit).removeprefix('+')}",
            "" if key == ALL else label,
            value,
            limit=limit,
            at_most=self.kind.at_most,
            unit=self.kind.unit,
        )


def parse_rule(name: str, texts: Sequence[str], *, where: str) -> Rule:
    """A rule from what was written behind its name: ``0.75``, or ``8=0.7`` for one batch size.

    Args:
        name: E.g. ``max-latency-ratio``.
        texts: One or more limits.
        where: What to call them in messages, e.g. ``--max-latency-ratio``.

    Raises:
        UnknownNameError: No such rule.
        ConfigError: A limit that is none, or two for the same.
    """
    kind = KINDS.get(name)
    if kind is None:
        raise UnknownNameError(
            f"unknown rule {name!r} in {where}.{close_matches(name, KINDS)} `ampdeploy gate "
            "--help` lists them."
        )
    limits: dict[str, float] = {}
    for text in texts:
        key, equals, limit = text.rpartition("=")
        key = key.strip() if equals else ALL
        if equals and not kind.scope and key != ALL:
            raise ConfigError(f"{where} {text!r}: {name} has one limit; write it without {key!r}.")
        if kind.scope == BATCH and key != ALL:
            key = _batch_size(key, where, text)
        if not key or key in limits:
            problem = f"gives {key} a second limit" if key else "names nothing before the ="
            raise ConfigError(f"{where} {text!r} {problem}. Give each one once.")
        limits[key] = kind.unit.parse(limit, where)
    if not limits:
        raise ConfigError(f"{where} has no limit. Write it like {kind.unit.example}.")
    return Rule(kind=kind, limits=limits)


def _batch_size(key: str, where: str, text: str) -> str:
    if not key.isascii() or not key.isdigit() or not int(key):
        raise ConfigError(f"{where} {text!r}: {key!r} is no batch size. Write it like 8=0.75.")
    return str(int(key))
