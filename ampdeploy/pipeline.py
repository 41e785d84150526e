"""The list of stages, once, and what runs, skips and resumes them.

A stage is skipped when its options, its inputs' hashes and the versions in use hash to what the
manifest says, and its outputs are still on disk unchanged. That is what makes a build resumable
after Ctrl-C, kill -9 or power loss: artifacts are renamed into place whole, the manifest is
written after them, and a stage that is not in the manifest runs again.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, StageRecord
from ampdeploy.config import BuildConfig, from_json, to_json
from ampdeploy.errors import ArtifactError
from ampdeploy.optional import require_build_host
from ampdeploy.progress import log
from ampdeploy.run import Run, Stage, fingerprint, open_run, read_or_new, versions
from ampdeploy.stages import deploy, distill, inputs, measure, prune
from ampdeploy.stages.common import (
    preflight,
    resolve_paths,
    runnable_artifacts,
    student_artifact,
)


def plan(config: BuildConfig) -> list[Stage]:
    """The whole pipeline for `config`, in order."""
    a = artifacts
    student = student_artifact(config)
    runnable = runnable_artifacts(config)
    training = Stage(
        name="distill",
        does=f"train the slim model against the original for {config.distill.epochs} epochs",
        run=distill.distill,
        reads=(a.BASELINE, a.SLIM),
        after=("data",),
        writes=(a.DISTILLED, a.DISTILL),
        options=distill.distill_options(config),
    )
    return [
        Stage(
            name="data",
            does="choose calibration and evaluation images; skip what cannot be read",
            run=inputs.data,
            options=inputs.data_options(config),
        ),
        Stage(
            name="load",
            does="fetch the weights and check them against the model",
            run=inputs.load,
            writes=(a.BASELINE,),
            options=inputs.load_options(config),
        ),
        Stage(
            name="score",
            does="importance of every hidden neuron: one forward and backward",
            run=prune.score,
            reads=(a.BASELINE,),
            after=("data",),
            writes=(a.SCORES,),
            options=prune.score_options(config),
        ),
        Stage(
            name="search",
            does="find every block's width, last block first",
            run=prune.search,
            reads=(a.BASELINE, a.SCORES),
            after=("data",),
            writes=(a.WIDTHS,),
            options=to_json(config.prune),
        ),
        Stage(
            name="slim",
            does="remove the pruned neurons physically",
            run=prune.slim,
            reads=(a.BASELINE, a.WIDTHS),
            writes=(a.SLIM,),
        ),
        *([training] if config.distill.epochs else []),
        Stage(
            name="export",
            does="write both models as ONNX and check them against PyTorch",
            run=deploy.export,
            reads=(a.BASELINE, student),
            after=("data",),
            writes=(a.BASELINE_ONNX, a.MODEL_ONNX, a.EXPORT),
            options=to_json(config.export),
        ),
        Stage(
            name="eval",
            does="fidelity and k-NN accuracy on images that calibration never saw",
            run=measure.evaluate,
            reads=runnable,
            after=("data",),
            writes=(a.EVAL,),
            options={"target": config.target},
        ),
        Stage(
            name="bench",
            does="latency, interleaved, and memory in fresh processes",
            run=measure.bench,
            reads=runnable,
            after=("data",),
            writes=(a.BENCH,),
            options={"target": config.target, **to_json(config.bench)},
        ),
        Stage(
            name="report",
            does="put it all in one place",
            run=measure.report,
            reads=(a.BASELINE, student, a.WIDTHS, a.EXPORT, a.EVAL, a.BENCH, *runnable),
            after=("data", "load"),
            writes=(a.REPORT_JSON, a.REPORT_MD),
            options={"target": config.target, "prune": to_json(config.prune)},
        ),
    ]


def build(config: BuildConfig, *, until: str = "report") -> Run:
    """Run the pipeline, or what is left of it, and return the finished run.

    Args:
        config: Everything the build does.
        until: The last stage to run.

    Raises:
        AmpDeployError: Something a user can fix; finished stages are kept.
        MissingDependencyError: This machine cannot run the build or its target.
    """
    config = resolve_paths(config)
    require_build_host(f"ampdeploy up to {until!r}")
    preflight(config)
    folder = config.folder
    with open_run(config) as run:
        for stage in _until(plan(config), until):
            _run_stage(run, stage)
        log.debug("finished up to %s in %s", until, folder)
    return run


def rerun_config(folder: Path) -> BuildConfig:
    """The configuration a run directory was built with.

    Raises:
        ArtifactError: Not a run directory.
    """
    manifest = Manifest.read(folder)
    if "config" not in manifest.data:
        raise ArtifactError(f"{manifest.path} holds no config. Build the run again.")

    return dataclasses.replace(from_json(manifest.data["config"]), out=folder)


def status(config: BuildConfig) -> list[tuple[Stage, bool]]:
    """Each stage with whether it is up to date, without changing anything on disk."""
    config = resolve_paths(config)
    run = Run(config, read_or_new(config))
    done = True
    result = []
    for stage in plan(config):
        done = done and config.resume and run.is_done(stage)
        result.append((stage, done))
    return result


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
    facts = stage.run(run)
    seconds = time.monotonic() - started
    outputs = {name: run.sha256(name) or "" for name in stage.writes}
    outputs.update(run.external_data(stage.writes))
    record = StageRecord(
        fingerprint=fingerprint(stage, hashes),
        options=stage.options,
        inputs=hashes,
        outputs=outputs,
        versions=versions(),
        seconds=round(seconds, 3),
        facts=facts,
    )
    run.manifest.put(stage.name, record)
    log.info("        done in %.1f s", seconds)
