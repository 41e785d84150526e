"""k-NN classification, by DINOv2's protocol and by SnapViT's. numpy only."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ampdeploy.bench.tasks.evidence import Evidence, Outcome
from ampdeploy.bench.tasks.neighbours import nearest, nearest_chunks
from ampdeploy.errors import DataError

KNN_K = 20  # "20 is usually working the best", says DINOv2's own help text
KNN_KS = (10, 20, 100, 200)  # what its evaluation reports
KNN_TEMPERATURE = 0.07
SNAPVIT_K = 20

# The names that reports and gates use.
KNN_METRIC = "knn_top1"
SNAPVIT_METRIC = "snapvit_knn_top1"

_DINOV2 = "facebookresearch/dinov2, dinov2/eval/knn.py"
_SNAPVIT = "arXiv 2510.17700; WalterSimoncini/SnapViT, src/utils/eval.py"


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
    softmax(cosine / temperature) (DINOv2, `dinov2/eval/knn.py`). DINOv2 takes the softmax over its
    largest k and sums the first k of it, which is another factor common to all votes of a query.
    Ties go to the lower label.

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
    near, cosines = nearest(queries, bank, min(k, others))
    return _elect(labels[near], softmax_weights(cosines, temperature))


def softmax_weights(cosines: np.ndarray, temperature: float = KNN_TEMPERATURE) -> np.ndarray:
    """Votes (N, k) of neighbours at these cosines, DINOv2's way."""
    scaled = cosines.astype(np.float64) / temperature
    weights = np.exp(scaled - scaled.max(axis=1, keepdims=True))
    shares: np.ndarray = weights / weights.sum(axis=1, keepdims=True)
    return shares


def _elect(labels: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The label (N,) with the most weight in each row of (N, k); ties go to the lower one."""
    classes = int(labels.max()) + 1
    cells = np.arange(len(labels))[:, None] * classes + labels
    votes = np.bincount(cells.ravel(), weights.ravel(), minlength=len(labels) * classes)
    winners: np.ndarray = votes.reshape(len(labels), classes).argmax(axis=1)
    return winners


def dinov2_knn(evidence: Evidence) -> dict[str, Outcome]:
    """Top-1 at k = 20 as `knn_top1`, and at DINOv2's other k where a class has that many images.

    A k above the images per class says more about the bank than about the features: most voters
    are of other classes whatever the features do.
    """
    fits = [k for k in KNN_KS if k == KNN_K or k <= evidence.images_per_class]
    left_out = [str(k) for k in KNN_KS if k not in fits]
    outcomes = {}
    for k in sorted(fits, key=lambda k: k != KNN_K):  # the headline first
        notes = _small_bank(evidence, k)
        if k == KNN_K and left_out:
            notes.append(
                f"k = {', '.join(left_out)} of the same protocol would mean less still with "
                f"{evidence.images_per_class:.3g} images a class, and is left out."
            )
        outcomes[KNN_METRIC if k == KNN_K else f"knn_k{k}_top1"] = Outcome(
            scores=_score(evidence, k, softmax_weights),
            task=evidence.task(
                f"k-NN on L2-normalised features, k = {k}, votes weighted by softmax of cosine / "
                f"{KNN_TEMPERATURE:g} ({_DINOV2})",
                notes=notes,
            ),
        )
    return outcomes


def snapvit_knn(evidence: Evidence) -> dict[str, Outcome]:
    """Top-1 with the unweighted majority of 20 neighbours, which is what SnapViT's tables show.

    Its code calls scikit-learn's `KNeighborsClassifier` on L2-normalised features: Euclidean
    distance, in the order of the cosine; one vote each; ties to the lower label; no temperature.
    """
    return {
        SNAPVIT_METRIC: Outcome(
            scores=_score(evidence, SNAPVIT_K, lambda cosines: np.ones(cosines.shape)),
            task=evidence.task(
                f"k-NN on L2-normalised features, k = {SNAPVIT_K}, one vote each ({_SNAPVIT})",
                notes=_small_bank(evidence, SNAPVIT_K),
            ),
        )
    }


def _score(
    evidence: Evidence, k: int, weigh: Callable[[np.ndarray], np.ndarray]
) -> dict[str, np.ndarray]:
    """Role -> (N,) 1 where the vote is right."""
    if evidence.others < 1:
        raise DataError(
            f"k-NN has {len(evidence.query_labels)} queries and {evidence.others} images to "
            "compare them with; it needs at least one of each. Use a folder with more images."
        )
    result = {}
    for role, queries in evidence.queries.items():
        bank = None if evidence.bank is None else evidence.bank[role]
        hits = np.zeros(len(queries))
        for chunk, near, cosines in nearest_chunks(queries, bank, min(k, evidence.others)):
            won = _elect(evidence.voters[near], weigh(cosines))
            hits[chunk] = won == evidence.query_labels[chunk]
        result[role] = hits
    return result


def _small_bank(evidence: Evidence, k: int) -> list[str]:
    """What a reader must know about a bank that is small for `k`."""
    notes = []
    if k > evidence.others:
        notes.append(f"Only {evidence.others} images are there to vote, so all of them do.")
    elif k > evidence.images_per_class:
        notes.append(
            f"k is above the {evidence.images_per_class:.3g} images a class, so most voters are of "
            "other classes and the result depends on k: compare models by it, not papers."
        )
    alone = evidence.unreachable()
    return [*notes, alone] if alone else notes
