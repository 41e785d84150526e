"""PyTorch, eager: runs a checkpoint as it is, on the GPU if there is one.

torch is imported by `check` and `open`, not with this module, so that a machine without it gets
an error that says how to install it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ampdeploy.errors import AmpDeployError
from ampdeploy.optional import require
from ampdeploy.targets.base import FEATURES, PATCH_FEATURES, Runner, Target

if TYPE_CHECKING:
    import torch

    from ampdeploy.models.vision import VisionModel


class TorchRunner(Runner):
    """A `VisionModel` in inference mode, float32."""

    def __init__(self, model: VisionModel, *, name: str, device: str) -> None:
        """Move `model` to `device` (``cpu`` or ``cuda``) and put it in eval mode."""
        names = (FEATURES, PATCH_FEATURES) if model.spec.has_patch_features else (FEATURES,)
        super().__init__(
            name=name, image_size=model.spec.image_size, output_names=names, device=device
        )
        self._model: VisionModel | None = model.eval().to(device)
        self._elapsed_ms: Callable[[], float] = lambda: 0.0  # of the last timed run
        on_gpu = self.device.startswith("cuda")
        self._stopwatch = _cuda_stopwatch if on_gpu else _host_stopwatch
        self.compute_clock = (
            "GPU: CUDA events before and after the model, images and features on the device"
            if on_gpu
            else "host: time.perf_counter_ns around the model, tensors in and out"
        )

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        import torch

        assert self._model is not None  # `run` refuses a closed runner
        try:
            with torch.inference_mode():
                batch = torch.from_numpy(images).to(self.device)
                if self._timed:
                    stop = self._stopwatch()
                    out = self._model(batch)
                    self._elapsed_ms = stop()
                else:
                    out = self._model(batch)
                result = {FEATURES: _to_numpy(out.features)}
                if out.patch_features is not None:
                    result[PATCH_FEATURES] = _to_numpy(out.patch_features)
        except torch.OutOfMemoryError as error:
            raise AmpDeployError(
                f"{self.name} ran out of GPU memory on a batch of {len(images)}: {error}. "
                "Use a smaller batch."
            ) from error
        return result

    def _compute_ms(self) -> float:
        return self._elapsed_ms()

    def _sibling_impl(self) -> TorchRunner:
        assert self._model is not None  # `sibling` refuses a closed runner
        return TorchRunner(self._model, name=self.name, device=self.device)

    def _close_impl(self) -> None:
        self._model = None


def _host_stopwatch() -> Callable[[], Callable[[], float]]:
    """Starts; stopped by a call; the result's call gives milliseconds."""
    start = time.perf_counter_ns()

    def stop() -> Callable[[], float]:
        took_ms = (time.perf_counter_ns() - start) / 1e6
        return lambda: took_ms

    return stop


def _cuda_stopwatch() -> Callable[[], Callable[[], float]]:
    """As `_host_stopwatch`, by the GPU: to be read once its work was waited for."""
    import torch

    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    events[0].record()

    def stop() -> Callable[[], float]:
        events[1].record()
        return lambda: float(events[0].elapsed_time(events[1]))

    return stop


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    array: np.ndarray = tensor.float().contiguous().cpu().numpy()
    return array


class TorchTarget(Target):
    """PyTorch on the CPU."""

    name: ClassVar[str] = "torch"
    artifact_suffixes: ClassVar[tuple[str, ...]] = (".safetensors",)
    width_multiple: ClassVar[int] = 16  # SIMD lanes
    device: ClassVar[str] = "cpu"

    def check(self) -> None:
        for module in ("torch", "timm", "safetensors"):
            require(module, needed_by=f"target {self.name}")

    def _open_impl(self, artifact: Path, *, threads: int | None) -> TorchRunner:
        import torch

        from ampdeploy.checkpoint import load_model

        if threads is not None:
            torch.set_num_threads(threads)  # for the whole process: torch has no narrower knob
        return TorchRunner(load_model(artifact), name=artifact.name, device=self.device)


class TorchCudaTarget(TorchTarget):
    """PyTorch on an NVIDIA GPU; never quietly on the CPU instead."""

    name: ClassVar[str] = "torch-cuda"
    width_multiple: ClassVar[int] = 64  # tensor core tiles
    device: ClassVar[str] = "cuda"

    def check(self) -> None:
        super().check()
        from ampdeploy.models.device import resolve_device

        resolve_device(self.device)
