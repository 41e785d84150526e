"""What runs, skips and resumes the stages of `ampdeploy.stages.plan`.

A stage is skipped when its options, its inputs' hashes and the versions in use hash to what the
manifest says, and its outputs are still on disk unchanged. That is what makes a build resumable
after Ctrl-C, kill -9 or power loss: artifacts are renamed into place whole, the manifest is
written after them, and a stage that is not in the manifest runs again.

What lies in the folder of a finished build is of that build: what stages wrote that it does not
have is deleted. So are the graphs, engines and reports of an earlier model when one is refused.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from ampdeploy.artifacts import Manifest, StageRecord
from ampdeploy.config import BuildConfig, from_json
from ampdeploy.errors import AmpDeployError, ArtifactError, VerificationError
from ampdeploy.optional import require_build_host
from ampdeploy.progress import log
from ampdeploy.run import Run, Stage, fingerprint, open_run, read_or_new, versions
from ampdeploy.stages.common import resolve_paths
from ampdeploy.stages.plan import left_out
from ampdeploy.stages.plan import plan as plan
from ampdeploy.stages.preflight import packs_bundle, preflight


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
    expected = preflight(config, until=until)
    if config.engine.when == "deferred":  # otherwise the stage that builds the engine says it
        for note in expected.known_bugs:
            log.warning("on the device: %s", note)
    with open_run(config) as run:
        stages = plan(config)
        for stage in _until(stages, until):
            if stage is stages[-1]:  # the report is of what there is
                for old in left_out(config):
                    _discard(run, old)
            try:
                _run_stage(run, stage)
            except VerificationError:
                for later in (*stages[stages.index(stage) :], *left_out(config)):
                    if later.delivers:
                        _discard(run, later)
                raise
        run.save_config()
    if packs_bundle(config, until):
        _pack(config.folder)
    return run


def _discard(run: Run, stage: Stage) -> None:
    gone = run.discard(stage)
    if gone:
        log.info("        removed %s of an earlier build", ", ".join(gone))


def _pack(folder: Path) -> None:
    """What the device builds the engine from."""
    from ampdeploy.device.bundle.pack import pack_run

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
    config: BuildConfig, stage_name: str, then: str, *, ignoring: Collection[str] = ()
) -> None:
    """Check that what `stage_name` wrote is the run's present model, not an older one.

    Args:
        config: Of the run, as `rerun_config` gives it.
        stage_name: The stage whose outputs are about to be used.
        then: The command that makes them, for the message.
        ignoring: Outputs that may be missing or changed.

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
    if stage.delivers:
        run.discard(stage)
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
