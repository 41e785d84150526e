"""Which TensorRT this is. The one place that tells 10.x, 11.x and TensorRT for RTX apart.

By what the module has, not by its version number: a feature moves between releases, and NVIDIA's
numbers of TensorRT and TensorRT for RTX have nothing to do with each other.

Run here: TensorRT for RTX 1.7. The probes of TensorRT 10 and 11 follow their documented Python API
and have been run against stand-ins of the module.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ampdeploy.errors import ConfigError, MissingDependencyError
from ampdeploy.optional import install_line, is_jetson, require

TRT = "trt"
TRT_RTX = "trt-rtx"
MODULES = {TRT: "tensorrt", TRT_RTX: "tensorrt_rtx"}

# What the build and the runner call, as (owner in the module, attribute).
_NEEDED = (
    ("Builder", "build_serialized_network"),
    ("OnnxParser", "parse_from_file"),
    ("IExecutionContext", "execute_async_v3"),
    ("ICudaEngine", "num_io_tensors"),
)


@dataclass(frozen=True, kw_only=True)
class Flavour:
    """An imported TensorRT and what it can do."""

    target: str
    """What `--target` calls it: ``trt`` or ``trt-rtx``."""
    trt: Any
    """The module, ``tensorrt`` or ``tensorrt_rtx``."""
    version: str
    """Its own version with the build, e.g. ``10.13.3.9``."""
    network_flags: int
    """For `Builder.create_network`: a strongly typed network."""
    is_rtx: bool
    """TensorRT for RTX: engines for a list of compute capabilities, compiled to the end on the
    device. It builds without a GPU, and has no use for a timing cache."""
    has_version_compatible: bool
    """Plans that newer releases can load."""
    hardware_levels: tuple[str, ...]
    """Names in `HardwareCompatibilityLevel` that it heeds."""
    can_strip_weights: bool
    """Plans without weights, and the parser that refits them from the ONNX file."""
    has_progress_monitor: bool

    @property
    def can_build_without_gpu(self) -> bool:
        """Whether an engine can be built on a machine without GPU and driver."""
        return self.is_rtx

    @property
    def takes_timing_cache(self) -> bool:
        """Whether measured tactics can be kept for the next build.

        TensorRT for RTX still has the functions, but with a cache it looks for a GPU, and does
        nothing with it:
        https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/timing-cache-migration.html
        """
        return not self.is_rtx


def find_flavour(target: str, *, needed_by: str) -> Flavour:
    """Import the TensorRT of `target` and find out what it can do.

    Args:
        target: ``trt`` or ``trt-rtx``.
        needed_by: What the user asked for, e.g. ``"target trt"``.

    Raises:
        ConfigError: Another target.
        MissingDependencyError: It is not installed, does not load, or is too old: TensorRT 8, which
            JetPack 6.0 and older have.
    """
    if target not in MODULES:
        raise ConfigError(f"{target!r} is no TensorRT target; those are {', '.join(MODULES)}.")
    trt = require(MODULES[target], needed_by=needed_by)
    flavour = describe_flavour(target, trt)
    _check_usable(flavour, needed_by=needed_by)
    return flavour


def describe_flavour(target: str, trt: Any) -> Flavour:
    """What the module `trt` can do."""
    flags = getattr(trt, "NetworkDefinitionCreationFlag", None)
    # Its number differs between 10 and 11.
    strong = getattr(flags, "STRONGLY_TYPED", None)
    is_rtx = hasattr(trt, "ComputeCapability")
    builder_flags = getattr(trt, "BuilderFlag", None)
    levels = getattr(trt, "HardwareCompatibilityLevel", None)
    return Flavour(
        target=target,
        trt=trt,
        version=str(getattr(trt, "__version__", "unknown")),
        network_flags=0 if strong is None else 1 << int(strong),
        is_rtx=is_rtx,
        # TensorRT for RTX has the names, too: it asks for a library that it does not bring, and
        # ignores the hardware level with a warning. Tried with 1.7.1.
        has_version_compatible=not is_rtx and hasattr(builder_flags, "VERSION_COMPATIBLE"),
        hardware_levels=tuple(
            name
            for name in ("SAME_COMPUTE_CAPABILITY", "AMPERE_PLUS")
            if not is_rtx and hasattr(levels, name)
        ),
        can_strip_weights=hasattr(builder_flags, "STRIP_PLAN")
        and hasattr(builder_flags, "REFIT_IDENTICAL")
        and hasattr(trt, "OnnxParserRefitter"),
        has_progress_monitor=hasattr(trt, "IProgressMonitor"),
    )


def _check_usable(flavour: Flavour, *, needed_by: str) -> None:
    trt = flavour.trt
    module = MODULES[flavour.target]
    absent = [
        f"{owner}.{name}" for owner, name in _NEEDED if not hasattr(getattr(trt, owner, None), name)
    ]
    # A TensorRT that has FP16 as a builder's flag can also choose the precision of each layer by
    # itself, which is what breaks ViTs. Without that flag every network is strongly typed.
    weakly_typed = hasattr(getattr(trt, "BuilderFlag", None), "FP16")
    if flavour.network_flags == 0 and weakly_typed:
        absent.append("NetworkDefinitionCreationFlag.STRONGLY_TYPED")
    if not absent:
        return
    if is_jetson():
        advice = (
            "JetPack 6.0 and older have TensorRT 8; flash JetPack 6.1 or newer. Never replace "
            "JetPack's TensorRT with pip's."
        )
    else:
        advice = f"Update it to TensorRT 10 or newer: {install_line(module)}"
    raise MissingDependencyError(
        f"{needed_by} needs a {module} with {', '.join(absent)}, and {flavour.version}, which is "
        f"installed, has none. {advice}"
    )
