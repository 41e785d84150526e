"""Layer times of TensorRT engines, from its IProfiler, and what is in a layer, from its inspector.

The engine's layers are not the graph's nodes: TensorRT fuses. Engines of ampdeploy are built with
detailed verbosity, and their inspector then names the ONNX nodes that each layer was made from
("Metadata"). FLOPs come from those nodes' shapes in the ONNX file beside the engine.
https://docs.nvidia.com/deeplearning/tensorrt/latest/inference-library/engine-tools.html

Written to the documented API, and run against a recording stand-in of TensorRT; not on a GPU.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.explain import result as kinds
from ampdeploy.explain.graph_work import operators_of_graph
from ampdeploy.explain.interleave import WARMUP_PAIRS, run_pairs
from ampdeploy.explain.ort_profile import mlp_shapes
from ampdeploy.explain.places import Place, place_all
from ampdeploy.explain.profiled import ProfiledModel, Timed
from ampdeploy.explain.result import Work
from ampdeploy.explain.work import Operator, work_of
from ampdeploy.targets.base import Target
from ampdeploy.targets.tensorrt import TrtRunner

CLOCK = (
    "TensorRT's IProfiler: GPU time of each layer between CUDA events. It keeps layers from "
    "overlapping; latency is GPU compute without it"
)

_ONNX_NODE = re.compile(r"\[ONNX Layer: ([^\]]+)\]")
_MOSTLY = 0.9  # of a layer's FLOPs: it is booked where they are


@dataclass(frozen=True, kw_only=True)
class Layer:
    """One layer of an engine, as its inspector describes it."""

    name: str
    type: str
    nodes: tuple[str, ...]
    """ONNX nodes that it was made from."""
    bytes: int
    """Of its inputs and outputs."""


def profile_pair(
    target: Target,
    baseline: Path,
    pruned: Path,
    *,
    batch: int,
    threads: int | None,
    runs: int,
) -> tuple[ProfiledModel, ProfiledModel]:
    """Profile two engines, after timing them without the profiler.

    Raises:
        MissingDependencyError: This machine cannot run them.
        ArtifactError: An engine does not say what its layers are, or its ONNX file is not there.
        AmpDeployError: The profiler reports other layers than the inspector.
    """
    graphs = [_graph_beside(plan, batch) for plan in (baseline, pruned)]
    with (
        target.open(baseline, threads=threads) as dense,
        target.open(pruned, threads=threads) as slim,
    ):
        runners = (dense, slim)
        assert isinstance(dense, TrtRunner)
        assert isinstance(slim, TrtRunner)
        size = dense.image_size
        noise = np.random.default_rng(0)
        images = noise.standard_normal((batch, 3, size, size), dtype=np.float32)
        for runner in (dense, slim):
            runner.upload(images)
        latency_ms = _compute_ms(dense, slim, runs)
        profilers = [_attach(runner) for runner in (dense, slim)]
        compute_ms = _compute_ms(dense, slim, runs)
        layers = [_inspect(runner) for runner in (dense, slim)]
        names = [runner.name for runner in runners]
    models = [
        _profiled(
            names[column],
            layers[column],
            profilers[column].calls[WARMUP_PAIRS:],
            graphs[column],
            latency_ms[:, column],
            compute_ms[:, column],
        )
        for column in (0, 1)
    ]
    return models[0], models[1]


def _compute_ms(dense: TrtRunner, slim: TrtRunner, runs: int) -> np.ndarray:
    """(runs, 2) milliseconds on the GPU by CUDA events."""
    seen: tuple[list[float], list[float]] = ([], [])
    run_pairs(
        lambda: seen[0].append(dense.run_device()), lambda: seen[1].append(slim.run_device()), runs
    )
    return np.array(seen).T[WARMUP_PAIRS:]


def _attach(runner: TrtRunner) -> Any:
    """A profiler on the runner's context that keeps the layers of each call apart."""
    loaded = runner.loaded

    class Profiler(loaded.trt.IProfiler):  # type: ignore[name-defined]
        def __init__(self) -> None:
            loaded.trt.IProfiler.__init__(self)
            self.calls: list[dict[str, float]] = []

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            # Called once a layer, in the engine's order, after each call.
            if not self.calls or layer_name in self.calls[-1]:
                self.calls.append({})
            self.calls[-1][layer_name] = ms

    profiler = Profiler()
    loaded.context.profiler = profiler
    loaded.context.enqueue_emits_profile = True
    return profiler


def _inspect(runner: TrtRunner) -> list[Layer]:
    loaded = runner.loaded
    inspector = loaded.engine.create_engine_inspector()
    inspector.execution_context = loaded.context
    text = inspector.get_engine_information(loaded.trt.LayerInformationFormat.JSON)
    return read_layers(text, runner.name)


def read_layers(text: str, name: str) -> list[Layer]:
    """What TensorRT's inspector says of an engine, as JSON.

    Args:
        text: The JSON.
        name: What to call the engine.

    Raises:
        ArtifactError: It lists names alone, or nothing.
    """
    try:
        listed = json.loads(text or "{}").get("Layers", [])
    except ValueError as error:
        raise AmpDeployError(f"{name}: TensorRT's inspector gave no JSON: {error}.") from error
    if not listed or not all(isinstance(layer, dict) for layer in listed):
        raise ArtifactError(
            f"{name} says nothing of its {len(listed)} layers but their names: it was not built "
            "with detailed profiling verbosity. Build it with `ampdeploy engine`."
        )
    return [
        Layer(
            name=layer["Name"],
            type=layer.get("LayerType", ""),
            nodes=tuple(_ONNX_NODE.findall(layer.get("Metadata", ""))),
            bytes=sum(_nbytes(t) for t in (*layer.get("Inputs", ()), *layer.get("Outputs", ()))),
        )
        for layer in listed
    ]


def _nbytes(tensor: Mapping[str, Any]) -> int:
    """Bytes of an inspector's tensor; its format says ``Half``, ``FP16``, ``Int8``, ..."""
    said = f"{tensor.get('Format/Datatype', '')} {tensor.get('Datatype', '')}".lower()
    if "half" in said or "16" in said:
        width = 2
    elif "int8" in said or "fp8" in said or "bool" in said:
        width = 1
    else:
        width = 4
    return width * int(np.prod([abs(size) for size in tensor.get("Dimensions", [0])]))


def _graph_beside(plan: Path, batch: int) -> list[Operator]:
    onnx = plan.with_name(read_manifest(plan).onnx)
    if not onnx.is_file():
        raise ArtifactError(
            f"{plan} was built from {onnx.name}, which is not beside it and says what its layers "
            "compute. Explain the run directory on the host that built it."
        )
    return operators_of_graph(onnx, batch)


def _profiled(
    name: str,
    layers: Sequence[Layer],
    calls: Sequence[Mapping[str, float]],
    operators: Sequence[Operator],
    latency_ms: np.ndarray,
    compute_ms: np.ndarray,
) -> ProfiledModel:
    places = place_all(operators, {})
    works = {operator.name: work_of(operator) for operator in operators}
    by_name = {layer.name: layer for layer in layers}
    unknown = sorted({n for call in calls for n in call} - set(by_name))
    if unknown or len(calls) != len(latency_ms):
        raise AmpDeployError(
            f"{name}: TensorRT's profiler reports {len(calls)} calls and layers that its inspector "
            f"does not list ({', '.join(unknown[:3]) or 'none'}); {len(latency_ms)} calls were "
            "made. Build the engine again with this TensorRT."
        )
    timed = []
    for layer in layers:
        if layer.name not in calls[0]:
            continue  # it does nothing at run time, and TensorRT does not report it
        mine = {node: works[node] for node in layer.nodes if node in works}
        timed.append(
            Timed(
                name=layer.name,
                op_type=layer.type,
                place=place_layer(mine, places),
                work=Work(
                    flops=sum(work.flops for work in mine.values()),
                    bytes=layer.bytes,
                    operators=1,
                ),
                ms=np.array([call.get(layer.name, 0.0) for call in calls]),
            )
        )
    widths, token_width, tokens = mlp_shapes(operators, places)
    types = {operator.name: operator.op_type for operator in operators}
    return ProfiledModel(
        operators=tuple(timed),
        run_ms=compute_ms,
        latency_ms=latency_ms,
        fused={
            "layers made of several operators": sum(len(layer.nodes) > 1 for layer in layers),
        },
        widths=widths,
        token_width=token_width,
        tokens=tokens,
        fused_attention=sum(len(_attentions(layer, places, types)) for layer in layers),
    )


def place_layer(works: Mapping[str, Work], places: Mapping[str, Place]) -> Place:
    """Where a layer is booked: where nearly all of its FLOPs are, or else what all of it shares.

    Args:
        works: The ONNX nodes that it was made from.
        places: Node -> place.
    """
    own = [places[node] for node in works]
    if not own:
        return Place(block=None, kind=kinds.REST)
    blocks = {place.block for place in own}
    flops: dict[Place, int] = defaultdict(int)
    for node, work in works.items():
        flops[places[node]] += work.flops
    total = sum(flops.values())
    if total:
        most = max(flops, key=lambda place: flops[place])
        if flops[most] >= _MOSTLY * total:
            return most
    found = {place.kind for place in own}
    # Without products, whatever a layer joins are elementwise operators.
    kind = found.pop() if len(found) == 1 else kinds.MIXED if total else kinds.ELEMENTWISE
    return Place(block=blocks.pop() if len(blocks) == 1 else None, kind=kind)


def _attentions(
    layer: Layer, places: Mapping[str, Place], types: Mapping[str, str]
) -> set[int | None]:
    """Blocks of which `layer` holds both products of the attention and the softmax."""
    inside: dict[int | None, list[str]] = defaultdict(list)
    for node in layer.nodes:
        if node in places and places[node].kind == kinds.SCORES:
            inside[places[node].block].append(types[node])
    return {block for block, ops in inside.items() if ops.count("MatMul") >= 2 and "Softmax" in ops}
