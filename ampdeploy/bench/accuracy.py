"""How close the pruned model's features are to the dense model's; what they are good for is judged
by `ampdeploy.bench.tasks`.

numpy only, so that it judges a checkpoint, an ONNX file or an engine alike. How far the numbers
hold for other images is in `ampdeploy.bench.fidelity_intervals`.

Array legend: N images, P patches per image, C feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ampdeploy.bench import fidelity_intervals as intervals
from ampdeploy.bench.tasks.neighbours import finite, nearest
from ampdeploy.errors import DataError, VerificationError
from ampdeploy.export.names import FEATURES, PATCH_FEATURES
from ampdeploy.report.codec import to_plain
from ampdeploy.report.result import INTERVAL_FIELDS, Interval
from ampdeploy.targets.base import Runner

NEIGHBOURS = 5  # of the neighbour agreement


def cosine_rows(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosine of each row of `a` with the same row of `b`.

    Args:
        a: (..., C)
        b: (..., C), the same shape.

    Returns:
        (...) float64. A row of zeros has no direction; its cosine is 0.

    Raises:
        VerificationError: Shapes differ, or a value is not finite.
    """
    if a.shape != b.shape:
        raise VerificationError(
            f"features of shapes {a.shape} and {b.shape} cannot be compared row by row. Both "
            "models must see the same images and have the same feature width."
        )
    a, b = finite(a).astype(np.float64), finite(b).astype(np.float64)
    dots = np.einsum("...c,...c->...", a, b)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


class FidelityAccumulator:
    """Compares two models batch by batch; keeps features of images, and of patches only means and
    cosines."""

    def __init__(self, *, k: int = NEIGHBOURS) -> None:
        """Start with no images; `k` is the number of neighbours in `knn_agreement`."""
        self._k = k
        self._reference: list[np.ndarray] = []
        self._candidate: list[np.ndarray] = []
        self._patch_cosines: list[np.ndarray] = []
        self._patch_means: tuple[list[np.ndarray], list[np.ndarray]] = ([], [])

    def add(self, reference: Mapping[str, np.ndarray], candidate: Mapping[str, np.ndarray]) -> None:
        """Add what both models returned for one batch, as `Runner.run` returns it.

        Raises:
            VerificationError: Shapes differ, or a value is not finite.
        """
        cosine_rows(reference[FEATURES], candidate[FEATURES])  # fail now, with this batch
        self._reference.append(reference[FEATURES])
        self._candidate.append(candidate[FEATURES])
        if (PATCH_FEATURES in reference) != (PATCH_FEATURES in candidate):
            raise VerificationError(
                "one model returns patch features and the other does not, so they are not two "
                "versions of one model. Compare a pruned model with its own baseline."
            )
        if PATCH_FEATURES in reference:
            cosines = cosine_rows(reference[PATCH_FEATURES], candidate[PATCH_FEATURES])
            before = self._patch_cosines[0] if self._patch_cosines else cosines
            if cosines.shape[1] != before.shape[1]:
                raise VerificationError(
                    f"images of {before.shape[1]} and of {cosines.shape[1]} patches cannot be "
                    "judged together. Give images of one size."
                )
            self._patch_cosines.append(cosines.astype(np.float32))
            for means, outputs in zip(self._patch_means, (reference, candidate), strict=True):
                means.append(outputs[PATCH_FEATURES].mean(axis=1))

    @property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """All features so far, (N, C) of the reference and of the candidate.

        Raises:
            DataError: No images were added.
        """
        if not self._reference:
            raise DataError("no images were compared. Give a folder with at least one image.")
        return np.concatenate(self._reference), np.concatenate(self._candidate)

    @property
    def patch_means(self) -> tuple[np.ndarray, np.ndarray] | None:
        """Mean patch feature of every image so far, (N, C) of the reference and of the candidate;
        None: the models have no patch features."""
        reference, candidate = self._patch_means
        return (np.concatenate(reference), np.concatenate(candidate)) if reference else None

    def result(self) -> dict[str, Any]:
        """Label-free closeness of the candidate to the reference on the images so far.

        Returns:
            The fields of `ampdeploy.report.result.Fidelity` as plain data: cosine_{mean,p1,min}
            over images, patch_cosine_{mean,p1} over all patches of all images, knn_agreement,
            knn_k, images, `intervals` of all but the minimum, and `why` for what is None. p1 is
            the first percentile, so near the minimum below 100 images.

        Raises:
            DataError: No images were added.
        """
        reference, candidate = self.features
        cosines = cosine_rows(reference, candidate)
        found: dict[str, Interval] = {
            "cosine_mean": intervals.of_mean(cosines),
            "cosine_p1": intervals.of_percentile(cosines),
        }
        why: dict[str, str] = {}
        if len(reference) > 2 * self._k:
            found["knn_agreement"] = intervals.of_neighbours(
                knn_agreement(reference, candidate, k=self._k),
                lambda rows: knn_agreement(reference[rows], candidate[rows], k=self._k),
                images=len(reference),
                k=self._k,
            )
        else:
            why["knn_agreement"] = (
                f"{len(reference)} images; with {self._k} neighbours it needs more than "
                f"{2 * self._k}, or chance alone agrees on half of them"
            )
        if self._patch_cosines:
            patches = np.concatenate(self._patch_cosines)
            # All images have as many, so that the mean of means is that of all patches.
            by_image = patches.mean(axis=1, dtype=np.float64)
            found["patch_cosine_mean"] = intervals.of_mean(by_image)
            found["patch_cosine_p1"] = intervals.of_clustered_percentile(patches)
        else:
            why["patch_cosine_mean"] = why["patch_cosine_p1"] = "the model has no patch features"
        return {
            "images": len(reference),
            **{name: found[name].value if name in found else None for name in INTERVAL_FIELDS},
            "cosine_min": float(cosines.min()),
            "knn_k": self._k,
            "intervals": to_plain(found),
            "why": why,
        }


def knn_agreement(reference: np.ndarray, candidate: np.ndarray, *, k: int = NEIGHBOURS) -> float:
    """Mean fraction of each image's k nearest neighbours (cosine, itself excluded) that both share.

    Chance is k / (N - 1).

    Args:
        reference: (N, C)
        candidate: (N, C)
        k: Neighbours; at most N - 1.

    Raises:
        DataError: Fewer than k + 1 images.
    """
    if len(reference) <= k:
        raise DataError(
            f"{len(reference)} images have no {k} neighbours each. Use more images or a smaller k."
        )
    near_reference, _ = nearest(reference, None, k)
    near_candidate, _ = nearest(candidate, None, k)
    shared = (near_reference[:, :, None] == near_candidate[:, None, :]).sum()
    return float(shared / near_reference.size)


def extract(runners: Sequence[Runner], batches: Iterable[np.ndarray]) -> tuple[np.ndarray, ...]:
    """Features (N, C) of all batches, one array per runner; no patch features are kept.

    Args:
        runners: Open models. Each batch is made once and shown to all of them.
        batches: Arrays (B, 3, S, S), preprocessed.

    Raises:
        DataError: There are no batches.
    """
    rows = [tuple(runner.run_all(batch)[FEATURES] for runner in runners) for batch in batches]
    if not rows:
        names = ", ".join(runner.name for runner in runners)
        raise DataError(f"{names}: given no images to run on. Use a folder with at least one.")
    return tuple(np.concatenate(features) for features in zip(*rows, strict=True))


def compare(
    reference: Runner, candidate: Runner, batches: Iterable[np.ndarray], *, k: int = NEIGHBOURS
) -> FidelityAccumulator:
    """Run both models over the same batches; the result holds features and fidelity."""
    accumulator = FidelityAccumulator(k=k)
    for batch in batches:
        accumulator.add(reference.run_all(batch), candidate.run_all(batch))
    return accumulator
