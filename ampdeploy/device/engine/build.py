"""From a typed ONNX graph to `engine.plan` and `engine.json`, on TensorRT 10, 11 and for RTX.

The precision is in the graph: networks are strongly typed, without exception. What TensorRT returns
is checked, None and False alike, and its log becomes the error.

Run here: builds with TensorRT for RTX, without a GPU. TensorRT 10 and 11, and all that needs a GPU
(building on it, its memory limits, the timing cache, the inspection of the built engine), follow
the documented API and have been run against a stand-in of NVIDIA's module only.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ampdeploy
from ampdeploy.artifacts import atomic_path, sha256_file
from ampdeploy.config import PRECISIONS, EngineConfig
from ampdeploy.device.engine import options
from ampdeploy.device.engine.flavour import Flavour, find_flavour
from ampdeploy.device.engine.log import make_logger
from ampdeploy.device.engine.manifest import (
    EngineManifest,
    PrecisionFacts,
    ProfileFacts,
    TensorFacts,
    write_manifest,
)
from ampdeploy.device.engine.memory_budget import memory_budget
from ampdeploy.device.engine.monitor import run_aside, run_monitored
from ampdeploy.device.engine.network_precision import (
    precision_warnings,
    read_engine_outputs,
    read_precision,
)
from ampdeploy.device.engine.parse import CHANNELS, check_interface, parse_network
from ampdeploy.device.engine.refit import data_sha256, put_weights_back
from ampdeploy.device.platform import DeviceFacts, device_facts
from ampdeploy.device.preprocess import preprocessing_of
from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError, VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.progress import log

KEPT_WARNINGS = 20
_NO_KERNEL = "could not find any implementation"
# Words with which TensorRT says that the machine's memory ran out ...
_OUT_OF_MEMORY = (
    "out of memory",
    "outofmemory",
    "memory allocation",
    "allocator error",
    "could not be allocated",
)
# ... and those with which it says that a kernel needs more than the builder's limits allow. In some
# releases "insufficient" is misspelt.
_OVER_THE_LIMIT = (
    "insufficient workspace",
    "sufficient workspace memory",
    "insufficient memory",
    "insuficient memory",
    "memory is insufficient",
)


@dataclass(frozen=True, kw_only=True)
class _Built:
    """What came out of the builder, and what was learnt on the way."""

    blob: Any
    """The serialised engine, TensorRT's host memory."""
    precision: PrecisionFacts
    profile: ProfileFacts
    io: tuple[TensorFacts, ...]
    compute_capabilities: tuple[str, ...]
    options: dict[str, Any]
    warnings: tuple[str, ...]


def build_engine(
    onnx: Path,
    plan: Path,
    *,
    target: str,
    config: EngineConfig,
    model: str,
    image_size: int,
    precision: str,
    verdict: dict[str, Any],
    timing_cache: Path | None = None,
    here: DeviceFacts | None = None,
) -> EngineManifest:
    """Build an engine and write it, with its manifest beside it.

    The plan is a pure plan; both files are replaced only once the new ones are complete.

    Args:
        onnx: The graph, its types decided; float32 inputs and outputs.
        plan: The ``.plan`` file.
        target: ``trt`` or ``trt-rtx``.
        config: Batches, portability and memory.
        model: Name of the model, for the manifest.
        image_size: Side of the square input, pixels.
        precision: What the graph is meant to be, ``fp16`` or ``fp32``. Anything else is refused.
        verdict: How the graph was verified, for the manifest; plain data.
        timing_cache: Folder for the kernel timings of this and later builds; None: keep none.
        here: Facts of this machine; None: find them out.

    Returns:
        The manifest.

    Raises:
        ConfigError: Options that exclude each other, or this TensorRT or machine.
        MissingDependencyError: No such TensorRT, or no GPU where it takes one.
        ArtifactError: The ONNX file is missing, damaged, or not one of ampdeploy's.
        VerificationError: The engine would not compute in `precision`.
        AmpDeployError: TensorRT could not build it, or the disk is full.
        KeyboardInterrupt: Ctrl-C; nothing was written.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"precision {precision!r} is none of {', '.join(PRECISIONS)}.")
    flavour = find_flavour(target, needed_by=f"building {plan.name} for target {target}")
    here = here or device_facts()
    options.check_can_build(flavour, config, here)
    if not onnx.is_file():
        raise ArtifactError(f"there is no ONNX file at {onnx}. Run `ampdeploy export` first.")
    onnx_sha256 = sha256_file(onnx)
    started = time.monotonic()
    built = _build(flavour, onnx, image_size, precision, config, here, timing_cache)
    seconds = time.monotonic() - started
    view = memoryview(built.blob)
    proof = _inspect_engine(flavour, built, here, onnx if config.strip_weights else None)
    warnings = (*built.warnings, *precision_warnings(proof, view.nbytes))
    manifest = EngineManifest(
        tool_version=ampdeploy.__version__,
        model=model,
        image_size=image_size,
        preprocessing=preprocessing_of(onnx),
        target=target,
        tensorrt_version=flavour.version,
        portable=config.portable,
        compute_capabilities=built.compute_capabilities,
        gpu=here.gpu,
        board=here.board if here.l4t is not None else None,
        sm_count=here.sm_count,
        driver=here.driver,
        os=here.os,
        arch=here.arch,
        plan_sha256=hashlib.sha256(view).hexdigest(),
        plan_bytes=view.nbytes,
        onnx=onnx.name,
        onnx_sha256=onnx_sha256,
        onnx_data_sha256=data_sha256(onnx),
        profiles=(built.profile,),
        io=built.io,
        precision=proof,
        stripped=config.strip_weights,
        verdict=verdict,
        options={**built.options, "build_s": round(seconds, 1)},
        warnings=tuple(dict.fromkeys(warnings))[:KEPT_WARNINGS],
    )
    with atomic_path(plan, needed=view.nbytes) as temporary:
        temporary.write_bytes(view)
    write_manifest(plan, manifest)
    _report(plan, manifest, seconds)
    return manifest


def _report(plan: Path, manifest: EngineManifest, seconds: float) -> None:
    for warning in manifest.warnings:
        log.debug("%s: %s", plan.name, warning)
    log.info(
        "built %s: %.1f MB in %.0f s, for compute capability %s; %.0f%% of the weights in FP16",
        plan.name,
        manifest.plan_bytes / 1e6,
        seconds,
        ", ".join(manifest.compute_capabilities),
        manifest.precision.half_share * 100,
    )


def _build(
    flavour: Flavour,
    onnx: Path,
    image_size: int,
    precision: str,
    config: EngineConfig,
    here: DeviceFacts,
    timing_cache: Path | None,
) -> _Built:
    trt = flavour.trt
    logger = make_logger(trt)

    def parse() -> tuple[Any, Any, Any]:
        builder = _make_builder(flavour, logger)
        return builder, *parse_network(flavour, builder, logger, onnx)

    builder, network, parser = run_aside(parse)
    io = check_interface(network, image_size, onnx)
    proof = read_precision(trt, network, onnx, asked=precision)
    builder_config = builder.create_builder_config()
    if builder_config is None:
        raise AmpDeployError(f"TensorRT made no builder config. {logger.explain()}")
    profile = _add_profile(builder, builder_config, config, image_size, logger)
    said = options.set_flags(flavour, builder_config, config)
    budget = memory_budget(
        here,
        limit_bytes=config.memory_limit_bytes,
        weight_bytes=sum(proof.weight_bytes.values()),
    )
    said |= options.set_memory(flavour, builder_config, budget)
    capabilities = _choose_gpus(flavour, builder_config, config, here)
    cache = _open_timing_cache(flavour, builder_config, here, timing_cache, said)
    if budget.warning:
        log.warning("%s", budget.warning)

    blob = run_monitored(
        lambda: builder.build_serialized_network(network, builder_config),
        trt=trt,
        builder_config=builder_config,
        has_monitor=flavour.has_progress_monitor,
        description=f"building {flavour.target} engine",
    )
    if blob is None:
        raise _not_built(flavour, onnx, logger)
    if cache is not None:
        options.save_timing_cache(builder_config, cache)
    warnings = [*([budget.warning] if budget.warning else []), *logger.warnings()]
    del parser  # it owns weights of the network, so not before
    return _Built(
        blob=blob,
        precision=proof,
        profile=profile,
        io=io,
        compute_capabilities=capabilities,
        options=said,
        warnings=tuple(warnings),
    )


def _make_builder(flavour: Flavour, logger: Any) -> Any:
    try:
        return flavour.trt.Builder(logger)
    except Exception as error:  # the bindings' own, when the C++ side returns nothing
        raise AmpDeployError(
            f"TensorRT {flavour.version} makes no builder: {error}. {logger.explain()} Run "
            "`ampdeploy doctor`."
        ) from error


def _add_profile(
    builder: Any, builder_config: Any, config: EngineConfig, image_size: int, logger: Any
) -> ProfileFacts:
    small, usual, large = ((batch, CHANNELS, image_size, image_size) for batch in config.batch)
    profile = builder.create_optimization_profile()
    if profile is None:
        raise AmpDeployError(f"TensorRT made no optimisation profile. {logger.explain()}")
    profile.set_shape(IMAGES, small, usual, large)
    if builder_config.add_optimization_profile(profile) < 0:
        raise AmpDeployError(f"TensorRT refused the batches {config.batch}. {logger.explain()}")
    return ProfileFacts(input=IMAGES, min=small, opt=usual, max=large)


def _choose_gpus(
    flavour: Flavour, builder_config: Any, config: EngineConfig, here: DeviceFacts
) -> tuple[str, ...]:
    if not flavour.is_rtx:
        if here.compute_capability is None:
            raise AmpDeployError(
                f"the compute capability of {here.gpu} cannot be found out, so the engine could "
                "not say where it runs. Install cuda-python, or update the driver."
            )
        return (here.compute_capability,)
    chosen = options.choose_compute_capabilities(flavour, config, here)
    options.set_compute_capabilities(flavour, builder_config, chosen)
    return tuple(chosen)


def _open_timing_cache(
    flavour: Flavour,
    builder_config: Any,
    here: DeviceFacts,
    folder: Path | None,
    said: dict[str, Any],
) -> Path | None:
    """Load the cache; returns its file, or None where there is none, which `said` then explains."""
    if not flavour.takes_timing_cache:
        said["timing_cache"] = "none: TensorRT for RTX has no use for one"
        return None
    if folder is None:
        said["timing_cache"] = "none"
        return None
    path = options.timing_cache_file(folder, flavour, here)
    options.load_timing_cache(builder_config, path)
    said["timing_cache"] = path.name
    return path


def _not_built(flavour: Flavour, onnx: Path, logger: Any) -> AmpDeployError:
    said = " | ".join(logger.errors()).lower()
    if _NO_KERNEL in said:
        # Why is often in warnings only; without this error they are of kernels that it could spare.
        said = " | ".join((said, *logger.warnings())).lower()
    batch = "lower the largest batch (--engine-batch of `ampdeploy build`)"
    # First: after a failed allocation TensorRT may ask for more workspace, which makes it worse.
    if any(words in said for words in _OUT_OF_MEMORY):
        advice = (
            f"Memory ran out. Close other programs, {batch}, or give less memory to the builder "
            "with --memory-limit."
        )
    elif any(words in said for words in _OVER_THE_LIMIT):
        advice = (
            "The builder's memory is too small for a kernel. Raise --memory-limit, or, if none was "
            f"given, close other programs, which raises it, too; or {batch}. If more memory does "
            "not help, it may be a known bug of this TensorRT: `ampdeploy doctor` lists them."
        )
    else:
        advice = "Run with -v for TensorRT's whole log; `ampdeploy doctor` lists its known bugs."
    return AmpDeployError(
        f"TensorRT {flavour.version} built no engine from {onnx.name}. {logger.explain()} {advice}"
    )


def _inspect_engine(
    flavour: Flavour, built: _Built, here: DeviceFacts, weights: Path | None
) -> PrecisionFacts:
    """Ask the engine itself for its types, where there is a GPU that can load it.

    Not run yet: it needs a GPU.

    Args:
        flavour: What built it.
        built: The engine and what is known of it.
        here: This machine.
        weights: The ONNX file, for an engine without weights: that it takes them is seen now, not
            when it is first opened. None: it has them.
    """
    if here.gpu is None:
        return replace(built.precision, why_no_engine_outputs="no GPU here to load the engine")
    if here.compute_capability not in built.compute_capabilities:
        return replace(
            built.precision,
            why_no_engine_outputs=f"not built for this GPU ({here.compute_capability})",
        )
    trt = flavour.trt
    logger = make_logger(trt)
    runtime = trt.Runtime(logger)
    # A version-compatible plan brings its runtime as code; this one was built a moment ago.
    runtime.engine_host_code_allowed = True
    engine = run_aside(lambda: runtime.deserialize_cuda_engine(built.blob))
    if engine is None:
        raise AmpDeployError(
            f"TensorRT {flavour.version} does not load the engine that it has just built. "
            f"{logger.explain()} Nothing was written."
        )
    if weights is not None:
        run_aside(
            lambda: put_weights_back(
                trt, engine, weights, logger, name=f"the engine of {weights.name}"
            )
        )
    try:
        outputs = read_engine_outputs(
            trt,
            engine,
            asked=built.precision.asked,
            shapes={IMAGES: built.profile.opt},
        )
    except VerificationError:
        raise
    except AmpDeployError as error:
        return replace(built.precision, why_no_engine_outputs=str(error))
    return replace(built.precision, engine_outputs=outputs)
