"""A complete report with made-up numbers, to be varied by tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from ampdeploy.report.assemble import compute_ratios
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
    Report,
    Timing,
    Verification,
    Weights,
)

NO_METER = "no energy meter on this machine"


def stats(p50: float) -> LatencyStats:
    return LatencyStats(
        p50=p50,
        p90=p50 * 1.1,
        p99=None,
        mean=p50,
        min=p50 * 0.9,
        max=p50 * 2,
        n=40,
        why={"p99": "40 timed calls; p99 needs 500"},
    )


def measured(scale: float, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "params": round(22_056_576 * scale),
        "flops": round(12_200_000_000 * scale),
        "file_bytes": round(88_300_000 * scale),
        "latency_ms": {"1": stats(90 * scale), "8": stats(700 * scale)},
        "throughput_img_s": {"1": 1000 / (90 * scale), "8": 8000 / (700 * scale)},
        "memory_bytes": round(240_000_000 * scale),
        "peak_rss_bytes": round(240_000_000 * scale) + 70_000_000,
        "memory_batch_size": 8,
        "energy_j_per_image": None,
        "accuracy": {"knn_top1": 0.57 - 0.02 * (1 - scale)},
        "why": {"energy_j_per_image": NO_METER},
    }
    return Measured(**{**values, **changes})


def timing(**changes: Any) -> Timing:
    values: dict[str, Any] = {
        "clock": "end to end",
        "order": "interleaved pairs",
        "warmup_pairs": 15,
        "warmup_seconds": 3.2,
        "warmup_stable": True,
        "pairs": 40,
        "seconds": 20.3,
        "capped": False,
        "buffers": 4,
    }
    return Timing(**{**values, **changes})


def fidelity(**changes: Any) -> Fidelity:
    values: dict[str, Any] = {
        "images": 256,
        "cosine_mean": 0.9871,
        "cosine_p1": 0.9512,
        "cosine_min": 0.9333,
        "patch_cosine_mean": 0.9755,
        "patch_cosine_p1": 0.9123,
        "knn_agreement": 0.83,
        "knn_k": 5,
    }
    return Fidelity(**{**values, **changes})


def sample_report(**changes: Any) -> Report:
    """A report in which only p99 and energy are null; `changes` replace top-level fields."""
    baseline, pruned = measured(1.0), measured(0.75)
    ratio = compute_ratios(
        baseline,
        pruned,
        latency={
            "1": Interval(value=0.75, ci95_low=0.741, ci95_high=0.762),
            "8": Interval(value=0.752, ci95_low=0.74, ci95_high=0.769),
        },
        accuracy_difference={"knn_top1": Interval(value=-0.005, ci95_low=-0.03, ci95_high=0.02)},
        why={},
    )
    report = Report(
        tool_version="0.1.0",
        model="dinov2_s",
        target="ort",
        device="cpu",
        judged_on="ort",
        precision=None,
        engine=None,
        image_size=224,
        threads=2,
        host={
            "cpu": "Example CPU | 3 GHz",
            "cores_physical": 2,
            "cores_logical": 4,
            "cores_usable": 2,
            "ram_bytes": 24_000_000_000,
            "arch": "x86_64",
            "os": "Example Linux",
            "kernel": "6.1",
            "python": "3.11.9",
            "packages": {"numpy": "2.4.6", "tensorrt": None},
            "gpus": None,
            "board": None,
            "l4t": None,
        },
        weights=Weights(source="hub/dinov2", sha256="a" * 64, licence="Apache-2.0", note="A note."),
        data=Data(
            calib=Dataset(name="train", sha256="b" * 64, images=256, skipped={"a/x.jpg": "cut"}),
            eval=Dataset(name="val", sha256="c" * 64, images=256, skipped={}),
        ),
        method=Method(
            search="divergence",
            asked={"params_cut": 0.25},
            criterion="loss of cosine",
            repair="refit",
            distill_epochs=0,
            widths=(
                BlockWidth(block=0, hidden=1536, kept=1536),
                BlockWidth(block=1, hidden=1536, kept=384),
            ),
        ),
        baseline=baseline,
        pruned=pruned,
        fidelity=fidelity(),
        ratio=ratio,
        timing={"1": timing(), "8": timing()},
        not_timed={},
        verification=(
            Verification(
                artifact="model.onnx",
                runtime="onnxruntime, CPU",
                batch_sizes=(1, 2, 5),
                images=5,
                max_abs_diff={"features": 1.5e-5},
                min_cosine={"features": 0.9999999},
            ),
        ),
        stages_seconds={"load": 2.5, "search": 100.0},
        why={"precision": "the build is float32", "engine": "target ort has none"},
    )
    return dataclasses.replace(report, **changes)


def engine_report(**changes: Any) -> Report:
    """The same of an FP16 engine, judged with something else than the engine."""
    proof = PrecisionProof(
        bar_cosine_p1=0.999,
        images=16,
        nodes_fp32=39,
        nodes_scaled=1,
        islands={"3": ("residual", "pointwise")},
        cosine_p1={"features": 0.999812},
        cosine_min={"features": 0.999801},
    )
    engine = EngineFacts(
        tensorrt="trt-rtx 1.7.1.116",
        compute_capabilities=("8.6", "8.9"),
        batch=(1, 1, 8),
        half_share=0.98,
        sha256="d" * 64,
        test=EngineTest(
            bar_cosine_p1=0.999,
            images=16,
            reference="model.onnx in ONNX Runtime, float32",
            cosine_p1={"1": {"features": 0.999701}, "8": {"features": 0.999702}},
            cosine_min={"1": {"features": 0.999601}, "8": {"features": 0.999602}},
        ),
    )
    both = ("baseline", "pruned")
    values: dict[str, Any] = {
        "target": "trt-rtx",
        "precision": dict.fromkeys(both, proof),
        "engine": dict.fromkeys(both, engine),
        "why": {},
    }
    return sample_report(**{**values, **changes})


def with_ratio(report: Report, **changes: Any) -> Report:
    """`report` with fields of its ratios replaced."""
    return dataclasses.replace(report, ratio=dataclasses.replace(report.ratio, **changes))


def bare_report() -> Report:
    """A report in which everything that may be null is."""
    reason = "no reason but this test"
    nulls = dict.fromkeys(
        (
            "latency_ms",
            "throughput_img_s",
            "memory_bytes",
            "peak_rss_bytes",
            "memory_batch_size",
            "energy_j_per_image",
            "accuracy",
        )
    )
    model = measured(1.0, **nulls, why=dict.fromkeys(nulls, reason))
    ratio = compute_ratios(
        model,
        model,
        latency=None,
        accuracy_difference=None,
        why={"latency": reason, "accuracy_difference": reason},
    )
    return sample_report(
        baseline=model,
        pruned=model,
        ratio=ratio,
        threads=None,
        fidelity=None,
        timing=None,
        verification=None,
        host={**dict.fromkeys(sample_report().host), "ram_bytes": 1},
        device=None,
        why=dict.fromkeys(
            ("threads", "fidelity", "timing", "verification", "device", "precision", "engine"),
            reason,
        ),
    )
