"""What a way of running a model looks like, and the ways of PyTorch.

Every way is given the same float32 images, which lie on the device when the clock starts; a way
that computes in FP16 casts them inside the call. Features stay on the device in its own type.

Run here: everything on a CPU. Events, graphs, memory and compilation to GPU code need a GPU and
follow torch's documentation; that the blocks trace as a whole is tested without one.
"""

from __future__ import annotations

import copy
import gc
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ampdeploy.closing import Closing
from ampdeploy.export.names import OUTPUTS
from ampdeploy.models.vision import VisionModel

if TYPE_CHECKING:
    from benchmarks.gpu.graphs import Graphs
    from benchmarks.gpu.pairs import Pair

CPU, CUDA = "cpu", "cuda"
EVENT_CLOCK = (
    "GPU, one call at a time: CUDA events before and after a call whose images lie on the device; "
    "no copies; where the GPU waits for the host to launch, that counts"
)
HOST_CLOCK = "host: time.perf_counter_ns around one call whose images lie on the device"
END_TO_END_CLOCK = (
    "end to end: pageable host memory to host memory, one call at a time (time.perf_counter_ns)"
)
GRAPH_WARMUP = 3  # runs on a side stream before a capture, as torch's documentation asks

Function = Callable[[Tensor], Sequence[Tensor | None]]
"""Images (B, 3, S, S) on the device -> features, and patch features where there are any."""


class Opened(Closing):
    """One model, ready for one batch size, with its input buffers. Use in a `with` block."""

    clock: str
    """What `time` measures, in words."""
    prepare_s: float
    """Seconds of what is done once: loading, first calls, compilation, capture."""
    memory: dict[str, Any]
    """Bytes on the device, and how they were found out; or why they are not known."""

    @abstractmethod
    def time(self, buffer: int) -> float:
        """Milliseconds of one call on the input buffer of that number."""

    @abstractmethod
    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """(B, 3, S, S) float32 to float32 features by name, host to host; B is fixed."""

    @abstractmethod
    def close(self) -> None:
        """Free what it holds."""


class Way(ABC):
    """One way to run a model."""

    name: str
    label: str
    devices: tuple[str, ...] = (CPU, CUDA)
    tf32: bool = False
    compiles: bool = False
    """Preparing it takes minutes for a large model, so it comes last and is bounded."""
    typed: bool = False
    """Runs the typed FP16 graph, which is made for some models only."""

    def absent(self) -> str | None:
        """Why this machine cannot run it at all; None: it can."""
        return None

    def begin(self) -> None:
        """Called once before the two models of a row are opened."""
        if self.compiles:
            # The compiled code of earlier rows counts towards torch's limit of recompilations.
            torch.compiler.reset()

    @abstractmethod
    def open(self, pair: Pair, role: str, buffers: list[np.ndarray], graphs: Graphs) -> Opened:
        """Prepare one of the pair's models for batches of the buffers' size."""


def synchronise(device: torch.device) -> None:
    """Wait for the GPU; nothing to wait for on a CPU."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)


def release(device: torch.device) -> None:
    """Give cached memory back, so that the next measurement starts from what is in use."""
    gc.collect()
    if device.type == CUDA:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


class _Graphed:
    """A function captured as one CUDA graph; images are copied into its input, as any user must."""

    def __init__(self, function: Function, images: Tensor, dtype: torch.dtype) -> None:
        # A graph replays addresses and keeps none of them alive: without this, the weights of a
        # model that nobody else holds are freed, and replaying reads whatever is there then.
        self._function = function
        self._input = images.to(dtype, copy=True)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(GRAPH_WARMUP):
                function(self._input)
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(self._input)

    def __call__(self, images: Tensor) -> Sequence[Tensor | None]:
        self._input.copy_(images)  # also the cast
        self._graph.replay()
        return self._output


class TorchOpened(Opened):
    """A function of torch with its buffers on the device."""

    def __init__(
        self,
        function: Function,
        buffers: list[np.ndarray],
        device: torch.device,
        *,
        dtype: torch.dtype,
        weights_bytes: int,
        graph: bool,
    ) -> None:
        """Run `function` until its kernels are chosen, and capture it if asked to.

        Args:
            function: Takes images of `dtype`.
            buffers: Batches of one size, float32.
            device: Where `function` computes.
            dtype: What the images are cast to, inside the call.
            weights_bytes: Of the model, for `memory`.
            graph: Capture the call as a CUDA graph.
        """
        self._device = device
        self._buffers = [torch.from_numpy(buffer).to(device) for buffer in buffers]
        self.clock = EVENT_CLOCK if device.type == CUDA else HOST_CLOCK
        if device.type == CUDA:
            self._start = torch.cuda.Event(enable_timing=True)
            self._end = torch.cuda.Event(enable_timing=True)
        release(device)
        held = _reserved(device)
        started = time.perf_counter()
        with torch.no_grad():
            function(self._buffers[0].to(dtype))
            synchronise(device)
            if graph:
                self._call: Function = _Graphed(function, self._buffers[0], dtype)
            else:
                self._call = lambda images: function(images.to(dtype))
            self._call(self._buffers[0])
            synchronise(device)
        self.prepare_s = time.perf_counter() - started
        release(device)
        self.memory = self._measure_memory(weights_bytes, _reserved(device) - held)

    def time(self, buffer: int) -> float:
        images = self._buffers[buffer]
        with torch.no_grad():
            if self._device.type != CUDA:
                start = time.perf_counter_ns()
                self._call(images)
                return (time.perf_counter_ns() - start) / 1e6
            self._start.record()
            self._call(images)
            self._end.record()
            self._end.synchronize()
            return float(self._start.elapsed_time(self._end))

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with torch.no_grad():
            found = self._call(torch.from_numpy(images).to(self._device))
            return {
                name: value.float().cpu().numpy()
                for name, value in zip(OUTPUTS, found, strict=False)
                if value is not None
            }

    def close(self) -> None:
        del self._call, self._buffers
        release(self._device)

    def _measure_memory(self, weights_bytes: int, held: int) -> dict[str, Any]:
        if self._device.type != CUDA:
            return {"weights_bytes": weights_bytes, "why": "the rest is read on a GPU only"}
        before = torch.cuda.memory_allocated(self._device)
        torch.cuda.reset_peak_memory_stats(self._device)
        with torch.no_grad():
            self._call(self._buffers[0])
        synchronise(self._device)
        call = torch.cuda.max_memory_allocated(self._device) - before
        release(self._device)
        return {
            "weights_bytes": weights_bytes,
            "held_bytes": max(0, held),
            "call_bytes": call,
            "peak_bytes": weights_bytes + max(0, held) + call,
            "method": (
                "torch's allocator: weights, what stays reserved between calls (a graph's pool, "
                "cuBLAS workspaces) and what one call adds; without the CUDA context"
            ),
        }


def _reserved(device: torch.device) -> int:
    return torch.cuda.memory_reserved(device) if device.type == CUDA else 0


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of parameters and buffers."""
    return sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])


def compile_blocks(model: VisionModel, **options: Any) -> VisionModel:
    """Compile every transformer block in place; blocks of one shape share the compiled code.

    The whole model as one graph would be compiled block by block all the same, in minutes instead
    of seconds for the 40 blocks of DINOv2-g. `fullgraph` makes a fall back to eager an error.
    """
    for block in model.blocks:
        block.compile(fullgraph=True, dynamic=False, **options)
    return model


class TorchWay(Way):
    """The model as it is, or its `half()`; eager, captured as a CUDA graph, or compiled too."""

    def __init__(
        self,
        name: str,
        label: str,
        *,
        half: bool = False,
        tf32: bool = False,
        graph: bool = False,
        compile_mode: str | None = None,
        devices: tuple[str, ...] = (CUDA,),
    ) -> None:
        """See `Way`; `compile_mode` is torch.compile's, None: not compiled."""
        self.name, self.label, self.devices, self.tf32 = name, label, devices, tf32
        self.compiles = compile_mode is not None
        self._dtype = torch.float16 if half else torch.float32
        self._graph, self._mode = graph, compile_mode

    def open(self, pair: Pair, role: str, buffers: list[np.ndarray], graphs: Graphs) -> TorchOpened:
        model = pair.models[role]
        if self._dtype != torch.float32 or self.compiles:
            model = copy.deepcopy(model).to(self._dtype)
        if self.compiles:
            compile_blocks(model, mode=self._mode)
        return TorchOpened(
            model,
            buffers,
            pair.device,
            dtype=self._dtype,
            weights_bytes=tensor_bytes(model),
            graph=self._graph,
        )
