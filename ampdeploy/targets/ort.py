"""ONNX Runtime, on the CPU (`ort`) or on an NVIDIA GPU (`ort-cuda`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ampdeploy.errors import AmpDeployError, ArtifactError, MissingDependencyError
from ampdeploy.export.session import open_session
from ampdeploy.optional import require
from ampdeploy.targets.base import FEATURES, IMAGES, PATCH_FEATURES, Runner, Target

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"


class OrtRunner(Runner):
    """An ONNX file in an ONNX Runtime session."""

    def __init__(self, session: onnxruntime.InferenceSession, *, name: str) -> None:
        """Check the graph's signature and take over `session`.

        Raises:
            ArtifactError: Inputs or outputs are not those of an ampdeploy export.
        """
        batch, size = _check_input(session, name)
        found = [output.name for output in session.get_outputs()]
        if FEATURES not in found:
            raise ArtifactError(
                f"{name} has the outputs {found}; one must be named {FEATURES!r}. Export the "
                "model with `ampdeploy export`."
            )
        super().__init__(
            name=name,
            image_size=size,
            output_names=tuple(n for n in (FEATURES, PATCH_FEATURES) if n in found),
            device="cuda" if CUDA in session.get_providers() else "cpu",
            fixed_batch=batch,
        )
        self._session: onnxruntime.InferenceSession | None = session

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert self._session is not None  # `run` refuses a closed runner
        try:
            values = self._session.run(list(self.output_names), {IMAGES: images})
        except Exception as error:
            # ONNX Runtime has no exception class of its own for running out of memory.
            if "alloc" not in str(error).lower():
                raise
            raise AmpDeployError(
                f"{self.name} ran out of memory on a batch of {len(images)}: {error}. "
                "Use a smaller batch."
            ) from error
        return dict(zip(self.output_names, values, strict=True))

    def _close_impl(self) -> None:
        self._session = None


def _check_input(session: onnxruntime.InferenceSession, name: str) -> tuple[int | None, int]:
    """(Fixed batch or None, image size) of a graph with the one input that we feed."""
    inputs = session.get_inputs()
    seen = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
    refusal = ArtifactError(
        f"{name} has the inputs [{seen}]; ampdeploy runs graphs with one input {IMAGES!r} of "
        "type tensor(float) and shape [batch, 3, S, S] with a fixed S. Export the model with "
        "`ampdeploy export`."
    )
    if len(inputs) != 1 or inputs[0].name != IMAGES or inputs[0].type != "tensor(float)":
        raise refusal
    shape = inputs[0].shape
    # Dynamic dimensions are strings or None.
    if len(shape) != 4 or shape[1] != 3 or not isinstance(shape[2], int) or shape[2] != shape[3]:
        raise refusal
    return (shape[0] if isinstance(shape[0], int) else None), shape[2]


class OrtTarget(Target):
    """ONNX Runtime on the CPU."""

    name: ClassVar[str] = "ort"
    artifact_suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    providers: ClassVar[tuple[str, ...]] = (CPU,)

    def check(self) -> None:
        runtime = require("onnxruntime", needed_by=f"target {self.name}")
        offered = runtime.get_available_providers()
        absent = [provider for provider in self.providers if provider not in offered]
        if absent:
            raise MissingDependencyError(
                f"target {self.name} needs {', '.join(absent)}; onnxruntime "
                f"{runtime.__version__} here offers {', '.join(offered)}. On an NVIDIA host run: "
                "pip uninstall onnxruntime && pip install 'ampdeploy[gpu]'"
            )

    def _open_impl(self, artifact: Path, *, threads: int | None) -> OrtRunner:
        session = open_session(artifact, threads=threads, providers=self.providers)
        # A provider that fails to start is dropped by ONNX Runtime, which then uses the CPU.
        active = session.get_providers()
        if self.providers[0] not in active:
            raise MissingDependencyError(
                f"target {self.name} asked for {self.providers[0]}, but the session of "
                f"{artifact.name} runs on {', '.join(active)}. Check the driver and the CUDA "
                "libraries with `ampdeploy doctor`."
            )
        return OrtRunner(session, name=artifact.name)


class OrtCudaTarget(OrtTarget):
    """ONNX Runtime on an NVIDIA GPU; never quietly on the CPU instead."""

    name: ClassVar[str] = "ort-cuda"
    providers: ClassVar[tuple[str, ...]] = (CUDA,)
