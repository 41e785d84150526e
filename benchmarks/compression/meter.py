"""What a step costs: wall time, how often an image went through a block, and peak memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import sys
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

if TYPE_CHECKING:
    from typing_extensions import Self

# Between two looks at the resident size. A tensor that lives shorter than this may be missed.
SAMPLE_SECONDS = 0.005


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The cost of one step, or of several in a row."""

    seconds: float = 0.0
    block_forwards: int = 0
    """Sum over blocks of the images that went through them."""
    block_backwards: int = 0
    """The same for passes that were differentiated."""
    peak_bytes: int = 0
    """Most memory taken at once beyond what was held at the start: growth of the resident size
    on a CPU, of the allocator's peak on a GPU."""
    held_bytes: int = 0
    """What is still taken at the end: results, and what the allocator did not give back."""

    def then(self, after: Cost) -> Cost:
        """This step followed by `after`, which runs on top of what this one holds."""
        return Cost(
            seconds=self.seconds + after.seconds,
            block_forwards=self.block_forwards + after.block_forwards,
            block_backwards=self.block_backwards + after.block_backwards,
            peak_bytes=max(self.peak_bytes, self.held_bytes + after.peak_bytes),
            held_bytes=self.held_bytes + after.held_bytes,
        )


class Meter:
    """Measures the cost of a ``with`` block; `cost` is there once it has ended.

    A block forward is a call of a module of the model's block class with images (B, N, C), in
    whatever copy of the model, counted B times. One whose output requires a gradient is taken to
    be followed by one backward.
    """

    cost: Cost

    def __init__(self, block_class: type[nn.Module], device: torch.device) -> None:
        self._block_class = block_class
        self._device = device
        self._forwards = 0
        self._backwards = 0

    def _count(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, self._block_class) and isinstance(output, Tensor):
            self._forwards += len(output)
            self._backwards += len(output) * output.requires_grad

    def __enter__(self) -> Self:
        self._memory: _Memory = (
            _CudaMemory(self._device) if self._device.type == "cuda" else _ResidentMemory()
        )
        self._handle = register_module_forward_hook(self._count)
        self._start = time.perf_counter()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        seconds = time.perf_counter() - self._start
        self._handle.remove()
        peak, held = self._memory.stop()
        self.cost = Cost(
            seconds=seconds,
            block_forwards=self._forwards,
            block_backwards=self._backwards,
            peak_bytes=peak,
            held_bytes=held,
        )


class _Memory:
    def stop(self) -> tuple[int, int]:
        """(peak, still held), both beyond the start, in bytes."""
        raise NotImplementedError


class _ResidentMemory(_Memory):
    """A thread that looks at the resident size of this process."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._base = self._peak = self._settled()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _settled(self) -> int:
        """Resident size once freed memory is given back, so that it cannot hide new needs."""
        gc.collect()
        _trim()
        return int(self._process.memory_info().rss)

    def _watch(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            self._peak = max(self._peak, int(self._process.memory_info().rss))

    def stop(self) -> tuple[int, int]:
        self._peak = max(self._peak, int(self._process.memory_info().rss))
        self._stop.set()
        self._thread.join()
        return max(self._peak - self._base, 0), max(self._settled() - self._base, 0)


class _CudaMemory(_Memory):
    def __init__(self, device: torch.device) -> None:
        self._device = device
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        self._base = torch.cuda.memory_allocated(device)

    def stop(self) -> tuple[int, int]:
        peak = torch.cuda.max_memory_allocated(self._device) - self._base
        return peak, max(torch.cuda.memory_allocated(self._device) - self._base, 0)


def _trim() -> None:
    """Hand freed heap pages back to the system, where the C library can (glibc)."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(ctypes.util.find_library("c")), "malloc_trim", None)
        if trim is not None:
            trim(0)
