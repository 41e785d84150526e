"""TensorRT engines: `trt` (TensorRT 10 and 11) and `trt-rtx` (TensorRT for RTX), one code path.

An engine fits one kind of GPU, operating system and TensorRT, and the runtime that is given
another one says little or crashes. So `engine.json`, next to the plan, is compared with this
machine first, and only a plan that belongs here is handed to TensorRT.

Run here: every refusal of a machine without GPU, with engines that TensorRT-RTX really built.
Running an engine follows the documented API and has been done against recording stand-ins of
NVIDIA's modules (order of calls, pointers, freeing), not on a GPU.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import numpy as np

from ampdeploy.device import cuda as cu
from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.engine.load import EngineTensor, LoadedEngine
from ampdeploy.device.engine.manifest import (
    EngineManifest,
    check_fits,
    check_plan_file,
    read_manifest,
)
from ampdeploy.device.engine.monitor import run_aside
from ampdeploy.device.engine.refit import check_weights
from ampdeploy.device.platform import DeviceFacts, device_facts
from ampdeploy.errors import AmpDeployError, MissingDependencyError
from ampdeploy.export.names import IMAGES, OUTPUTS
from ampdeploy.targets.base import Runner, Target


class TrtRunner(Runner):
    """An engine on the GPU, with its own stream and buffers for its largest batch.

    `run` is host to host. `upload`, `run_device` and `download` are its three parts, so that a
    benchmark can time the GPU apart from the copies.
    """

    compute_clock = (
        "GPU: CUDA events around the engine, images and features on the device; where the GPU "
        "waits for the host to launch, that counts"
    )

    def __init__(self, loaded: LoadedEngine, *, cuda: cu.CudaApi, name: str) -> None:
        """Take over `loaded`, and allocate on the GPU what running it takes.

        Args:
            loaded: Engine and context; closed by this runner, also when this fails.
            cuda: The runtime API, its device chosen.
            name: What to call it in messages.

        Raises:
            ArtifactError: Inputs or outputs are not those of an ampdeploy export.
            CudaError: The GPU has too little memory.
        """
        with ExitStack() as resources:
            resources.enter_context(loaded)
            tensors = loaded.tensors(name)
            self._images = next(tensor for tensor in tensors if tensor.is_input)
            self._outputs = [tensor for tensor in tensors if not tensor.is_input]
            found = {tensor.name for tensor in self._outputs}
            self._batch_range = loaded.batch_range()
            super().__init__(
                name=name,
                image_size=self._images.shape[-1],
                output_names=tuple(n for n in OUTPUTS if n in found),
                device="cuda",
                batches=(self._batch_range[0], self._batch_range[-1]),
            )
            self._loaded = loaded
            self._cuda = cuda
            self._batch = 0  # of the shapes that the context has now; 0: none yet
            self._computed = False  # the outputs on the device are those of the last upload
            self._graph: cu.Graph | None = None
            self._failed = False
            self._allocate(tensors, resources)
            self._resources = resources.pop_all()

    def _allocate(self, tensors: list[EngineTensor], resources: ExitStack) -> None:
        self._stream = resources.enter_context(cu.Stream(self._cuda))
        self._start = resources.enter_context(cu.Event(self._cuda))
        self._end = resources.enter_context(cu.Event(self._cuda))
        self._on_device: dict[str, cu.DeviceBuffer] = {}
        self._on_host: dict[str, cu.PinnedBuffer] = {}
        for tensor in tensors:
            nbytes = tensor.nbytes(self._batch_range[-1])
            device = resources.enter_context(cu.DeviceBuffer(self._cuda, nbytes))
            host = resources.enter_context(cu.PinnedBuffer(self._cuda, nbytes))
            self._on_device[tensor.name], self._on_host[tensor.name] = device, host
            if not self._loaded.context.set_tensor_address(tensor.name, device.address):
                raise self._refused(f"set_tensor_address of {tensor.name!r}")
        resources.callback(self._forget_graph)  # last in, so first to go

    @property
    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch of the engine's profile."""
        return self._batch_range

    @property
    def loaded(self) -> LoadedEngine:
        """The engine and its context, to profile and inspect."""
        return self._loaded

    @property
    def activation_bytes(self) -> int | None:
        """GPU memory that the context takes for activations; None where TensorRT does not say."""
        size = getattr(self._loaded.engine, "device_memory_size_v2", None)
        return None if size is None else int(size)

    def upload(self, images: np.ndarray) -> None:
        """Put a batch on the device, and wait until it is there.

        Args:
            images: As `run` takes them.

        Raises:
            AmpDeployError: As `run`.
        """
        self._require_open()
        self._check(images)
        with self._remember_failure():
            self._upload(images)
            self._stream.synchronize()

    def run_device(self) -> float:
        """Compute on what was uploaded last, leaving the features on the device.

        The first call with a new batch size includes work that later ones do not: TensorRT-RTX
        compiles kernels for it. Capturing the CUDA graph is not timed.

        Returns:
            Milliseconds on the GPU by CUDA events, without copies.
        """
        self._require_open()
        if not self._batch:
            raise RuntimeError(f"{self.name} has no images on the device; call `upload` first")
        with self._remember_failure():
            return self._run_timed()

    def download(self) -> dict[str, np.ndarray]:
        """Features of the batch that `run_device` computed last, as `run` returns them."""
        self._require_open()
        if not self._computed:
            raise RuntimeError(f"{self.name} has computed nothing yet; call `run_device` first")
        with self._remember_failure():
            return self._download()

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        with self._remember_failure():
            self._upload(images)
            if self._timed:
                self._execute_between_events()
            else:
                self._execute()
            return self._download()

    def _compute_ms(self) -> float:
        # `_download` has waited for both events.
        with self._remember_failure():
            return self._end.ms_since(self._start)

    def _sibling_impl(self) -> TrtRunner:
        return TrtRunner(_with_own_context(self._loaded), cuda=self._cuda, name=self.name)

    def _require_open(self) -> None:
        if self._closed:
            raise RuntimeError(f"{self.name} is closed; run it inside its `with` block")

    @contextlib.contextmanager
    def _remember_failure(self) -> Iterator[None]:
        """Name the engine in CUDA's errors; `close` must know of any, see there."""
        try:
            yield
        except cu.CudaError as error:
            self._failed = True
            raise cu.CudaError(f"{self.name}: {error}", name=error.name) from error
        except BaseException:
            self._failed = True
            raise

    def _upload(self, images: np.ndarray) -> None:
        self._computed = False
        self._set_batch(len(images))
        pinned = self._on_host[IMAGES]
        np.copyto(pinned.array(images.shape), images)
        cu.copy_to_device(self._cuda, self._on_device[IMAGES], pinned, images.nbytes, self._stream)

    def _set_batch(self, batch: int) -> None:
        if batch == self._batch:
            return
        # A captured graph is undefined once its context was changed, so it goes first ("CUDA
        # Graphs" in https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/optimization.html).
        self._forget_graph()
        self._batch = 0
        if not self._loaded.context.set_input_shape(IMAGES, (batch, *self._images.shape)):
            raise self._refused(f"set_input_shape to a batch of {batch}")
        for tensor in self._outputs:
            wanted = (batch, *tensor.shape)
            shape = tuple(self._loaded.context.get_tensor_shape(tensor.name))
            if shape != wanted:
                raise self._refused(f"the shape {wanted} of {tensor.name!r}, it says {shape},")
        self._batch = batch

    def _execute(self) -> None:
        """Queue the engine; with a graph asked for, capture it after the first plain run."""
        if self._graph is not None:
            self._graph.launch(self._stream)
        else:
            self._enqueue()
            if self._loaded.capture:
                # The plain run has settled what the new shapes made TensorRT put off.
                self._stream.synchronize()
                self._graph = cu.capture_graph(self._cuda, self._stream, self._enqueue)
        self._computed = True

    def _enqueue(self) -> None:
        if not self._loaded.context.execute_async_v3(self._stream.address):
            raise self._refused("execute_async_v3")

    def _run_timed(self) -> float:
        self._execute_between_events()
        self._end.synchronize()
        return self._end.ms_since(self._start)

    def _execute_between_events(self) -> None:
        if self._loaded.capture and self._graph is None:
            self._execute()  # also captures, which is not to be timed
        self._start.record(self._stream)
        self._execute()
        self._end.record(self._stream)

    def _download(self) -> dict[str, np.ndarray]:
        wanted = [tensor for tensor in self._outputs if tensor.name in self.output_names]
        for tensor in wanted:
            cu.copy_to_host(
                self._cuda,
                self._on_host[tensor.name],
                self._on_device[tensor.name],
                tensor.nbytes(self._batch),
                self._stream,
            )
        self._stream.synchronize()
        shapes = {tensor.name: (self._batch, *tensor.shape) for tensor in wanted}
        return {n: self._on_host[n].array(shapes[n]).copy() for n in self.output_names}

    def _refused(self, what: str) -> AmpDeployError:
        return AmpDeployError(
            f"{self.name}: TensorRT refused {what}. {self._loaded.logger.explain()}"
        )

    def _forget_graph(self) -> None:
        if self._graph is not None:
            graph, self._graph = self._graph, None
            graph.close()

    def _close_impl(self) -> None:
        # After a failed run CUDA may refuse everything, and that run's error has said why.
        expected = (cu.CudaError,) if self._failed else ()
        with contextlib.suppress(*expected), self._resources:
            self._stream.synchronize()
            if not self._failed:
                self._loaded.save_cache()


def _with_own_context(loaded: LoadedEngine) -> LoadedEngine:
    """The same engine with another execution context: contexts of one engine share its weights
    and may run at the same time.
    https://docs.nvidia.com/deeplearning/tensorrt/latest/performance/best-practices.html
    """
    loaded.save_cache()  # so that TensorRT-RTX need not compile the same kernels again
    twin = copy.copy(loaded)  # holds runtime and engine too, so either may be closed first
    twin.context = run_aside(twin.make_context)
    if twin.context is None:
        raise AmpDeployError(
            "TensorRT makes no second execution context for an engine, mostly for want of GPU "
            f"memory. {loaded.logger.explain()} Free some."
        )
    return twin


class TrtTarget(Target):
    """TensorRT 10 and 11 on an NVIDIA GPU, Jetson among them."""

    name: ClassVar[str] = "trt"
    artifact_suffixes: ClassVar[tuple[str, ...]] = (".plan", ".engine")
    width_multiple: ClassVar[int] = 64  # tensor core tiles

    def __init__(self, *, cuda_graph: bool = False) -> None:
        """Choose how engines are run.

        Args:
            cuda_graph: Launch a whole run as one CUDA graph, captured anew when the batch size
                changes.
        """
        self._cuda_graph = cuda_graph

    def with_cuda_graph(self) -> TrtTarget:
        return type(self)(cuda_graph=True)

    def check(self) -> None:
        facts = device_facts(free_memory=False)
        if facts.gpu is None:
            raise MissingDependencyError(
                f"target {self.name} runs engines on an NVIDIA GPU, and this machine has none "
                f"that can be used: {facts.problem}. Run it on a machine with one, or use "
                "--target ort for the .onnx file."
            )
        self._check_packages()

    def _check_packages(self) -> str:
        """Version of TensorRT, once it and cuda-python are known to load."""
        needed_by = f"target {self.name}"
        version = find_flavour(self.name, needed_by=needed_by).version
        cu.open_cuda(needed_by=needed_by)
        return version

    def _check_for(self, artifact: Path) -> None:
        """Compare the manifest with this machine: cheap things first, TensorRT last.

        Raises:
            MissingDependencyError: No GPU, TensorRT or cuda-python here.
            ArtifactError: The engine is damaged, was built for another machine, or its weights are
                neither in it nor beside it.
        """
        manifest = read_manifest(artifact)
        facts = device_facts(free_memory=False)
        # Importing TensorRT can take seconds on a Jetson, and most of what can be wrong is known
        # without it: all but its version, for which the engine's own stands in this once.
        check_fits(manifest, facts, manifest.tensorrt_version, self.name)
        if facts.gpu is None:
            raise _no_gpu_for(artifact, manifest, facts)
        check_plan_file(artifact, manifest)
        check_weights(artifact, manifest)
        check_fits(manifest, facts, self._check_packages(), self.name)

    def _open_impl(self, artifact: Path, *, threads: int | None) -> TrtRunner:
        needed_by = f"target {self.name}"
        flavour = find_flavour(self.name, needed_by=needed_by)
        cuda = cu.open_cuda(needed_by=needed_by)
        loaded = LoadedEngine(
            artifact,
            read_manifest(artifact),
            flavour,
            threads=threads,
            cuda_graph=self._cuda_graph,
        )
        return TrtRunner(loaded, cuda=cuda, name=artifact.name)


class TrtRtxTarget(TrtTarget):
    """TensorRT for RTX: it finishes its kernels on the machine that runs them."""

    name: ClassVar[str] = "trt-rtx"


def _no_gpu_for(
    artifact: Path, manifest: EngineManifest, facts: DeviceFacts
) -> MissingDependencyError:
    capabilities = " or ".join(manifest.compute_capabilities)
    gpu = manifest.gpu or "an NVIDIA GPU"
    return MissingDependencyError(
        f"{artifact} is an engine for {gpu} of compute capability {capabilities} on "
        f"{manifest.os} {manifest.arch}, and this machine has no GPU that can be used: "
        f"{facts.problem}. Run it on a machine like that one, or use --target ort for the .onnx "
        "file that it came from."
    )
