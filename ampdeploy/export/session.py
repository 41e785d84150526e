"""Opening an ONNX file for inference. No torch here: a device can use it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.errors import ArtifactError, ConfigError, MissingDependencyError
from ampdeploy.export.names import IMAGES
from ampdeploy.optional import install_extra, require

if TYPE_CHECKING:
    import onnxruntime

# Severity 3 is ERROR: below it ONNX Runtime prints advice that nobody asked for.
LOG_ERRORS_ONLY = 3
CPU = "CPUExecutionProvider"


def require_runtime(providers: tuple[str, ...], *, needed_by: str) -> Any:
    """The `onnxruntime` module, once it is known to have every one of `providers`.

    Raises:
        MissingDependencyError: It is not installed, or is a build without one of them.
    """
    runtime = require("onnxruntime", needed_by=needed_by)
    offered = runtime.get_available_providers()
    absent = [name for name in providers if name not in offered]
    if absent:
        raise MissingDependencyError(
            f"{needed_by} needs {', '.join(absent)}; onnxruntime {runtime.__version__} here has no "
            f"such provider, only {', '.join(offered)}. On an NVIDIA host run: "
            f"pip uninstall onnxruntime, then {install_extra('gpu')}"
        )
    return runtime


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    providers: tuple[str, ...] = (CPU,),
    optimise: bool = True,
    profile_to: Path | None = None,
) -> onnxruntime.InferenceSession:
    """Load an ONNX file into ONNX Runtime, on exactly the providers asked for.

    Args:
        path: The ``.onnx`` file; its ``.data`` file, if it has one, lies next to it.
        threads: CPU threads inside one operator; None: ONNX Runtime's default.
        providers: Execution providers in order of preference. All must be in this build and load.
        optimise: Let ONNX Runtime rewrite the graph.
        profile_to: Time every operator, until ``session.end_profiling()``, which writes a JSON file
            whose path starts like this one and returns that path. It costs time itself.

    Raises:
        ArtifactError: The file is missing, is not ONNX, or is damaged.
        ConfigError: `threads` is below 1.
        MissingDependencyError: onnxruntime is not installed, or a provider is not available.
    """
    runtime = require_runtime(providers, needed_by=f"running {path.name}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be 1 or more.")
    if not path.is_file():
        raise ArtifactError(f"there is no ONNX file at {path}. Run `ampdeploy export` first.")
    options = runtime.SessionOptions()
    options.log_severity_level = LOG_ERRORS_ONLY
    # Preallocating one block per input shape took 100 MB more for DINOv2-S at batch 8 and gave no
    # speed (0.50 s a call either way); the arena alone is enough.
    options.enable_mem_pattern = False
    # An idle session's threads spin for a while and take the cores from the other model of a
    # comparison: on two cores DINOv2-S then took 84 ms a call instead of 64, and p90 doubled.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if threads is not None:
        options.intra_op_num_threads = threads
    if profile_to is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile_to)
    if not optimise:
        options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        session = runtime.InferenceSession(str(path), options, providers=list(providers))
    except Exception as error:
        raise ArtifactError(
            f"{path} ({path.stat().st_size} bytes) cannot be opened as ONNX: {error}. It is "
            "damaged, incomplete, or not an ONNX file; export it again."
        ) from error
    # ONNX Runtime drops a provider that fails to start and goes on with the CPU.
    failed = [name for name in providers if name not in session.get_providers()]
    if failed:
        raise MissingDependencyError(
            f"{', '.join(failed)} did not start for {path.name}; ONNX Runtime fell back to "
            f"{', '.join(session.get_providers())}. Check the driver and CUDA libraries with "
            "`ampdeploy doctor`."
        )
    return session


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """The one input of a graph that ampdeploy can run."""

    batch: int | None
    """The only batch size it takes; None: any."""
    size: int
    """Side S of the square images, pixels."""


def image_input(session: onnxruntime.InferenceSession, name: str) -> ImageInput:
    """Check that a graph takes images the way an ampdeploy export does.

    Args:
        session: The file, opened.
        name: What to call it in the message.

    Raises:
        ArtifactError: It has other inputs.
    """
    inputs = session.get_inputs()
    if [(value.name, value.type) for value in inputs] == [(IMAGES, "tensor(float)")]:
        match inputs[0].shape:  # dynamic dimensions are strings or None
            case [batch, 3, int(height), int(width)] if height == width:
                return ImageInput(batch=batch if isinstance(batch, int) else None, size=height)
    seen = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
    raise ArtifactError(
        f"{name} takes {seen or 'no inputs'}, expected one float32 input {IMAGES!r} of shape "
        "[batch, 3, S, S] with a fixed S. It was not exported by ampdeploy; export the model with "
        "`ampdeploy export`."
    )
