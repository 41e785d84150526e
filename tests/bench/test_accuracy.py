"""Metrics on cases small enough to work out by hand."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from ampdeploy.bench.accuracy import (
    NEIGHBOURS,
    FidelityAccumulator,
    compare,
    cosine_rows,
    extract,
    knn_agreement,
)
from ampdeploy.errors import DataError, VerificationError
from ampdeploy.report.codec import from_plain
from ampdeploy.report.result import INTERVAL_FIELDS, Fidelity
from ampdeploy.targets.base import get_target
from tests.targets.onnx_samples import images, write_linear_model


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def fidelity(a, b, patches_a=None, patches_b=None, *, k=NEIGHBOURS):
    """Of all images at once."""
    accumulator = FidelityAccumulator(k=k)
    both = [{"features": a}, {"features": b}]
    if patches_a is not None:
        both[0]["patch_features"], both[1]["patch_features"] = patches_a, patches_b
    accumulator.add(*both)
    return accumulator.result()


def test_cosine_of_known_rows():
    a = np.array([[1, 0], [1, 0], [1, 0], [3, 4], [0, 0]], np.float32)
    b = np.array([[2, 0], [0, 5], [-1, 0], [4, 3], [1, 0]], np.float32)
    np.testing.assert_allclose(cosine_rows(a, b), [1, 0, -1, 24 / 25, 0], atol=1e-12)


def test_cosine_refuses_other_shapes_and_values_that_are_not_finite():
    with pytest.raises(VerificationError, match=r"\(2, 3\) and \(2, 4\)"):
        cosine_rows(random(2, 3), random(2, 4))
    broken = random(2, 3)
    broken[1, 2] = np.nan
    with pytest.raises(VerificationError, match="1 of 6"):
        cosine_rows(random(2, 3), broken)


def test_identical_models_are_perfect_whatever_the_scale():
    features, patches = random(30, 8), random(30, 4, 8, seed=1)
    plain = json.loads(json.dumps(fidelity(features, 3 * features, patches, 2 * patches)))
    result = from_plain(Fidelity, plain, where="eval.json")
    assert result.cosine_min == pytest.approx(1)
    assert result.patch_cosine_p1 == pytest.approx(1)
    assert result.knn_agreement == 1
    assert (result.images, result.knn_k, result.why) == (30, 5, {})


def test_orthogonal_features_have_cosine_zero():
    a = np.tile(np.array([[1, 0]], np.float32), (4, 1))
    b = np.tile(np.array([[0, 1]], np.float32), (4, 1))
    result = fidelity(a, b, k=1)
    assert result["cosine_mean"] == result["cosine_p1"] == result["cosine_min"] == 0


def test_percentile_and_minimum_see_the_one_bad_image():
    a = np.tile(np.array([[1, 0]], np.float32), (101, 1))
    b = a.copy()
    b[7] = [-1, 0]
    result = fidelity(a, b)
    assert result["cosine_mean"] == pytest.approx(99 / 101)
    assert result["cosine_min"] == -1
    assert result["cosine_p1"] == pytest.approx(1)  # exactly one of 100 steps lies below


def four_pairs() -> np.ndarray:
    """Eight points on a circle in four tight pairs: the nearest neighbour is the partner."""
    angles = np.deg2rad([0, 5, 90, 95, 180, 185, 270, 275])
    return np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)


def test_neighbour_agreement_of_a_permutation_counts_what_is_shared():
    features = four_pairs()
    assert knn_agreement(features, features, k=1) == 1
    swapped = features[[0, 2, 1, 3, 4, 5, 6, 7]]  # breaks two of the four pairs
    assert knn_agreement(features, swapped, k=1) == 0.5


def test_neighbour_agreement_in_chunks_is_the_same(monkeypatch):
    a, b = random(50, 4), random(50, 4, seed=1)
    whole = knn_agreement(a, b, k=5)
    monkeypatch.setattr("ampdeploy.bench.tasks.neighbours.SIMILARITIES_AT_ONCE", 7 * 50)
    assert knn_agreement(a, b, k=5) == whole
    assert 0 < whole < 0.5


def test_neighbour_agreement_is_null_where_chance_would_look_good():
    result = fidelity(random(10, 4), random(10, 4, seed=1), k=5)
    assert result["knn_agreement"] is None
    assert "10 images" in result["why"]["knn_agreement"]
    with pytest.raises(DataError, match="5 images"):
        knn_agreement(random(5, 4), random(5, 4), k=5)


def test_accumulating_batches_equals_all_at_once():
    a, b = random(23, 6), random(23, 6, seed=1)
    pa, pb = random(23, 5, 6, seed=2), random(23, 5, 6, seed=3)
    accumulator = FidelityAccumulator()
    for rows in (slice(0, 8), slice(8, 16), slice(16, 23)):
        accumulator.add(
            {"features": a[rows], "patch_features": pa[rows]},
            {"features": b[rows], "patch_features": pb[rows]},
        )
    at_once, result = fidelity(a, b, pa, pb), accumulator.result()
    assert result.pop("why") == at_once.pop("why") == {}
    ours, theirs = result.pop("intervals"), at_once.pop("intervals")
    assert ours.keys() == theirs.keys() == set(INTERVAL_FIELDS)
    for name, interval in ours.items():
        assert interval.pop("why") == theirs[name].pop("why")
        assert interval == pytest.approx(theirs[name])
    assert result == pytest.approx(at_once)
    np.testing.assert_array_equal(accumulator.features[1], b)
    np.testing.assert_allclose(accumulator.patch_means[0], pa.mean(axis=1), rtol=1e-6)
    np.testing.assert_allclose(accumulator.patch_means[1], pb.mean(axis=1), rtol=1e-6)
    by_hand = cosine_rows(pa, pb)
    assert result["patch_cosine_mean"] == pytest.approx(by_hand.mean(), abs=1e-6)


def test_accumulator_refuses_what_is_not_one_model_twice():
    accumulator = FidelityAccumulator()
    with pytest.raises(DataError, match="no images"):
        accumulator.result()
    both = {"features": random(2, 3), "patch_features": random(2, 4, 3)}
    with pytest.raises(VerificationError, match="patch features"):
        accumulator.add(both, {"features": random(2, 3)})


def test_every_number_but_the_smallest_has_its_interval():
    a, pa = random(400, 6), random(400, 5, 6, seed=2)
    b, pb = a + 0.5 * random(400, 6, seed=1), pa + 0.5 * random(400, 5, 6, seed=3)
    result = from_plain(Fidelity, fidelity(a, b, pa, pb), where="eval.json")
    assert result.intervals.keys() == set(INTERVAL_FIELDS)
    for name in INTERVAL_FIELDS:
        interval = result.interval(name)
        assert interval.value == getattr(result, name)
        assert interval.ci95_low < interval.value < interval.ci95_high
    assert result.intervals["cosine_p1"].ci95_low == pytest.approx(result.cosine_min)


def test_intervals_of_few_images_say_what_they_lack():
    result = fidelity(random(12, 6), random(12, 6, seed=1))
    assert result["intervals"].keys() == {"cosine_mean", "cosine_p1", "knn_agreement"}
    mean, p1 = (result["intervals"][name] for name in ("cosine_mean", "cosine_p1"))
    assert (mean["ci95_low"], mean["ci95_high"]) == (None, None)
    assert mean["why"]["ci95_low"] == "12 images; an interval needs 20"
    assert p1["ci95_low"] is None
    assert p1["ci95_high"] is not None
    assert p1["why"] == {"ci95_low": "12 images; about 368 would give the lower end"}
    tiny = from_plain(Fidelity, fidelity(random(2, 6), random(2, 6, seed=1)), where="eval.json")
    assert tiny.interval("knn_agreement") is None
    assert tiny.interval("patch_cosine_p1") is None


def test_an_interval_that_a_report_lacks_is_lost_and_its_number_is_the_field():
    result = from_plain(Fidelity, fidelity(random(30, 6), random(30, 6, seed=1)), where="eval.json")
    without = dataclasses.replace(result, intervals={})
    assert without.interval("cosine_mean").lost
    assert "the report has none" in without.interval("cosine_mean").why_open
    other = dataclasses.replace(result, cosine_mean=0.5)
    assert other.interval("cosine_mean").value == 0.5


def test_images_of_different_sizes_are_not_judged_together():
    accumulator = FidelityAccumulator()
    for patches in (4, 4, 5):
        both = {"features": random(2, 3), "patch_features": random(2, patches, 3)}
        if patches == 4:
            accumulator.add(both, both)
    with pytest.raises(VerificationError, match="of 4 and of 5 patches"):
        accumulator.add(both, both)


def test_runners_are_compared_on_the_same_batches(tmp_path):
    write_linear_model(tmp_path / "a.onnx", seed=0)
    write_linear_model(tmp_path / "b.onnx", seed=1)
    batches = [images(4, seed=2), images(3, seed=3)]
    ort = get_target("ort")
    with ort.open(tmp_path / "a.onnx") as a, ort.open(tmp_path / "b.onnx") as b:
        features = extract((a, b), iter(batches))
        compared = compare(a, b, iter(batches))
        same, other = compare(a, a, batches, k=2), compare(a, b, batches, k=2)
        with pytest.raises(DataError, match="no images"):
            extract((a, b), [])
    for found, expected in zip(features, compared.features, strict=True):
        assert found.shape == (7, 4)
        np.testing.assert_array_equal(found, expected)
    assert same.result()["cosine_min"] == pytest.approx(1)
    assert other.result()["cosine_mean"] < 0.9
    assert other.result()["patch_cosine_mean"] == pytest.approx(1)  # patches are the pixels
