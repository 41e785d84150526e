"""How close the pruned model's features are to the dense model's, and how well they classify.

numpy only, so that it judges a checkpoint, an ONNX file or an engine alike.

Array legend: N images, M bank images, P patches per image, C feature width.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ampdeploy.errors import DataError, VerificationError
from ampdeploy.export.names import FEATURES, PATCH_FEATURES
from ampdeploy.report.result import Interval
from ampdeploy.targets.base import Runner

NEIGHBOURS = 5  # of the neighbour agreement
KNN_K = 20  # DINOv2's evaluation reports k = 10, 20, 100, 200
KNN_TEMPERATURE = 0.07  # DINOv2's own
ROWS_AT_ONCE = 1024  # bounds the similarity matrix to this many rows
RESAMPLES = 2000


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
    dots = np.einsum("...c,...c->...", _finite(a), _finite(b))
    norms = np.linalg.norm(a.astype(np.float64), axis=-1) * np.linalg.norm(
        b.astype(np.float64), axis=-1
    )
    return np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)


def _finite(features: np.ndarray) -> np.ndarray:
    """`features` as float64.

    Raises:
        VerificationError: A value is NaN or infinite.
    """
    bad = int(features.size - np.count_nonzero(np.isfinite(features)))
    if bad:
        raise VerificationError(
            f"{bad} of {features.size} feature values are NaN or infinite. The model overflows, "
            "or its weights are damaged; check it with `ampdeploy eval` in float32."
        )
    return features.astype(np.float64)


def _unit_rows(features: np.ndarray) -> np.ndarray:
    features = _finite(features)
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    return np.divide(features, norms, out=np.zeros_like(features), where=norms > 0)


class FidelityAccumulator:
    """Compares two models batch by batch; keeps per-image features, not patch features."""

    def __init__(self, *, k: int = NEIGHBOURS) -> None:
        """Start with no images; `k` is the number of neighbours in `knn_agreement`."""
        self._k = k
        self._reference: list[np.ndarray] = []
        self._candidate: list[np.ndarray] = []
        self._patch_cosines: list[np.ndarray] = []

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
            self._patch_cosines.append(cosines.ravel().astype(np.float32))

    @property
    def features(self) -> tuple[np.ndarray, np.ndarray]:
        """All features so far, (N, C) of the reference and of the candidate.

        Raises:
            DataError: No images were added.
        """
        if not self._reference:
            raise DataError("no images were compared. Give a folder with at least one image.")
        return np.concatenate(self._reference), np.concatenate(self._candidate)

    def result(self) -> dict[str, Any]:
        """Label-free closeness of the candidate to the reference on the images so far.

        Returns:
            The fields of `ampdeploy.report.result.Fidelity`: cosine_{mean,p1,min} over images,
            patch_cosine_{mean,p1} over all patches of all images, knn_agreement, knn_k, images,
            and `why` for what is None. p1 is the first percentile, so near the minimum below 100
            images.

        Raises:
            DataError: No images were added.
        """
        reference, candidate = self.features
        cosines = cosine_rows(reference, candidate)
        why: dict[str, str] = {}
        agreement = None
        if len(reference) > 2 * self._k:
            agreement = knn_agreement(reference, candidate, k=self._k)
        else:
            why["knn_agreement"] = (
                f"{len(reference)} images; with {self._k} neighbours it needs more than "
                f"{2 * self._k}, or chance alone agrees on half of them"
            )
        patch_mean = patch_p1 = None
        if self._patch_cosines:
            patches = np.concatenate(self._patch_cosines)
            patch_mean = float(patches.mean(dtype=np.float64))
            patch_p1 = float(np.percentile(patches, 1))
        else:
            why["patch_cosine_mean"] = why["patch_cosine_p1"] = "the model has no patch features"
        return {
            "images": len(reference),
            "cosine_mean": float(cosines.mean()),
            "cosine_p1": float(np.percentile(cosines, 1)),
            "cosine_min": float(cosines.min()),
            "patch_cosine_mean": patch_mean,
            "patch_cosine_p1": patch_p1,
            "knn_agreement": agreement,
            "knn_k": self._k,
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
    near_reference, _ = _nearest(reference, None, k)
    near_candidate, _ = _nearest(candidate, None, k)
    shared = (near_reference[:, :, None] == near_candidate[:, None, :]).sum()
    return float(shared / near_reference.size)


def _nearest(queries: np.ndarray, bank: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (N, k) of the most similar bank rows, and cosines; no bank: the other queries."""
    unit = _unit_rows(queries)
    unit_bank = unit if bank is None else _unit_rows(bank)
    indices, cosines = [], []
    for start in range(0, len(unit), ROWS_AT_ONCE):
        similarity = unit[start : start + ROWS_AT_ONCE] @ unit_bank.T
        if bank is None:
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = -np.inf
        top = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
        indices.append(top)
        cosines.append(np.take_along_axis(similarity, top, axis=1))
    return np.concatenate(indices), np.concatenate(cosines)


def knn_predict(
    bank: np.ndarray | None,
    bank_labels: np.ndarray | None,
    queries: np.ndarray,
    query_labels: np.ndarray,
    *,
    k: int = KNN_K,
    temperature: float = KNN_TEMPERATURE,
) -> np.ndarray:
    """Label of each query by DINOv2's k-NN protocol.

    Features are L2-normalised; the k most similar bank images vote for their label with weight
    softmax(cosine / temperature) (DINOv2, `dinov2/eval/knn.py`). Ties go to the lower label.

    Args:
        bank: (M, C), or None for leave-one-out: each query against all the others.
        bank_labels: (M,) integers from 0; None with `bank` None.
        queries: (N, C)
        query_labels: (N,) integers from 0; only used as the bank's labels in leave-one-out.
        k: Neighbours; all of the bank when it is smaller.
        temperature: Of the softmax.

    Returns:
        (N,) predicted labels.

    Raises:
        DataError: Labels and features differ in number, or there is nothing to compare with.
        VerificationError: A value is not finite.
    """
    labels = query_labels if bank is None else bank_labels
    rows = len(queries) if bank is None else len(bank)
    if labels is None or len(labels) != rows or len(query_labels) != len(queries):
        raise DataError(
            f"{rows} bank and {len(queries)} query images came with "
            f"{None if labels is None else len(labels)} and {len(query_labels)} labels. "
            "Give one label per image."
        )
    others = rows - 1 if bank is None else rows
    if others < 1 or not len(queries):
        raise DataError(
            f"k-NN has {len(queries)} queries and {others} images to compare them with; it needs "
            "at least one of each. Use a folder with more images."
        )
    near, cosines = _nearest(queries, bank, min(k, others))
    scaled = cosines / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    votes = np.zeros((len(queries), int(labels.max()) + 1))
    np.add.at(votes, (np.arange(len(queries))[:, None], labels[near]), weights)
    return votes.argmax(axis=1)


def paired_difference(
    baseline_correct: np.ndarray, pruned_correct: np.ndarray, *, seed: int = 0
) -> Interval:
    """Accuracy of pruned minus baseline on the same images, with a bootstrap 95% interval.

    Args:
        baseline_correct: (N,) booleans, one per image.
        pruned_correct: (N,), the same images.
        seed: Of the resampling.
    """
    difference = pruned_correct.astype(np.float64) - baseline_correct.astype(np.float64)
    rng = np.random.default_rng(seed)
    n = len(difference)
    means = [difference[rng.integers(0, n, n)].mean() for _ in range(RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return Interval(value=float(difference.mean()), ci95_low=float(low), ci95_high=float(high))


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
