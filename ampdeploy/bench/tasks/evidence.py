"""What a task judges, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ampdeploy.errors import DataError
from ampdeploy.report.result import Task

BASELINE, PRUNED = ROLES = ("baseline", "pruned")


class TaskSkippedError(Exception):
    """These images cannot show what the task measures; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What both models computed from the same images, and what these show.

    Array legend: N queries, M bank images, C feature width.
    """

    queries: Mapping[str, np.ndarray]
    """Role -> (N, C), the images that are judged."""
    query_labels: np.ndarray
    """(N,) positions in `classes`."""
    bank: Mapping[str, np.ndarray] | None
    """Role -> (M, C), labelled images to judge with; None: the other queries."""
    bank_labels: np.ndarray | None
    """(M,) positions in `classes`; None with `bank` None."""
    classes: tuple[str, ...]
    """All classes, sorted by name."""
    patch_means: Mapping[str, np.ndarray] | None = None
    """Role -> (N, C), mean patch feature of each query, for heads that read it."""

    def __post_init__(self) -> None:
        _check_labels("query", self.queries, self.query_labels)
        if self.bank is not None:
            _check_labels("bank", self.bank, self.bank_labels)

    @property
    def others(self) -> int:
        """Images that each query is compared with."""
        return len(self.query_labels) - 1 if self.bank_labels is None else len(self.bank_labels)

    @property
    def voters(self) -> np.ndarray:
        """Labels of the images that queries are compared with, itself among them if there is no
        bank."""
        return self.query_labels if self.bank_labels is None else self.bank_labels

    @cached_property
    def relevant(self) -> np.ndarray:
        """(N,) how many of the `others` have the query's own label."""
        counts = np.bincount(self.voters, minlength=len(self.classes))
        own: np.ndarray = counts[self.query_labels] - (self.bank_labels is None)
        return own

    @property
    def images_per_class(self) -> float:
        """Mean number of `others` in a class that has any."""
        return self.others / max(1, len(np.unique(self.voters)))

    def unreachable(self) -> str | None:
        """A sentence on queries whose class none of the `others` is in; None: there are none."""
        alone = self.relevant == 0
        if not alone.any():
            return None
        classes = len(np.unique(self.query_labels[alone]))
        return (
            f"{int(alone.sum())} of {len(alone)} images, of {classes} classes, have no other image "
            "of their class to be found by, and count as wrong."
        )

    def task(
        self,
        protocol: str,
        *,
        chance: float | None = None,
        alone: str | None = "leave-one-out: the other images vote",
        notes: list[str],
    ) -> Task:
        """The facts of one metric.

        Args:
            protocol: In words, with its constants and source.
            chance: What guessing gives; None: one in so many classes.
            alone: What is done without a bank; None: the task never looks at other images.
            notes: Sentences on what a reader must know; they follow the protocol.
        """
        why = {}
        if self.bank_labels is None or alone is None:
            why["bank_images"] = alone or "none is needed"
        return Task(
            protocol=" ".join([f"{protocol.rstrip('.')}.", *notes]),
            images=len(self.query_labels),
            bank_images=None if why or self.bank_labels is None else len(self.bank_labels),
            classes=len(self.classes),
            chance=1 / len(self.classes) if chance is None else chance,
            why=why,
        )


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One metric of both models."""

    scores: Mapping[str, np.ndarray]
    """Role -> (N,) of each query, in [0, 1]; the metric is the mean."""
    task: Task


def _check_labels(what: str, features: Mapping[str, np.ndarray], labels: np.ndarray | None) -> None:
    for role, rows in features.items():
        if labels is None or len(labels) != len(rows):
            raise DataError(
                f"{len(rows)} {what} images of the {role} model came with "
                f"{None if labels is None else len(labels)} labels. Give one label per image."
            )
