"""Classification by a head that the user has: top-1 and top-5. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ampdeploy.bench.tasks.evidence import Evidence, Outcome
from ampdeploy.errors import ArtifactError
from ampdeploy.models.registry import close_matches

TOP1_METRIC = "supervised_top1"
TOP5_METRIC = "supervised_top5"
NAMED_CLASSES = 5  # named one by one in messages
SORTED = "the sorted names of the image folders"


@dataclass(frozen=True, kw_only=True)
class Head:
    """A linear classifier: logits = features @ weight.T + bias. K classes."""

    name: str
    """File name, for messages and the report."""
    sha256: str
    weight: np.ndarray
    """(K, C), or (K, 2C) for features followed by the mean patch feature."""
    bias: np.ndarray
    """(K,)"""
    classes: tuple[str, ...] | None
    """Name of each row; None: nobody has said it."""
    order: str = "named in the file"
    """Where `classes` come from, in words."""


def reads_patches(head: Head, feature_dim: int) -> bool:
    """Whether the head takes features and mean patch features side by side, as DINOv2's do."""
    return head.weight.shape[1] == 2 * feature_dim


def check_head(
    head: Head, classes: Sequence[str], *, feature_dim: int, has_patches: bool
) -> np.ndarray:
    """The row of the head for each of `classes`.

    Args:
        head: What classifies.
        classes: Names of the images' classes, sorted.
        feature_dim: Width C of the models' features.
        has_patches: Whether the models give patch features.

    Raises:
        ArtifactError: The head is of another width, or does not have these classes.
    """
    rows, width = head.weight.shape
    if width != feature_dim and not (reads_patches(head, feature_dim) and has_patches):
        also = f", or {2 * feature_dim} with the mean patch feature behind it"
        raise ArtifactError(
            f"head {head.name} reads features of width {width}; these models give "
            f"{feature_dim}{also if has_patches else ''}. Give a head that was trained on the "
            "features of this model, before any projection."
        )
    if head.classes is None:
        if rows != len(classes):
            raise ArtifactError(
                f"head {head.name} has {rows} classes and does not name them, and the images have "
                f"{len(classes)}, so which row is which cannot be told. Name them in the file, as "
                'the JSON list "classes" (safetensors: in the metadata), or use images of all its '
                "classes."
            )
        return np.arange(rows)
    position = {name: row for row, name in enumerate(head.classes)}
    missing = [name for name in classes if name not in position]
    if missing:
        close = close_matches(missing[0], head.classes)
        raise ArtifactError(
            f"{len(missing)} of the {len(classes)} classes of the images are not among the "
            f"{rows} of head {head.name}: {', '.join(missing[:NAMED_CLASSES])}"
            f"{', ...' if len(missing) > NAMED_CLASSES else ''}.{close} Name the folders as the "
            "head names its classes."
        )
    return np.array([position[name] for name in classes])


def supervised(evidence: Evidence, head: Head) -> dict[str, Outcome]:
    """Top-1, and top-5 where there are more than five classes, of one head on both models.

    Raises:
        ArtifactError: The head does not fit; see `check_head`.
    """
    width = next(iter(evidence.queries.values())).shape[1]
    rows = check_head(
        head,
        evidence.classes,
        feature_dim=width,
        has_patches=evidence.patch_means is not None,
    )
    own = rows[evidence.query_labels]
    ranks = {}
    for role, features in evidence.queries.items():
        if reads_patches(head, width) and evidence.patch_means is not None:
            features = np.concatenate([features, evidence.patch_means[role]], axis=1)
        ranks[role] = rank_of(features.astype(np.float64) @ head.weight.T + head.bias, own)
    total = len(head.weight)
    reads = "features and mean patch feature" if reads_patches(head, width) else "features"
    order = head.order if head.classes is not None else SORTED
    protocol = (
        f"linear head {head.name} (sha256 {head.sha256[:12]}) on {reads}, {total} classes, {order}"
    )
    notes = []
    if total > len(evidence.classes):
        notes.append(f"Images of {len(evidence.classes)} of them were judged.")
    wanted = {TOP1_METRIC: 1, TOP5_METRIC: 5}
    if total <= wanted[TOP5_METRIC]:
        del wanted[TOP5_METRIC]
        notes.append(f"Top-5 of {total} classes is always right and is left out.")
    return {
        metric: Outcome(
            scores={role: (rank < top).astype(np.float64) for role, rank in ranks.items()},
            task=evidence.task(
                f"top-{top} of {protocol}", chance=top / total, alone=None, notes=notes
            ),
        )
        for metric, top in wanted.items()
    }


def rank_of(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """How many classes come before the right one; of equals the lower class comes first.

    Args:
        logits: (N, K)
        labels: (N,)

    Returns:
        (N,) from 0.
    """
    own = np.take_along_axis(logits, labels[:, None], axis=1)
    before = np.arange(logits.shape[1]) < labels[:, None]
    ranks: np.ndarray = ((logits > own) | ((logits == own) & before)).sum(axis=1)
    return ranks
