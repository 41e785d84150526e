"""A run directory at work: which stage is done, what its inputs hash to, who holds the folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, sha256_file, sha256_json
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.errors import AmpDeployError

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
        if record.fingerprint != fingerprint(stage, inputs):
            return False
        return all(self.sha256(name) == digest for name, digest in record.outputs.items())


def versions() -> dict[str, str]:
    """Versions of ampdeploy and of the packages that can change a result."""
    found = {"ampdeploy": ampdeploy.__version__}
    for name in _VERSIONED:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def fingerprint(stage: Stage, inputs: dict[str, str]) -> str:
    """Hash of everything the result of `stage` depends on."""
    return sha256_json(
        {
            "stage": stage.name,
            "options": stage.options,
            "inputs": inputs,
            "versions": versions(),
            "writes": stage.writes,
        }
    )


@contextlib.contextmanager
def open_run(config: BuildConfig) -> Iterator[Run]:
    """Lock the run directory of `config`, making it if need be."""
    folder = config.folder
    manifest = read_or_new(config)
    artifacts.prepare_folder(folder)
    with artifacts.run_lock(folder):
        artifacts.remove_stale_temporaries(folder)
        run = Run(config, manifest)
        run.manifest.data["config"] = to_json(config)
        run.manifest.data["tool_version"] = ampdeploy.__version__
        if not config.resume:
            run.manifest.data["stages"] = {}
        run.manifest.save()
        yield run


def read_or_new(config: BuildConfig) -> Manifest:
    """The manifest of `config`'s run directory, or one without stages; writes nothing.

    Raises:
        AmpDeployError: The folder is a file, holds other things, or another model's run.
    """
    folder = config.folder
    if folder.exists() and not folder.is_dir():
        raise AmpDeployError(f"--out {folder} is a file, not a folder. Choose another --out.")
    if not (folder / artifacts.MANIFEST).exists():
        if folder.is_dir() and any(not entry.name.startswith(".") for entry in folder.iterdir()):
            raise AmpDeployError(
                f"--out {folder} holds files but no {artifacts.MANIFEST}: it is not a run of "
                "ampdeploy, and nothing there was touched. Choose an empty or new folder."
            )
        return Manifest.create(folder, model=config.model.name, tool_version=ampdeploy.__version__)
    manifest = Manifest.read(folder)
    if manifest.model != config.model.name:
        raise AmpDeployError(
            f"--out {folder} holds a run of {manifest.model!r}, not of {config.model.name!r}. "
            "Choose another --out, or delete that folder."
        )
    return manifest
