"""From the artifacts of a finished run to a `Report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy import __version__
from ampdeploy.config import BuildConfig, PruneConfig
from ampdeploy.report.codec import from_plain
from ampdeploy.report.measured import compute_ratios, measured_model, measured_ratios
from ampdeploy.report.result import (
    BlockWidth,
    Data,
    Dataset,
    EngineFacts,
    EngineTest,
    Fidelity,
    Interval,
    Method,
    PrecisionProof,
    Report,
    Task,
    Verification,
    Weights,
)

if TYPE_CHECKING:
    from ampdeploy.bench.result import BenchResult

# Field of `Report` -> the measurement of `BenchResult` that fills it.
_BENCH_FIELDS = {
    "device": "device",
    "timing": "latency",
    "cuda_graph_timing": "cuda_graph",
    "throughput_timing": "throughput",
    "telemetry": "telemetry",
}
# What the divergence search minimises.
LOSS_OF_COSINE = "loss of cosine"


def assemble(
    config: BuildConfig,
    *,
    images: Mapping[str, Any],
    weights: Mapping[str, Any],
    widths: Mapping[str, Any],
    repair: Mapping[str, Any],
    export: Mapping[str, Any],
    evaluation: Mapping[str, Any],
    bench: BenchResult,
    precision: Mapping[str, Any] | None,
    engines: Mapping[str, Any],
    profiles: Mapping[str, Mapping[str, int]],
    files: Mapping[str, Path],
    stages_seconds: Mapping[str, float],
) -> Report:
    """Put together what the stages wrote.

    Args:
        config: Of the run.
        images: Facts of the data stage.
        weights: Provenance of the dense weights.
        widths: `widths.json`.
        repair: `repair.json`.
        export: `export.json`.
        evaluation: `eval.json`.
        bench: What was measured, of `bench.json`.
        precision: `precision.json`; None: the build is float32.
        engines: "baseline" and "pruned" -> the engine's manifest, or None.
        profiles: "baseline" and "pruned" -> params and flops.
        files: "baseline" and "pruned" -> the file that the target runs.
        stages_seconds: Stage -> seconds.
    """
    accuracy = evaluation["accuracy"]
    no_accuracy = evaluation["why"].get("accuracy")
    measured = {
        role: measured_model(
            role,
            profile=profiles[role],
            file=files[role],
            accuracy=accuracy and accuracy[role],
            why_no_accuracy=no_accuracy,
            bench=bench,
        )
        for role in ("baseline", "pruned")
    }
    intervals, why = measured_ratios(bench)
    differences = evaluation["accuracy_difference"]
    if not differences:
        why["accuracy_difference"] = no_accuracy
    ratio = compute_ratios(
        measured["baseline"],
        measured["pruned"],
        intervals=intervals,
        accuracy_difference={
            metric: from_plain(Interval, value, where="eval.json")
            for metric, value in differences.items()
        }
        if differences
        else None,
        why=why,
    )
    threads = config.bench.threads
    missing = {} if threads else {"threads": "the runtime's own default"}
    for name, measurement in _BENCH_FIELDS.items():
        if getattr(bench, measurement) is None:
            missing[name] = bench.why[measurement]
    tasks = evaluation["tasks"]
    if tasks is None:
        missing["tasks"] = no_accuracy
    if precision is None:
        missing["precision"] = "the build is float32"
    if engines["pruned"] is None:
        deferred = "it is built on the device, from the bundle"
        no_engine = f"target {config.target} has none"
        missing["engine"] = deferred if config.builds_engine else no_engine
    return Report(
        tool_version=__version__,
        model=config.model.name,
        target=config.target,
        image_size=profiles["baseline"]["image_size"],
        threads=threads,
        device=bench.device,
        judged_on=evaluation["target"],
        precision=None if precision is None else {r: _proof(f) for r, f in precision.items()},
        engine=None
        if engines["pruned"] is None
        else {role: _engine(manifest) for role, manifest in engines.items()},
        host=bench.host,
        weights=Weights(
            source=weights["source"],
            sha256=weights["sha256"],
            licence=weights["licence"],
            note=weights["note"],
        ),
        data=_data(images),
        method=Method(
            search=config.prune.search,
            asked=_asked(config.prune),
            criterion=config.prune.criterion if config.prune.search == "amp" else LOSS_OF_COSINE,
            repair=repair["method"],
            distill_epochs=config.distill.epochs,
            widths=tuple(
                BlockWidth(block=b["block"], hidden=b["hidden"], kept=b["kept"])
                for b in widths["blocks"]
            ),
        ),
        baseline=measured["baseline"],
        pruned=measured["pruned"],
        fidelity=from_plain(Fidelity, evaluation["fidelity"], where="eval.json"),
        ratio=ratio,
        tasks=tasks
        and {name: from_plain(Task, facts, where="eval.json") for name, facts in tasks.items()},
        tasks_left_out=dict(evaluation["tasks_left_out"]),
        timing=_timings(bench.latency),
        cuda_graph_timing=_timings(bench.cuda_graph),
        throughput_timing=_timings(bench.throughput),
        telemetry=bench.telemetry,
        not_timed=dict(bench.not_timed),
        verification=tuple(_verification(role, export[role]) for role in ("baseline", "pruned")),
        stages_seconds=dict(stages_seconds),
        why=missing,
    )


def _asked(prune: PruneConfig) -> dict[str, float]:
    if prune.search == "amp":
        names = ("threshold", "batch_size", "inv_temperature")
        return {name: getattr(prune, name) for name in names}
    kind, value = prune.budget
    return {kind: value}


def _proof(facts: Mapping[str, Any]) -> PrecisionProof:
    outputs = facts["judgement"]["outputs"]
    scaled = sum(decision["scale"] is not None for decision in facts["decisions"])
    return PrecisionProof(
        bar_cosine_p1=facts["bar"]["cosine_p1"],
        images=facts["judged_images"],
        nodes_fp32=len(facts["decisions"]) - scaled,
        nodes_scaled=scaled,
        islands={block: tuple(kinds) for block, kinds in facts["islands"].items()},
        cosine_p1={name: seen["cosine_p1"] for name, seen in outputs.items()},
        cosine_min={name: seen["cosine_min"] for name, seen in outputs.items()},
    )


def _engine(manifest: Mapping[str, Any]) -> EngineFacts:
    profile = manifest["profiles"][0]
    tested = manifest["verdict"]["engine"]
    untested = tested.get("untested")
    return EngineFacts(
        tensorrt=f"{manifest['target']} {manifest['tensorrt_version']}",
        compute_capabilities=tuple(manifest["compute_capabilities"]),
        batch=tuple(profile[end][0] for end in ("min", "opt", "max")),
        half_share=manifest["precision"]["half_share"],
        sha256=manifest["plan_sha256"],
        test=None if untested else _engine_test(tested),
        why={"test": untested} if untested else {},
    )


def _engine_test(facts: Mapping[str, Any]) -> EngineTest:
    def each(key: str) -> dict[str, dict[str, float]]:
        return {
            batch: {name: seen[key] for name, seen in outputs.items()}
            for batch, outputs in facts["batches"].items()
        }

    return EngineTest(
        bar_cosine_p1=facts["bar_cosine_p1"],
        images=facts["images"],
        reference=facts["reference"],
        cosine_p1=each("cosine_p1"),
        cosine_min=each("cosine_min"),
    )


def _timings(rows: Mapping[str, Any] | None) -> dict[str, Any] | None:
    return None if rows is None else {size: row.timing for size, row in rows.items()}


def _data(images: Mapping[str, Any]) -> Data:
    bank = images["bank"]
    return Data(
        calib=_dataset(images["calib"]),
        eval=_dataset(images["queries"]),
        bank=bank and _dataset(bank),
        why={} if bank else {"bank": "the evaluation images are one folder"},
    )


def _dataset(images: Mapping[str, Any]) -> Dataset:
    return Dataset(
        name=Path(images["root"]).name,
        sha256=images["sha256"],
        images=len(images["files"]),
        skipped=dict(images["skipped"]),
    )


def _verification(role: str, facts: Mapping[str, Any]) -> Verification:
    compared = facts["verified"]
    outputs = {item["output"] for item in compared}
    return Verification(
        artifact=facts["artifact"],
        runtime="onnxruntime, CPU",
        batch_sizes=tuple(sorted({item["batch"] for item in compared})),
        images=facts["verified_images"],
        max_abs_diff={
            name: max(i["max_abs_diff"] for i in compared if i["output"] == name)
            for name in sorted(outputs)
        },
        min_cosine={
            name: min(i["min_cosine"] for i in compared if i["output"] == name)
            for name in sorted(outputs)
        },
    )
