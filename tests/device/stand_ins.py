"""Recording stand-ins of NVIDIA's modules: cuda-python and TensorRT, not any part of ampdeploy.

A GPU that keeps account: memory is real host memory, a stream is a queue that only runs when it is
waited for, and everything handed out must come back exactly once. What a runner does in the wrong
order, with the wrong pointer or without waiting shows as wrong numbers.
"""

# ruff: noqa: N801, N802, N815 - functions and classes by NVIDIA's names
from __future__ import annotations

import ctypes
import enum
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import numpy as np

SIZE = 4
WIDTH = 5
PATCHES = 2
SUCCESS, INVALID, OUT_OF_MEMORY, NO_DEVICE, TOO_OLD, ILLEGAL = 0, 1, 2, 100, 35, 700


class cudaError_t(enum.IntEnum):
    cudaSuccess = SUCCESS
    cudaErrorInvalidValue = INVALID
    cudaErrorMemoryAllocation = OUT_OF_MEMORY
    cudaErrorInsufficientDriver = TOO_OLD
    cudaErrorNoDevice = NO_DEVICE
    cudaErrorIllegalAddress = ILLEGAL


class Handle:
    """What the bindings give for a stream, event or graph: an object around a number."""

    def __init__(self, number):
        self.number = number

    def __int__(self):
        raise AssertionError("int(handle) is deprecated; ask cuda.bindings.utils")


class OldHandle(Handle):
    """The same before cuda-bindings 12.9.1."""

    def __int__(self):
        return self.number


class Gpu:
    """State behind the stand-in of `cuda.bindings.runtime`."""

    def __init__(self, *, handle=Handle, driver_version=13000, bindings_version=13000):
        self.handle = handle
        self.driver_version, self.bindings_version = driver_version, bindings_version
        self.calls: list[str] = []
        self.live: dict[int, tuple[str, object]] = {}
        self.failures: dict[str, tuple[int, int]] = {}
        self.queue: list = []
        self.captured: list | None = None
        self.work_done = 0
        self._next = 1000

    def fail(self, function, status, *, at=1):
        """Let the `at`-th call from now on of `function`, and every later one, fail."""
        self.failures[function] = (at + self.calls.count(function), status)

    def drain(self):
        queue, self.queue = self.queue, []
        for work in queue:
            work()

    def submit(self, work):
        """Queue work that counts; while capturing it is only written down."""

        def counted():
            work()
            self.work_done += 1

        (self.queue if self.captured is None else self.captured).append(counted)

    def make(self, kind, content=None):
        self._next += 1
        self.live[self._next] = (kind, content)
        return self.handle(self._next)

    def number(self, handle):
        return handle.number if isinstance(handle, Handle) else int(handle)

    def take_back(self, kind, handle):
        number = self.number(handle)
        assert self.live.pop(number, (None,))[0] == kind, f"{kind} {number} was not handed out"
        return (SUCCESS,)

    def content(self, kind, handle):
        found, content = self.live[self.number(handle)]
        assert found == kind
        return content

    def memory(self, address, nbytes):
        """Check that [address, address + nbytes) is inside one live allocation."""
        for number, (kind, content) in self.live.items():
            if kind not in ("device", "pinned"):
                continue
            if number <= address and address + nbytes <= number + ctypes.sizeof(content):
                return kind
        raise AssertionError(f"{nbytes} bytes at {address} belong to nobody")

    # The runtime API, by NVIDIA's names.

    def cudaGetErrorString(self, status):
        return SUCCESS, f"words for {int(status)}".encode()

    def cudaGetDeviceCount(self):
        return SUCCESS, 1

    def cudaSetDevice(self, index):
        return (SUCCESS,)

    def cudaDeviceGetAttribute(self, key, device):
        assert (key, device) == ("integrated", 0)
        return SUCCESS, 0

    def cudaMemGetInfo(self):
        return SUCCESS, 5 << 30, 6 << 30

    def cudaDriverGetVersion(self):
        return SUCCESS, self.driver_version

    def cudaRuntimeGetVersion(self):
        return SUCCESS, self.bindings_version

    def _allocate(self, kind, nbytes):
        block = (ctypes.c_char * nbytes)(*b"\xff" * nbytes)  # NaN, as fresh memory may be anything
        address = ctypes.addressof(block)
        self.live[address] = (kind, block)
        return SUCCESS, address

    def cudaMalloc(self, nbytes):
        return self._allocate("device", nbytes)

    def cudaMallocHost(self, nbytes):
        return self._allocate("pinned", nbytes)

    def cudaFree(self, address):
        self.drain()  # waits for the GPU, as the real one
        return self.take_back("device", address)

    def cudaFreeHost(self, address):
        self.drain()
        return self.take_back("pinned", address)

    def cudaMemcpyAsync(self, target, source, nbytes, kind, stream):
        self.content("stream", stream)
        assert [self.memory(source, nbytes), self.memory(target, nbytes)] == {
            1: ["pinned", "device"], 2: ["device", "pinned"]
        }[kind]  # fmt: skip
        self.submit(lambda: ctypes.memmove(target, source, nbytes))
        return (SUCCESS,)

    def cudaStreamCreateWithFlags(self, flags):
        assert flags == 1
        return SUCCESS, self.make("stream")

    def cudaStreamDestroy(self, stream):
        return self.take_back("stream", stream)

    def cudaStreamSynchronize(self, stream):
        self.content("stream", stream)
        assert self.captured is None, "a capturing stream cannot be waited for"
        self.drain()
        return (SUCCESS,)

    def cudaEventCreateWithFlags(self, flags):
        return SUCCESS, self.make("event", {})

    def cudaEventDestroy(self, event):
        return self.take_back("event", event)

    def cudaEventRecord(self, event, stream):
        content = self.content("event", event)
        self.queue.append(lambda: content.update(at=self.work_done))
        return (SUCCESS,)

    def cudaEventSynchronize(self, event):
        self.drain()
        return (SUCCESS,)

    def cudaEventElapsedTime(self, start, end):
        """A millisecond for each copy or engine run between the two."""
        return SUCCESS, float(self.content("event", end)["at"] - self.content("event", start)["at"])

    def cudaStreamBeginCapture(self, stream, mode):
        assert not self.queue, "the run before the capture was not waited for"
        self.captured = []
        return (SUCCESS,)

    def cudaStreamEndCapture(self, stream):
        work, self.captured = self.captured, None
        self.work_done += 1  # it takes time, which must not be taken for the engine's
        return SUCCESS, self.make("graph", work)

    def cudaGraphInstantiate(self, graph, flags):
        return SUCCESS, self.make("executable", self.content("graph", graph))

    def cudaGraphDestroy(self, graph):
        return self.take_back("graph", graph)

    def cudaGraphExecDestroy(self, executable):
        return self.take_back("executable", executable)

    def cudaGraphLaunch(self, executable, stream):
        self.queue.extend(self.content("executable", executable))
        return (SUCCESS,)


def _recorded(gpu, name):
    def function(*arguments):
        gpu.calls.append(name)
        first, status = gpu.failures.get(name, (0, SUCCESS))
        if first and gpu.calls.count(name) >= first:
            if name == "cudaStreamEndCapture":
                gpu.captured = None  # a capture that went wrong is over all the same
            return (cudaError_t(status), *([None] * 3))
        status, *values = getattr(gpu, name)(*arguments)
        return (cudaError_t(status), *values)

    return function


def _module(name, **content):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    vars(module).update(content)
    return module


def runtime_module(gpu, name="cuda.bindings.runtime"):
    functions = {n: _recorded(gpu, n) for n in dir(gpu) if n.startswith("cuda")}
    return _module(
        name,
        **functions,
        cudaError_t=cudaError_t,
        cudaStreamNonBlocking=1,
        cudaEventDefault=0,
        cudaDeviceAttr=SimpleNamespace(cudaDevAttrIntegrated="integrated"),
        cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice=1, cudaMemcpyDeviceToHost=2),
        cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
    )


def install_cuda(monkeypatch, gpu):
    """Put `gpu` where the current cuda-python is looked for."""
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime_module(gpu))
    utils = _module("cuda.bindings.utils", get_cuda_native_handle=lambda handle: handle.number)
    monkeypatch.setitem(sys.modules, "cuda.bindings.utils", utils)


def install_old_cuda(monkeypatch, gpu):
    """Put `gpu` where cuda-python up to 12.6.0 has it."""
    for name in ("cuda.bindings.runtime", "cuda.bindings.driver", "cuda.bindings.utils"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", runtime_module(gpu, "cuda.cudart"))


class CUresult(enum.IntEnum):
    CUDA_SUCCESS = SUCCESS
    CUDA_ERROR_NO_DEVICE = NO_DEVICE
    CUDA_ERROR_OPERATING_SYSTEM = 304


def install_driver(monkeypatch, *, name="NVIDIA RTX A2000", capability=(8, 6), integrated=0,
                   init=SUCCESS, context=SUCCESS):  # fmt: skip
    """A driver API with one GPU; returns the list of the calls made to it."""
    calls = []
    answers = {
        "cuInit": (init,),
        "cuDeviceGetCount": (SUCCESS, 1),
        "cuDeviceGet": (SUCCESS, "device 0"),
        "cuDeviceGetName": (SUCCESS, name.encode() + b"\0" * 20),
        "cuDeviceTotalMem": (SUCCESS, 6 << 30),
        "cuDriverGetVersion": (SUCCESS, 12060),
        "cuDevicePrimaryCtxRetain": (context, "context"),
        "cuCtxPushCurrent": (SUCCESS,),
        "cuCtxPopCurrent": (SUCCESS, "context"),
        "cuDevicePrimaryCtxRelease": (SUCCESS,),
        "cuMemGetInfo": (SUCCESS, 5 << 30, 6 << 30),
        "cuGetErrorString": (SUCCESS, b"words"),
    }
    attributes = {"COMPUTE_CAPABILITY_MAJOR": capability[0],
                  "COMPUTE_CAPABILITY_MINOR": capability[1],
                  "MULTIPROCESSOR_COUNT": 26, "INTEGRATED": integrated}  # fmt: skip

    def answer(function):
        def call(*arguments):
            calls.append(function)
            status, *values = answers[function]
            return (CUresult(status), *values)

        return call

    module = _module(
        "cuda.bindings.driver",
        **{function: answer(function) for function in answers},
        cuDeviceGetAttribute=lambda key, device: (CUresult(SUCCESS), attributes[key]),
        CUdevice_attribute=SimpleNamespace(
            **{f"CU_DEVICE_ATTRIBUTE_{key}": key for key in attributes}
        ),
    )
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", module)
    return calls


class DataType(enum.Enum):
    FLOAT = 0
    HALF = 1


class TensorIOMode(enum.Enum):
    NONE = 0
    INPUT = 1
    OUTPUT = 2


class TensorLocation(enum.Enum):
    DEVICE = 0
    HOST = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    STRONGLY_TYPED = 1


class Severity(enum.Enum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self):
        pass


class TensorRt:
    """State behind the stand-in of `tensorrt` and `tensorrt_rtx`, whose engines add up images."""

    def __init__(self, gpu, *, batches=(1, 1, 3)):
        self.gpu = gpu
        self.batches = batches
        self.refuse: set[str] = set()
        """Functions that answer False or None."""
        self.stripped = False
        """Whether its plans hold no weights: such an engine puts out NaN until it is refitted."""
        self.missing: list[str] = []
        """Weights that the refitter still misses, whatever it is given."""
        self.events = gpu.calls
        self.runtimes: list = []
        self.tensors = {
            "images": (TensorIOMode.INPUT, DataType.FLOAT, (-1, 3, SIZE, SIZE)),
            "features": (TensorIOMode.OUTPUT, DataType.FLOAT, (-1, WIDTH)),
            "patch_features": (TensorIOMode.OUTPUT, DataType.FLOAT, (-1, PATCHES, WIDTH)),
        }

    def answer(self, function, value):
        self.events.append(function)
        if function not in self.refuse:
            return value
        self.logger.log(Severity.ERROR, f"why {function} failed")
        return False if value is True else None


class _Tracked:
    """Says when it is gone."""

    def __init__(self, state):
        self.state = state

    def __del__(self):
        self.state.events.append(f"del {type(self).__name__}")


class Runtime(_Tracked):
    engine_host_code_allowed = False
    max_threads = 1

    def __init__(self, state, logger):
        super().__init__(state)
        state.logger = logger
        state.seen_threads, state.seen_host_code = None, None

    def deserialize_cuda_engine(self, plan):
        self.state.plan = bytes(plan)
        self.state.seen_threads = self.max_threads
        self.state.seen_host_code = self.engine_host_code_allowed
        return self.state.answer("deserialize_cuda_engine", Engine(self.state))


class Engine(_Tracked):
    device_memory_size_v2 = 12345

    def __init__(self, state):
        super().__init__(state)
        state.has_weights = not state.stripped

    @property
    def num_io_tensors(self):
        return len(self.state.tensors)

    def get_tensor_name(self, index):
        return list(self.state.tensors)[index]

    def get_tensor_mode(self, name):
        return self.state.tensors[name][0]

    def get_tensor_dtype(self, name):
        return self.state.tensors[name][1]

    def get_tensor_shape(self, name):
        return self.state.tensors[name][2]

    def get_tensor_location(self, name):
        return TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile):
        assert (name, profile) == ("images", 0)
        return [(batch, 3, SIZE, SIZE) for batch in self.state.batches]

    def create_execution_context(self, config=None):
        self.state.context_config = config
        return self.state.answer("create_execution_context", Context(self.state))


class RtxEngine(Engine):
    def create_runtime_config(self):
        return self.state.answer("create_runtime_config", RuntimeConfig(self.state))


class Context(_Tracked):
    def __init__(self, state):
        super().__init__(state)
        self.addresses, self.shape = {}, None

    def set_tensor_address(self, name, address):
        assert self.state.gpu.memory(address, 4) == "device"
        self.addresses[name] = address
        return self.state.answer("set_tensor_address", True)

    def set_input_shape(self, name, shape):
        assert name == "images"
        assert self.state.batches[0] <= shape[0] <= self.state.batches[2]
        self.shape = shape
        return self.state.answer("set_input_shape", True)

    def get_tensor_shape(self, name):
        return (self.shape[0], *self.state.tensors[name][2][1:])

    def execute_async_v3(self, stream):
        self.state.gpu.content("stream", stream)
        shape, addresses = self.shape, dict(self.addresses)
        if self.state.answer("execute_async_v3", True):
            self.state.gpu.submit(lambda: self._compute(shape, addresses))
            return True
        return False

    def _compute(self, shape, addresses):
        images = self._array(addresses["images"], shape)
        if not self.state.has_weights:
            images = np.full_like(images, np.nan)
        for name, (mode, _, dims) in self.state.tensors.items():
            if mode is TensorIOMode.OUTPUT:
                self._array(addresses[name], (shape[0], *dims[1:]))[:] = expected(images)[name]

    def _array(self, address, shape):
        count = int(np.prod(shape))
        assert self.state.gpu.memory(address, 4 * count) == "device"
        return np.ctypeslib.as_array((ctypes.c_float * count).from_address(address)).reshape(shape)


class Refitter(_Tracked):
    """Takes any weights: telling right from wrong ones is not its job."""

    def __init__(self, state, engine, logger):
        super().__init__(state)
        assert isinstance(engine, Engine)
        self._given = None

    def get_missing_weights(self):
        return [] if self._given and not self.state.missing else self.state.missing or ["weight"]

    def refit_cuda_engine(self):
        self.state.has_weights = not self.get_missing_weights()
        return self.state.answer("refit_cuda_engine", self.state.has_weights)


class OnnxParserRefitter(_Tracked):
    num_errors = 1

    def __init__(self, state, refitter, logger):
        super().__init__(state)
        self._refitter = refitter

    def refit_from_file(self, path):
        with open(path, "rb") as file:
            self._refitter._given = file.read()
        return self.state.answer("refit_from_file", True)

    def get_error(self, index):
        return "odd shape"


def expected(images):
    """What the stand-in's engines compute."""
    sums = images.sum(axis=(1, 2, 3), dtype=np.float32)[:, None]
    features = sums + np.arange(WIDTH, dtype=np.float32)
    patches = sums[:, None] - np.arange(PATCHES * WIDTH, dtype=np.float32).reshape(PATCHES, WIDTH)
    return {"features": features, "patch_features": patches}


class RuntimeCache:
    def __init__(self, state):
        self.state, self.kernels = state, b""

    def deserialize(self, blob):
        if not blob.startswith(b"kernels"):
            return False
        self.kernels = bytes(blob)
        return True

    def serialize(self):
        return memoryview(self.kernels or b"kernels of this GPU")


class RuntimeConfig:
    dynamic_shapes_kernel_specialization_strategy = "lazy"
    cuda_graph_strategy = "disabled"

    def __init__(self, state):
        self.state = state

    def create_runtime_cache(self):
        return self.state.answer("create_runtime_cache", RuntimeCache(self.state))

    def set_runtime_cache(self, cache):
        self.cache = cache
        return self.state.answer("set_runtime_cache", True)


def install_tensorrt(monkeypatch, state, *, rtx=False, version="10.13.3.9"):
    """Put the stand-in where `tensorrt`, or `tensorrt_rtx`, is imported from."""
    from ampdeploy.device.engine import log as trt_log

    name = "tensorrt_rtx" if rtx else "tensorrt"
    runtime = type("Runtime", (Runtime,), {})
    if rtx:

        def deserialize(self, plan):
            self.state.plan = bytes(plan)
            return self.state.answer("deserialize_cuda_engine", RtxEngine(self.state))

        runtime.deserialize_cuda_engine = deserialize
    content = {
        "ComputeCapability": object,
        "DynamicShapesKernelSpecializationStrategy": SimpleNamespace(EAGER="eager"),
        "CudaGraphStrategy": SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole"),
    }
    module = _module(
        name,
        __version__=version,
        Builder=SimpleNamespace(build_serialized_network=None),
        OnnxParser=SimpleNamespace(parse_from_file=None),
        ICudaEngine=Engine,
        IExecutionContext=Context,
        ILogger=ILogger,
        Runtime=lambda logger: runtime(state, logger),
        Refitter=lambda engine, logger: Refitter(state, engine, logger),
        OnnxParserRefitter=lambda refitter, logger: OnnxParserRefitter(state, refitter, logger),
        DataType=DataType,
        TensorIOMode=TensorIOMode,
        TensorLocation=TensorLocation,
        NetworkDefinitionCreationFlag=NetworkDefinitionCreationFlag,
        **(content if rtx else {}),
    )
    monkeypatch.setitem(sys.modules, name, module)
    # TensorRT takes one logger a process, which is kept: it must not be that of another module.
    monkeypatch.delitem(trt_log._loggers, name, raising=False)
    monkeypatch.setattr(trt_log, "_loggers", dict(trt_log._loggers))
    return module
