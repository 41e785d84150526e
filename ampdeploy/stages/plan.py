"""The list of stages, once."""

from __future__ import annotations

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.report.result import SCHEMA_VERSION
from ampdeploy.run import Stage
from ampdeploy.stages import deploy, distill, engine, inputs, measure, prune
from ampdeploy.stages.common import engine_sources, shipped_artifacts, student_artifact
from ampdeploy.stages.judging import judged_artifacts

# Distributions whose version can change what a stage computes, by what it uses.
TORCH = ("numpy", "torch", "timm")
IMAGES = ("pillow", "torchvision")
ONNX = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def plan(config: BuildConfig) -> list[Stage]:
    """The whole pipeline for `config`, in order; the same on every machine."""
    return [stage for stage, included in _stages(config) if included]


def left_out(config: BuildConfig) -> list[Stage]:
    """The stages that other configs have and `config` has not."""
    return [stage for stage, included in _stages(config) if not included]


def _stages(config: BuildConfig) -> list[tuple[Stage, bool]]:
    """Every stage there is, in order, and whether `config` has it."""
    a = artifacts
    student = student_artifact(config)
    judged = judged_artifacts(config)
    moments = (a.MOMENTS,) if config.prune.needs_moments else ()
    divergence = config.prune.search == "divergence"
    repaired = config.prune.fold != "none"
    fp16 = config.precision.precision == "fp16"
    now = config.builds_engine and config.engine.when == "now"
    data = Stage(
        name="data",
        does="choose calibration and evaluation images; skip what cannot be read",
        run=inputs.data,
        options=inputs.data_options,
        looks_outside=True,
        packages=("pillow",),
    )
    load = Stage(
        name="load",
        does="fetch the weights and check them against the model",
        run=inputs.load,
        writes=(a.BASELINE,),
        options=inputs.load_options,
        looks_outside=True,
        packages=("timm", "torch", "safetensors"),
    )
    score = Stage(
        name="score",
        does="rank every hidden neuron: one forward and backward",
        run=prune.score,
        reads=(a.BASELINE,),
        after=("data.calib",),
        writes=(a.SCORES, *moments),
        options=prune.score_options,
        packages=(*TORCH, *IMAGES),
    )
    search = Stage(
        name="search",
        does="spend the budget where it costs least, and verify it on unseen images"
        if divergence
        else "find every block's width by AMP's threshold, last block first",
        run=prune.search,
        reads=(a.BASELINE, a.SCORES, *(moments if divergence else ())),
        after=("data.calib",),
        writes=(a.WIDTHS,),
        options=prune.search_options,
        packages=(*TORCH, *IMAGES),
    )
    slim = Stage(
        name="slim",
        does="remove the pruned neurons physically"
        + (" and repair what is left" if repaired else ""),
        run=prune.slim,
        reads=(a.BASELINE, a.WIDTHS, *(moments if repaired else ())),
        after=("data.calib",) if repaired else (),
        writes=(a.SLIM, a.REPAIR),
        options=prune.slim_options,
        packages=("safetensors", *((*TORCH, *IMAGES) if repaired else ())),
    )
    training = Stage(
        name="distill",
        does=f"train the slim model against the original for {config.distill.epochs} epochs",
        run=distill.distill,
        reads=(a.BASELINE, a.SLIM),
        after=("data.queries",),
        writes=(a.DISTILLED, a.DISTILL),
        options=distill.distill_options,
        looks_outside=True,
        packages=(*TORCH, *IMAGES),
    )
    export = Stage(
        name="export",
        does="write both models as ONNX and check them against PyTorch",
        run=deploy.export,
        reads=(a.BASELINE, student),
        after=("data.queries",),
        writes=(a.BASELINE_ONNX, a.MODEL_ONNX, a.EXPORT),
        options=lambda c: to_json(c.export),
        packages=(*TORCH, *ONNX),
        delivers=True,
    )
    typing = Stage(
        name="type",
        does="give every tensor its precision, and check it in real FP16 against PyTorch",
        run=engine.type_graphs,
        reads=(a.BASELINE, student, a.BASELINE_ONNX, a.MODEL_ONNX),
        after=("data.calib", "data.queries"),
        writes=(a.BASELINE_FP16_ONNX, a.MODEL_FP16_ONNX, a.PRECISION),
        options=lambda c: to_json(c.precision),
        packages=(*TORCH, *IMAGES, *ONNX),
        delivers=True,
    )
    engines = Stage(
        name="engine",
        does=f"build the engines for {config.target}, and test them where they run",
        run=engine.build_engines,
        reads=(
            *dict.fromkeys((*engine_sources(config), a.BASELINE_ONNX, a.MODEL_ONNX)),
            a.PRECISION if fp16 else a.EXPORT,
        ),
        # Other images would test the same engine: no reason to build it again.
        after=("load",),
        writes=(a.BASELINE_PLAN, a.BASELINE_ENGINE_JSON, a.ENGINE_PLAN, a.ENGINE_JSON),
        options=engine.engine_options,
        looks_outside=True,
        delivers=True,
    )
    evaluation = Stage(
        name="eval",
        does="fidelity and accuracy on images that calibration never saw",
        run=measure.evaluate,
        reads=judged,
        after=("data.queries", "data.bank"),
        writes=(a.EVAL,),
        options=measure.eval_options,
        packages=(*TORCH, *IMAGES, *ONNX, "scikit-learn"),
        delivers=True,
    )
    timing = Stage(
        name="bench",
        does="latency, interleaved, and memory in fresh processes",
        run=measure.bench,
        reads=judged,
        after=("data.queries",),
        writes=(a.BENCH,),
        options=measure.bench_options,
        looks_outside=True,
        packages=(*TORCH, *IMAGES, *ONNX),
        delivers=True,
    )
    report = Stage(
        name="report",
        does="put it all in one place",
        run=measure.report,
        reads=(
            *(a.BASELINE, student, a.WIDTHS, a.REPAIR, a.EXPORT, a.EVAL, a.BENCH),
            *([a.PRECISION] if fp16 else []),
            *([a.ENGINE_JSON, a.BASELINE_ENGINE_JSON] if now else []),
            *shipped_artifacts(config),
        ),
        after=("data", "load"),
        writes=(a.REPORT_JSON, a.REPORT_MD, a.REPORT_HTML),
        options=lambda c: {
            "target": c.target,
            "schema": SCHEMA_VERSION,
            "prune": to_json(c.prune),
            "engine": c.engine.when,
        },
        delivers=True,
    )
    return [
        (data, True),
        (load, True),
        (score, True),
        (search, True),
        (slim, True),
        (training, config.distill.epochs > 0),
        (export, True),
        (typing, fp16),
        (engines, now),
        (evaluation, True),
        (timing, True),
        (report, True),
    ]
