"""How close a pruned model is to the dense one: the dense features are computed once."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from ampdeploy.bench.accuracy import FidelityAccumulator
from ampdeploy.bench.tasks.knn import KNN_K, knn_predict
from ampdeploy.models.vision import VisionModel
from ampdeploy.targets.torch import TorchRunner

EVAL_BATCH = 16

# Columns of a row, for each set of images; `knn` only where there are labels.
FIDELITY = (
    "cosine_mean",
    "cosine_p1",
    "patch_cosine_mean",
    "patch_cosine_p1",
    "knn_agreement",
)


class Judge:
    """One set of images, what the dense model makes of them, and a verdict on any other model."""

    def __init__(
        self, dense: VisionModel, images: Tensor, *, labels: list[int] | None = None
    ) -> None:
        """Run the dense model.

        Args:
            dense: The reference; nothing of it is kept.
            images: (N, 3, S, S), preprocessed.
            labels: Class of each image, for k-NN; None where there are none.
        """
        self._batches = [batch.numpy() for batch in images.split(EVAL_BATCH)]
        self._labels = None if labels is None else np.array(labels)
        self._dense = self._run(dense)

    def _run(self, model: VisionModel) -> list[dict[str, np.ndarray]]:
        device = str(next(model.parameters()).device)
        with TorchRunner(model, name="model", device=device) as runner:
            return [runner.run(batch) for batch in self._batches]

    def verdict(self, model: VisionModel | None) -> dict[str, Any]:
        """Fidelity of `model` to the dense one (None: the dense one itself), and its accuracy.

        Returns:
            The columns of `FIDELITY` (cosines and shares in [-1, 1]), and ``knn``: leave-one-out
            top-1 accuracy by DINOv2's protocol, None without labels.
        """
        outputs = self._dense if model is None else self._run(model)
        accumulator = FidelityAccumulator()
        for reference, candidate in zip(self._dense, outputs, strict=True):
            accumulator.add(reference, candidate)
        result = accumulator.result()
        row: dict[str, Any] = {name: result[name] for name in FIDELITY}
        row["knn"] = None
        if self._labels is not None:
            features = accumulator.features[1]
            predicted = knn_predict(None, None, features, self._labels, k=KNN_K)
            row["knn"] = float((predicted == self._labels).mean())
        return row
