"""Linear probe: what a linear classifier can read from the features, by scikit-learn's solver."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ampdeploy.bench.tasks.evidence import BASELINE, PRUNED, Evidence, Outcome, TaskSkippedError
from ampdeploy.bench.tasks.neighbours import finite
from ampdeploy.optional import require
from ampdeploy.progress import log

PROBE_METRIC = "probe_top1"
FROZEN_METRIC = "frozen_probe_top1"

# Inverse penalties that are tried, of features scaled to a root mean square of 1.
PENALTIES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
# Taken where no class has an image to spare for choosing.
MIDDLE_PENALTY = 1e-1
LEAST_PROBABILITY = 1e-12  # so that one image cannot make the log loss infinite
FOLDS = 5
OTHER_FOLDS = "cross-validation: the other images train"
MAX_ITERATIONS = 1000
# Multiply-accumulates of one gradient above which it takes minutes: a core does some 10**10 a
# second, and all penalties of both models together take some thousand gradients.
SLOW_GRADIENT = 10**9


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A trained classifier."""

    model: Any
    """scikit-learn's."""
    scale: float
    """Features are divided by it."""
    penalty: float
    converged: bool

    def predict(self, features: np.ndarray) -> np.ndarray:
        """Labels (N,) of features (N, C)."""
        labels: np.ndarray = self.model.predict(_scaled(features, self.scale))
        return labels

    def probabilities(self, features: np.ndarray) -> np.ndarray:
        """(N, K) of the K classes that it was trained on, in their order."""
        shares: np.ndarray = self.model.predict_proba(_scaled(features, self.scale))
        return shares


@dataclass(frozen=True, kw_only=True)
class _Split:
    """Images that train and images that are judged."""

    train: Mapping[str, np.ndarray]
    train_labels: np.ndarray
    judged: np.ndarray
    """Positions among the queries."""


def check_probe() -> None:
    """Raise before anything is computed if the solver is missing.

    Raises:
        MissingDependencyError: scikit-learn is not here.
    """
    require("sklearn.linear_model", needed_by="the linear probe")


def linear_probe(evidence: Evidence, *, seed: int = 0) -> dict[str, Outcome]:
    """Top-1 of a probe trained on each model's own features, and of the baseline's on both.

    The first is what somebody gets who trains a head for the pruned model; the second, what
    somebody gets who keeps the head that was trained on the baseline.

    Multinomial logistic regression with an L2 penalty (lbfgs), trained on the bank; without one,
    on the other folds of the queries. The penalty is chosen on the baseline and used for both, so
    that its choice cannot be the difference: on 420 images of 30 classes, choosing it for each
    model moved the difference by 4 points. It is the one of least log loss in cross-validation,
    which depends less on the split than the accuracy that DINOv2's
    `dinov2/eval/log_regression.py` chooses by.

    Raises:
        TaskSkippedError: The training images are of one class.
        MissingDependencyError: scikit-learn is not here.
        VerificationError: A feature is not finite.
    """
    size = len(evidence.voters) * evidence.queries[BASELINE].shape[1] * len(evidence.classes)
    if size > SLOW_GRADIENT:
        log.warning(
            "        the linear probe trains on %d images of %d classes, which takes long; leave "
            "`probe` out of --tasks to skip it",
            len(evidence.voters),
            len(evidence.classes),
        )
    own = {role: np.zeros(len(evidence.query_labels)) for role in evidence.queries}
    frozen = np.zeros(len(evidence.query_labels))
    probes: dict[str, list[Probe]] = {role: [] for role in evidence.queries}
    for split in _splits(evidence, seed):
        if len(np.unique(split.train_labels)) < 2:
            raise TaskSkippedError(
                "a probe needs training images of two classes or more. Use a folder with more "
                "images a class"
            )
        labels = evidence.query_labels[split.judged]
        penalty = choose_penalty(split.train[BASELINE], split.train_labels, seed=seed)
        for role, features in split.train.items():
            probe = train_probe(features, split.train_labels, penalty)
            probes[role].append(probe)
            judged = evidence.queries[role][split.judged]
            own[role][split.judged] = probe.predict(judged) == labels
        kept = probes[BASELINE][-1].predict(evidence.queries[PRUNED][split.judged])
        frozen[split.judged] = kept == labels
    protocol = _protocol(evidence)
    return {
        PROBE_METRIC: Outcome(
            scores=own,
            task=evidence.task(
                f"{protocol}, for each model its own", alone=OTHER_FOLDS, notes=_notes(probes)
            ),
        ),
        FROZEN_METRIC: Outcome(
            scores={BASELINE: own[BASELINE], PRUNED: frozen},
            task=evidence.task(
                f"{protocol}, on the baseline's features alone and kept for the pruned model, as "
                "by a user who does not train the head again",
                alone=OTHER_FOLDS,
                notes=_notes({BASELINE: probes[BASELINE]}),
            ),
        ),
    }


def choose_penalty(features: np.ndarray, labels: np.ndarray, *, seed: int = 0) -> float:
    """The inverse penalty of least log loss on images held out, every image once.

    Args:
        features: (M, C)
        labels: (M,) of two classes or more.
        seed: Of the folds.
    """
    folds = _folds(labels, FOLDS, seed)
    losses = np.zeros(len(PENALTIES))
    judged = 0
    for fold in np.unique(folds):
        train = folds != fold
        known = np.unique(labels[train])
        held = ~train & np.isin(labels, known)  # a class with one image cannot be learnt
        if len(known) < 2 or not held.any():
            continue
        judged += int(held.sum())
        own = np.searchsorted(known, labels[held])[:, None]
        for number, penalty in enumerate(PENALTIES):
            probe = train_probe(features[train], labels[train], penalty)
            odds = np.take_along_axis(probe.probabilities(features[held]), own, axis=1)
            losses[number] -= np.log(np.maximum(odds, LEAST_PROBABILITY)).sum()
    return PENALTIES[int(np.argmin(losses))] if judged else MIDDLE_PENALTY


def train_probe(features: np.ndarray, labels: np.ndarray, penalty: float) -> Probe:
    """A probe of features (M, C) with labels (M,) of two classes or more."""
    linear = require("sklearn.linear_model", needed_by="the linear probe")
    warning = require("sklearn.exceptions", needed_by="the linear probe").ConvergenceWarning
    pools = require("threadpoolctl", needed_by="the linear probe")  # scikit-learn brings it
    scale = _root_mean_square(features)
    model = linear.LogisticRegression(C=penalty, max_iter=MAX_ITERATIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", warning)
        # Thousands of products of small matrices: two threads took ten times as long as one.
        with pools.threadpool_limits(1):
            model.fit(_scaled(features, scale), labels)
    converged = not any(issubclass(item.category, warning) for item in caught)
    return Probe(model=model, scale=scale, penalty=penalty, converged=converged)


def _root_mean_square(features: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(finite(features), dtype=np.float64)))) or 1.0


def _scaled(features: np.ndarray, scale: float) -> np.ndarray:
    return finite(features).astype(np.float64) / scale


def _folds(labels: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Fold of each image: every class is spread over all folds, as far as its images go."""
    rng = np.random.default_rng(seed)
    folds = np.zeros(len(labels), np.int64)
    position = 0
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        folds[members] = (position + np.arange(len(members))) % count
        position += len(members)
    return folds


def _splits(evidence: Evidence, seed: int) -> Iterator[_Split]:
    if evidence.bank is not None and evidence.bank_labels is not None:
        everything = np.arange(len(evidence.query_labels))
        yield _Split(train=evidence.bank, train_labels=evidence.bank_labels, judged=everything)
        return
    folds = _folds(evidence.query_labels, FOLDS, seed)
    for fold in np.unique(folds):
        train = folds != fold
        yield _Split(
            train={role: features[train] for role, features in evidence.queries.items()},
            train_labels=evidence.query_labels[train],
            judged=np.flatnonzero(~train),
        )


def _protocol(evidence: Evidence) -> str:
    where = "on the bank" if evidence.bank is not None else f"on the other folds of {FOLDS}"
    version = require("sklearn", needed_by="the linear probe").__version__
    return (
        f"logistic regression (scikit-learn {version}, lbfgs, at most {MAX_ITERATIONS} iterations) "
        f"trained {where}, its L2 penalty chosen of {len(PENALTIES)} by {FOLDS}-fold "
        "cross-validation of the baseline on the training images"
    )


def _notes(probes: Mapping[str, list[Probe]]) -> list[str]:
    chosen = sorted({probe.penalty for trained in probes.values() for probe in trained})
    notes = [
        "Chosen C, of features scaled to a root mean square of 1: "
        f"{', '.join(f'{penalty:g}' for penalty in chosen)}."
    ]
    if {PENALTIES[0], PENALTIES[-1]} & set(chosen):
        notes.append(f"It is at the edge of those tried, {PENALTIES[0]:g} to {PENALTIES[-1]:g}.")
    stopped = [role for role, trained in probes.items() if not all(p.converged for p in trained)]
    if stopped:
        notes.append(f"The solver stopped before it had converged for: {', '.join(stopped)}.")
    return notes
