"""ONNX Runtime, on the CPU (`ort`) or on an NVIDIA GPU (`ort-cuda`)."""

from __future__ import annotations

import time
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
    """An ONNX file in an ONNX Runtime session. Several threads may `run` it at once."""

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
        self._wanted = list(self.output_names)
        self._computed_ns = 0
        if self.device == "cpu":
            self.compute_clock = "host: time.perf_counter_ns around ONNX Runtime's session.run"
        else:
            self.why_no_compute_clock = (
                "ONNX Runtime copies to and from the GPU inside its one call, and does not say "
                "what that took"
            )

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert self._session is not None  # `run` refuses a closed runner
        try:
            if self._timed:
                start = time.perf_counter_ns()
                values = self._session.run(self._wanted, {IMAGES: images})
                self._computed_ns = time.perf_counter_ns() - start
            else:
                values = self._session.run(self._wanted, {IMAGES: images})
        except Exception as error:
            # ONNX Runtime has no exception class of its own for running out of memory.
            if "alloc" not in str(error).lower():
                raise
            raise AmpDeployError(
                f"{self.name} ran out of memory on a batch of {len(images)}: {error}. "
                "Use a smaller batch."
            ) from error
        return dict(zip(self.output_names, values, strict=True))

    def _compute_ms(self) -> float:
        return self._computed_ns / 1e6

    def _sibling_impl(self) -> OrtRunner:
        assert self._session is not None  # `sibling` refuses a closed runner
        # A session may be run by several threads at once; its arena serves them all.
        return OrtRunner(self._session, name=self.name)

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
