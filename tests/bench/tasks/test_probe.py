"""The linear probe, with scikit-learn's real solver."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ampdeploy.bench.tasks import TaskSkippedError, check_tasks
from ampdeploy.bench.tasks.probe import (
    MIDDLE_PENALTY,
    PENALTIES,
    choose_penalty,
    linear_probe,
    train_probe,
)
from ampdeploy.errors import MissingDependencyError, VerificationError
from tests.bench.tasks.samples import clusters, evidence


def turned(features: np.ndarray) -> np.ndarray:
    """The same features in other coordinates: a new head reads them as well, the old one cannot."""
    return np.roll(features, 3, axis=1)


def test_own_probe_and_frozen_probe_tell_different_things():
    bank, bank_labels = clusters(12)
    queries, labels = clusters(6, seed=1)
    found = linear_probe(
        evidence(
            queries,
            labels,
            pruned=turned(queries),
            bank=bank,
            bank_pruned=turned(bank),
            bank_labels=bank_labels,
        )
    )
    own, frozen = found["probe_top1"], found["frozen_probe_top1"]
    assert own.scores["baseline"].mean() == own.scores["pruned"].mean() == 1
    assert frozen.scores["baseline"].mean() == 1
    assert frozen.scores["pruned"].mean() < 0.6
    assert "kept for the pruned model" in frozen.task.protocol
    assert (own.task.images, own.task.bank_images) == (18, 36)


def test_the_probe_is_scikit_learns():
    from sklearn.linear_model import LogisticRegression

    features, labels = clusters(20, noise=1.0)
    probe = train_probe(features, labels, 0.3)
    rms = np.sqrt(np.mean(features.astype(np.float64) ** 2))
    model = LogisticRegression(C=probe.penalty, max_iter=1000)
    model.fit(features.astype(np.float64) / rms, labels)
    others, _ = clusters(50, noise=1.0, seed=1)
    np.testing.assert_array_equal(
        probe.predict(others), model.predict(others.astype(np.float64) / rms)
    )
    assert probe.converged


def test_the_scale_of_the_features_does_not_matter():
    features, labels = clusters(10, noise=0.5)
    others, _ = clusters(10, noise=0.5, seed=1)
    penalty = choose_penalty(features, labels)
    assert choose_penalty(1000 * features, labels) == penalty
    small = train_probe(features, labels, penalty)
    large = train_probe(1000 * features, labels, penalty)
    np.testing.assert_array_equal(small.predict(others), large.predict(1000 * others))


def test_without_a_bank_no_image_is_judged_by_a_probe_that_saw_it(monkeypatch):
    monkeypatch.setattr("ampdeploy.bench.tasks.probe.PENALTIES", (1.0,))  # learns any labels
    rng = np.random.default_rng(0)
    features = rng.standard_normal((60, 200)).astype(np.float32)
    labels = rng.integers(0, 2, 60)
    found = linear_probe(evidence(features, labels))["probe_top1"]
    assert found.scores["baseline"].mean() < 0.75
    assert "cross-validation" in found.task.why["bank_images"]
    seen = linear_probe(evidence(features, labels, bank=features, bank_labels=labels))
    assert seen["probe_top1"].scores["baseline"].mean() == 1
    separable = linear_probe(evidence(*clusters(10)))
    assert separable["frozen_probe_top1"].scores["pruned"].mean() == 1


def test_one_image_a_class_trains_without_choosing():
    features, labels = clusters(1)
    assert choose_penalty(features, labels) == MIDDLE_PENALTY


def test_the_penalty_suits_the_data_and_is_the_baselines_for_both():
    clean, labels = clusters(12)
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((36, 60)).astype(np.float32)
    assert choose_penalty(clean, labels) == PENALTIES[-1]
    assert choose_penalty(noise, labels) == PENALTIES[0]
    padded = np.hstack([clean, np.zeros((36, 52), np.float32)])
    found = linear_probe(
        evidence(padded, labels, pruned=noise, bank=padded, bank_pruned=noise, bank_labels=labels)
    )
    assert f"mean square of 1: {PENALTIES[-1]:g}." in found["probe_top1"].task.protocol
    assert "at the edge of those tried" in found["probe_top1"].task.protocol


def test_one_class_cannot_be_probed():
    bank, bank_labels = clusters(5, classes=1)
    queries, labels = clusters(2, classes=2)
    with pytest.raises(TaskSkippedError, match="two classes or more"):
        linear_probe(evidence(queries, labels, bank=bank, bank_labels=bank_labels))


def test_a_solver_that_stops_early_is_said_to_have(monkeypatch):
    monkeypatch.setattr("ampdeploy.bench.tasks.probe.MAX_ITERATIONS", 1)
    bank, labels = clusters(10, noise=0.5)
    found = linear_probe(evidence(bank, labels, bank=bank, bank_labels=labels))
    assert "stopped before it had converged" in found["probe_top1"].task.protocol
    monkeypatch.undo()
    found = linear_probe(evidence(bank, labels, bank=bank, bank_labels=labels))
    assert "stopped" not in found["probe_top1"].task.protocol


def test_values_that_are_not_finite_are_refused():
    bank, labels = clusters(5)
    broken = bank.copy()
    broken[0, 0] = np.nan
    with pytest.raises(VerificationError, match="NaN"):
        linear_probe(evidence(bank, labels, bank=broken, bank_labels=labels))


def test_a_missing_solver_is_named_before_anything_runs(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.linear_model", None)
    with pytest.raises(MissingDependencyError, match="linear probe needs"):
        check_tasks(("knn", "probe"))
    check_tasks(("knn", "retrieval"))


def test_a_long_training_is_announced(monkeypatch, caplog):
    monkeypatch.setattr("ampdeploy.bench.tasks.probe.SLOW_GRADIENT", 1)
    linear_probe(evidence(*clusters(5)))
    assert "takes long" in caplog.text
