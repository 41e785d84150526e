"""What the tensors of every artifact are called. The contract between export and all targets."""

from __future__ import annotations

from pathlib import Path

IMAGES = "images"
FEATURES = "features"
PATCH_FEATURES = "patch_features"

# Outputs in their order in a graph; a model without patch features has the first alone.
OUTPUTS = (FEATURES, PATCH_FEATURES)


def data_name(name: str) -> str:
    """The file that holds the weights of the ONNX file `name` that do not fit into one protobuf."""
    return f"{name}.data"


def data_path(path: Path) -> Path:
    """Where that file lies: beside `path`."""
    return path.with_name(data_name(path.name))
