"""How far every tensor reaches on real images: what decides which of them fit FP16."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from onnxscript import ir

from ampdeploy.errors import DataError
from ampdeploy.export.names import IMAGES
from ampdeploy.export.write import scratch_session
from ampdeploy.precision.graph import float_outputs, load_model
from ampdeploy.progress import track

if TYPE_CHECKING:
    import onnxruntime

ALL = "ampdeploy_ranges"


def measure_ranges(path: Path, images: np.ndarray, *, batch: int = 4) -> dict[str, float]:
    """Largest absolute value of every float tensor, over all images, in float32.

    The maxima are computed inside ONNX Runtime, as one small vector a run: no activation is
    copied out, so the memory stays that of a plain run.

    Args:
        path: Float32 ONNX file.
        images: (N, 3, S, S) float32 real images: noise and black ones reach elsewhere.
        batch: Images a run.

    Returns:
        Tensor name -> abs-max. Inputs of the graph included.

    Raises:
        ArtifactError: The file cannot be used.
        DataError: There are no images, or the model computes values that are not finite.
    """
    if not len(images):
        raise DataError("cannot measure ranges without images: give at least one.")
    model = load_model(path)
    names = _add_maxima(model)
    largest = np.zeros(len(names), dtype=np.float64)
    with scratch_session(model, near=path) as session:
        for start in track(range(0, len(images), batch), "ranges", -(-len(images) // batch)):
            largest = np.maximum(largest, _maxima(session, images[start : start + batch]))
    broken = [name for name, value in zip(names, largest, strict=True) if not math.isfinite(value)]
    if broken:
        raise DataError(
            f"{path.name} computes values that are not finite in float32, in {len(broken)} "
            f"tensors, {broken[0]!r} first. The weights or the images are broken."
        )
    return {name: float(value) for name, value in zip(names, largest, strict=True)}


def _maxima(session: onnxruntime.InferenceSession, images: np.ndarray) -> np.ndarray:
    # NaN must not be lost: np.maximum hands it on, and so does ReduceMax.
    found: np.ndarray = session.run([ALL], {IMAGES: images})[0]
    return found.astype(np.float64)


def _add_maxima(model: ir.Model) -> list[str]:
    """Append max(abs(x)) of every float tensor to the graph, as one output; returns their order."""
    graph = model.graph
    values = [*graph.inputs, *(v for node in graph for v in float_outputs(node))]
    axis = ir.tensor(np.array([0], dtype=np.int64), name=f"{ALL}_axis")
    zero = ir.Value(name=f"{ALL}_axis", const_value=axis)
    graph.register_initializer(zero)
    parts = []
    for position, value in enumerate(values):
        absolute = ir.node("Abs", [value], name=f"{ALL}_abs_{position}")
        top = ir.node(
            "ReduceMax", [absolute.outputs[0]], {"keepdims": 0}, name=f"{ALL}_max_{position}"
        )
        vector = ir.node("Unsqueeze", [top.outputs[0], zero], name=f"{ALL}_vector_{position}")
        graph.extend([absolute, top, vector])
        parts.append(vector.outputs[0])
    joined = ir.node("Concat", parts, {"axis": 0}, name=ALL)
    joined.outputs[0].name = ALL
    joined.outputs[0].dtype = ir.DataType.FLOAT
    graph.append(joined)
    graph.outputs.append(joined.outputs[0])
    return [value.name or "" for value in values]
