"""What every runtime looks like from outside: a `Target` opens an artifact into a `Runner`.

No torch here, and no runtime either: each target's module is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ampdeploy.closing import Closing
from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError, UnknownNameError

# What a runner takes and returns is named as the tensors of the files it opens.
from ampdeploy.export.names import FEATURES as FEATURES
from ampdeploy.export.names import PATCH_FEATURES as PATCH_FEATURES
from ampdeploy.models.registry import close_matches

if TYPE_CHECKING:
    from typing_extensions import Self

# name -> (module, class); the order is that of `ampdeploy doctor`.
_TARGETS = {
    "ort": ("ampdeploy.targets.ort", "OrtTarget"),
    "ort-cuda": ("ampdeploy.targets.ort", "OrtCudaTarget"),
    "torch": ("ampdeploy.targets.torch", "TorchTarget"),
    "torch-cuda": ("ampdeploy.targets.torch", "TorchCudaTarget"),
    "trt": ("ampdeploy.targets.tensorrt", "TrtTarget"),
    "trt-rtx": ("ampdeploy.targets.tensorrt", "TrtRtxTarget"),
}

# Which target opens an artifact when nobody named one.
_TARGET_OF_SUFFIX = {".onnx": "ort", ".safetensors": "torch"}
# Every TensorRT writes files with these; engine.json, next to the file, says which one did.
ENGINE_SUFFIXES = (".plan", ".engine")


@dataclass(frozen=True, kw_only=True)
class CallTimes:
    """One call of `Runner.run` by two clocks, in milliseconds."""

    end_to_end_ms: float
    """Host memory to host memory, on the host's clock."""
    compute_ms: float | None
    """The device's part of it, by the runner's `compute_clock`; None where it has none."""


class Runner(Closing):
    """One loaded model. Owns its runtime's memory until `close`, or the end of a `with` block."""

    compute_clock: str | None = None
    """What `CallTimes.compute_ms` is, in words; None where the runtime does not tell."""
    why_no_compute_clock: str = "this runtime does not say what its device computed"
    """Where `compute_clock` is None."""

    def __init__(
        self,
        *,
        name: str,
        image_size: int,
        output_names: tuple[str, ...],
        device: str = "cpu",
        batches: tuple[int, int | None] = (1, None),
    ) -> None:
        """Describe the loaded model.

        Args:
            name: What to call it in messages, e.g. the artifact's file name.
            image_size: Side S of the square input, pixels.
            output_names: Names of what `run` returns, "features" among them.
            device: Where it computes: ``cpu`` or ``cuda``.
            batches: Smallest and largest batch that it accepts; None: no limit.
        """
        self._name = name
        self._image_size = image_size
        self._output_names = output_names
        self._device = device
        self._batches = batches
        self._closed = False
        self._timed = False  # whether `_run_impl` shall take the time of the device's part

    @property
    def name(self) -> str:
        """What to call it in messages."""
        return self._name

    @property
    def image_size(self) -> int:
        """Side of the square input, pixels."""
        return self._image_size

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs: "features", and "patch_features" where the model has them."""
        return self._output_names

    @property
    def device(self) -> str:
        """``cpu`` or ``cuda``."""
        return self._device

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Compute the features of one batch, host memory to host memory.

        Args:
            images: (B, 3, S, S) float32, C-contiguous, preprocessed as the model expects.

        Returns:
            "features" (B, C) and, where the model has them, "patch_features" (B, P, C), float32.

        Raises:
            AmpDeployError: `images` has another type, shape or memory layout, or memory ran out.
        """
        if self._closed:
            raise RuntimeError(f"{self.name} is closed; run it inside its `with` block")
        self._check(images)
        return self._run_impl(images)

    def run_timed(self, images: np.ndarray) -> CallTimes:
        """`run`, timed by both clocks at once. For one thread at a time.

        Args:
            images: As `run` takes them.

        Raises:
            AmpDeployError: As `run`.
        """
        self._timed = self.compute_clock is not None
        try:
            start = time.perf_counter_ns()
            self.run(images)
            took = time.perf_counter_ns() - start
        finally:
            self._timed = False
        # Read only now: asking a GPU for its events would count as end to end.
        compute_ms = None if self.compute_clock is None else self._compute_ms()
        return CallTimes(end_to_end_ms=took / 1e6, compute_ms=compute_ms)

    def run_all(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """`run` for any number of images: cut at the largest batch, filled up to the smallest.

        For results, not for timing: what fills a batch is computed and dropped.

        Args:
            images: (N, 3, S, S), as `run` takes them.

        Returns:
            As `run`, for all N images.

        Raises:
            AmpDeployError: As `run`.
        """
        smallest, largest = self._batches
        step = largest or max(len(images), 1)
        parts = []
        for start in range(0, max(len(images), 1), step):
            part = images[start : start + step]
            # Repeated, not zeros: the last images of a real batch are real too.
            filled = part[np.arange(max(smallest, len(part))) % len(part)] if len(part) else part
            outputs = self.run(filled if len(filled) > len(part) else part)
            parts.append({name: value[: len(part)] for name, value in outputs.items()})
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def _check(self, images: np.ndarray) -> None:
        size = self.image_size
        wanted = f"{self.name} takes C-contiguous float32 images of shape (B, 3, {size}, {size})"
        if not isinstance(images, np.ndarray):
            raise AmpDeployError(
                f"{wanted}; it was given a {type(images).__name__}. Pass a numpy array."
            )
        if images.dtype != np.float32:
            raise AmpDeployError(
                f"{wanted}; the dtype is {images.dtype}. Convert with images.astype(np.float32)."
            )
        if images.ndim != 4 or images.shape[1:] != (3, size, size) or not len(images):
            raise AmpDeployError(
                f"{wanted}; the shape is {images.shape}. Resize to {size} pixels and put the "
                "channels first, as the model's own transform does."
            )
        smallest, largest = self._batches
        if not smallest <= len(images) <= (largest or len(images)):
            sizes = f"exactly {smallest}" if smallest == largest else f"{smallest} to {largest}"
            raise AmpDeployError(
                f"{self.name} was built for batches of {sizes}; it was given {len(images)} images. "
                "Pass batches of that size, or build it with others: --engine-batch for an "
                "engine, a dynamic batch for an ONNX file."
            )
        if not images.flags.c_contiguous:
            raise AmpDeployError(
                f"{wanted}; these have strides {images.strides}. "
                "Convert with np.ascontiguousarray(images)."
            )

    @abstractmethod
    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """`run` after the checks. While `_timed` is set, it takes the time for `_compute_ms`."""

    def _compute_ms(self) -> float:
        """The device's part of the last `_run_impl`; where there is a `compute_clock`."""
        raise NotImplementedError(f"{type(self).__name__} has a compute clock and no time of it")

    def sibling(self) -> Self:
        """Another runner of the same loaded model, to be run in another thread meanwhile.

        Weights are shared; what a run needs besides is its own. Close it as any runner.

        Raises:
            AmpDeployError: There is no memory for it.
        """
        if self._closed:
            raise RuntimeError(f"{self.name} is closed; take its sibling inside its `with` block")
        return self._sibling_impl()

    def _sibling_impl(self) -> Self:
        """`sibling` of an open runner."""
        raise NotImplementedError(f"{type(self).__name__} cannot be run by several threads")

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        if not self._closed:
            self._closed = True
            self._close_impl()

    @abstractmethod
    def _close_impl(self) -> None:
        """Drop what holds memory; called once."""


class Target(ABC):
    """One runtime on one kind of device."""

    name: ClassVar[str]
    """What `--target` calls it."""
    artifact_suffixes: ClassVar[tuple[str, ...]]
    """File suffixes that it opens."""
    width_multiple: ClassVar[int]
    """Widths that are multiples of this make full use of its matrix kernels."""

    why_no_cuda_graph: ClassVar[str] = "this runtime launches no CUDA graphs"
    """Where `with_cuda_graph` gives None."""

    def with_cuda_graph(self) -> Target | None:
        """The same target, launching a whole run as one CUDA graph; None where it cannot."""
        return None

    @abstractmethod
    def check(self) -> None:
        """Import the runtime and make sure that this machine can run it.

        Raises:
            MissingDependencyError: A package, driver or device is not here.
        """

    def open(self, artifact: Path, *, threads: int | None = None) -> Runner:
        """Load an artifact.

        Args:
            artifact: A file with one of `artifact_suffixes`.
            threads: CPU threads of the runtime; None: its default.

        Raises:
            MissingDependencyError: This machine cannot run the target.
            ArtifactError: The file is missing, of another kind, or damaged.
            ConfigError: `threads` is below 1.
        """
        if threads is not None and threads < 1:
            raise ConfigError(f"threads is {threads}; it must be 1 or more.")
        if artifact.suffix not in self.artifact_suffixes:
            raise ArtifactError(
                f"target {self.name} opens {' or '.join(self.artifact_suffixes)} files, and "
                f"{artifact} is none. {_suffix_advice(artifact)}"
            )
        if not artifact.is_file():
            raise ArtifactError(f"there is no file {artifact}. Check the path, or build it first.")
        self._check_for(artifact)
        return self._open_impl(artifact, threads=threads)

    def _check_for(self, artifact: Path) -> None:
        """Make sure that this machine can run `artifact`. A target may look at the file first."""
        self.check()

    @abstractmethod
    def _open_impl(self, artifact: Path, *, threads: int | None) -> Runner:
        """`open` after the checks."""


def _suffix_advice(artifact: Path) -> str:
    if artifact.suffix in ENGINE_SUFFIXES:
        return "Use --target trt or trt-rtx for it, whichever built it."
    name = _TARGET_OF_SUFFIX.get(artifact.suffix)
    if name:
        return f"Use --target {name} for it."
    known = [f"{suffix} ({target})" for suffix, target in _TARGET_OF_SUFFIX.items()]
    known += [f"{suffix} (trt, trt-rtx)" for suffix in ENGINE_SUFFIXES]
    return f"Files that can be run: {', '.join(known)}."


def target_names() -> tuple[str, ...]:
    """Names that `get_target` knows."""
    return tuple(_TARGETS)


def get_target(name: str) -> Target:
    """The target called `name`. Its runtime is not imported yet: see `Target.check`.

    Raises:
        UnknownNameError: No such target.
    """
    if name not in _TARGETS:
        raise UnknownNameError(
            f"unknown target {name!r}.{close_matches(name, _TARGETS)} Known: {', '.join(_TARGETS)}."
        )
    module, cls = _TARGETS[name]
    target: Target = getattr(importlib.import_module(module), cls)()
    return target


def target_for(artifact: Path) -> Target:
    """The target that opens `artifact`.

    By its suffix: .onnx -> ort, .safetensors -> torch; a .plan or .engine by the ``engine.json``
    next to it, which says whose it is.

    Raises:
        ArtifactError: No target opens such files, or an engine has no ``engine.json``.
    """
    if artifact.suffix in ENGINE_SUFFIXES:
        from ampdeploy.device.engine.manifest import read_manifest

        return get_target(read_manifest(artifact).target)
    name = _TARGET_OF_SUFFIX.get(artifact.suffix)
    if name is None:
        raise ArtifactError(f"no target opens {artifact}. {_suffix_advice(artifact)}")
    return get_target(name)
