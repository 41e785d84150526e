"""CUDA through NVIDIA's own Python bindings (`cuda-python`), every status checked.

Only what a runner needs: memory on the device and pinned on the host, streams, events, graphs.
Whatever CUDA hands out is a context manager that gives it back exactly once.

Run here without a GPU: finding the bindings, and every error path of a machine without a driver.
The rest follows the documented runtime API and has been run against a recording stand-in of the
bindings, not on a GPU: https://docs.nvidia.com/cuda/cuda-runtime-api/
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
from collections.abc import Callable
from types import ModuleType, TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np

from ampdeploy.errors import AmpDeployError, MissingDependencyError
from ampdeploy.optional import available, require

if TYPE_CHECKING:
    from typing_extensions import Self

# The bindings moved in cuda-python 12.6.1; the old names are gone in 13.
# https://nvidia.github.io/cuda-python/cuda-bindings/latest/release/12.6.1-notes.html
_RUNTIME = ("cuda.bindings.runtime", "cuda.cudart")
_DRIVER = ("cuda.bindings.driver", "cuda.cuda")

# CUDA counts versions as 1000 * major + 10 * minor.
_VERSION_MAJOR, _VERSION_MINOR = 1000, 10

_OUT_OF_MEMORY = ("cudaErrorMemoryAllocation", "CUDA_ERROR_OUT_OF_MEMORY")
_NO_DEVICE = "cudaErrorNoDevice"
_DRIVER_TOO_OLD = "cudaErrorInsufficientDriver"  # also what no driver at all is called


class CudaError(AmpDeployError):
    """A call to CUDA that did not succeed; `name` is NVIDIA's name of the error."""

    def __init__(self, message: str, *, name: str) -> None:
        super().__init__(message)
        self.name = name


class CudaApi:
    """One of NVIDIA's modules, through which every call is checked."""

    def __init__(self, module: ModuleType, *, describe: str) -> None:
        """Wrap `module`; `describe` is its function that turns an error into words."""
        self.module = module
        self._describe = describe

    def call(self, function: str, *arguments: Any) -> Any:
        """Call `function` and return what it gives besides its status.

        Returns:
            None, the one value, or a tuple of several.

        Raises:
            CudaError: The status is not success.
        """
        status, *values = getattr(self.module, function)(*arguments)
        if int(status) != 0:
            name = str(getattr(status, "name", status))
            advice = " Use a smaller batch." if name in _OUT_OF_MEMORY else ""
            raise CudaError(
                f"{function} failed: {name} ({int(status)}), {self._words(status)}.{advice}",
                name=name,
            )
        if len(values) < 2:
            return values[0] if values else None
        return tuple(values)

    def _words(self, status: Any) -> str:
        error, text = getattr(self.module, self._describe)(status)
        return text.decode(errors="replace") if int(error) == 0 and text else "no description"


def version_text(version: int) -> str:
    """``12.6`` of 12060, the way CUDA counts versions."""
    return f"{version // _VERSION_MAJOR}.{version % _VERSION_MAJOR // _VERSION_MINOR}"


def driver_api(*, needed_by: str) -> CudaApi:
    """The driver API. Nothing is called yet.

    Raises:
        MissingDependencyError: cuda-python is not installed or does not load.
    """
    return CudaApi(_bindings(_DRIVER, needed_by), describe="cuGetErrorString")


def runtime_api(*, needed_by: str) -> CudaApi:
    """The runtime API. Nothing is called yet.

    Raises:
        MissingDependencyError: cuda-python is not installed or does not load.
    """
    return CudaApi(_bindings(_RUNTIME, needed_by), describe="cudaGetErrorString")


def _bindings(layouts: tuple[str, ...], needed_by: str) -> ModuleType:
    for name in layouts:
        if available(name):
            return require(name, needed_by=needed_by)
    raise MissingDependencyError(
        f"{needed_by} needs NVIDIA's package cuda-python 12.6 or newer, which is not installed "
        "here. Run: pip install 'cuda-python>=12.6' (on a driver for CUDA 12, such as JetPack 6: "
        "pip install 'cuda-python==12.*')"
    )


def open_cuda(*, needed_by: str, index: int = 0) -> CudaApi:
    """The runtime API on a machine that has a usable GPU, which becomes the current device.

    Args:
        needed_by: What the user asked for, e.g. ``"target trt"``.
        index: Which of the visible GPUs.

    Raises:
        MissingDependencyError: No cuda-python, no driver, a driver older than the bindings, or
            no such GPU.
    """
    cuda = runtime_api(needed_by=needed_by)
    try:
        count = cuda.call("cudaGetDeviceCount")
    except CudaError as error:
        raise MissingDependencyError(_why_no_gpu(cuda, error, needed_by)) from error
    if index >= count:
        raise MissingDependencyError(
            f"{needed_by} needs CUDA device {index}, and this machine shows {count}"
            f"{_visible_devices()}. Check with nvidia-smi."
        )
    cuda.call("cudaSetDevice", index)
    return cuda


def _why_no_gpu(cuda: CudaApi, error: CudaError, needed_by: str) -> str:
    needs = f"{needed_by} needs an NVIDIA GPU, and"
    if error.name == _NO_DEVICE:
        return f"{needs} the driver shows none{_visible_devices()}. Check with nvidia-smi."
    # 0 where there is no driver at all; neither call needs one.
    driver, bindings = cuda.call("cudaDriverGetVersion"), cuda.call("cudaRuntimeGetVersion")
    if driver == 0:
        return (
            f"{needs} this machine has no NVIDIA driver. Install the driver, or run it on a "
            "machine that has one."
        )
    major = driver // _VERSION_MAJOR
    if error.name == _DRIVER_TOO_OLD and major < bindings // _VERSION_MAJOR:
        return (
            f"{needs} this machine's driver is for CUDA {version_text(driver)} while the "
            f"installed cuda-python is for CUDA {version_text(bindings)}. Run: "
            f"pip install 'cuda-python=={major}.*'"
        )
    return f"{needs} CUDA does not start: {error} Check the driver with nvidia-smi."


def _visible_devices() -> str:
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    return "" if value is None else f" (CUDA_VISIBLE_DEVICES is {value!r})"


class _Owned:
    """Something that CUDA made and that must be given back exactly once."""

    give_back: str
    """Name of the runtime function that takes it back."""

    def __init__(self, cuda: CudaApi, handle: Any) -> None:
        self._cuda = cuda
        self._handle: Any = handle

    @property
    def handle(self) -> Any:
        """What the bindings call it.

        Raises:
            RuntimeError: It was given back already.
        """
        if self._handle is None:
            raise RuntimeError(f"this {type(self).__name__} is closed")
        return self._handle

    def close(self) -> None:
        """Give it back. Closing twice is allowed.

        Raises:
            CudaError: CUDA refuses, as after any earlier error that broke its context.
        """
        if self._handle is not None:
            handle, self._handle = self._handle, None
            self._cuda.call(self.give_back, handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CudaError:
            # After an illegal access every later call fails too; the first error says why.
            if exc is None:
                raise


class Stream(_Owned):
    """A queue of work that does not wait for the default stream."""

    give_back = "cudaStreamDestroy"

    def __init__(self, cuda: CudaApi) -> None:
        flag = cuda.module.cudaStreamNonBlocking
        super().__init__(cuda, cuda.call("cudaStreamCreateWithFlags", flag))
        self._address = _native_handle(self._handle)

    @property
    def address(self) -> int:
        """The stream as the number that TensorRT takes."""
        assert self.handle is not None  # refuses a closed stream
        return self._address

    def synchronize(self) -> None:
        """Wait until everything queued is done; errors of that work surface here."""
        self._cuda.call("cudaStreamSynchronize", self.handle)


def _native_handle(handle: Any) -> int:
    """The address behind one of the bindings' objects.

    ``int(handle)`` is deprecated since cuda-bindings 12.9.1, which brought the function for it:
    https://nvidia.github.io/cuda-python/cuda-bindings/latest/release/12.9.1-notes.html
    """
    if available("cuda.bindings.utils"):
        utils = require("cuda.bindings.utils", needed_by="a CUDA stream")
        if hasattr(utils, "get_cuda_native_handle"):
            return int(utils.get_cuda_native_handle(handle))
    return int(handle)


class Event(_Owned):
    """A point in a stream, with the time at which the GPU reached it."""

    give_back = "cudaEventDestroy"

    def __init__(self, cuda: CudaApi) -> None:
        super().__init__(cuda, cuda.call("cudaEventCreateWithFlags", cuda.module.cudaEventDefault))

    def record(self, stream: Stream) -> None:
        """Place it after what `stream` holds now."""
        self._cuda.call("cudaEventRecord", self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait until the GPU has reached it."""
        self._cuda.call("cudaEventSynchronize", self.handle)

    def ms_since(self, start: Event) -> float:
        """Milliseconds on the GPU from `start` to this one, both reached; resolves about 0.5 us."""
        return float(self._cuda.call("cudaEventElapsedTime", start.handle, self.handle))


class _Buffer(_Owned):
    take: str
    """Name of the runtime function that allocates it."""

    def __init__(self, cuda: CudaApi, nbytes: int) -> None:
        """Allocate `nbytes`.

        Raises:
            CudaError: The memory is not there.
        """
        if nbytes < 1:
            raise ValueError(f"{self.take} of {nbytes} bytes")
        try:
            super().__init__(cuda, cuda.call(self.take, nbytes))
        except CudaError as error:
            raise CudaError(f"cannot allocate {nbytes} bytes: {error}", name=error.name) from error
        self.nbytes = nbytes

    @property
    def address(self) -> int:
        """Address of the first byte, on the device or the host."""
        return int(self.handle)

    def check_room(self, nbytes: int) -> None:
        """Refuse to touch more than was allocated.

        Raises:
            ValueError: The buffer is smaller.
        """
        if nbytes > self.nbytes:
            raise ValueError(f"{nbytes} bytes do not fit a buffer of {self.nbytes}")


class DeviceBuffer(_Buffer):
    """Memory of the GPU."""

    take, give_back = "cudaMalloc", "cudaFree"


class PinnedBuffer(_Buffer):
    """Page-locked host memory: copies to and from the GPU need no staging."""

    take, give_back = "cudaMallocHost", "cudaFreeHost"

    def array(self, shape: tuple[int, ...]) -> np.ndarray:
        """The first bytes as float32 of `shape`, without a copy: gone when the buffer is.

        Raises:
            ValueError: The buffer is smaller.
        """
        count = math.prod(shape)
        self.check_room(count * ctypes.sizeof(ctypes.c_float))
        floats = (ctypes.c_float * count).from_address(self.address)
        return np.ctypeslib.as_array(floats).reshape(shape)


def copy_to_device(
    cuda: CudaApi, target: DeviceBuffer, source: PinnedBuffer, nbytes: int, stream: Stream
) -> None:
    """Queue a copy of the first `nbytes`, host to device."""
    _copy(cuda, target, source, nbytes, cuda.module.cudaMemcpyKind.cudaMemcpyHostToDevice, stream)


def copy_to_host(
    cuda: CudaApi, target: PinnedBuffer, source: DeviceBuffer, nbytes: int, stream: Stream
) -> None:
    """Queue a copy of the first `nbytes`, device to host."""
    _copy(cuda, target, source, nbytes, cuda.module.cudaMemcpyKind.cudaMemcpyDeviceToHost, stream)


def _copy(
    cuda: CudaApi, target: _Buffer, source: _Buffer, nbytes: int, kind: Any, stream: Stream
) -> None:
    target.check_room(nbytes)
    source.check_room(nbytes)
    cuda.call("cudaMemcpyAsync", target.address, source.address, nbytes, kind, stream.handle)


class Graph(_Owned):
    """Work that was captured once and is launched as a whole."""

    give_back = "cudaGraphExecDestroy"

    def launch(self, stream: Stream) -> None:
        """Queue all of it."""
        self._cuda.call("cudaGraphLaunch", self.handle, stream.handle)


class _Captured(_Owned):
    """What was captured, before it can be launched."""

    give_back = "cudaGraphDestroy"


def capture_graph(cuda: CudaApi, stream: Stream, work: Callable[[], None]) -> Graph:
    """Capture what `work` queues on `stream`; nothing of it is run.

    Raises:
        CudaError: Something in `work` cannot be captured.
    """
    # Thread-local: another thread may allocate meanwhile.
    mode = cuda.module.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
    cuda.call("cudaStreamBeginCapture", stream.handle, mode)
    try:
        work()
    except BaseException:
        # The stream must leave capture mode, or it could not even be destroyed.
        with contextlib.suppress(CudaError):
            _Captured(cuda, cuda.call("cudaStreamEndCapture", stream.handle)).close()
        raise
    with _Captured(cuda, cuda.call("cudaStreamEndCapture", stream.handle)) as captured:
        return Graph(cuda, cuda.call("cudaGraphInstantiate", captured.handle, 0))
