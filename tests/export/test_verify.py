from __future__ import annotations

import numpy as np
import onnx
import pytest

from ampdeploy.errors import ArtifactError, DataError, VerificationError
from ampdeploy.export.verify import verify_onnx

TOLERANCES = {"max_relative_diff": 1e-4, "min_cosine": 0.999999}


def verify(path, case, *, images=None, reference=None, batches=(1, 2)):
    return verify_onnx(
        path,
        case.images.numpy() if images is None else images,
        case.reference if reference is None else reference,
        batches=batches,
        **TOLERANCES,
    )


def with_weight(source, target, name, change):
    """Copy an ONNX file with one initialiser changed."""
    model = onnx.load(source)
    (tensor,) = [tensor for tensor in model.graph.initializer if tensor.name.endswith(name)]
    values = onnx.numpy_helper.to_array(tensor).copy()
    change(values)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(model, target)
    return target


def test_a_changed_weight_is_caught_at_every_batch_size(exported, tmp_path):
    def shift(values):
        values[0] += 0.5

    case = exported("plain")
    path = with_weight(case.path, tmp_path / "bad.onnx", "blocks.1.mlp.fc1.bias", shift)
    with pytest.raises(VerificationError) as caught:
        verify(path, case)
    message = str(caught.value)
    for name in case.reference:
        for batch in (1, 2):
            assert f"batch {batch}, {name}: largest difference" in message
            assert f"batch {batch}, {name}: smallest cosine" in message
        assert f"{name} 0." in message.splitlines()[0]


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_features_of_any_scale_are_held_to_the_same_precision(exported, tmp_path, scale):
    case = exported("plain")
    path = tmp_path / "scaled.onnx"
    scaled = onnx.load(case.path)
    for name in ("norm.weight", "norm.bias"):
        (tensor,) = [t for t in scaled.graph.initializer if t.name.endswith(f"backbone.{name}")]
        values = onnx.numpy_helper.to_array(tensor) * np.float32(scale)
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    onnx.save(scaled, path)
    reference = {name: values * np.float32(scale) for name, values in case.reference.items()}
    for seen in verify(path, case, reference=reference):
        rms = np.sqrt(np.square(reference[seen.output], dtype=np.float64).mean())
        assert seen.max_abs_diff == pytest.approx(seen.max_relative_diff * rms)
        assert 0 < seen.max_relative_diff < 2e-5

    # One element, off by a part in a thousand: no cosine shows it.
    reference["features"][-1, 0] += np.float32(1e-3 * scale)
    with pytest.raises(VerificationError, match="--max-relative-diff") as caught:
        verify(path, case, reference=reference)
    assert "features: largest difference 0.000" in str(caught.value)
    assert "smallest cosine" not in str(caught.value)


def test_a_reference_of_zeros_is_matched_by_zeros_alone(exported, tmp_path):
    case = exported("plain")
    reference = {**case.reference, "features": np.zeros_like(case.reference["features"])}
    with pytest.raises(VerificationError, match="features: largest difference inf of the RMS"):
        verify(case.path, case, reference=reference)


def test_not_finite_is_a_failure(exported, tmp_path):
    def poison(values):
        values[0] = np.nan

    case = exported("plain")
    path = with_weight(case.path, tmp_path / "nan.onnx", "blocks.1.mlp.fc1.bias", poison)
    with pytest.raises(VerificationError, match=r"batch 2, patch_features: .* not finite"):
        verify(path, case)


@pytest.mark.parametrize("batches", [(1,), (2, 3), (5,), (8,)])
def test_every_image_is_compared_at_every_batch_size(exported, batches):
    case = exported("plain")
    comparisons = verify(case.path, case, batches=batches)
    assert len(comparisons) == len(batches) * len(case.reference)
    # The last image alone disagrees: whatever the batch size, it must be seen.
    reference = {name: values.copy() for name, values in case.reference.items()}
    reference["features"][-1] *= -1
    with pytest.raises(VerificationError, match="features: smallest cosine -1"):
        verify(case.path, case, reference=reference, batches=batches)


def test_a_fixed_batch_is_reported_with_the_batches_that_fail(exported, tmp_path):
    case = exported("plain")
    model = onnx.load(case.path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    onnx.save(model, tmp_path / "fixed.onnx")
    with pytest.raises(VerificationError, match="batch 2: ONNX Runtime cannot run it") as caught:
        verify(tmp_path / "fixed.onnx", case)
    assert "batch 1:" not in str(caught.value)


def test_other_inputs_are_named(exported, tmp_path):
    case = exported("plain")
    model = onnx.load(case.path)
    model.graph.input[0].name = "pixel_values"
    for node in model.graph.node:
        node.input[:] = ["pixel_values" if name == "images" else name for name in node.input]
    onnx.save(model, tmp_path / "other.onnx")
    with pytest.raises(ArtifactError, match=r"takes pixel_values .* expected one float32 input"):
        verify(tmp_path / "other.onnx", case)


def test_other_image_size_is_named(exported):
    case = exported("plain")
    images = np.zeros((5, 3, 28, 28), np.float32)
    with pytest.raises(ArtifactError, match=r"images of \[3, 56, 56\] .* are \[3, 28, 28\]"):
        verify(case.path, case, images=images)


def test_other_outputs_are_named(exported):
    case = exported("plain")
    reference = {"features": case.reference["features"]}
    with pytest.raises(ArtifactError, match="export of another model"):
        verify(case.path, case, reference=reference)


def test_other_width_is_a_mismatch(exported):
    case = exported("plain")
    reference = {**case.reference, "features": case.reference["features"][:, :-1]}
    with pytest.raises(VerificationError, match=r"features: its shape is \(5, 32\)"):
        verify(case.path, case, reference=reference)


def test_unusable_references_are_refused(exported):
    case = exported("plain")
    with pytest.raises(DataError, match="for 4 images, but there are 5"):
        verify(case.path, case, reference={"features": case.reference["features"][:4]})
    with pytest.raises(DataError, match="nothing to compare"):
        verify(case.path, case, reference={})
    with pytest.raises(DataError, match="at least one"):
        verify(case.path, case, images=case.images.numpy()[:0])
    broken = case.reference["features"].copy()
    broken[0, 0] = np.inf
    with pytest.raises(DataError, match="1 of 160 values"):
        verify(case.path, case, reference={**case.reference, "features": broken})
