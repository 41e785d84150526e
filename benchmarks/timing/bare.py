"""An engine of TensorRT run as an application would that knows its shapes: nothing is checked.

What `ampdeploy`'s runner is compared with. Written against NVIDIA's "Running Inference"
(https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/python-api-docs.html) and
cuda-python's runtime API; every call's status is thrown away but for the errors that Python raises.
It has not been run: no machine that runs such engines was at hand.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.closing import Closing
from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.engine.manifest import read_manifest


class BareEngine(Closing):
    """Batch 1, float32 in and out."""

    def __init__(self, plan: Path) -> None:
        """Load `plan`, whose manifest says which TensorRT it is for."""
        from cuda.bindings import runtime as cudart

        self._cudart = cudart
        trt = find_flavour(read_manifest(plan).target, needed_by="a bare engine").trt
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(plan.read_bytes())
        self._context = self._engine.create_execution_context()
        _, self._stream = cudart.cudaStreamCreate()
        self._names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        shape = tuple(self._engine.get_tensor_shape(self._names[0]))
        self._context.set_input_shape(self._names[0], (1, *shape[1:]))
        self._device: dict[str, int] = {}
        self._host: dict[str, tuple[int, np.ndarray]] = {}
        for name in self._names:
            shape = tuple(self._context.get_tensor_shape(name))
            nbytes = 4 * int(np.prod(shape))
            _, self._device[name] = cudart.cudaMalloc(nbytes)
            _, address = cudart.cudaMallocHost(nbytes)
            memory = (ctypes.c_float * (nbytes // 4)).from_address(int(address))
            self._host[name] = (int(address), np.ctypeslib.as_array(memory).reshape(shape))
            self._context.set_tensor_address(name, int(self._device[name]))

    def close(self) -> None:
        """Free what was allocated."""
        cudart = self._cudart
        cudart.cudaStreamSynchronize(self._stream)
        for name in self._names:
            cudart.cudaFree(self._device[name])
            cudart.cudaFreeHost(self._host[name][0])
        cudart.cudaStreamDestroy(self._stream)

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """Features of one image (1, 3, S, S), host to host."""
        cudart, stream = self._cudart, self._stream
        given, *wanted = self._names
        address, pinned = self._host[given]
        np.copyto(pinned, images)
        to_device = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        to_host = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        cudart.cudaMemcpyAsync(self._device[given], address, pinned.nbytes, to_device, stream)
        self._context.execute_async_v3(int(stream))
        found: dict[str, Any] = {}
        for name in wanted:
            address, pinned = self._host[name]
            cudart.cudaMemcpyAsync(address, self._device[name], pinned.nbytes, to_host, stream)
            found[name] = pinned
        cudart.cudaStreamSynchronize(stream)
        return {name: values.copy() for name, values in found.items()}
