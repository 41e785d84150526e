"""What is made of a bundle on a device: an engine of each graph, or the graph itself.

Folders of work in progress: an engine that an interrupted try built is used again if nothing that
it depends on has changed. One that was seen to be wrong is not: see `discard`.
"""

from __future__ import annotations

import functools
import shutil
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy import artifacts
from ampdeploy.artifacts import explain_os_errors, sha256_json
from ampdeploy.config import ENGINE_TARGETS, EngineConfig, sizes_to_test, to_json
from ampdeploy.device.bundle.contents import Bundle
from ampdeploy.device.engine.flavour import Flavour, find_flavour
from ampdeploy.device.engine.options import timing_cache_file
from ampdeploy.device.install.installation import INSTALL_JSON
from ampdeploy.device.platform import DeviceFacts, device_facts
from ampdeploy.errors import ArtifactError
from ampdeploy.export.names import data_name
from ampdeploy.progress import log
from ampdeploy.targets.base import Target

# ONNX Runtime has no profile; these are tested.
ORT_BATCHES = (1, 8)

RTX = "trt-rtx"


@dataclass(kw_only=True)
class Job:
    """One installation under way."""

    bundle: Bundle
    target: Target
    here: DeviceFacts
    work: Path
    """Where things are built; in the file system of the installation."""
    engine: EngineConfig
    notes: list[str] = field(default_factory=list)

    @property
    def builds(self) -> bool:
        """Whether there is an engine to build."""
        return self.target.name in ENGINE_TARGETS

    @functools.cached_property
    def flavour(self) -> Flavour:
        """The TensorRT that builds; only where there is an engine to build."""
        return find_flavour(self.target.name, needed_by=f"target {self.target.name}")

    @property
    def usual_batch(self) -> int:
        """The batch size that is timed."""
        return self.engine.batch[1] if self.builds else ORT_BATCHES[0]

    @property
    def batches(self) -> tuple[int, ...]:
        """Batch sizes that must work."""
        return sizes_to_test(self.engine.batch) if self.builds else ORT_BATCHES


def avoid_known_bugs(job: Job) -> None:
    """Change what this TensorRT needs changed, and what makes no sense on a device.

    Raises:
        VerificationError: Every engine of this graph would be wrong here.
    """
    if not job.builds:
        return
    from ampdeploy.device.radar.bugs import apply_workarounds, find_bugs

    if job.engine.strip_weights:
        job.engine = replace(job.engine, strip_weights=False)
        job.notes.append("the engine has its weights: it is built where it runs")
    if job.engine.compute_capabilities and job.target.name != RTX:
        job.engine = replace(job.engine, compute_capabilities=())
    bugs = find_bugs(
        tensorrt_version=job.flavour.version,
        target=job.target.name,
        compute_capability=job.here.compute_capability,
        patterns=set(job.bundle.manifest.patterns),
    )
    job.engine, notes = apply_workarounds(job.engine, bugs)
    job.notes += notes


def make(job: Job, role: str) -> Path:
    """What the target opens, alone in a folder of its own.

    Args:
        job: The installation.
        role: ``pruned`` or ``baseline``.
    """
    manifest = job.bundle.manifest
    source = job.bundle.path(manifest.onnx if role == "pruned" else manifest.baseline_onnx)
    folder = job.work / role
    if job.builds:
        return _build(job, source, folder, role)
    if role == "baseline":
        return source  # run from where it is, and not installed
    if folder.exists():
        shutil.rmtree(folder)
    names = [n for n in (source.name, data_name(source.name)) if n in manifest.files]
    with explain_os_errors(folder, needed=sum(manifest.files[name].bytes for name in names)):
        folder.mkdir()
        for name in names:
            shutil.copyfile(job.bundle.path(name), folder / name)
    return folder / source.name


def _build(job: Job, source: Path, folder: Path, role: str) -> Path:
    """The engine; one that an earlier try built is used again if nothing it depends on changed."""
    from ampdeploy.device.engine.build import build_engine

    manifest = job.bundle.manifest
    plan = folder / (artifacts.ENGINE_PLAN if role == "pruned" else artifacts.BASELINE_PLAN)
    record, key = _record(job, role), _build_key(job, source)
    if is_built(plan, record, key):
        log.info("%s was built before; using it", plan.name)
        (folder / INSTALL_JSON).unlink(missing_ok=True)
        return plan
    record.unlink(missing_ok=True)
    if folder.exists():
        shutil.rmtree(folder)
    with explain_os_errors(folder):
        folder.mkdir()
    build_engine(
        source,
        plan,
        target=job.target.name,
        config=job.engine,
        model=manifest.model,
        image_size=manifest.image_size,
        precision=manifest.precision,
        verdict=manifest.verdict.get(role, {}),
        timing_cache=job.work,
        # Asked for anew: what is left once the first engine has been built and tested.
        here=replace(job.here, memory_free_bytes=device_facts().memory_free_bytes),
    )
    artifacts.write_json(record, key)
    return plan


def discard(job: Job, role: str) -> None:
    """Delete the engine of `role`, which is wrong, with all that the next try would make it from.

    TensorRT chooses kernels by timing them, so that another build may use other ones and be right;
    but not if it is told the timings of this one.
    """
    folder = job.work / role
    with explain_os_errors(job.work):
        _record(job, role).unlink(missing_ok=True)
        if job.flavour.takes_timing_cache:
            timing_cache_file(job.work, job.flavour, job.here).unlink(missing_ok=True)
        if folder.exists():
            shutil.rmtree(folder)


def _record(job: Job, role: str) -> Path:
    """What the engine of `role` was built from; beside its folder, which is installed whole."""
    return job.work / f"{role}.key.json"


def _build_key(job: Job, source: Path) -> dict[str, str]:
    manifest = job.bundle.manifest
    parts = (source.name, data_name(source.name))
    return engine_key(
        job.flavour,
        job.here,
        onnx=[manifest.files[name].sha256 for name in parts if name in manifest.files],
        options=[to_json(job.engine), manifest.precision, manifest.verdict],
    )


def engine_key(
    flavour: Flavour, here: DeviceFacts, *, onnx: list[str], options: Any
) -> dict[str, str]:
    """Everything that an engine depends on, to be kept beside it for `is_built`.

    Args:
        flavour: The TensorRT that builds it.
        here: This machine.
        onnx: SHA-256 of the graph and of its file of weights, if it has one.
        options: How it is built; plain data.
    """
    machine = (here.gpu, here.compute_capability, here.sm_count, here.driver, here.board, here.arch)
    return {
        "tool": ampdeploy.__version__,
        "onnx": sha256_json(onnx),
        "tensorrt": f"{flavour.target} {flavour.version}",
        "machine": sha256_json(machine),
        "config": sha256_json(options),
    }


def is_built(plan: Path, record: Path, key: dict[str, str]) -> bool:
    """Whether `plan` is whole, and was built from what `key` says.

    Args:
        plan: The engine.
        record: JSON file with the key of what was built last; written after plan and manifest.
        key: What would be built now: `engine_key`.
    """
    from ampdeploy.device.engine.manifest import check_plan_file, read_manifest

    if not record.is_file():
        return False
    try:
        if artifacts.read_json(record) != key:
            return False
        check_plan_file(plan, read_manifest(plan))
    except ArtifactError:
        return False
    return True
