"""What the tensors of every artifact are called. The contract between export and all targets."""

from __future__ import annotations

from pathlib import Path

IMAGES = "images"
FEATURES = "features"
PATCH_FEATURES = "patch_features"

# Outputs in their order in a graph; a model without patch features has the first alone.
OUTPUTS = (FEATURES, PATCH_FEATURES)


def data_path(path: Path) -> Path:
    """Where the weights of an ONNX file go when they do not fit into one protobuf."""
    return path.with_name(f"{path.name}.data")
