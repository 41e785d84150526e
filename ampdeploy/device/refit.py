"""Putting the weights back into a plan that was built without them.

Not run on a GPU: TensorRT must deserialise the plan for it. Tried here is all that comes before,
and the rest against a recording stand-in of TensorRT's module.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/refitting-engines.html
"""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import atomic_path, sha256_file
from ampdeploy.device.build_monitor import run_aside
from ampdeploy.device.engine_file import (
    EngineManifest,
    check_fits,
    check_plan_file,
    read_manifest,
    write_manifest,
)
from ampdeploy.device.flavour import Flavour, find_flavour
from ampdeploy.device.platform import DeviceFacts, device_facts
from ampdeploy.device.trt_log import make_logger
from ampdeploy.errors import AmpDeployError, ArtifactError, MissingDependencyError
from ampdeploy.progress import log


def data_file(onnx: Path) -> Path:
    """Where the weights of an ONNX file are when they do not fit into it."""
    return onnx.with_name(f"{onnx.name}.data")


def data_sha256(onnx: Path) -> str | None:
    """SHA-256 of the ``.data`` file of `onnx`; None: it has none."""
    data = data_file(onnx)
    return sha256_file(data) if data.is_file() else None


def refit_plan(
    plan: Path, onnx: Path, out: Path, *, here: DeviceFacts | None = None
) -> EngineManifest:
    """Write a complete plan from one without weights and the ONNX file that it was built from.

    Needs the kind of GPU that the plan was built for.

    Args:
        plan: Built with `strip_weights`; its manifest lies beside it.
        onnx: The very file it was built from: other weights would give wrong results unnoticed.
        out: The new plan; its manifest is written beside it. May be `plan` itself.
        here: Facts of this machine; None: find them out.

    Returns:
        The manifest of the new plan.

    Raises:
        ArtifactError: The plan is not one without weights, does not fit here, or the ONNX file is
            another one.
        MissingDependencyError: No TensorRT, or no GPU.
        AmpDeployError: TensorRT could not refit it, or the file cannot be written.
    """
    manifest = read_manifest(plan)
    if not manifest.stripped:
        raise ArtifactError(f"{plan} has its weights; there is nothing to refit.")
    here = here or device_facts()
    if here.gpu is None:
        raise MissingDependencyError(
            f"refitting {plan.name} needs an NVIDIA GPU of compute capability "
            f"{', '.join(manifest.compute_capabilities)}, and this machine has none "
            f"({here.problem}). Do it on the device."
        )
    _check_same_onnx(onnx, manifest)
    flavour = find_flavour(manifest.target, needed_by=f"refitting {plan.name}")
    check_fits(manifest, here, flavour.version, flavour.target, stripped_ok=True)
    check_plan_file(plan, manifest)
    blob = run_aside(lambda: _refit(flavour, plan, onnx))
    view = memoryview(blob)
    with atomic_path(out) as temporary:
        temporary.write_bytes(view)
    complete = dataclasses.replace(
        manifest,
        stripped=False,
        plan_sha256=hashlib.sha256(view).hexdigest(),
        plan_bytes=view.nbytes,
    )
    write_manifest(out, complete)
    log.info("refitted %s: %.1f MB", out.name, view.nbytes / 1e6)
    return complete


def _check_same_onnx(onnx: Path, manifest: EngineManifest) -> None:
    if not onnx.is_file():
        raise ArtifactError(f"there is no ONNX file at {onnx}; give {manifest.onnx}.")
    if (sha256_file(onnx), data_sha256(onnx)) != (manifest.onnx_sha256, manifest.onnx_data_sha256):
        raise ArtifactError(
            f"{onnx} is not the {manifest.onnx} that the plan was built from (its sha256 differs). "
            "Give that file, or build the engine again from this one."
        )


def _refit(flavour: Flavour, plan: Path, onnx: Path) -> Any:
    """The serialised engine with its weights, as TensorRT's host memory."""
    trt = flavour.trt
    logger = make_logger(trt)

    def failed(what: str, more: str = "") -> AmpDeployError:
        return AmpDeployError(f"{plan.name}: {what}. {more}{logger.explain()}")

    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    if engine is None:
        raise failed("TensorRT does not load it")
    refitter = trt.Refitter(engine, logger)
    parser = trt.OnnxParserRefitter(refitter, logger)
    if not parser.refit_from_file(str(onnx)):
        errors = "; ".join(str(parser.get_error(i)) for i in range(parser.num_errors))
        raise failed(f"TensorRT does not take the weights of {onnx.name}", f"{errors} ")
    missing = list(refitter.get_missing_weights())
    if missing:
        raise failed(f"{len(missing)} weights are still missing, {missing[0]} among them")
    if not refitter.refit_cuda_engine():
        raise failed("refitting failed")
    config = engine.create_serialization_config()
    # Set by default on an engine that was built without weights.
    config.clear_flag(trt.SerializationFlag.EXCLUDE_WEIGHTS)
    blob = engine.serialize_with_config(config)
    if blob is None:
        raise failed("it cannot be serialised with its weights")
    return blob
