"""From the artifacts of a finished run to a `Report`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ampdeploy import __version__
from ampdeploy.config import BuildConfig, PruneConfig
from ampdeploy.export.names import data_path
from ampdeploy.report.codec import from_plain
from ampdeploy.report.result import (
    BlockWidth,
    Data,
    Dataset,
    EngineFacts,
    EngineTest,
    Fidelity,
    Interval,
    LatencyStats,
    Measured,
    Method,
    PrecisionProof,
    Ratios,
    Report,
    Timing,
    Verification,
    Weights,
)

NO_ENERGY = "this version measures energy on no target"
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
    bench: Mapping[str, Any],
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
        bench: `bench.json`.
        precision: `precision.json`; None: the build is float32.
        engines: "baseline" and "pruned" -> the engine's manifest, or None.
        profiles: "baseline" and "pruned" -> params and flops.
        files: "baseline" and "pruned" -> the file that the target runs.
        stages_seconds: Stage -> seconds.
    """
    measured = {
        role: _measured(role, profiles[role], files[role], evaluation, bench)
        for role in ("baseline", "pruned")
    }
    differences = evaluation["accuracy_difference"]
    why = {} if differences else {"accuracy_difference": evaluation["why"]["accuracy"]}
    timed = bench["latency"]
    if timed is None:
        why["latency"] = bench["why"]
    ratio = compute_ratios(
        measured["baseline"],
        measured["pruned"],
        latency=None
        if timed is None
        else {
            size: from_plain(Interval, row["ratio"], where="bench.json")
            for size, row in timed.items()
        },
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
    if timed is None:
        missing |= dict.fromkeys(("device", "timing"), bench["why"])
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
        device=bench["device"],
        judged_on=evaluation["target"],
        precision=None if precision is None else {r: _proof(f) for r, f in precision.items()},
        engine=None
        if engines["pruned"] is None
        else {role: _engine(manifest) for role, manifest in engines.items()},
        host=bench["host"],
        weights=Weights(
            source=weights["source"],
            sha256=weights["sha256"],
            licence=weights["licence"],
            note=weights["note"],
        ),
        data=Data(calib=_dataset(images["calib"]), eval=_dataset(images["queries"])),
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
        timing=None
        if timed is None
        else {
            size: from_plain(Timing, row["timing"], where="bench.json")
            for size, row in timed.items()
        },
        not_timed=dict(bench["not_timed"]),
        verification=tuple(_verification(role, export[role]) for role in ("baseline", "pruned")),
        stages_seconds=dict(stages_seconds),
        why=missing,
    )


def compute_ratios(
    baseline: Measured,
    pruned: Measured,
    *,
    latency: dict[str, Interval] | None,
    accuracy_difference: dict[str, Interval] | None,
    why: dict[str, str],
) -> Ratios:
    """Pruned / baseline of every number both have.

    Args:
        baseline: The dense model.
        pruned: The slim model.
        latency: Per batch size, from the paired samples (`LatencyResult.ratio`).
        accuracy_difference: Per metric, from the paired predictions.
        why: Reasons for `latency` or `accuracy_difference` being None.
    """
    why = dict(why)
    memory = None
    if baseline.memory_bytes and pruned.memory_bytes:
        memory = pruned.memory_bytes / baseline.memory_bytes
    else:
        reasons = {**baseline.why, **pruned.why}
        why["memory"] = reasons.get("memory_bytes", "memory_bytes is 0 for one of the models")
    return Ratios(
        params=pruned.params / baseline.params,
        flops=pruned.flops / baseline.flops,
        file_bytes=pruned.file_bytes / baseline.file_bytes,
        memory=memory,
        latency=latency,
        accuracy_difference=accuracy_difference,
        why=why,
    )


def _asked(prune: PruneConfig) -> dict[str, float]:
    if prune.search == "amp":
        names = ("threshold", "batch_size", "inv_temperature")
        return {name: getattr(prune, name) for name in names}
    kind, value = prune.budget
    return {kind: value}


def _measured(
    role: str,
    profile: Mapping[str, int],
    file: Path,
    evaluation: Mapping[str, Any],
    bench: Mapping[str, Any],
) -> Measured:
    why = {"energy_j_per_image": NO_ENERGY}
    accuracy = evaluation["accuracy"]
    if accuracy is None:
        why["accuracy"] = evaluation["why"]["accuracy"]
    timed, memory = bench["latency"], (bench["memory"] or {}).get(role)
    if timed is None:
        why |= dict.fromkeys(("latency_ms", "throughput_img_s"), bench["why"])
    if memory is None:
        why |= dict.fromkeys(("memory_bytes", "peak_rss_bytes", "memory_batch_size"), bench["why"])
        memory = dict.fromkeys(("memory_bytes", "peak_rss_bytes", "batch_size"))
    elif memory["memory_bytes"] is None:
        why["memory_bytes"] = memory["why"]["memory_bytes"]
    return Measured(
        params=profile["params"],
        flops=profile["flops"],
        file_bytes=_bytes_with_data(file),
        latency_ms=None
        if timed is None
        else {
            size: from_plain(LatencyStats, row[role], where="bench.json")
            for size, row in timed.items()
        },
        throughput_img_s=None
        if timed is None
        else {size: row["throughput_img_s"][role] for size, row in timed.items()},
        memory_bytes=memory["memory_bytes"],
        peak_rss_bytes=memory["peak_rss_bytes"],
        memory_batch_size=memory["batch_size"],
        energy_j_per_image=None,
        accuracy=accuracy[role] if accuracy else None,
        why=why,
    )


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


def _bytes_with_data(file: Path) -> int:
    """Of an ONNX file above 2 GB, the weights are in a file of their own."""
    data = data_path(file)
    return file.stat().st_size + (data.stat().st_size if data.is_file() else 0)


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
