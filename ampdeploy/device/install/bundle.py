"""From a bundle to an installed engine: verify, build, test, install, compare. On the device.

Nothing is installed that was not seen to compute the golden outputs, and nothing that was
installed is touched before. Work in progress lies in a hidden folder next to the installation; a
build that was killed goes on from there. An engine that failed its test does not stay there.

The comparison with the unpruned model comes last: its engine is the larger one, and a board that
runs out of memory over it, or kills this process, has the tested one by then.

Run here: all of it with ONNX Runtime, and up to the missing GPU with TensorRT for RTX.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import explain_os_errors, run_lock
from ampdeploy.config import ENGINE_TARGETS, EngineConfig, to_json
from ampdeploy.device.bundle import archive
from ampdeploy.device.bundle import contents as form
from ampdeploy.device.bundle.contents import Bundle
from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.install.installation import (
    Installation,
    add_comparison,
    check_installation,
    check_replaceable,
    put_in_place,
    read_installation,
    recover,
    write_installation,
)
from ampdeploy.device.install.make import RTX, Job, avoid_known_bugs, discard, make
from ampdeploy.device.platform import DeviceFacts, device_facts
from ampdeploy.device.self_test import (
    SelfTest,
    compare_with_baseline,
    read_goldens,
    self_test,
)
from ampdeploy.errors import (
    AmpDeployError,
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    VerificationError,
)
from ampdeploy.optional import install_line
from ampdeploy.progress import log
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import Target, get_target

# What can be made of a bundle.
TARGETS = ("ort", "ort-cuda", *ENGINE_TARGETS)

# In `install.json` until the comparison has ended; the next try then goes on with it.
UNFINISHED = (
    "the comparison did not come to its end; `ampdeploy engine` on the bundle, with the options "
    "that it was installed with, goes on with it"
)


# An archive's content, in the folder of the work in progress.
UNPACKED = "bundle"


@dataclass(frozen=True, kw_only=True)
class InstallOptions:
    """What `install_bundle` does."""

    target: str | None = None
    """None: the bundle's."""
    out: Path | None = None
    """None: ``<bundle>-engine`` next to the bundle."""
    untested: bool = False
    """Install what no GPU here can test. What fails a test is never installed."""
    compare: bool = True
    """Build and time the baseline, too."""
    memory_limit_bytes: int | None = None
    """What TensorRT's builder may take; None: as the bundle says, mostly what is free."""


def install_bundle(path: Path, options: InstallOptions) -> tuple[Path, Installation]:
    """Build what a bundle is for, prove it, and install it.

    Args:
        path: The bundle: a folder or a ``.tar``.
        options: Target, place, memory, and what may be left out.

    Returns:
        The folder of the installation, and what its `install.json` says. A comparison that failed
        is no error: `why_no_comparison` has the reason.

    Raises:
        ArtifactError: The bundle is damaged or was tampered with.
        VerificationError: What was built does not compute the golden outputs, or a known bug of
            this TensorRT makes it wrong. Nothing was installed.
        MissingDependencyError: A package or GPU is missing. What was built is kept.
        ConfigError: Another target, or a memory limit for one that builds nothing.
        AmpDeployError: The place is taken by something else, TensorRT failed, or the disk is full.
    """
    # Not resolved: a link there is somebody's, and is refused below.
    out = Path(os.path.abspath(options.out or _default_out(path)))
    check_replaceable(out)
    here = device_facts()
    manifest = _read_manifest(path)
    target = _target(options.target or manifest.target)
    engine = _engine(manifest.engine, target, options)
    problem = _check_target(target)
    with _workshop(out) as work:
        recover(out)
        bundle = _open_bundle(path, work, here)
        job = Job(bundle=bundle, target=target, here=here, work=work, engine=engine)
        avoid_known_bugs(job)
        installation = _unfinished(job, out) or _install(job, out, problem, options)
        if installation.why_no_comparison == UNFINISHED:
            installation = _compare(job, out, installation, options)
    for note in installation.notes:
        log.warning("%s", note)
    return out, installation


def _default_out(path: Path) -> Path:
    path = path.resolve()
    name = path.stem if path.suffix == archive.SUFFIX else path.name
    return path.with_name(f"{name}-engine")


def _read_manifest(path: Path) -> form.BundleManifest:
    if path.is_dir():
        return form.read_bundle(path).manifest
    return form.parse_head(archive.read_head(path), where=path)


def _target(name: str) -> Target:
    target = get_target(name)
    if name not in TARGETS:
        raise ConfigError(
            f"target {name} needs a build host, and a bundle is for a device. Choose "
            f"{', '.join(TARGETS)}."
        )
    return target


def _engine(asked: EngineConfig, target: Target, options: InstallOptions) -> EngineConfig:
    limit = options.memory_limit_bytes
    if limit is None:
        return asked
    if target.name not in ENGINE_TARGETS:
        raise ConfigError(
            f"target {target.name} builds no engine whose memory could be limited. Leave "
            f"--memory-limit out, or choose --target {' or '.join(ENGINE_TARGETS)}."
        )
    return replace(asked, memory_limit_bytes=limit)


def _check_target(target: Target) -> str | None:
    """Why this machine can build but not run; None: it can do both.

    Raises:
        MissingDependencyError: It can do neither.
    """
    if target.name in ENGINE_TARGETS:
        try:
            find_flavour(target.name, needed_by=f"target {target.name}")
        except MissingDependencyError as error:
            raise MissingDependencyError(
                f"{error}\nWithout TensorRT: --target ort takes the bundle's graph as it is, for "
                f"ONNX Runtime on the CPU. For that, run: {install_line('onnxruntime')}"
            ) from error
    try:
        target.check()
    except MissingDependencyError as error:
        if target.name != RTX:
            raise
        return str(error)
    return None


@contextlib.contextmanager
def _workshop(out: Path) -> Iterator[Path]:
    """The folder of the work in progress, held; gone after success.

    Else it is kept for the next try, if there is anything in it to go on from.
    """
    work = out.with_name(f".{out.name}.work")
    with explain_os_errors(work):
        work.mkdir(parents=True, exist_ok=True)
    with run_lock(work):
        if not (work / ".lock").exists():
            # Between the two lines above, another process finished and took the folder away.
            raise AmpDeployError(f"another ampdeploy has just installed {out}. Run it again.")
        artifacts.remove_stale_temporaries(work)
        try:
            yield work
        except BaseException:
            with contextlib.suppress(OSError):
                if os.listdir(work) == [".lock"]:
                    shutil.rmtree(work)
            raise
        shutil.rmtree(work, ignore_errors=True)


def _open_bundle(path: Path, work: Path, here: DeviceFacts) -> Bundle:
    """The bundle as a folder, every file checked."""
    folder = path if path.is_dir() else _unpack(path, work)
    bundle = form.read_bundle(folder)
    log.info("checking %d files of %s", len(bundle.manifest.files), path.name)
    try:
        form.check_files(bundle, here, called=path)
    except ArtifactError:
        if folder != path:
            shutil.rmtree(folder)  # it comes from the archive, and will come again
        raise
    return bundle


def _unpack(path: Path, work: Path) -> Path:
    """The archive's content; what an earlier try unpacked is used again."""
    folder, partial = work / UNPACKED, work / f"{UNPACKED}.part"
    head = archive.read_head(path)
    if folder.is_dir():
        with contextlib.suppress(OSError):
            if all((folder / name).read_bytes() == content for name, content in head.items()):
                return folder
        shutil.rmtree(folder)
    if partial.exists():
        shutil.rmtree(partial)
    log.info("unpacking %s", path.name)
    archive.extract(path, partial)
    partial.rename(folder)
    return folder


def _unfinished(job: Job, out: Path) -> Installation | None:
    """What an earlier try of the same installed and did not come to compare; None: nothing."""
    try:
        found = read_installation(out)
        if found.why_no_comparison != UNFINISHED:
            return None
        origin = _origin(job)
        before = {name: getattr(found, name) for name in origin}
        for facts in (before, origin):
            facts["device"] = facts["device"] | {"memory_free_bytes": None}  # always another
        if before != origin:
            return None
        check_installation(out, job.here)
    except AmpDeployError:
        return None
    log.info("%s was installed before; going on with the comparison", out)
    return found


def _install(job: Job, out: Path, problem: str | None, options: InstallOptions) -> Installation:
    """Build, test, and put in place."""
    try:
        artifact = make(job, "pruned")
        facts = _prove(job, artifact, problem, options)
        installation = write_installation(artifact.parent, **facts, artifact=artifact.name)
        put_in_place(artifact.parent, out, job.here)
    except BaseException:
        if not job.builds:  # a copy, which the next try makes anew
            shutil.rmtree(job.work / "pruned", ignore_errors=True)
        raise
    log.info("installed %s", out)
    return installation


def _prove(
    job: Job, artifact: Path, problem: str | None, options: InstallOptions
) -> dict[str, Any]:
    """Test `artifact`; returns the fields of its `install.json`.

    Raises:
        VerificationError: It is wrong.
        MissingDependencyError: It cannot be tested here, and must not go untested.
    """
    tested: SelfTest | None = None
    why = UNFINISHED
    if problem is None:
        tested = _test(job, artifact)
    elif options.untested:
        why = "it cannot be run here"
        job.notes.append("installed without a test, as --untested says")
    else:
        raise MissingDependencyError(
            f"the engine was built and cannot be tested here, so it was not installed. {problem} "
            f"It lies at {artifact}, and the same command uses it again. Run it on the machine "
            "that the engine is for; or install it as it is with --untested."
        )
    manifest = job.bundle.manifest
    return {
        **_origin(job),
        "model": manifest.model,
        "image_size": manifest.image_size,
        "preprocessing": manifest.preprocessing,
        "precision": manifest.precision,
        "notes": tuple(job.notes),
        "self_test": tested,
        "untested": problem,
        "comparison": None,
        "why_no_comparison": why,
    }


def _origin(job: Job) -> dict[str, Any]:
    """The fields of `install.json` that say from what, by what and where it was made."""
    return {
        "tool_version": ampdeploy.__version__,
        "target": job.target.name,
        "bundle_sha256": job.bundle.sha256,
        "runtime": _runtime(job),
        "device": to_plain(job.here),
        "engine": to_json(job.engine) if job.builds else None,
    }


def _test(job: Job, artifact: Path) -> SelfTest:
    goldens = read_goldens(job.bundle)
    try:
        with job.target.open(artifact) as runner:
            tested = self_test(runner, job.bundle, goldens, job.batches)
    except VerificationError as error:
        said = f"{error}\nNothing was installed, and what was installed before is as it was. "
        if job.builds:
            discard(job, "pruned")
            said += (
                "The engine was deleted, with the timings, if any, that its kernels were chosen "
                "by: the same command builds it anew, and may get other kernels. "
            )
        else:
            # The same graph would fail in the same way: this is of no use to another try.
            shutil.rmtree(job.work / UNPACKED, ignore_errors=True)
        raise VerificationError(
            f"{said}`ampdeploy doctor` lists known bugs of this machine's TensorRT."
        ) from error
    log.info(
        "self-test passed: p1 cosine %.6f on %d golden images, bar %g",
        tested.worst,
        tested.images,
        tested.min_cosine_p1,
    )
    return tested


def _compare(
    job: Job, out: Path, installation: Installation, options: InstallOptions
) -> Installation:
    """Compare what is installed with the unpruned model, as far as this machine can."""
    comparison, why, notes = None, None, list[str]()
    if not options.compare:
        why = "--no-compare was given"
    else:
        log.info("comparing it with the unpruned model; --no-compare leaves that out")
        try:
            baseline = make(job, "baseline")
            # Opened anew: while the builder works on the baseline, the memory is its.
            with (
                job.target.open(baseline) as dense,
                job.target.open(out / installation.artifact) as pruned,
            ):
                comparison, notes = compare_with_baseline(
                    dense, pruned, job.bundle, read_goldens(job.bundle), job.usual_batch
                )
        except (AmpDeployError, MemoryError) as error:
            why = str(error) or "out of memory"
            log.warning("tested and installed, but not compared with the unpruned model: %s", why)
    return add_comparison(
        out, installation, comparison=comparison, why_no_comparison=why, notes=notes
    )


def _runtime(job: Job) -> dict[str, str]:
    """What runs the artifact, and its version."""
    if job.builds:
        return {job.target.name: job.flavour.version}
    found = {}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
