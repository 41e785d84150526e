"""The list of stages, once, and what runs, skips and resumes them.

A stage is skipped when its options, its inputs' hashes and the versions in use hash to what the
manifest says, and its outputs are still on disk unchanged. That is what makes a build resumable
after Ctrl-C, kill -9 or power loss: artifacts are renamed into place whole, the manifest is
written after them, and a stage that is not in the manifest runs again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, StageRecord
from ampdeploy.config import BuildConfig, from_json, to_json
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.optional import require_build_host
from ampdeploy.progress import log
from ampdeploy.run import Run, Stage, fingerprint, open_run, read_or_new, versions
from ampdeploy.stages import deploy, distill, engine, inputs, measure, prune
from ampdeploy.stages.common import (
    engine_sources,
    judging_target,
    resolve_paths,
    runnable_artifacts,
    shipped_artifacts,
    student_artifact,
)
from ampdeploy.stages.preflight import preflight

# Distributions whose version can change what a stage computes, by what it uses.
TORCH = ("numpy", "torch", "timm")
IMAGES = ("pillow", "torchvision")
ONNX = ("onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu")


def plan(config: BuildConfig) -> list[Stage]:
    """The whole pipeline for `config`, in order."""
    a = artifacts
    student = student_artifact(config)
    runnable = runnable_artifacts(config)
    moments = (a.MOMENTS,) if config.prune.needs_moments else ()
    divergence = config.prune.search == "divergence"
    repaired = config.prune.fold != "none"
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
    typing = Stage(
        name="type",
        does="give every tensor its precision, and check it in real FP16 against PyTorch",
        run=engine.type_graphs,
        reads=(a.BASELINE, student, a.BASELINE_ONNX, a.MODEL_ONNX),
        after=("data.calib", "data.queries"),
        writes=(a.BASELINE_FP16_ONNX, a.MODEL_FP16_ONNX, a.PRECISION),
        options=lambda c: to_json(c.precision),
        packages=(*TORCH, *IMAGES, *ONNX),
    )
    fp16 = config.precision.precision == "fp16"
    verdict = a.PRECISION if fp16 else a.EXPORT
    engines = Stage(
        name="engine",
        does=f"build the engines for {config.target}",
        run=engine.build_engines,
        reads=(*engine_sources(config), verdict),
        after=("load",),
        writes=(a.BASELINE_PLAN, a.BASELINE_ENGINE_JSON, a.ENGINE_PLAN, a.ENGINE_JSON),
        options=engine.engine_options,
        looks_outside=True,
    )
    now = config.builds_engine and config.engine.when == "now"
    return [
        Stage(
            name="data",
            does="choose calibration and evaluation images; skip what cannot be read",
            run=inputs.data,
            options=inputs.data_options,
            looks_outside=True,
            packages=("pillow",),
        ),
        Stage(
            name="load",
            does="fetch the weights and check them against the model",
            run=inputs.load,
            writes=(a.BASELINE,),
            options=inputs.load_options,
            looks_outside=True,
            packages=("timm", "torch", "safetensors"),
        ),
        Stage(
            name="score",
            does="rank every hidden neuron: one forward and backward",
            run=prune.score,
            reads=(a.BASELINE,),
            after=("data.calib",),
            writes=(a.SCORES, *moments),
            options=prune.score_options,
            packages=(*TORCH, *IMAGES),
        ),
        Stage(
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
        ),
        Stage(
            name="slim",
            does="remove the pruned neurons physically"
            + (" and repair what is left" if repaired else ""),
            run=prune.slim,
            reads=(a.BASELINE, a.WIDTHS, *(moments if repaired else ())),
            after=("data.calib",) if repaired else (),
            writes=(a.SLIM, a.REPAIR),
            options=prune.slim_options,
            packages=("safetensors", *((*TORCH, *IMAGES) if repaired else ())),
        ),
        *([training] if config.distill.epochs else []),
        Stage(
            name="export",
            does="write both models as ONNX and check them against PyTorch",
            run=deploy.export,
            reads=(a.BASELINE, student),
            after=("data.queries",),
            writes=(a.BASELINE_ONNX, a.MODEL_ONNX, a.EXPORT),
            options=lambda c: to_json(c.export),
            packages=(*TORCH, *ONNX),
        ),
        *([typing] if fp16 else []),
        *([engines] if now else []),
        Stage(
            name="eval",
            does="fidelity and k-NN accuracy on images that calibration never saw",
            run=measure.evaluate,
            reads=runnable,
            after=("data.queries", "data.bank"),
            writes=(a.EVAL,),
            options=lambda c: {"target": judging_target(c)},
            packages=(*TORCH, *IMAGES, *ONNX),
        ),
        Stage(
            name="bench",
            does="latency, interleaved, and memory in fresh processes",
            run=measure.bench,
            reads=runnable,
            after=("data.queries",),
            writes=(a.BENCH,),
            options=measure.bench_options,
            looks_outside=True,
            packages=(*TORCH, *IMAGES, *ONNX),
        ),
        Stage(
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
            writes=(a.REPORT_JSON, a.REPORT_MD),
            options=lambda c: {
                "target": c.target,
                "prune": to_json(c.prune),
                "engine": c.engine.when,
            },
        ),
    ]


def build(config: BuildConfig, *, until: str = "report") -> Run:
    """Run the pipeline, or what is left of it, and return the finished run.

    With a deferred engine, a finished run is also packed as a bundle, ``<run>-bundle``.

    Args:
        config: Everything the build does.
        until: The last stage to run.

    Raises:
        AmpDeployError: Something a user can fix; finished stages are kept.
        MissingDependencyError: This machine cannot run the build or its target.
    """
    config = resolve_paths(config)
    require_build_host("ampdeploy build")
    preflight(config)
    with open_run(config) as run:
        for stage in _until(plan(config), until):
            _run_stage(run, stage)
        run.save_config()
    if config.builds_engine and config.engine.when == "deferred" and until == "report":
        _pack(config.folder)
    return run


def _pack(folder: Path) -> None:
    """What the device builds the engine from."""
    from ampdeploy.device.pack import pack_run

    packed = pack_run(folder)
    log.info("bundle  %s: on the device, run `ampdeploy engine` on it", packed.path)


def rerun_config(folder: Path) -> BuildConfig:
    """The configuration a run directory was built with.

    Raises:
        ArtifactError: Not a run directory.
    """
    manifest = Manifest.read(folder)
    if "config" not in manifest.data:
        raise ArtifactError(f"{manifest.path} holds no config. Build the run again.")
    return dataclasses.replace(from_json(manifest.data["config"]), out=folder)


def require_current(
    config: BuildConfig, stage_name: str, then: str, *, ignoring: str | None = None
) -> None:
    """Check that what `stage_name` wrote is the run's present model, not an older one.

    Args:
        config: Of the run, as `rerun_config` gives it.
        stage_name: The stage whose outputs are about to be used.
        then: The command that makes them, for the message.
        ignoring: An output that may be missing or changed.

    Raises:
        ArtifactError: It has not run, or something before it has changed since.
    """
    run = Run(config, Manifest.read(config.folder))
    for stage in _until(plan(config), stage_name):
        if not run.is_current(stage, ignoring=ignoring):
            raise ArtifactError(
                f"{config.folder}: stage {stage.name!r} has not run since the run last changed, "
                f"or its files were damaged or removed. Run `{then}` first."
            )


def status(config: BuildConfig) -> list[tuple[Stage, str]]:
    """Each stage with what a build would do, without changing anything on disk.

    ``up to date``: it would be skipped. ``would run``: it has not run with these options and
    inputs. ``may run``: it follows one that would, and runs unless that one ends as it did before.
    """
    config = resolve_paths(config)
    run = Run(config, read_or_new(config))
    changing: set[str] = set()
    result = []
    for stage in plan(config):
        if not (config.resume and run.is_done(stage)):
            state = "would run"
        elif changing & {*stage.reads, *(name.partition(".")[0] for name in stage.after)}:
            state = "may run"
        else:
            state = "up to date"
        if state != "up to date":
            changing |= {stage.name, *stage.writes}
        result.append((stage, state))
    return result


@contextlib.contextmanager
def explain_memory_errors(stage_name: str) -> Iterator[None]:
    """Turn running out of memory into an error that names the options that need less.

    Raises:
        AmpDeployError: In place of torch's and Python's own.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # torch has OutOfMemoryError for the GPU and a bare RuntimeError for the CPU.
        known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not known and "DefaultCPUAllocator" not in str(error):
            raise
        first = (str(error).splitlines() or ["no memory left"])[0]
        raise AmpDeployError(
            f"stage {stage_name!r} ran out of memory: {first}. Lower --micro-batch (images per "
            "pass; the result stays the same) or --calib-images, or use another --device."
        ) from error


def _until(every: list[Stage], last: str) -> list[Stage]:
    names = [stage.name for stage in every]
    if last not in names:
        raise ArtifactError(f"this run has no stage {last!r}; its stages are {', '.join(names)}.")
    return every[: names.index(last) + 1]


def _run_stage(run: Run, stage: Stage) -> None:
    if run.is_done(stage):
        log.info("%-7s up to date", stage.name)
        return
    log.info("%-7s %s", stage.name, stage.does)
    hashes = run.input_hashes(stage)
    if hashes is None:
        raise ArtifactError(
            f"stage {stage.name!r} needs {', '.join(stage.reads)} in {run.folder}, and not all of "
            "it is there. Run `ampdeploy build` on this folder."
        )
    run.forget_hashes(stage.writes)
    started = time.monotonic()
    with explain_memory_errors(stage.name):
        facts = stage.run(run)
    seconds = time.monotonic() - started
    outputs = {name: run.sha256(name) or "" for name in stage.writes}
    outputs.update(run.external_data(stage.writes))
    record = StageRecord(
        fingerprint=fingerprint(stage, run.config, hashes),
        options=stage.options(run.config),
        inputs=hashes,
        outputs=outputs,
        versions=versions(stage),
        seconds=round(seconds, 3),
        facts=facts,
    )
    run.manifest.put(stage.name, record)
    run.save_config()
    log.info("        done in %.1f s", seconds)
