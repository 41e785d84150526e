"""Retrieval metrics on rankings worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.tasks import TaskSkippedError
from ampdeploy.bench.tasks.retrieval import average_precision_at_r, retrieval
from tests.bench.tasks.samples import clusters, evidence


def test_average_precision_among_the_r_nearest():
    hits = np.array([[1, 0, 1, 1], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1]], bool)
    found = average_precision_at_r(hits, np.array([3, 2, 2, 2]))
    # (1/1 + 2/3) / 3; (1/2) / 2; perfect; both hits come after the first two
    np.testing.assert_allclose(found, [5 / 9, 1 / 4, 1, 0])
    assert average_precision_at_r(hits[:1], np.array([0]))[0] == 0


def test_clusters_are_retrieved_and_noise_is_not():
    bank, bank_labels = clusters(6)
    queries, labels = clusters(4, seed=1)
    noise = np.random.default_rng(3).standard_normal(queries.shape)
    found = retrieval(evidence(queries, labels, pruned=noise, bank=bank, bank_labels=bank_labels))
    for outcome in found.values():
        assert outcome.scores["baseline"].mean() == 1
        assert outcome.scores["pruned"].mean() < 0.9
        assert (outcome.task.images, outcome.task.bank_images) == (12, 18)


def test_leave_one_out_ranks_the_others():
    features, labels = clusters(3)
    found = retrieval(evidence(features, labels))
    assert found["retrieval_map_r"].scores["baseline"].mean() == 1
    assert found["retrieval_recall1"].task.chance == pytest.approx(2 / 8)
    assert "leave-one-out" in found["retrieval_recall1"].task.why["bank_images"]


def test_chance_is_what_random_features_give():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [30, 60, 90, 120])
    bank_labels = np.repeat(np.arange(4), [10, 20, 30, 40])
    queries = rng.standard_normal((len(labels), 6))
    scores = {"retrieval_recall1": [], "retrieval_map_r": []}
    for _ in range(20):
        bank = rng.standard_normal((len(bank_labels), 6))
        found = retrieval(evidence(queries, labels, bank=bank, bank_labels=bank_labels))
        for metric, outcome in found.items():
            scores[metric].append(outcome.scores["baseline"].mean())
    for metric, values in scores.items():
        assert found[metric].task.chance == pytest.approx(np.mean(values), abs=0.02)
        assert 0.05 < found[metric].task.chance < 0.5


def test_images_that_cannot_be_found_are_said():
    features, labels = clusters(3)
    features, labels = features[:7], labels[:7]  # one image of the last class
    found = retrieval(evidence(features, labels))
    assert found["retrieval_recall1"].scores["baseline"].tolist() == [1] * 6 + [0]
    assert "1 of 7 images" in found["retrieval_map_r"].task.protocol
    with pytest.raises(TaskSkippedError, match="more images a class"):
        retrieval(evidence(*clusters(1)))
