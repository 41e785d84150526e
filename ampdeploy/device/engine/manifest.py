"""`engine.json`: what a plan is, where it runs, and why it is trusted.

The plan stays a pure plan, which every TensorRT tool reads. All that ampdeploy knows about it lies
next to it, and is compared with the machine before TensorRT sees the plan: given a plan of another
GPU, version or platform, TensorRT says little, and sometimes crashes.

Nothing here imports TensorRT.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.artifacts import read_json, sha256_file, write_json
from ampdeploy.errors import ArtifactError
from ampdeploy.report.codec import from_plain, to_plain

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

ENGINE_SCHEMA_VERSION = 2

_RTX = "trt-rtx"
_AMPERE = (8, 0)
# Plans of this major version that were built to be version compatible also run on the next.
# https://docs.nvidia.com/deeplearning/tensorrt/latest/getting-started/support-matrix.html
_MAJOR_THAT_RUNS_ON_NEXT = 10


@dataclass(frozen=True, kw_only=True)
class TensorFacts:
    """An input or output."""

    name: str
    mode: str
    """``input`` or ``output``."""
    dtype: str
    """TensorRT's name: ``FLOAT``, ``HALF``."""
    shape: tuple[int, ...]
    """-1: dynamic."""


@dataclass(frozen=True, kw_only=True)
class ProfileFacts:
    """Shapes that one input was built for."""

    input: str
    min: tuple[int, ...]
    opt: tuple[int, ...]
    max: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class PrecisionFacts:
    """Proof of what the engine computes in.

    Of the parsed network, which is strongly typed: TensorRT must keep its types.
    """

    asked: str
    """``fp16`` or ``fp32``."""
    layers: dict[str, dict[str, int]]
    """Kind of layer -> type of its output -> number of layers; integer arithmetic left out."""
    gemm_layers: dict[str, int]
    """Type that it computes in -> number of matrix multiplications and convolutions."""
    gemm_weights: dict[str, int]
    """The same -> number of weights that they multiply with."""
    half_share: float
    """Share of those weights that are multiplied in FP16."""
    weight_bytes: dict[str, int]
    """Type -> bytes of all constants of the network."""
    onnx_weight_bytes: dict[str, int]
    """ONNX type -> bytes of the initialisers of the file."""
    engine_outputs: dict[str, int] | None = None
    """Type -> outputs of the built engine's layers, as its inspector says."""
    why_no_engine_outputs: str | None = None


@dataclass(frozen=True, kw_only=True)
class EngineManifest:
    """The content of `engine.json`."""

    schema_version: int = ENGINE_SCHEMA_VERSION
    tool_version: str
    model: str
    image_size: int
    preprocessing: dict[str, Any]
    """How its images are prepared, `preprocess.FIELDS`; empty: the graph does not say."""
    target: str
    """``trt`` or ``trt-rtx``."""
    tensorrt_version: str
    portable: str
    """``none``, ``version``, ``same-cc`` or ``ampere-plus``."""
    compute_capabilities: tuple[str, ...]
    """What it was built for: on `trt` the GPU that it was built on."""
    gpu: str | None
    """The GPU that it was built on; None: built without one."""
    board: str | None
    """The Jetson that it was built on: its GPUs have one name, and do not share engines."""
    sm_count: int | None
    driver: str | None
    os: str
    arch: str
    plan_sha256: str
    plan_bytes: int
    onnx: str
    """File name of the graph that it was built from."""
    onnx_sha256: str
    onnx_data_sha256: str | None
    """Of its ``.data`` file, where the weights are in one."""
    profiles: tuple[ProfileFacts, ...]
    io: tuple[TensorFacts, ...]
    precision: PrecisionFacts
    stripped: bool
    """The weights are not in the plan, but in the ONNX file, which must lie beside it."""
    verdict: dict[str, Any]
    """How the graph that it was built from was verified."""
    options: dict[str, Any] = field(default_factory=dict)
    """What the builder was told, and what was left to its default, in words."""
    warnings: tuple[str, ...] = ()


def manifest_path(plan: Path) -> Path:
    """``engine.json`` of ``engine.plan``."""
    return plan.with_suffix(".json")


def write_manifest(plan: Path, manifest: EngineManifest) -> None:
    """Write the manifest of `plan`, atomically. The plan comes first: see `check_plan_file`."""
    write_json(manifest_path(plan), to_plain(manifest))


def read_manifest(plan: Path) -> EngineManifest:
    """The manifest of `plan`.

    Raises:
        ArtifactError: There is none, it is damaged, or a newer ampdeploy wrote it.
    """
    path = manifest_path(plan)
    if not path.exists():
        raise ArtifactError(
            f"{plan} has no {path.name} beside it, so nothing is known about where it runs. Copy "
            "both files, or build the engine again here; a build that was killed between the two "
            "leaves the plan alone."
        )
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != ENGINE_SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version!r}; this ampdeploy reads "
            f"{ENGINE_SCHEMA_VERSION}. Read it with the version that wrote it, or build the "
            "engine again."
        )
    return from_plain(EngineManifest, data, where=str(path))


def check_plan_file(plan: Path, manifest: EngineManifest) -> None:
    """Make sure that the plan is the one the manifest was written for.

    Raises:
        ArtifactError: It is missing, cut short, changed, or of another build.
    """
    try:
        size = plan.stat().st_size
        if size == manifest.plan_bytes and sha256_file(plan) == manifest.plan_sha256:
            return
    except OSError as error:
        raise ArtifactError(f"cannot read {plan}: {error.strerror}.") from error
    if size < manifest.plan_bytes:
        problem = f"has {size} bytes of {manifest.plan_bytes}: it was cut short, or is"
    elif size > manifest.plan_bytes:
        problem = f"has {size} bytes, not {manifest.plan_bytes}: something was added, or it is"
    else:
        problem = "has another sha256: it was changed, or is"
    raise ArtifactError(
        f"{plan} is not the plan that {manifest_path(plan).name} describes. It {problem} of "
        "another build. Copy both files again, or build the engine again."
    )


def check_fits(manifest: EngineManifest, here: DeviceFacts, version: str, target: str) -> None:
    """Make sure that a plan can run on this machine, from its manifest alone.

    Without a GPU here, only what does not depend on it is compared.

    Args:
        manifest: The plan's.
        here: This machine.
        version: Of the TensorRT that would load it.
        target: Which one that is, ``trt`` or ``trt-rtx``.

    Raises:
        ArtifactError: It cannot; every mismatch is named.
    """
    problems = [
        *_other_target(manifest, target),
        *_other_platform(manifest, here),
        *_other_gpu(manifest, here),
    ]
    if manifest.target == target:
        problems += _other_version(manifest, version)
    if problems:
        raise ArtifactError(
            f"the engine of {manifest.model} cannot run here: {'; '.join(problems)}. Build it on a "
            "machine like this one, from the same ONNX file or bundle."
        )


def _other_target(manifest: EngineManifest, target: str) -> list[str]:
    if manifest.target == target:
        return []
    return [f"it was built for target {manifest.target}, and is opened with {target}"]


def _other_platform(manifest: EngineManifest, here: DeviceFacts) -> list[str]:
    problems = []
    # NVIDIA states that engines of TensorRT for RTX run on both Windows and Linux.
    # https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
    if manifest.os != here.os and manifest.target != _RTX:
        problems.append(f"it was built on {manifest.os}, and this is {here.os}")
    if manifest.arch != here.arch:
        problems.append(f"it was built for {manifest.arch}, and this is {here.arch}")
    return problems


def _other_version(manifest: EngineManifest, version: str) -> list[str]:
    built, here = _numbers(manifest.tensorrt_version), _numbers(version)
    # System packages may name fewer parts than the wheel of the same release does.
    parts = min(len(built), len(here))
    if built[:parts] == here[:parts] and parts:
        return []
    said = f"it was built with TensorRT {manifest.tensorrt_version}, and this is {version}"
    if manifest.portable != "version":
        return [said]
    newer = here[:parts] >= built[:parts]
    same_major = here[:1] == built[:1]
    next_major = here[:1] == (_MAJOR_THAT_RUNS_ON_NEXT + 1,) and built[:1] == (
        _MAJOR_THAT_RUNS_ON_NEXT,
    )
    if newer and (same_major or next_major):
        return []
    return [f"{said}; a version-compatible plan runs on newer releases of the same major version"]


def _other_gpu(manifest: EngineManifest, here: DeviceFacts) -> list[str]:
    capability = here.compute_capability
    if capability is None:
        return []
    built_for = ", ".join(manifest.compute_capabilities)
    if manifest.portable == "ampere-plus":
        if here.l4t is not None:
            return ["hardware-compatible engines do not run on a Jetson"]
        if _numbers(capability) < _AMPERE:
            return [f"it runs from compute capability 8.0 on, and this GPU has {capability}"]
        return []
    if capability not in manifest.compute_capabilities:
        return [
            f"it was built for compute capability {built_for}, and this GPU ({here.gpu}) has "
            f"{capability}"
        ]
    if manifest.target == _RTX or manifest.portable == "same-cc":
        return []
    return _other_model(manifest, here)


def _other_model(manifest: EngineManifest, here: DeviceFacts) -> list[str]:
    """By default an engine is for one model of GPU; on a Jetson, whose GPUs share a name, board."""
    if manifest.board is not None and here.board is not None:
        # Not the number of SMs: a Jetson's power mode switches some of them off.
        if _module(manifest.board) != _module(here.board):
            return [f"it was built on {manifest.board}, and this is {here.board}"]
        return []
    portable = "(an engine built with --portable same-cc would do)"
    if manifest.gpu is not None and here.gpu is not None and manifest.gpu != here.gpu:
        return [f"it was built on {manifest.gpu}, and this is {here.gpu} {portable}"]
    # Variants of one model share its name, as the 8 and 12 GB ones of some GeForce cards do.
    if None not in (manifest.sm_count, here.sm_count) and manifest.sm_count != here.sm_count:
        return [
            f"it was built on a {manifest.gpu} of {manifest.sm_count} SMs, and this one has "
            f"{here.sm_count} {portable}"
        ]
    return []


def _module(board: str) -> str:
    # JetPack 6.2 renamed the same boards: "... Developer Kit" became "... Developer Kit Super".
    return board.removesuffix(" Super")


def _numbers(version: str) -> tuple[int, ...]:
    parts = []
    for part in version.split("."):
        if not part.isdigit():
            break
        parts.append(int(part))
    return tuple(parts)
