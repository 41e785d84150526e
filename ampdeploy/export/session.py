"""Opening an ONNX file for inference. No torch here: a device can use it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ampdeploy.errors import ArtifactError, ConfigError, MissingDependencyError
from ampdeploy.optional import require

if TYPE_CHECKING:
    import onnxruntime

# Severity 3 is ERROR: below it ONNX Runtime prints advice that nobody asked for.
LOG_ERRORS_ONLY = 3
INPUT = "images"


def open_session(
    path: Path,
    *,
    threads: int | None = None,
    providers: tuple[str, ...] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Load an ONNX file into ONNX Runtime, on exactly the providers asked for.

    Args:
        path: The ``.onnx`` file; its ``.data`` file, if it has one, lies next to it.
        threads: CPU threads inside one operator; None: ONNX Runtime's default.
        providers: Execution providers in order of preference. All must be in this build and load.

    Raises:
        ArtifactError: The file is missing, is not ONNX, or is damaged.
        ConfigError: `threads` is below 1.
        MissingDependencyError: onnxruntime is not installed, or a provider is not available.
    """
    runtime = require("onnxruntime", needed_by=f"running {path.name}")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be 1 or more.")
    if not path.is_file():
        raise ArtifactError(f"there is no ONNX file at {path}. Run `ampdeploy export` first.")
    absent = [name for name in providers if name not in runtime.get_available_providers()]
    if absent:
        raise MissingDependencyError(
            f"this build of onnxruntime has no {', '.join(absent)}; it offers "
            f"{', '.join(runtime.get_available_providers())}. On an NVIDIA host, install "
            "`ampdeploy[gpu]` in place of [cpu]."
        )
    options = runtime.SessionOptions()
    options.log_severity_level = LOG_ERRORS_ONLY
    # Preallocating one block per input shape took 100 MB more for DINOv2-S at batch 8 and gave no
    # speed (0.50 s a call either way); the arena alone is enough.
    options.enable_mem_pattern = False
    if threads is not None:
        options.intra_op_num_threads = threads
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


def check_interface(
    session: onnxruntime.InferenceSession, path: Path, image_shape: tuple[int, ...]
) -> None:
    """Check that the file takes images, and of this shape.

    Args:
        session: `path`, opened.
        path: For the message.
        image_shape: Channels, height, width, in pixels.

    Raises:
        ArtifactError: It has other inputs, or the images do not fit.
    """
    inputs = session.get_inputs()
    described = ", ".join(f"{value.name} {value.type} {value.shape}" for value in inputs)
    if [value.name for value in inputs] != [INPUT] or inputs[0].type != "tensor(float)":
        raise ArtifactError(
            f"{path} takes {described or 'no inputs'}, expected one float32 input {INPUT!r}. It "
            "was not exported by ampdeploy, or is another model; export it again."
        )
    if list(inputs[0].shape[1:]) != list(image_shape):
        raise ArtifactError(
            f"{path} takes {described}, but the images are {list(image_shape)} (channels, height, "
            "width). Prepare the images at the size the model was exported for."
        )
