"""A machine with an RTX GPU, as far as ampdeploy can tell: `ampdeploy` in a process of its own.

NVIDIA's modules are stand-ins there, no part of ampdeploy is. TensorRT for RTX parses and builds
for real. What takes a GPU is done by hand: CUDA's memory and streams by `tests.device.stand_ins`,
and a plan is "run" by ONNX Runtime, on the graph that it was built from.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np

from tests.device import stand_ins as nvidia

FOLDER, CAPABILITY, FAULT = "STAND_IN_FOLDER", "STAND_IN_CAPABILITY", "STAND_IN_FAULT"
# What is wrong with its TensorRT, in every engine alike.
MIXED_UP = "images of a batch are mixed up"
NO_MEMORY = "no memory to run what was built"
REPOSITORY = Path(__file__).resolve().parent.parent


def run(
    folder: Path, command: list[str], *, capability: str = "8.6", fault: str = ""
) -> subprocess.CompletedProcess[str]:
    """Run `ampdeploy` on such a machine.

    Args:
        folder: Where the stand-in keeps what it knows of plans, for other processes.
        command: Verb and options.
        capability: Of the GPU.
        fault: `MIXED_UP` or `NO_MEMORY`.
    """
    start = folder / "start"
    start.mkdir(parents=True, exist_ok=True)
    (start / "sitecustomize.py").write_text("from tests.gpu import put_in\nput_in()\n")
    environment = {
        **os.environ,
        FOLDER: str(folder),
        CAPABILITY: capability,
        FAULT: fault,
        "AMPDEPLOY_CACHE": str(folder / "cache"),
        "PYTHONPATH": f"{start}{os.pathsep}{REPOSITORY}",
    }
    return subprocess.run(
        [sys.executable, "-m", "ampdeploy", *command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def put_in() -> None:
    """Put the stand-ins where NVIDIA's modules are imported from. For this whole process."""
    import pytest

    monkeypatch = pytest.MonkeyPatch()
    major, minor = os.environ[CAPABILITY].split(".")
    gpu = nvidia.Gpu()
    nvidia.install_cuda(monkeypatch, gpu)
    nvidia.install_driver(monkeypatch, capability=(int(major), int(minor)))
    sys.modules["tensorrt_rtx"] = _tensorrt_rtx(gpu, Path(os.environ[FOLDER]))


def _tensorrt_rtx(gpu: nvidia.Gpu, folder: Path) -> ModuleType:
    """The real module with another runtime."""
    import tensorrt_rtx as real

    parsed: list[str] = []

    class OnnxParser(real.OnnxParser):
        def parse_from_file(self, path):
            parsed.append(path)
            return super().parse_from_file(path)

    class Builder(real.Builder):
        def create_optimization_profile(self):
            self.profile = super().create_optimization_profile()
            return self.profile

        def build_serialized_network(self, network, config):
            blob = super().build_serialized_network(network, config)
            if blob is not None:
                name = hashlib.sha256(memoryview(blob)).hexdigest()
                shutil.copy(parsed[-1], folder / f"{name}.onnx")
                batches = [shape[0] for shape in self.profile.get_shape("images")]
                (folder / f"{name}.json").write_text(json.dumps(batches))
            return blob

    class Runtime:
        max_threads = 1
        engine_host_code_allowed = False

        def __init__(self, logger):
            pass

        def deserialize_cuda_engine(self, plan):
            name = hashlib.sha256(memoryview(plan)).hexdigest()
            return Engine(_state(gpu, real, folder / name))

    module = ModuleType("tensorrt_rtx")
    vars(module).update(vars(real))
    module.OnnxParser, module.Builder, module.Runtime = OnnxParser, Builder, Runtime
    return module


def _state(gpu: nvidia.Gpu, trt: ModuleType, path: Path) -> nvidia.TensorRt:
    """What one engine knows."""
    import onnxruntime

    batches = json.loads(path.with_suffix(".json").read_text())
    state = nvidia.TensorRt(gpu, batches=tuple(batches))
    state.trt = trt
    # As the project runs it: typed graphs have their casts where they are meant to be.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.intra_op_num_threads = 1
    state.session = onnxruntime.InferenceSession(f"{path}.onnx", options)
    io = trt.TensorIOMode
    state.tensors = {
        value.name: (mode, trt.DataType.FLOAT, (-1, *value.shape[1:]))
        for mode, values in (
            (io.INPUT, state.session.get_inputs()),
            (io.OUTPUT, state.session.get_outputs()),
        )
        for value in values
    }
    return state


class Engine(nvidia.RtxEngine):
    def get_tensor_location(self, name):
        return self.state.trt.TensorLocation.DEVICE

    def get_tensor_profile_shape(self, name, profile):
        dims = self.state.tensors[name][2][1:]
        return [(batch, *dims) for batch in self.state.batches]

    def create_execution_context(self, config=None):
        # The builder's inspection asks without a configuration, and takes no activations.
        no_memory = os.environ[FAULT] == NO_MEMORY and config is not None
        return None if no_memory else Context(self.state)

    def create_engine_inspector(self):
        return self

    def get_engine_information(self, kind):
        return json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Half"}]}]})


class Context(nvidia.Context):
    def _compute(self, shape, addresses):
        images = self._array(addresses["images"], shape)
        session = self.state.session
        names = [value.name for value in session.get_outputs()]
        for name, right in zip(names, session.run(names, {"images": images}), strict=True):
            said = np.roll(right, 1, axis=0) if os.environ[FAULT] == MIXED_UP else right
            self._array(addresses[name], right.shape)[:] = said
