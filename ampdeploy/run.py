"""A run directory at work: which stage is done, what its inputs hash to, who holds the folder."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, sha256_file, sha256_json
from ampdeploy.config import BuildConfig, stored
from ampdeploy.errors import AmpDeployError
from ampdeploy.export.names import data_name

# Key in a stage's facts under which it says what identifies each part of them.
IDENTITY = "identity"
# Key in a stage's options for what belongs to the machine, and in there, in a build of an engine,
# for whether that machine runs it.
MACHINE = "machine"
RUNS_ENGINE = "runs_engine"


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
    """Facts of earlier stages it reads: ``load``, or one part, ``data.calib``."""
    writes: tuple[str, ...] = ()
    options: Callable[[BuildConfig], dict[str, Any]] = lambda _config: {}
    """Everything else that its result depends on."""
    looks_outside: bool = False
    """Its options depend on more than the config: folders, weights or the machine."""
    packages: tuple[str, ...] = ()
    """Distributions whose version can change its result."""
    delivers: bool = False
    """What it writes is what people take away. It goes before the stage runs again, and when an
    earlier stage refuses: an old engine must not pass for the one that was just refused."""


class Run:
    """A run directory being worked on."""

    def __init__(self, config: BuildConfig, manifest: Manifest) -> None:
        self.config = config
        self.manifest = manifest
        self.folder = manifest.path.parent
        self._hashes: dict[str, str] = {}
        self._said: set[str] = set()

    def save_config(self) -> None:
        """Make this build's config the run's. Called when something was done with it, so that a
        command that fails before it has changed anything leaves the run as it was."""
        self.manifest.data["config"] = stored(self.config)
        self.manifest.data["tool_version"] = ampdeploy.__version__
        self.manifest.save()

    def once(self, reason: str) -> str:
        """`reason` for a warning where it is new, and ``see above`` where one has given it."""
        if reason in self._said:
            return "see above"
        self._said.add(reason)
        return reason

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
            self._hashes.pop(data_name(name), None)

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
            earlier, _, part = name.partition(".")
            record = self.manifest.stage(earlier)
            if record is None:
                return None
            # A part says itself what identifies it: the same images in another folder are the same.
            found = record.facts[IDENTITY][part] if part else record.facts
            hashes[f"facts of {name}"] = sha256_json(found)
        return hashes

    def external_data(self, names: Sequence[str]) -> dict[str, str]:
        """Hashes of the .data files that ONNX models above 2 GB keep their weights in."""
        found = {name: self.sha256(name) for name in (data_name(n) for n in names)}
        return {name: digest for name, digest in found.items() if digest is not None}

    def is_done(self, stage: Stage) -> bool:
        """Whether `stage` need not run again."""
        record = self.manifest.stage(stage.name)
        inputs = self.input_hashes(stage)
        if record is None or inputs is None:
            return False
        if not self._outputs_stand(stage):
            return False
        if record.fingerprint == fingerprint(stage, self.config, inputs):
            return True
        return record.inputs == inputs and _did_more(record.options, stage, self.config)

    def is_current(self, stage: Stage, *, ignoring: Collection[str] = ()) -> bool:
        """Whether what `stage` wrote belongs to this run's config and present artifacts.

        Unlike `is_done` it does not ask the outside world: a finished run stays usable where its
        images and weights are not, on any machine, and under newer libraries.

        Args:
            stage: One of the plan.
            ignoring: Outputs that may be missing or changed.
        """
        record = self.manifest.stage(stage.name)
        if record is None or record.inputs != self.input_hashes(stage):
            return False
        if not stage.looks_outside and _lasting(record.options) != _lasting(
            stage.options(self.config)
        ):
            return False
        return self._outputs_stand(stage, ignoring)

    def discard(self, stage: Stage) -> list[str]:
        """Delete what `stage` wrote, and its record; returns the names of what was there."""
        record = self.manifest.stage(stage.name)
        names = {*stage.writes, *(data_name(name) for name in stage.writes)}
        names |= set(record.outputs) if record else set()
        there = sorted(name for name in names if self.path(name).exists())
        for name in there:
            with artifacts.explain_os_errors(self.path(name)):
                self.path(name).unlink()
        self.forget_hashes(stage.writes)
        if record is not None:
            del self.manifest.data["stages"][stage.name]
            self.manifest.save()
        return there

    def _outputs_stand(self, stage: Stage, ignoring: Collection[str] = ()) -> bool:
        record = self.manifest.stage(stage.name)
        outputs = record.outputs if record else {}
        return all(self.sha256(n) == digest for n, digest in outputs.items() if n not in ignoring)


def _lasting(options: dict[str, Any]) -> dict[str, Any]:
    """What is left of a stage's options without those of the machine."""
    return {key: value for key, value in options.items() if key != MACHINE}


def _did_more(recorded: dict[str, Any], stage: Stage, config: BuildConfig) -> bool:
    """Whether a stage was done where the engine runs, which it does not here.

    What was measured with the engine stands then: all that this machine could put in its place is
    that it was not measured.
    """
    if not _runs_engine(recorded):
        return False
    here = stage.options(config)
    return not _runs_engine(here) and _lasting(recorded) == _lasting(here)


def _runs_engine(options: dict[str, Any]) -> bool:
    return bool(options.get(MACHINE, {}).get(RUNS_ENGINE))


def versions(stage: Stage) -> dict[str, str]:
    """Versions of ampdeploy and of the packages that can change the result of `stage`."""
    found = {"ampdeploy": ampdeploy.__version__}
    for name in stage.packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def fingerprint(stage: Stage, config: BuildConfig, inputs: dict[str, str]) -> str:
    """Hash of everything the result of `stage` depends on."""
    return sha256_json(
        {
            "stage": stage.name,
            "options": stage.options(config),
            "inputs": inputs,
            "versions": versions(stage),
            "writes": stage.writes,
        }
    )


@contextlib.contextmanager
def open_run(config: BuildConfig) -> Iterator[Run]:
    """Lock the run directory of `config`, making it if need be."""
    folder = config.folder
    read_or_new(config)  # refuses a folder that is not ours before anything is made in it
    artifacts.prepare_folder(folder)
    with artifacts.run_lock(folder):
        # Read again: who held the lock may have written until now.
        run = Run(config, read_or_new(config))
        artifacts.remove_stale_temporaries(folder)
        if not config.resume:
            run.manifest.data["stages"] = {}
        if "config" not in run.manifest.data:
            run.save_config()
        yield run


def read_or_new(config: BuildConfig) -> Manifest:
    """The manifest of `config`'s run directory, or one without stages; writes nothing.

    Raises:
        AmpDeployError: The folder is a file, holds other things, or another model's run.
    """
    folder = config.folder
    with artifacts.explain_os_errors(folder):
        is_file = folder.exists() and not folder.is_dir()
        is_run = not is_file and (folder / artifacts.MANIFEST).exists()
        others = folder.is_dir() and any(e.name[0] != "." for e in folder.iterdir())
    if is_file:
        raise AmpDeployError(f"--out {folder} is a file, not a folder. Choose another --out.")
    if not is_run:
        if others:
            raise AmpDeployError(
                f"--out {folder} holds files but no {artifacts.MANIFEST}: it is not a run of "
                "ampdeploy, and nothing there was touched. Choose an empty or new folder."
            )
        return Manifest.create(folder, model=config.model.name, tool_version=ampdeploy.__version__)
    manifest = Manifest.read(folder)
    if manifest.model == config.model.name:
        return manifest
    if _cost_nothing(manifest):
        return Manifest.create(folder, model=config.model.name, tool_version=ampdeploy.__version__)
    raise AmpDeployError(
        f"--out {folder} holds a run of {manifest.model!r}, not of {config.model.name!r}. "
        "Choose another --out, or delete that folder."
    )


def _cost_nothing(manifest: Manifest) -> bool:
    """Whether all that a run did was to look at the images; as when its weights were refused."""
    names = {entry.name for entry in manifest.path.parent.iterdir() if entry.name[0] != "."}
    return set(manifest.data["stages"]) <= {"data"} and names == {artifacts.MANIFEST}
