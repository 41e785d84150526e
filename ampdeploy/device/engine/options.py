"""What the builder is told: portability, GPUs, memory, timing cache; and what is refused, and why.

Where NVIDIA's documentation excludes something, it is refused here, before anything is built:
TensorRT itself often ignores it with a warning.

Run here: TensorRT for RTX. What only `trt` has follows its documentation and has been run against
stand-ins of its module, as has all that needs a GPU.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.artifacts import atomic_path
from ampdeploy.config import EngineConfig
from ampdeploy.device.engine.flavour import TRT_RTX, Flavour
from ampdeploy.device.engine.memory_budget import MemoryBudget
from ampdeploy.errors import AmpDeployError, ConfigError, MissingDependencyError
from ampdeploy.progress import log

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

LEVELS = {"same-cc": "SAME_COMPUTE_CAPABILITY", "ampere-plus": "AMPERE_PLUS"}
# Oldest GPU that may build for others, by the documentation of HardwareCompatibilityLevel:
# same-cc from Turing on, ampere-plus from Ampere on.
OLDEST = {"same-cc": (7, 5), "ampere-plus": (8, 0)}

# What TensorRT for RTX builds for unless told otherwise is "8.6, 8.9, 12.0, 12.1, and later", in
# older releases 8.0 as well; which of them depends on its version. Named one by one, the manifest
# can say what the engine is for. Turing (7.5) must be asked for: in an engine for several GPUs it
# costs the newer ones speed.
# https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/cpu-engines.html
DEFAULT_COMPUTE_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
CURRENT = "CURRENT"


def check_options(target: str, config: EngineConfig) -> None:
    """Refuse options that no TensorRT and no machine takes together.

    Args:
        target: ``trt`` or ``trt-rtx``.
        config: What was asked for.

    Raises:
        ConfigError: They exclude each other, or the target.
    """
    asked = f"--portable {config.portable}"
    capabilities = ", ".join(config.compute_capabilities)
    if target == TRT_RTX and config.portable != "none":
        raise ConfigError(
            f"{asked} is not for target {target}: TensorRT for RTX ignores it or fails. Its "
            "engines already run on every GPU that they are built for; name those with the compute "
            "capabilities."
        )
    if target != TRT_RTX and capabilities:
        raise ConfigError(
            f"compute capabilities {capabilities} were given, and target {target} builds for the "
            "GPU it runs on. Leave them out, or use --target trt-rtx."
        )
    if config.strip_weights and config.portable == "version":
        # A version-compatible plan runs in the lean runtime, which neither refits nor serialises:
        # https://developer.nvidia.com/ja-jp/blog/tensorrt-hardware-version-compatibility/
        raise ConfigError(
            f"--strip-weights and {asked} exclude each other: the runtime inside a "
            "version-compatible plan cannot put weights back. Choose one."
        )
    if config.strip_weights and len(config.compute_capabilities) > 1:
        raise ConfigError(
            "--strip-weights: without weights, TensorRT for RTX builds for one compute capability "
            f"at a time; {capabilities} were given."
        )


def check_can_build(flavour: Flavour, config: EngineConfig, here: DeviceFacts) -> None:
    """Refuse what cannot be built here, before anything expensive starts.

    Raises:
        ConfigError: The options exclude each other, or this TensorRT or machine.
        MissingDependencyError: It takes a GPU, and there is none.
    """
    check_options(flavour.target, config)
    if not flavour.can_build_without_gpu and here.gpu is None:
        raise MissingDependencyError(
            f"target {flavour.target} builds on the GPU that the engine is for, and this machine "
            f"has none ({here.problem}). Build on the device from a bundle (--engine deferred, "
            "then `ampdeploy bundle`), or build with --target trt-rtx, which needs no GPU."
        )
    _check_portable(flavour, config.portable, here)
    if config.strip_weights:
        _check_strip(flavour, here)
    if flavour.is_rtx:
        choose_compute_capabilities(flavour, config, here)


def _check_portable(flavour: Flavour, portable: str, here: DeviceFacts) -> None:
    if portable == "none":
        return
    asked = f"--portable {portable}"
    if portable == "version":
        if not flavour.has_version_compatible:
            raise ConfigError(f"{asked}: TensorRT {flavour.version} cannot build such plans.")
        return
    if here.l4t is not None:
        raise ConfigError(
            f"{asked} does not exist on a Jetson: NVIDIA supports hardware compatibility on "
            "neither JetPack nor DRIVE OS. Build on each device from the bundle."
        )
    if LEVELS[portable] not in flavour.hardware_levels:
        raise ConfigError(
            f"{asked}: TensorRT {flavour.version} has no {LEVELS[portable]}. Update TensorRT, or "
            f"choose another: {', '.join(flavour.hardware_levels) or 'it has none'}."
        )
    capability = here.compute_capability
    if capability is not None and _pair(capability) < OLDEST[portable]:
        oldest = ".".join(map(str, OLDEST[portable]))
        raise ConfigError(
            f"{asked} can be built on GPUs of compute capability {oldest} and newer; this one "
            f"({here.gpu}) has {capability}."
        )


def _check_strip(flavour: Flavour, here: DeviceFacts) -> None:
    if not flavour.can_strip_weights:
        raise ConfigError(f"--strip-weights: TensorRT {flavour.version} cannot leave weights out.")
    # Documented, and 1.7.1 fails on every network with a matrix product: see CPU-only AOT, above.
    if flavour.is_rtx and here.gpu is None:
        raise MissingDependencyError(
            "--strip-weights: without weights, TensorRT for RTX builds only on a machine with an "
            f"NVIDIA GPU, and this one has none ({here.problem}). Leave it out here."
        )


def _pair(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split("."))


def choose_compute_capabilities(
    flavour: Flavour, config: EngineConfig, here: DeviceFacts
) -> dict[str, str]:
    """For which GPUs TensorRT for RTX builds: capability -> its name in `ComputeCapability`.

    What was asked for. Else the default list, which does not depend on the machine, so that every
    host builds the same file; but a GPU that is here and not on the list gets an engine of its own,
    and so does every engine without weights, which is for one GPU.

    Raises:
        ConfigError: This TensorRT cannot build for one of them.
    """
    known = _known_capabilities(flavour.trt)
    own = here.compute_capability
    asked = config.compute_capabilities
    own_engine = config.strip_weights or own not in DEFAULT_COMPUTE_CAPABILITIES
    if not asked and own is not None and own_engine:
        asked = (own,)
    if not asked:
        return {name: known[name] for name in DEFAULT_COMPUTE_CAPABILITIES if name in known}
    if own is not None and asked == (own,) and own not in known:
        return {own: CURRENT}  # a GPU that is not on NVIDIA's list: it may work
    unknown = [name for name in asked if name not in known]
    if unknown:
        raise ConfigError(
            f"TensorRT for RTX {flavour.version} does not build for compute capability "
            f"{', '.join(unknown)}; it knows {', '.join(sorted(known, key=_pair))}."
        )
    return {name: known[name] for name in dict.fromkeys(asked)}


def _known_capabilities(trt: Any) -> dict[str, str]:
    """``12.0`` -> ``SM120``, for all that TensorRT for RTX has a name for."""
    numbers = [name[2:] for name in dir(trt.ComputeCapability) if name.startswith("SM")]
    return {f"{number[:-1]}.{number[-1]}": f"SM{number}" for number in numbers if number.isdigit()}


def set_compute_capabilities(flavour: Flavour, builder_config: Any, chosen: dict[str, str]) -> None:
    """Tell the builder of TensorRT for RTX what `choose_compute_capabilities` found."""
    builder_config.num_compute_capabilities = len(chosen)
    for i, (capability, name) in enumerate(chosen.items()):
        member = getattr(flavour.trt.ComputeCapability, name)
        if not builder_config.set_compute_capability(member, i):
            raise AmpDeployError(f"TensorRT for RTX refused compute capability {capability}.")


def set_flags(flavour: Flavour, builder_config: Any, config: EngineConfig) -> dict[str, Any]:
    """Set portability, weight stripping and arithmetic; returns what the manifest keeps of it."""
    trt = flavour.trt
    flags = trt.BuilderFlag
    if hasattr(flags, "TF32"):
        # On by default, it rounds FP32 products to 10 bits. What was verified was FP32.
        builder_config.clear_flag(flags.TF32)
    if hasattr(trt, "ProfilingVerbosity"):
        # Lets the engine's inspector name the types of its layers.
        builder_config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if config.strip_weights:
        builder_config.set_flag(flags.STRIP_PLAN)
        builder_config.set_flag(flags.REFIT_IDENTICAL)
    if config.portable == "version":
        builder_config.set_flag(flags.VERSION_COMPATIBLE)
    level = LEVELS.get(config.portable)
    if level is not None:
        wanted = getattr(trt.HardwareCompatibilityLevel, level)
        builder_config.hardware_compatibility_level = wanted
        if builder_config.hardware_compatibility_level != wanted:
            raise AmpDeployError(f"TensorRT {flavour.version} did not take {level}.")
    return {"strongly_typed": True, "tf32": False, "hardware_compatibility": level or "NONE"}


def set_memory(flavour: Flavour, builder_config: Any, budget: MemoryBudget) -> dict[str, Any]:
    """Set the limits of the builder's memory; returns what the manifest keeps of it."""
    pools = flavour.trt.MemoryPoolType
    said: dict[str, Any] = {"memory": budget.reason}
    for key, pool, limit in (
        ("workspace_bytes", "WORKSPACE", budget.workspace_bytes),
        ("tactic_bytes", "TACTIC_DRAM", budget.tactic_bytes),
    ):
        if limit is None or not hasattr(pools, pool):
            continue
        member = getattr(pools, pool)
        builder_config.set_memory_pool_limit(member, limit)
        # A limit that it does not like, it leaves as it was, with a line in its log.
        if builder_config.get_memory_pool_limit(member) != limit:
            raise AmpDeployError(
                f"TensorRT {flavour.version} did not take {pool} of {limit} bytes."
            )
        said[key] = limit
    return said


def timing_cache_file(folder: Path, flavour: Flavour, here: DeviceFacts) -> Path:
    """Where kernel timings are kept: they hold for one TensorRT build, GPU and driver."""
    parts = (flavour.version, here.gpu, here.compute_capability, here.sm_count, here.driver)
    words = "-".join(re.sub(r"[^\w.]+", "_", str(part)) for part in parts)
    return folder / f"{flavour.target}-{words}.timing"


def load_timing_cache(builder_config: Any, path: Path) -> None:
    """Give the builder the timings of earlier builds; an unusable file is only a slower build.

    Raises:
        AmpDeployError: TensorRT takes no cache, not even an empty one.
    """
    try:
        known = path.read_bytes()
    except FileNotFoundError:
        known = b""
    except OSError as error:
        log.warning("cannot read %s: %s; kernels are timed again", path, error.strerror)
        known = b""
    for blob in (known, b""):
        cache = builder_config.create_timing_cache(blob)
        # False: a cache of another device is not taken.
        if cache is not None and builder_config.set_timing_cache(cache, False):
            return
        if blob:
            log.warning("%s is damaged or of another machine; kernels are timed again", path)
    raise AmpDeployError("TensorRT refused an empty timing cache. Build without one.")


def save_timing_cache(builder_config: Any, path: Path) -> None:
    """Keep what this build timed. Failing to is only a warning: the engine is built."""
    cache = builder_config.get_timing_cache()
    blob = cache.serialize() if cache is not None else None
    if blob is None:
        log.warning("TensorRT gave no timing cache to keep")
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            temporary.write_bytes(memoryview(blob))
    except (OSError, AmpDeployError) as error:
        log.warning("the timing cache is not kept: %s", error)
