"""From a plan file to an execution context, and what TensorRT-RTX compiles at run time.

TensorRT-RTX's engines hold kernels in an intermediate form, which it compiles for this GPU when
they are first used. Two of its settings decide when: ampdeploy has every kernel compiled before it
is run, so that nothing changes in the middle of a measurement, and keeps what was compiled in a
cache on disk, so that the next process does not wait for it again.
https://docs.nvidia.com/deeplearning/tensorrt-rtx/latest/inference-library/work-with-cuda-graphs.html

Run here: deserialising with the real TensorRT-RTX up to the missing driver. The rest has been run
against a recording stand-in of its module, not on a GPU.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.artifacts import atomic_path
from ampdeploy.closing import Closing
from ampdeploy.device.engine.flavour import Flavour
from ampdeploy.device.engine.log import make_logger
from ampdeploy.device.engine.manifest import EngineManifest
from ampdeploy.device.engine.monitor import run_aside
from ampdeploy.device.engine.refit import put_weights_back, weights_file
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.export.names import FEATURES, IMAGES
from ampdeploy.models.wheel import cache_folder
from ampdeploy.progress import log

if TYPE_CHECKING:
    pass


_FLOAT_BYTES = 4
_PROFILE = 0  # ampdeploy builds engines with one optimisation profile


@dataclass(frozen=True, kw_only=True)
class EngineTensor:
    """An input or output of an engine: float32, on the device, batch first."""

    name: str
    is_input: bool
    shape: tuple[int, ...]
    """Without the batch."""

    def nbytes(self, batch: int) -> int:
        """Its size for `batch` images."""
        return batch * math.prod(self.shape) * _FLOAT_BYTES


class LoadedEngine(Closing):
    """Runtime, engine and execution context, dropped in the order that TensorRT wants."""

    def __init__(
        self,
        plan: Path,
        manifest: EngineManifest,
        flavour: Flavour,
        *,
        threads: int | None = None,
        cuda_graph: bool = False,
    ) -> None:
        """Load a plan that was checked against its manifest and this machine.

        Args:
            plan: The file; beside it, if it holds no weights, the ONNX file with them.
            manifest: Its ``engine.json``.
            flavour: The TensorRT that opens it.
            threads: CPU threads that the runtime may use; None: its default.
            cuda_graph: Whether a whole run shall be launched at once.

        Raises:
            ArtifactError: TensorRT does not take it.
            AmpDeployError: It does not take its weights, or the context cannot be made; mostly too
                little memory on the GPU.
        """
        self.trt = flavour.trt
        self.logger = make_logger(flavour.trt)
        self.runtime: Any = None
        self.engine: Any = None
        self.context: Any = None
        self.capture = cuda_graph
        """Whether the caller must capture a CUDA graph; False where the runtime does it."""
        self._cache: Any = None
        self._cache_path = cache_folder() / flavour.target / f"{manifest.plan_sha256[:16]}.kernels"
        self._cached_bytes = 0
        try:
            self._load(plan, manifest, flavour, threads)
        except BaseException:
            self.close()
            raise

    def _load(
        self, plan: Path, manifest: EngineManifest, flavour: Flavour, threads: int | None
    ) -> None:
        self.runtime = self.trt.Runtime(self.logger)
        if threads is not None:
            self.runtime.max_threads = threads
        if manifest.portable == "version":
            # Such a plan carries, as code, the runtime of the TensorRT that built it. Its hash was
            # compared with the manifest's before we came here.
            self.runtime.engine_host_code_allowed = True
        with open(plan, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            self.engine = run_aside(lambda: self.runtime.deserialize_cuda_engine(data))
        if self.engine is None:
            raise ArtifactError(
                f"{flavour.target} {flavour.version} does not load {plan}, although its manifest "
                f"fits this machine. {self.logger.explain()} Build the engine again here."
            )
        onnx = weights_file(plan, manifest)
        if onnx is not None:
            run_aside(
                lambda: put_weights_back(self.trt, self.engine, onnx, self.logger, name=str(plan))
            )
        # TensorRT-RTX compiles every kernel in this call: minutes, the first time.
        self.context = run_aside(self.make_context)
        if self.context is None:
            raise AmpDeployError(
                f"{plan} was loaded, but TensorRT makes no execution context for it, mostly for "
                f"want of GPU memory. {self.logger.explain()} Free some, or build the engine for "
                "smaller batches."
            )

    def make_context(self) -> Any:
        """An execution context of the engine; None: TensorRT makes none."""
        strategies = getattr(self.trt, "DynamicShapesKernelSpecializationStrategy", None)
        if strategies is None:  # a TensorRT whose engines hold finished kernels
            return self.engine.create_execution_context()
        config = self._made(self.engine.create_runtime_config(), "runtime configuration")
        config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER
        if self.capture and hasattr(self.trt, "CudaGraphStrategy"):
            # It knows when its kernels are ready to be captured; we would have to guess.
            config.cuda_graph_strategy = self.trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            self.capture = False
        self._cache = self._made(config.create_runtime_cache(), "kernel cache")
        self._read_cache()
        if not config.set_runtime_cache(self._cache):
            raise AmpDeployError(f"TensorRT-RTX refused its kernel cache. {self.logger.explain()}")
        return self.engine.create_execution_context(config)

    def _made(self, what: Any, name: str) -> Any:
        if what is None:
            raise AmpDeployError(f"TensorRT-RTX made no {name}. {self.logger.explain()}")
        return what

    def _read_cache(self) -> None:
        try:
            blob = self._cache_path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            log.warning("cannot read %s: %s; kernels are compiled again", self._cache_path, error)
            return
        # It refuses kernels of another GPU, driver or version of its own, and compiles again.
        if self._cache.deserialize(blob):
            self._cached_bytes = len(blob)
        else:
            log.info("%s is of another driver or GPU; compiling kernels", self._cache_path)

    def save_cache(self) -> None:
        """Keep the kernels compiled so far for the next process. A full disk is only a warning."""
        kernels = None if self._cache is None else self._cache.serialize()
        blob = b"" if kernels is None else bytes(kernels)
        if len(blob) in (0, self._cached_bytes):
            return
        try:
            self._cache_path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_path(self._cache_path) as temporary:
                temporary.write_bytes(blob)
        except (OSError, AmpDeployError) as error:
            log.warning("the compiled kernels are not kept for the next run: %s", error)

    def tensors(self, name: str) -> list[EngineTensor]:
        """Inputs and outputs, as long as ampdeploy could have exported them.

        Args:
            name: What to call the engine in the message.

        Raises:
            ArtifactError: It takes or gives something else.
        """
        engine = self.engine
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        tensors = [tensor for n in names if (tensor := self._tensor(n))]
        inputs = [tensor for tensor in tensors if tensor.is_input]
        if [tensor.name for tensor in inputs] == [IMAGES] and FEATURES in names:
            shape = inputs[0].shape
            if shape == (3, shape[-1], shape[-1]) and len(tensors) == len(names):
                return tensors
        seen = (
            f"{n} {engine.get_tensor_dtype(n)} {list(engine.get_tensor_shape(n))}" for n in names
        )
        raise ArtifactError(
            f"{name} has the tensors {'; '.join(seen) or 'none'}; expected one float32 input "
            f"{IMAGES!r} of shape [batch, 3, S, S] and float32 outputs, batch first, with "
            f"{FEATURES!r} among them. It was not built by ampdeploy; build it with "
            "`ampdeploy engine`."
        )

    def _tensor(self, name: str) -> EngineTensor | None:
        """One input or output; None if it is not what every tensor of an export is."""
        trt, engine = self.trt, self.engine
        dims = tuple(engine.get_tensor_shape(name))
        if (
            engine.get_tensor_dtype(name) != trt.DataType.FLOAT
            or engine.get_tensor_location(name) != trt.TensorLocation.DEVICE
            or len(dims) < 2
            or min(dims[1:]) < 1
        ):
            return None
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        return EngineTensor(name=name, is_input=is_input, shape=dims[1:])

    def batch_range(self) -> tuple[int, int, int]:
        """Smallest, usual and largest batch of the engine's profile."""
        shapes = self.engine.get_tensor_profile_shape(IMAGES, _PROFILE)
        smallest, usual, largest = (int(shape[0]) for shape in shapes)
        return smallest, usual, largest

    def close(self) -> None:
        """Let go of context, engine and runtime, in this order. Closing twice is allowed."""
        self.context = None
        self._cache = None
        self.engine = None
        self.runtime = None
