"""A head on features: ranks, classes, and every way in which it may not fit."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.tasks import Head, check_head
from ampdeploy.bench.tasks.supervised import rank_of, supervised
from ampdeploy.errors import ArtifactError
from tests.bench.tasks.samples import clusters, evidence


def head(weight, *, classes=None) -> Head:
    weight = np.asarray(weight, np.float64)
    return Head(
        name="head.npz",
        sha256="0" * 64,
        weight=weight,
        bias=np.zeros(len(weight)),
        classes=classes,
    )


def names(count: int) -> tuple[str, ...]:
    return tuple(f"class{number:03d}" for number in range(count))


def test_rank_counts_what_comes_before_and_ties_go_to_the_lower_class():
    logits = np.array([[3, 2, 1], [1, 2, 3], [5, 5, 5], [5, 5, 5]])
    assert rank_of(logits, np.array([0, 0, 0, 2])).tolist() == [0, 2, 0, 2]


def test_top1_and_top5_of_both_models():
    features, labels = clusters(4, classes=7, width=8)
    worse = features[:, [1, 0, 2, 3, 4, 5, 6, 7]]  # the first two classes change places
    found = supervised(evidence(features, labels, pruned=worse), head(np.eye(7, 8)))
    assert list(found) == ["supervised_top1", "supervised_top5"]
    assert found["supervised_top1"].scores["baseline"].mean() == 1
    np.testing.assert_array_equal(
        found["supervised_top1"].scores["pruned"], np.repeat([0, 0, 1, 1, 1, 1, 1], 4)
    )
    assert found["supervised_top5"].task.chance == pytest.approx(5 / 7)
    assert found["supervised_top1"].task.bank_images is None
    assert "head.npz" in found["supervised_top1"].task.protocol


def test_named_classes_may_be_in_any_order_and_more_than_the_images_have():
    features, labels = clusters(3)
    backwards = head(np.eye(5, 8)[::-1], classes=names(5)[::-1])
    found = supervised(evidence(features, labels), backwards)
    assert list(found) == ["supervised_top1"]
    assert found["supervised_top1"].scores["baseline"].mean() == 1
    assert found["supervised_top1"].task.chance == pytest.approx(1 / 5)
    assert "Images of 3 of them" in found["supervised_top1"].task.protocol
    assert "Top-5 of 5 classes is always right" in found["supervised_top1"].task.protocol


def test_a_head_may_read_the_mean_patch_feature_too():
    """DINOv2's published linear heads do: hub/classifiers.py."""
    features, labels = clusters(3)
    nothing = np.zeros_like(features)
    wide = head(np.hstack([np.zeros((3, 8)), np.eye(3, 8)]))
    found = supervised(evidence(nothing, labels, patch_means=features), wide)
    assert found["supervised_top1"].scores["baseline"].mean() == 1
    with pytest.raises(ArtifactError, match=r"width 16; these models give 8\."):
        supervised(evidence(features, labels), wide)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (head(np.ones((3, 5))), "reads features of width 5; these models give 8, or 16 with"),
        (head(np.ones((1000, 8))), "1000 classes and does not name them, and the images have 3"),
        (
            head(np.ones((3, 8)), classes=("class000", "class001", "klass002")),
            "1 of the 3 classes .*: class002. Did you mean 'klass002'",
        ),
    ],
)
def test_a_head_that_does_not_fit_is_refused(made, message):
    with pytest.raises(ArtifactError, match=message):
        check_head(made, names(3), feature_dim=8, has_patches=True)
