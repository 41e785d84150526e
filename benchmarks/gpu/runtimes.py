"""Ways that run an ONNX graph: the interpreter, ONNX Runtime, TensorRT; and what RTX says here.

Run here: the interpreter and ONNX Runtime on a CPU, and TensorRT for RTX up to the missing driver.
On a GPU they follow the runtimes' documentation.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ampdeploy.artifacts import sha256_file, write_json
from ampdeploy.config import EngineConfig, to_json
from ampdeploy.device.cuda import open_cuda
from ampdeploy.device.engine.build import build_engine
from ampdeploy.device.engine.flavour import Flavour, find_flavour
from ampdeploy.device.engine.load import LoadedEngine
from ampdeploy.device.engine.log import make_logger
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.device.engine.options import DEFAULT_COMPUTE_CAPABILITIES
from ampdeploy.device.engine.refit import data_sha256
from ampdeploy.device.install.make import engine_key, is_built
from ampdeploy.device.platform import device_facts
from ampdeploy.errors import AmpDeployError
from ampdeploy.export.names import IMAGES
from ampdeploy.export.session import CPU as CPU_PROVIDER
from ampdeploy.export.session import open_session, require_runtime
from ampdeploy.precision.compare import agreement
from ampdeploy.targets.tensorrt import TrtRtxTarget, TrtRunner, TrtTarget
from benchmarks.gpu.graphs import Graphs
from benchmarks.gpu.interpret import InterpretedGraph
from benchmarks.gpu.pairs import DENSE, Pair
from benchmarks.gpu.ways import CPU, CUDA, HOST_CLOCK, Opened, TorchOpened, Way, tensor_bytes

CUDA_PROVIDER = "CUDAExecutionProvider"
TRT_CLOCK = "GPU, one call at a time: CUDA events of the engine's own stream; no copies"
MEMORY_METHOD = (
    "how much less of the GPU's memory is free once the model is open and has run once; what other "
    "processes took meanwhile counts, too"
)


def free_bytes(device: str) -> int:
    """Free memory of the GPU; 0 on a CPU."""
    return torch.cuda.mem_get_info()[0] if device == CUDA else 0


def memory_taken(device: str, free_before: int) -> dict[str, Any]:
    """For `Opened.memory`, of a runtime that torch's allocator knows nothing of."""
    if device != CUDA:
        return {"why": "read on a GPU only"}
    taken = max(0, free_before - free_bytes(device))
    return {"taken_bytes": taken, "method": MEMORY_METHOD}


class InterpretedWay(Way):
    """The typed FP16 graph by `InterpretedGraph`: the GPU's FP16, attention not fused."""

    name = "typed-torch"
    label = "typed FP16 graph, node by node with PyTorch's kernels; on a GPU as one CUDA graph"
    typed = True

    def open(self, pair: Pair, role: str, buffers: list[np.ndarray], graphs: Graphs) -> TorchOpened:
        module = InterpretedGraph(graphs.typed(role), pair.device)
        return TorchOpened(
            module,
            buffers,
            pair.device,
            dtype=torch.float32,
            weights_bytes=tensor_bytes(module),
            graph=pair.device.type == CUDA,
        )


class OrtOpened(Opened):
    """An ONNX Runtime session with inputs and outputs bound on the device."""

    clock = HOST_CLOCK

    def __init__(self, path: Path, buffers: list[np.ndarray], device: str) -> None:
        """Open `path` on `device` (``cpu`` or ``cuda``) and nowhere else."""
        started, free = time.perf_counter(), free_bytes(device)
        provider = (CUDA_PROVIDER if device == CUDA else CPU_PROVIDER,)
        runtime = require_runtime(provider, needed_by=f"running {path.name}")
        self._device = device
        self._session = open_session(path, providers=provider)
        self._names = [output.name for output in self._session.get_outputs()]
        self._inputs = [runtime.OrtValue.ortvalue_from_numpy(b, device, 0) for b in buffers]
        self.time(0)
        self.prepare_s = time.perf_counter() - started
        self.memory = memory_taken(device, free)

    def time(self, buffer: int) -> float:
        binding = self._session.io_binding()
        binding.bind_ortvalue_input(IMAGES, self._inputs[buffer])
        for name in self._names:
            binding.bind_output(name, self._device, 0)
        start = time.perf_counter_ns()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return (time.perf_counter_ns() - start) / 1e6

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        found = self._session.run(self._names, {IMAGES: images})
        return dict(zip(self._names, found, strict=True))

    def close(self) -> None:
        del self._session, self._inputs


class OrtWay(Way):
    """ONNX Runtime on the device's own provider."""

    def __init__(self, name: str, label: str, *, device: str, typed: bool) -> None:
        """`typed`: the typed FP16 graph; else the float32 one, as exported."""
        self.name, self.label, self.devices, self.typed = name, label, (device,), typed

    def absent(self) -> str | None:
        provider = CUDA_PROVIDER if CUDA in self.devices else CPU_PROVIDER
        try:
            require_runtime((provider,), needed_by=self.name)
        except AmpDeployError as error:
            return str(error)
        return None

    def open(self, pair: Pair, role: str, buffers: list[np.ndarray], graphs: Graphs) -> OrtOpened:
        path = graphs.typed(role) if self.typed else graphs.float32(role)
        return OrtOpened(path, buffers, self.devices[0])


class TrtOpened(Opened):
    """An engine in ampdeploy's own runner."""

    clock = TRT_CLOCK

    def __init__(self, target: TrtTarget, plan: Path, buffers: list[np.ndarray]) -> None:
        """Open `plan` and run it once."""
        started, free = time.perf_counter(), free_bytes(CUDA)
        runner = target.open(plan)
        assert isinstance(runner, TrtRunner)
        self._runner, self._buffers = runner, buffers
        self.time(0)
        self.prepare_s = time.perf_counter() - started
        self.memory = {
            "activation_bytes": runner.activation_bytes,
            **memory_taken(CUDA, free),
        }

    def time(self, buffer: int) -> float:
        self._runner.upload(self._buffers[buffer])
        return self._runner.run_device()

    def features(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self._runner.run(images)

    def close(self) -> None:
        self._runner.close()


class TrtWay(Way):
    """The typed FP16 graph through ampdeploy's builder and runner, as one CUDA graph."""

    devices = (CUDA,)
    typed = True

    def __init__(self, target: str, batches: tuple[int, ...]) -> None:
        """`batches`: those of the rows; one engine serves them all."""
        self.name = target
        self.label = f"typed FP16 graph, --target {target}, as one CUDA graph"
        self._config = engine_config(batches)

    def absent(self) -> str | None:
        try:
            self._target().check()
        except AmpDeployError as error:
            return str(error)
        return None

    def _target(self) -> TrtTarget:
        return (TrtTarget if self.name == "trt" else TrtRtxTarget)(cuda_graph=True)

    def open(self, pair: Pair, role: str, buffers: list[np.ndarray], graphs: Graphs) -> TrtOpened:
        return TrtOpened(self._target(), self.engine(pair, role, graphs), buffers)

    @functools.cached_property
    def identity(self) -> dict[str, str] | None:
        """What engines of one graph, and so their rows, differ by; None without this TensorRT."""
        try:
            return self._key([])
        except AmpDeployError:
            return None

    def _key(self, onnx: list[str]) -> dict[str, str]:
        flavour = find_flavour(self.name, needed_by=f"--ways {self.name}")
        return engine_key(flavour, device_facts(), onnx=onnx, options=to_json(self._config))

    def engine(self, pair: Pair, role: str, graphs: Graphs) -> Path:
        """The plan: of an earlier row or call if it would come out the same, else built now.

        Raises:
            AmpDeployError: As `build_engine`.
        """
        onnx = graphs.typed(role)
        plan = onnx.with_name(f"{role}.{self.name}.plan")
        record = plan.with_suffix(".key.json")
        key = self._key([sha256_file(onnx), data_sha256(onnx) or ""])
        if not is_built(plan, record, key):
            record.unlink(missing_ok=True)
            build(graphs, pair, role, plan, target=self.name, config=self._config)
            write_json(record, key)
        return plan


def engine_config(batches: tuple[int, ...], **options: Any) -> EngineConfig:
    """One engine for all of `batches`, tuned for the middle one."""
    ordered = sorted(batches)
    return EngineConfig(batch=(ordered[0], ordered[len(ordered) // 2], ordered[-1]), **options)


def build(
    graphs: Graphs, pair: Pair, role: str, plan: Path, *, target: str, config: EngineConfig
) -> None:
    """Build an engine of the typed graph.

    Raises:
        AmpDeployError: As `build_engine`.
    """
    build_engine(
        graphs.typed(role),
        plan,
        target=target,
        config=config,
        model=pair.name,
        image_size=pair.images.shape[-1],
        precision="fp16",
        verdict=graphs.verdict(role),
    )


def probe_rtx(load_pair: Callable[[], tuple[Pair, Graphs]], batch: int) -> list[dict[str, Any]]:
    """What TensorRT for RTX says on this machine, step by step.

    Hopper is not on NVIDIA's list of GPUs for it. Besides an engine for this GPU, one for all GPUs
    on the list is tried, and handed to the runtime without asking its manifest first: what counts
    here is NVIDIA's own answer. An unsupported GPU might end the process, so this comes last.

    Args:
        load_pair: Called only where TensorRT for RTX can be imported.
        batch: Images per call of the engines.

    Returns:
        Per step what was tried, whether it worked, and what was said.
    """
    steps: list[dict[str, Any]] = []

    def attempt(step: str, action: Callable[[], tuple[str, Any]]) -> Any:
        try:
            said, found = action()
        except Exception as error:
            steps.append({"step": step, "ok": False, "said": f"{type(error).__name__}: {error}"})
            return None
        steps.append({"step": step, "ok": found is not None, "said": said})
        return found

    def find() -> tuple[str, Flavour]:
        flavour = find_flavour("trt-rtx", needed_by="this probe")
        return flavour.version, flavour

    flavour = attempt("import", find)
    if flavour is None:
        return steps
    pair, graphs = load_pair()
    here = device_facts()
    own = engine_config((batch,))
    listed = dataclasses.replace(own, compute_capabilities=DEFAULT_COMPUTE_CAPABILITIES)
    for name, config in (("this GPU", own), ("the GPUs that NVIDIA lists", listed)):
        plan = graphs.folder / f"probe-{len(steps)}.plan"

        def make(plan: Path = plan, config: EngineConfig = config) -> tuple[str, Path]:
            build(graphs, pair, DENSE, plan, target="trt-rtx", config=config)
            capabilities = ", ".join(read_manifest(plan).compute_capabilities)
            return f"{plan.stat().st_size} bytes, for compute capability {capabilities}", plan

        def load(plan: Path = plan) -> tuple[str, Any]:
            logger = make_logger(flavour.trt)
            engine = flavour.trt.Runtime(logger).deserialize_cuda_engine(plan.read_bytes())
            return "loaded" if engine is not None else logger.explain(), engine

        def run(plan: Path = plan) -> tuple[str, Any]:
            return "ran", _run_unchecked(pair, plan, flavour, batch)

        where = here.compute_capability or here.problem
        if attempt(f"build for {name} (here: {where})", make) is None:
            continue
        if attempt(f"load the engine for {name}", load) is None:
            continue
        found = attempt(f"run the engine for {name}", run)
        if found is not None:
            steps[-1]["agreement"] = found
    return steps


def _run_unchecked(pair: Pair, plan: Path, flavour: Flavour, batch: int) -> dict[str, Any]:
    """Agreement with PyTorch of an engine that may not be meant for this GPU."""
    cuda = open_cuda(needed_by="this probe")
    loaded = LoadedEngine(plan, read_manifest(plan), flavour)
    with TrtRunner(loaded, cuda=cuda, name=plan.name) as runner:
        found = runner.run(np.ascontiguousarray(pair.images[:batch]))
    return {
        name: dataclasses.asdict(agreement(value, pair.references[DENSE][name][:batch]))
        for name, value in found.items()
    }


def ort_ways() -> list[Way]:
    """ONNX Runtime: typed FP16 on CUDA; float32 where there is only a CPU, to try the code."""
    return [
        OrtWay("ort-cuda", "typed FP16 graph, ONNX Runtime CUDA", device=CUDA, typed=True),
        OrtWay("ort-cpu", "float32 graph, ONNX Runtime CPU", device=CPU, typed=False),
    ]
