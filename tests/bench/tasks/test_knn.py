"""k-NN protocols against hand-made cases and against the libraries that the papers call."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ampdeploy.bench.tasks.knn import dinov2_knn, knn_predict, snapvit_knn, softmax_weights
from ampdeploy.bench.tasks.neighbours import nearest
from ampdeploy.errors import DataError, VerificationError
from tests.bench.tasks.samples import clusters, evidence


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def knn_accuracy(bank, bank_labels, queries, query_labels, *, k):
    predicted = knn_predict(bank, bank_labels, queries, query_labels, k=k)
    return (predicted == query_labels).mean()


def test_neighbours_come_in_order_and_in_chunks_alike(monkeypatch):
    queries, bank = random(23, 6), random(40, 6, seed=1)
    near, cosines = nearest(queries, bank, 7)
    unit = [rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (queries, bank)]
    similarity = unit[0] @ unit[1].T
    np.testing.assert_array_equal(near, np.argsort(-similarity, axis=1)[:, :7])
    np.testing.assert_allclose(cosines, -np.sort(-similarity, axis=1)[:, :7], atol=1e-6)
    monkeypatch.setattr("ampdeploy.bench.tasks.neighbours.SIMILARITIES_AT_ONCE", 5 * 40)
    np.testing.assert_array_equal(nearest(queries, bank, 7)[0], near)


def test_knn_separates_clusters_with_a_bank_and_leave_one_out():
    bank, bank_labels = clusters(10)
    queries, query_labels = clusters(4, seed=1)
    assert knn_accuracy(bank, bank_labels, queries, query_labels, k=5) == 1
    assert knn_accuracy(None, None, bank, bank_labels, k=5) == 1
    assert knn_accuracy(bank, (bank_labels + 1) % 3, queries, query_labels, k=5) == 0


def test_leave_one_out_does_not_let_an_image_vote_for_itself():
    features, labels = clusters(1)  # every class has one image: nobody can be right
    assert knn_accuracy(None, None, features, labels, k=1) == 0
    assert knn_accuracy(features, labels, features, labels, k=1) == 1


def test_k_larger_than_the_bank_uses_all_of_it_and_two_per_class_work():
    features, labels = clusters(2)
    assert knn_accuracy(None, None, features, labels, k=200) == 1


def test_votes_are_weighted_by_the_softmax_of_similarity():
    # One neighbour of class 0 at cosine 1, two of class 1 at cosine c: they win when
    # 2 exp(c / T) > exp(1 / T), that is c > 1 - T log 2.
    def predicted(cosine: float, temperature: float) -> int:
        sine = math.sqrt(1 - cosine**2)
        bank = np.array([[1, 0], [cosine, sine], [cosine, -sine]])
        query = np.array([[2.0, 0]])
        labels = np.array([0, 1, 1])
        return int(knn_predict(bank, labels, query, np.array([0]), k=3, temperature=temperature)[0])

    threshold = 1 - 0.07 * math.log(2)
    assert predicted(threshold - 1e-3, 0.07) == 0
    assert predicted(threshold + 1e-3, 0.07) == 1
    assert predicted(threshold - 1e-3, 0.1) == 1


def test_dinov2s_softmax_over_the_largest_k_gives_the_same_votes():
    """Its code takes the softmax over all 200 and sums the first k; ours is over the k."""
    cosines = -np.sort(-random(5, 200), axis=1)
    over_all, over_k = softmax_weights(cosines)[:, :10], softmax_weights(cosines[:, :10])
    shares = over_all / over_all.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shares, over_k, rtol=1e-9)


def test_knn_refuses_labels_that_do_not_fit_and_an_empty_bank():
    features, labels = clusters(2)
    with pytest.raises(DataError, match="one label per image"):
        knn_predict(features, labels[:-1], features, labels)
    with pytest.raises(DataError, match="one label per image"):
        knn_predict(None, None, features, labels[:-1])
    with pytest.raises(DataError, match="0 images to compare"):
        knn_predict(None, None, features[:1], labels[:1])
    with pytest.raises(DataError, match="one label per image"):
        evidence(features, labels[:-1])
    with pytest.raises(DataError, match="0 images to compare"):
        dinov2_knn(evidence(features[:1], labels[:1]))
    features[0, 0] = np.inf
    with pytest.raises(VerificationError, match="infinite"):
        knn_predict(None, None, features, labels)


def test_the_task_is_the_prediction():
    bank, bank_labels = clusters(30, noise=0.6)
    queries, labels = clusters(40, noise=0.6, seed=1)
    worse = queries + random(*queries.shape, seed=2)
    found = dinov2_knn(evidence(queries, labels, pruned=worse, bank=bank, bank_labels=bank_labels))
    assert list(found) == ["knn_top1", "knn_k10_top1"]
    for metric, k in (("knn_top1", 20), ("knn_k10_top1", 10)):
        for role, rows in (("baseline", queries), ("pruned", worse)):
            expected = knn_predict(bank, bank_labels, rows, labels, k=k) == labels
            np.testing.assert_array_equal(found[metric].scores[role], expected)
    assert 0.5 < found["knn_top1"].scores["baseline"].mean() < 1
    task = found["knn_top1"].task
    assert (task.images, task.bank_images, task.classes) == (120, 90, 3)
    assert task.chance == pytest.approx(1 / 3)
    assert "k = 20" in task.protocol
    assert "0.07" in task.protocol


@pytest.mark.parametrize(("per_class", "expected"), [(100, 3), (200, 4), (5, 1)])
def test_every_k_that_a_class_has_images_for_is_reported(per_class, expected):
    bank, labels = clusters(per_class)
    found = dinov2_knn(evidence(bank[:30], labels[:30], bank=bank, bank_labels=labels))
    assert len(found) == expected
    left_out = "is left out" in found["knn_top1"].task.protocol
    assert left_out == (expected < 4)


def test_a_small_bank_is_said_to_be_small():
    queries, labels = clusters(4, seed=1)

    def protocol(per_class: int) -> str:
        bank, bank_labels = clusters(per_class)
        chosen = evidence(queries, labels, bank=bank, bank_labels=bank_labels)
        return dinov2_knn(chosen)["knn_top1"].task.protocol

    assert "Only 6 images are there to vote" in protocol(2)
    assert "k is above the 10 images a class" in protocol(10)
    assert "images a class, so most" not in protocol(20)


def test_classes_that_nobody_can_vote_for_are_counted():
    bank, bank_labels = clusters(20)
    queries, labels = clusters(4, classes=4)
    found = dinov2_knn(evidence(queries, labels, bank=bank, bank_labels=bank_labels))
    task = found["knn_top1"].task
    assert "4 of 16 images, of 1 classes, have no other image of their class" in task.protocol
    assert found["knn_top1"].scores["baseline"][12:].sum() == 0
    alone = dinov2_knn(evidence(*clusters(1)))["knn_top1"].task
    assert "3 of 3 images" in alone.protocol
    assert alone.bank_images is None
    assert "leave-one-out" in alone.why["bank_images"]


def test_snapvits_protocol_is_scikit_learns_classifier():
    """What its `evaluate_knn` calls: normalised features, 20 neighbours, one vote each."""
    from sklearn.neighbors import KNeighborsClassifier

    bank, bank_labels = clusters(40, classes=5, noise=0.7)
    queries, labels = clusters(30, classes=5, noise=0.7, seed=1)

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    library = KNeighborsClassifier(n_neighbors=20).fit(unit(bank), bank_labels)
    expected = library.predict(unit(queries)) == labels
    found = snapvit_knn(evidence(queries, labels, bank=bank, bank_labels=bank_labels))
    hits = found["snapvit_knn_top1"].scores["baseline"]
    np.testing.assert_array_equal(hits, expected)
    assert 0.3 < hits.mean() < 0.95
    weighted = dinov2_knn(evidence(queries, labels, bank=bank, bank_labels=bank_labels))
    assert (weighted["knn_top1"].scores["baseline"] != hits).any()
