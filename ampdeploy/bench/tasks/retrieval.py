"""Retrieval: are an image's nearest neighbours of its own class? numpy only."""

from __future__ import annotations

import numpy as np

from ampdeploy.bench.tasks.evidence import Evidence, Outcome, TaskSkippedError
from ampdeploy.bench.tasks.neighbours import nearest_chunks

RECALL_METRIC = "retrieval_recall1"
MAP_METRIC = "retrieval_map_r"
OTHERS = "leave-one-out: the other images are searched"

_SOURCE = "MAP@R of Musgrave et al., arXiv 2003.08505"


def retrieval(evidence: Evidence) -> dict[str, Outcome]:
    """Recall@1, and mean average precision among the R nearest, R being the images of the class.

    MAP@R is 1 when the R nearest are the R images of the query's class, and unlike recall@1 it
    sees the whole neighbourhood. Unlike average precision over the full ranking it needs no more
    than R neighbours, so a bank of ImageNet's size is affordable.

    Raises:
        TaskSkippedError: No query has another image of its class.
    """
    deepest = int(evidence.relevant.max(initial=0))
    if deepest < 1:
        raise TaskSkippedError(
            "no image has another one of its class to be found. Use a folder with more images a "
            "class"
        )
    recall, precision = {}, {}
    for role, queries in evidence.queries.items():
        bank = None if evidence.bank is None else evidence.bank[role]
        first, average = np.zeros(len(queries)), np.zeros(len(queries))
        for chunk, near, _ in nearest_chunks(queries, bank, deepest):
            hits = evidence.voters[near] == evidence.query_labels[chunk, None]
            first[chunk] = hits[:, 0]
            average[chunk] = average_precision_at_r(hits, evidence.relevant[chunk])
        recall[role], precision[role] = first, average
    alone = evidence.unreachable()
    notes = [alone] if alone else []
    return {
        RECALL_METRIC: Outcome(
            scores=recall,
            task=evidence.task(
                "recall@1: the most similar image by cosine has the same label",
                chance=float(evidence.relevant.mean() / evidence.others),
                alone=OTHERS,
                notes=notes,
            ),
        ),
        MAP_METRIC: Outcome(
            scores=precision,
            task=evidence.task(
                "mean average precision among the R most similar images by cosine, R of them "
                f"having the same label ({_SOURCE})",
                chance=_chance_of_map(evidence.relevant, evidence.others),
                alone=OTHERS,
                notes=notes,
            ),
        ),
    }


def average_precision_at_r(hits: np.ndarray, relevant: np.ndarray) -> np.ndarray:
    """(N,) of rankings.

    Args:
        hits: (N, k) whether each neighbour, most similar first, is relevant.
        relevant: (N,) relevant images that there are, R; at most k. With none the result is 0.
    """
    ranks = np.arange(1, hits.shape[1] + 1)
    precision = np.cumsum(hits, axis=1) / ranks
    counted = hits & (ranks <= relevant[:, None])
    total: np.ndarray = (precision * counted).sum(axis=1) / np.maximum(relevant, 1)
    return total


def _chance_of_map(relevant: np.ndarray, others: int) -> float:
    """Expected MAP@R of random rankings of `others` images.

    At rank i an image is relevant with probability p = R / M, and of the i - 1 before it, given
    that, each with (R - 1) / (M - 1).
    """
    by_count = {}
    for count in np.unique(relevant):
        ranks = np.arange(1, count + 1)
        before = (ranks - 1) * (count - 1) / max(others - 1, 1)
        by_count[count] = float(((1 + before) / ranks).mean() * count / others) if count else 0.0
    return float(np.mean([by_count[count] for count in relevant]))
