"""ONNX Runtime, on the CPU (`ort`) or on an NVIDIA GPU (`ort-cuda`)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.export.names import FEATURES, IMAGES, OUTPUTS
from ampdeploy.export.session import CPU, image_input, open_session, require_runtime
from ampdeploy.targets.base import Runner, Target

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"


class OrtRunner(Runner):
    """An ONNX file in an ONNX Runtime session."""

    def __init__(self, session: onnxruntime.InferenceSession, *, name: str) -> None:
        """Check the graph's signature and take over `session`.

        Raises:
            ArtifactError: Inputs or outputs are not those of an ampdeploy export.
        """
        takes = image_input(session, name)
        found = [output.name for output in session.get_outputs()]
        if FEATURES not in found:
            raise ArtifactError(
                f"{name} has the outputs {found}; one must be named {FEATURES!r}. Export the "
                "model with `ampdeploy export`."
            )
        super().__init__(
            name=name,
            image_size=takes.size,
            output_names=tuple(n for n in OUTPUTS if n in found),
            device="cuda" if CUDA in session.get_providers() else "cpu",
            batches=(takes.batch or 1, takes.batch),
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


class OrtTarget(Target):
    """ONNX Runtime on the CPU."""

    name: ClassVar[str] = "ort"
    artifact_suffixes: ClassVar[tuple[str, ...]] = (".onnx",)
    width_multiple: ClassVar[int] = 16  # SIMD lanes
    providers: ClassVar[tuple[str, ...]] = (CPU,)

    def check(self) -> None:
        require_runtime(self.providers, needed_by=f"target {self.name}")

    def _open_impl(self, artifact: Path, *, threads: int | None) -> OrtRunner:
        session = open_session(artifact, threads=threads, providers=self.providers)
        return OrtRunner(session, name=artifact.name)


class OrtCudaTarget(OrtTarget):
    """ONNX Runtime on an NVIDIA GPU; never quietly on the CPU instead."""

    name: ClassVar[str] = "ort-cuda"
    width_multiple: ClassVar[int] = 64  # tensor core tiles
    providers: ClassVar[tuple[str, ...]] = (CUDA,)
