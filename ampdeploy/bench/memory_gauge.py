"""How much memory a GPU has left, before and after a model is opened."""

from __future__ import annotations

from dataclasses import dataclass

import psutil

from ampdeploy.device.cuda import CudaApi, open_cuda


@dataclass(frozen=True, kw_only=True)
class Gauge:
    """Free memory of the first GPU, all processes together."""

    cuda: CudaApi
    shared: bool
    """Jetson: the GPU works in the host's memory."""

    def free_bytes(self) -> int:
        """Of the GPU; where memory is shared, what the host could still give (MemAvailable).

        On Tegra, CUDA's own figure leaves out what the kernel can reclaim from its caches:
        https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/ (memory management).

        Raises:
            CudaError: The context is broken.
        """
        if self.shared:
            return int(psutil.virtual_memory().available)
        free, _ = self.cuda.call("cudaMemGetInfo")
        return int(free)


def open_gauge(*, needed_by: str) -> Gauge:
    """Start CUDA in this process, so that its context is not counted as part of a model.

    Raises:
        MissingDependencyError: No cuda-python, no driver or no GPU.
        CudaError: The GPU does not answer.
    """
    cuda = open_cuda(needed_by=needed_by)
    shared = cuda.call(
        "cudaDeviceGetAttribute", cuda.module.cudaDeviceAttr.cudaDevAttrIntegrated, 0
    )
    cuda.call("cudaMemGetInfo")  # the first call makes the context
    return Gauge(cuda=cuda, shared=bool(shared))
