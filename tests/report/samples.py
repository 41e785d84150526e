"""A complete report with made-up numbers, to be varied by tests."""

from __future__ import annotations

import dataclasses
from typing import Any

from ampdeploy.report.measured import compute_ratios
from ampdeploy.report.result import (
    INTERVAL_FIELDS,
    BlockWidth,
    Data,
    Dataset,
    Energy,
    EngineFacts,
    EngineTest,
    Fidelity,
    Interval,
    LatencyStats,
    Measured,
    Method,
    PrecisionProof,
    Report,
    Spread,
    Task,
    Telemetry,
    ThroughputTiming,
    Timing,
    Verification,
    Weights,
)

NO_METER = "no energy meter on this machine"
NO_GRAPH = "it runs on the CPU"


def stats(p50: float) -> LatencyStats:
    return LatencyStats(
        p50=p50,
        p90=p50 * 1.1,
        p99=None,
        mean=p50,
        min=p50 * 0.9,
        max=p50 * 2,
        n=40,
        quantiles=(*(p50 * (0.9 + 0.02 * step) for step in range(20)), p50 * 2),
        why={"p99": "40 timed calls; p99 needs 500"},
    )


def measured(scale: float, **changes: Any) -> Measured:
    values: dict[str, Any] = {
        "params": round(22_056_576 * scale),
        "flops": round(12_200_000_000 * scale),
        "file_bytes": round(88_300_000 * scale),
        "latency_ms": {"1": stats(90 * scale), "8": stats(700 * scale)},
        "compute_ms": {"1": stats(89 * scale), "8": stats(690 * scale)},
        "cuda_graph_compute_ms": None,
        "throughput_img_s": {"1": 1000 / (90 * scale), "8": 8000 / (700 * scale)},
        "memory_bytes": round(240_000_000 * scale),
        "weight_bytes": round(88_000_000 * scale),
        "activation_bytes": 60_000_000,
        "peak_rss_bytes": round(240_000_000 * scale) + 70_000_000,
        "memory_batch_size": 8,
        "energy_j_per_image": None,
        "energy": None,
        "accuracy": {"knn_top1": 0.57 - 0.02 * (1 - scale)},
        "why": {
            "energy_j_per_image": NO_METER,
            "energy": NO_METER,
            "cuda_graph_compute_ms": NO_GRAPH,
        },
    }
    return Measured(**{**values, **changes})


def timing(**changes: Any) -> Timing:
    values: dict[str, Any] = {
        "clock": "end to end",
        "order": "interleaved pairs",
        "loads": 5,
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
    values |= changes
    if "intervals" not in changes:
        values["intervals"] = {
            name: Interval(
                value=values[name], ci95_low=values[name] - 0.004, ci95_high=values[name] + 0.002
            )
            for name in INTERVAL_FIELDS
            if values[name] is not None
        }
    return Fidelity(**values)


def few_images(**changes: Any) -> Fidelity:
    """Of so few images that nothing bounds the 1st percentile from below."""
    found = fidelity(images=180, **changes)
    p1 = dataclasses.replace(
        found.intervals["cosine_p1"],
        ci95_low=None,
        why={"ci95_low": "180 images; about 368 would give the lower end"},
    )
    return dataclasses.replace(found, intervals={**found.intervals, "cosine_p1": p1})


def sample_report(**changes: Any) -> Report:
    """A report in which only p99 and energy are null; `changes` replace top-level fields."""
    baseline, pruned = measured(1.0), measured(0.75)
    ratio = compute_ratios(
        baseline,
        pruned,
        intervals={
            "latency": {
                "1": Interval(value=0.75, ci95_low=0.741, ci95_high=0.762),
                "8": Interval(value=0.752, ci95_low=0.74, ci95_high=0.769),
            },
            "compute": {
                "1": Interval(value=0.748, ci95_low=0.74, ci95_high=0.757),
                "8": Interval(value=0.751, ci95_low=0.739, ci95_high=0.767),
            },
            "cuda_graph_compute": None,
            "throughput": {
                "1": Interval(value=1.31, ci95_low=1.28, ci95_high=1.35),
                "8": Interval(value=1.33, ci95_low=1.3, ci95_high=1.36),
            },
        },
        accuracy_difference={"knn_top1": Interval(value=-0.005, ci95_low=-0.03, ci95_high=0.02)},
        why={"cuda_graph_compute": NO_GRAPH},
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
            bank=Dataset(name="train", sha256="e" * 64, images=420, skipped={}),
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
        tasks={
            "knn_top1": Task(
                protocol="DINOv2's k-NN: k = 20, temperature 0.07",
                images=256,
                bank_images=420,
                classes=30,
                chance=1 / 30,
            )
        },
        timing={"1": timing(), "8": timing()},
        cuda_graph_timing=None,
        throughput_timing=dict.fromkeys(
            ("1", "8"),
            ThroughputTiming(in_flight=2, loads=5, windows=10, window_seconds=0.5, seconds=10.2),
        ),
        tasks_left_out={},
        telemetry=Telemetry(
            samples=40,
            seconds=41.0,
            power_mode="performance",
            clocks_mhz={"cpu": Spread(min=2900.0, median=3000.0, max=3100.0)},
            temperature_c={"cpu": Spread(min=45.0, median=50.0, max=61.0)},
            throttled=(),
            other_load=0.01,
        ),
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
        why={
            "precision": "the build is float32",
            "engine": "target ort has none",
            "cuda_graph_timing": NO_GRAPH,
        },
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
        "why": {"cuda_graph_timing": NO_GRAPH},
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
            "compute_ms",
            "cuda_graph_compute_ms",
            "throughput_img_s",
            "memory_bytes",
            "weight_bytes",
            "activation_bytes",
            "peak_rss_bytes",
            "memory_batch_size",
            "energy_j_per_image",
            "energy",
            "accuracy",
        )
    )
    times = ("latency", "compute", "cuda_graph_compute", "throughput")
    model = measured(1.0, **nulls, why=dict.fromkeys(nulls, reason))
    ratio = compute_ratios(
        model,
        model,
        intervals=dict.fromkeys(times),
        accuracy_difference=None,
        why=dict.fromkeys((*times, "accuracy_difference"), reason),
    )
    missing = (
        "threads", "fidelity", "timing", "cuda_graph_timing", "throughput_timing", "telemetry",
        "tasks", "verification", "device", "precision", "engine",
    )  # fmt: skip
    return sample_report(
        baseline=model,
        pruned=model,
        ratio=ratio,
        host={**dict.fromkeys(sample_report().host), "ram_bytes": 1},
        **dict.fromkeys(missing),
        why=dict.fromkeys(missing, reason),
    )


def whole_report() -> Report:
    """A report in which nothing is null."""
    report = engine_report(cuda_graph_timing={"1": timing(), "8": timing()}, why={})
    energy = Energy(
        batch_size=8,
        images=4000,
        seconds=30.0,
        mean_watts=40.0,
        idle_watts=10.0,
        source="a meter",
    )
    models = {}
    for role in ("baseline", "pruned"):
        model = getattr(report, role)
        times = {
            size: dataclasses.replace(row, p99=row.max, why={})
            for size, row in model.latency_ms.items()
        }
        models[role] = dataclasses.replace(
            model,
            latency_ms=times,
            compute_ms=times,
            cuda_graph_compute_ms=times,
            energy_j_per_image=0.5,
            energy=energy,
            why={},
        )
    ratio = dataclasses.replace(
        report.ratio, cuda_graph_compute=report.ratio.compute, energy=1.0, why={}
    )
    return dataclasses.replace(report, ratio=ratio, **models)
