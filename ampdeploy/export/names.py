"""What the tensors of every artifact are called. The contract between export and all targets."""

from __future__ import annotations

IMAGES = "images"
FEATURES = "features"
PATCH_FEATURES = "patch_features"

# Outputs in their order in a graph; a model without patch features has the first alone.
OUTPUTS = (FEATURES, PATCH_FEATURES)
