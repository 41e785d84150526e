"""The list of stages, once, and the engine that runs them, skips them, and resumes them.

A stage is skipped when its options, its inputs' hashes and the versions in use hash to what the
manifest says, and its outputs are still on disk unchanged. That is what makes a build resumable
after Ctrl-C, kill -9 or power loss: artifacts are renamed into place whole, the manifest is
written after them, and a stage that is not in the manifest runs again.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy import artifacts, stages
from ampdeploy.artifacts import Manifest, StageRecord, sha256_file, sha256_json
from ampdeploy.config import BuildConfig, from_json, to_json
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.optional import require_build_host
from ampdeploy.progress import log

# Packages whose version can change what a stage computes.
_VERSIONED = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One arrow of the data flow."""

    name: str
    does: str
    """One line for people."""
    run: Callable[[Run], dict[str, Any]]
    """Does the work and returns the facts that the manifest keeps."""
    reads: tuple[str, ...] = ()
    """Artifacts it reads."""
    after: tuple[str, ...] = ()
    """Stages whose facts it reads."""
    writes: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    """Everything else that its result depends on."""


def plan(config: BuildConfig) -> list[Stage]:
    """The whole pipeline for `config`, in order."""
    a = artifacts
    student = stages.student_artifact(config)
    runnable = stages.runnable_artifacts(config)
    distill = Stage(
        name="distill",
        does=f"train the slim model against the original for {config.distill.epochs} epochs",
        run=stages.distill,
        reads=(a.BASELINE, a.SLIM),
        after=("data",),
        writes=(a.DISTILLED, a.DISTILL),
        options=stages.distill_options(config),
    )
    return [
        Stage(
            name="data",
            does="choose calibration and evaluation images; skip what cannot be read",
            run=stages.data,
            options=stages.data_options(config),
        ),
        Stage(
            name="load",
            does="fetch the weights and check them against the model",
            run=stages.load,
            writes=(a.BASELINE,),
            options=stages.load_options(config),
        ),
        Stage(
            name="score",
            does="importance of every hidden neuron: one forward and backward",
            run=stages.score,
            reads=(a.BASELINE,),
            after=("data",),
            writes=(a.SCORES,),
            options=stages.score_options(config),
        ),
        Stage(
            name="search",
            does="find every block's width, last block first",
            run=stages.search,
            reads=(a.BASELINE, a.SCORES),
            after=("data",),
            writes=(a.WIDTHS,),
            options=to_json(config.prune),
        ),
        Stage(
            name="slim",
            does="remove the pruned neurons physically",
            run=stages.slim,
            reads=(a.BASELINE, a.WIDTHS),
            writes=(a.SLIM,),
        ),
        *([distill] if config.distill.epochs else []),
        Stage(
            name="export",
            does="write both models as ONNX and check them against PyTorch",
            run=stages.export,
            reads=(a.BASELINE, student),
            after=("data",),
            writes=(a.BASELINE_ONNX, a.MODEL_ONNX, a.EXPORT),
            options=to_json(config.export),
        ),
        Stage(
            name="eval",
            does="fidelity and k-NN accuracy on images that calibration never saw",
            run=stages.evaluate,
            reads=runnable,
            after=("data",),
            writes=(a.EVAL,),
            options={"target": config.target},
        ),
        Stage(
            name="bench",
            does="latency, interleaved, and memory in fresh processes",
            run=stages.bench,
            reads=runnable,
            after=("data",),
            writes=(a.BENCH,),
            options={"target": config.target, **to_json(config.bench)},
        ),
        Stage(
            name="report",
            does="put it all in one place",
            run=stages.report,
            reads=(a.BASELINE, student, a.WIDTHS, a.EXPORT, a.EVAL, a.BENCH, *runnable),
            after=("data", "load"),
            writes=(a.REPORT_JSON, a.REPORT_MD),
            options={"target": config.target, "prune": to_json(config.prune)},
        ),
    ]


class Run:
    """A run directory being worked on."""

    def __init__(self, config: BuildConfig, manifest: Manifest) -> None:
        self.config = config
        self.manifest = manifest
        self.folder = manifest.path.parent
        self._hashes: dict[str, str] = {}

    def path(self, artifact: str) -> Path:
        """Where an artifact lies."""
        return self.folder / artifact

    def facts(self, stage: str) -> dict[str, Any]:
        """What an earlier stage found out."""
        return self.manifest.facts(stage)

    def sha256(self, artifact: str) -> str | None:
        """Hash of an artifact as it is on disk; None when it is missing."""
        if artifact not in self._hashes:
            path = self.path(artifact)
            if not path.is_file():
                return None
            self._hashes[artifact] = sha256_file(path)
        return self._hashes[artifact]

    def forget_hashes(self, names: Sequence[str]) -> None:
        """The artifacts are about to be written anew."""
        for name in names:
            self._hashes.pop(name, None)
            self._hashes.pop(f"{name}.data", None)

    def input_hashes(self, stage: Stage) -> dict[str, str] | None:
        """Hashes of everything `stage` reads; None while some of it is not there yet."""
        hashes: dict[str, str] = {}
        for name in stage.reads:
            digest = self.sha256(name)
            if digest is None:
                return None
            hashes[name] = digest
        hashes.update(self.external_data(stage.reads))
        for name in stage.after:
            record = self.manifest.stage(name)
            if record is None:
                return None
            hashes[f"facts of {name}"] = sha256_json(record.facts)
        return hashes

    def external_data(self, names: Sequence[str]) -> dict[str, str]:
        """Hashes of the .data files that ONNX models above 2 GB keep their weights in."""
        found = {name: self.sha256(name) for name in (f"{n}.data" for n in names)}
        return {name: digest for name, digest in found.items() if digest is not None}

    def is_done(self, stage: Stage) -> bool:
        """Whether `stage` need not run again."""
        record = self.manifest.stage(stage.name)
        inputs = self.input_hashes(stage)
        if record is None or inputs is None:
            return False
        if record.fingerprint != _fingerprint(stage, inputs):
            return False
        return all(self.sha256(name) == digest for name, digest in record.outputs.items())


def versions() -> dict[str, str]:
    """Versions of ampdeploy and of the packages that can change a result."""
    found = {"ampdeploy": ampdeploy.__version__}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _fingerprint(stage: Stage, inputs: dict[str, str]) -> str:
    return sha256_json(
        {
            "stage": stage.name,
            "options": stage.options,
            "inputs": inputs,
            "versions": versions(),
            "writes": stage.writes,
        }
    )


def build(config: BuildConfig, *, until: str = "report") -> Run:
    """Run the pipeline, or what is left of it, and return the finished run.

    Args:
        config: Everything the build does.
        until: The last stage to run.

    Raises:
        AmpDeployError: Something a user can fix; finished stages are kept.
        MissingDependencyError: This machine cannot run the build or its target.
    """
    config = stages.resolve_paths(config)
    require_build_host(f"ampdeploy up to {until!r}")
    stages.preflight(config)
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
    import dataclasses

    return dataclasses.replace(from_json(manifest.data["config"]), out=folder)


def status(config: BuildConfig) -> list[tuple[Stage, bool]]:
    """Each stage with whether it is up to date, without changing anything on disk."""
    config = stages.resolve_paths(config)
    run = Run(config, _existing(config) or _new_manifest(config))
    done = True
    result = []
    for stage in plan(config):
        done = done and config.resume and run.is_done(stage)
        result.append((stage, done))
    return result


@contextlib.contextmanager
def open_run(config: BuildConfig) -> Iterator[Run]:
    """Lock the run directory of `config`, making it if need be."""
    folder = config.folder
    existing = _existing(config)
    artifacts.prepare_folder(folder)
    with artifacts.run_lock(folder):
        artifacts.remove_stale_temporaries(folder)
        run = Run(config, existing or _new_manifest(config))
        run.manifest.data["config"] = to_json(config)
        run.manifest.data["tool_version"] = ampdeploy.__version__
        if not config.resume:
            run.manifest.data["stages"] = {}
        run.manifest.save()
        yield run


def _existing(config: BuildConfig) -> Manifest | None:
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise AmpDeployError(f"--out {folder} is a file, not a folder. Choose another --out.")
    if not (folder / artifacts.MANIFEST).exists():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise AmpDeployError(
                f"--out {folder} holds files but no {artifacts.MANIFEST}: it is not a run of "
                "ampdeploy, and nothing there was touched. Choose an empty or new folder."
            )
        return None
    manifest = Manifest.read(folder)
    if manifest.model != config.model.name:
        raise AmpDeployError(
            f"--out {folder} holds a run of {manifest.model!r}, not of {config.model.name!r}. "
            "Choose another --out, or delete that folder."
        )
    return manifest


def _new_manifest(config: BuildConfig) -> Manifest:
    return Manifest.create(
        config.folder, model=config.model.name, tool_version=ampdeploy.__version__
    )


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
    inputs = run.input_hashes(stage)
    if inputs is None:
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
        fingerprint=_fingerprint(stage, inputs),
        options=stage.options,
        inputs=inputs,
        outputs=outputs,
        versions=versions(),
        seconds=round(seconds, 3),
        facts=facts,
    )
    run.manifest.put(stage.name, record)
    log.info("        done in %.1f s", seconds)
