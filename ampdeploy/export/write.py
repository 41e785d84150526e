"""Putting an ONNX graph on disk, and into a throw-away session. No torch here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
from onnxscript import ir

from ampdeploy.artifacts import atomic_path, scratch_folder
from ampdeploy.export.names import data_path
from ampdeploy.export.session import open_session

if TYPE_CHECKING:
    import onnxruntime

# A protobuf message ends at 2**31 - 1 bytes; 64 MiB is room for the graph around the weights.
SINGLE_FILE_LIMIT = 2**31 - 2**26
# Weights below this stay in the graph file: shapes and axes must be readable without the data.
EXTERNAL_TENSOR_MIN_BYTES = 1024


def weight_bytes(model: ir.Model) -> int:
    """Bytes of all initialisers."""
    values = model.graph.initializers.values()
    return sum(value.const_value.nbytes for value in values if value.const_value is not None)


def write_graph(
    model: ir.Model, path: Path, *, single_file_limit: int = SINGLE_FILE_LIMIT
) -> tuple[int, bool]:
    """Write atomically; the same graph gives the same bytes.

    Args:
        model: The graph with its weights.
        path: The ``.onnx`` file.
        single_file_limit: Above this many bytes of weights they go to `data_path(path)`.

    Returns:
        Bytes of all files written, and whether the weights are in a file of their own.

    Raises:
        AmpDeployError: The file cannot be written.
    """
    data = data_path(path)
    weights = weight_bytes(model)
    if weights <= single_file_limit:
        with atomic_path(path, needed=weights) as temporary:
            temporary.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
        data.unlink(missing_ok=True)  # of an earlier, larger model: nothing refers to it now
        return path.stat().st_size, False
    # The data file is renamed first: a graph without its weights must never be seen.
    with atomic_path(path) as temporary, atomic_path(data, needed=weights) as temporary_data:
        ir.save(
            model,
            temporary,
            format="protobuf",
            external_data=temporary_data.name,
            size_threshold_bytes=EXTERNAL_TENSOR_MIN_BYTES,
        )
        proto = onnx.load(temporary, format="protobuf", load_external_data=False)
        for tensor in proto.graph.initializer:
            for entry in tensor.external_data:
                if entry.key == "location":
                    entry.value = data.name
        temporary.write_bytes(proto.SerializeToString(deterministic=True))
    return path.stat().st_size + data.stat().st_size, True


@contextlib.contextmanager
def scratch_session(
    model: ir.Model, *, near: Path, optimise: bool = True
) -> Iterator[onnxruntime.InferenceSession]:
    """A session of a graph that nobody keeps.

    Args:
        model: The graph.
        near: A file in whose folder the graph may lie for as long as the session is loading:
            there is room there for weights of this size.
        optimise: Let ONNX Runtime rewrite the graph.
    """
    with scratch_folder(near) as folder:
        path = folder / "graph.onnx"
        write_graph(model, path)
        yield open_session(path, optimise=optimise)
