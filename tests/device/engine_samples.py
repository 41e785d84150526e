"""Small real graphs typed to FP16 in a simple way, facts of machines, and TensorRT with a GPU.

`trt_with_a_gpu` is TensorRT for RTX with all that is its own taken away, so that it passes for
TensorRT 10: parser, builder and timing cache are NVIDIA's. What takes a GPU (runtime, engine,
refitter) is written by hand, and only records what it is told.
"""

from __future__ import annotations

import dataclasses
import json
import types
from pathlib import Path

import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.transformers.float16 import convert_float_to_float16

from ampdeploy.device.platform import DeviceFacts

KEPT_FLOAT = ["LayerNormalization", "Softmax"]

NO_GPU = DeviceFacts(
    gpu=None,
    compute_capability=None,
    sm_count=None,
    driver=None,
    cuda_driver_version=None,
    memory_total_bytes=None,
    memory_free_bytes=None,
    integrated=None,
    os="linux",
    arch="x86_64",
    board=None,
    l4t=None,
    jetpack=None,
    problem="none was put in",
)
ADA = dataclasses.replace(
    NO_GPU,
    gpu="NVIDIA GeForce RTX 4090",
    compute_capability="8.9",
    sm_count=128,
    driver="570.124.06",
    cuda_driver_version="12.8",
    memory_total_bytes=24 << 30,
    memory_free_bytes=20 << 30,
    integrated=False,
    problem=None,
)
ORIN = dataclasses.replace(
    ADA,
    gpu="Orin",
    compute_capability="8.7",
    sm_count=8,
    driver="540.4.0",
    memory_total_bytes=8 << 30,
    memory_free_bytes=5 << 30,
    integrated=True,
    arch="aarch64",
    board="NVIDIA Jetson Orin Nano Developer Kit",
    l4t="36.4.3",
    jetpack="6.2",
)


def to_fp16(source: Path, path: Path, *, float_blocks: tuple[str, ...] = ()) -> Path:
    """Type `source` to FP16, but its norms, softmax, and nodes whose names start so."""
    model = onnx.load(source)
    kept = [node.name for node in model.graph.node if node.name.startswith(float_blocks or ("?",))]
    model = convert_float_to_float16(
        model, keep_io_types=True, op_block_list=KEPT_FLOAT, node_block_list=kept
    )
    onnx.save(model, path)
    return path


def write_graph(
    path: Path,
    nodes: list,
    weights: dict,
    *,
    size: int = 8,
    width: int = 4,
    batch: int | str = "batch",
    output: str = "features",
) -> Path:
    """Write a graph `images` -> `output`, both float32."""
    images = helper.make_tensor_value_info("images", TensorProto.FLOAT, [batch, 3, size, size])
    features = helper.make_tensor_value_info(output, TensorProto.FLOAT, [batch, width])
    constants = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "sample", [images], [features], constants)
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


def trt_with_a_gpu(*, inspector: str | None = None, engine: bool = True) -> types.ModuleType:
    """A module ``tensorrt``; see above. `calls` on it lists what was done with the GPU.

    Args:
        inspector: What the engine inspector says; None: one FP16 layer.
        engine: Whether the runtime takes plans.
    """
    import tensorrt_rtx

    said = inspector or json.dumps({"Layers": [{"Outputs": [{"Format/Datatype": "Half"}]}]})
    module = types.ModuleType("tensorrt")
    vars(module).update({k: v for k, v in vars(tensorrt_rtx).items() if k != "ComputeCapability"})
    # Its own name, so that it has its own logger; the real builder takes that as well.
    module.__name__ = "tensorrt"
    module.__version__ = "10.13.3.9"
    module.calls = calls = []

    class Context:
        shapes = ""

        def set_input_shape(self, name, shape):
            self.shapes = f"{name} {tuple(shape)}"
            return True

    class Engine:
        execution_context = None

        def create_execution_context(self):
            return Context()

        def create_engine_inspector(self):
            return self

        def get_engine_information(self, kind):
            calls.append(f"inspected at {self.execution_context.shapes}")
            return said

    class Runtime:
        def __init__(self, logger):
            self.engine_host_code_allowed = False

        def deserialize_cuda_engine(self, blob):
            calls.append(f"deserialize, host code {self.engine_host_code_allowed}")
            return Engine() if engine else None

    class Refitter:
        missing: tuple[str, ...] = ()

        def __init__(self, engine, logger):
            assert isinstance(engine, Engine)

        def get_missing_weights(self):
            return list(self.missing)

        def refit_cuda_engine(self):
            calls.append("refit")
            return True

    class OnnxParserRefitter:
        num_errors = 0

        def __init__(self, refitter, logger):
            assert isinstance(refitter, Refitter)

        def refit_from_file(self, path):
            calls.append(f"weights of {Path(path).name}")
            return True

    module.Runtime, module.Refitter = Runtime, Refitter
    module.OnnxParserRefitter = OnnxParserRefitter
    return module
