"""What is wrong fails, whatever is wrong: values, goldens, interface."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.device.bundle import contents as form
from ampdeploy.device.install.bundle import InstallOptions, install_bundle
from ampdeploy.device.self_test import read_goldens, run_batched
from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.targets.base import get_target
from tests.device.bundles import reseal


def test_batches_are_filled_up_and_cut_off(small):
    goldens = read_goldens(form.read_bundle(small))
    with get_target("ort").open(small / "model.fp16.onnx") as runner:
        whole = runner.run(goldens.images)
        for batch in (1, 3, 8):
            found = run_batched(runner, goldens.images, batch)
            for name, values in whole.items():
                assert found[name].shape == values.shape
                np.testing.assert_allclose(found[name], values, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a.pop("images"),
        lambda a: a.pop("features"),
        lambda a: a.update(images=a["images"][:2]),
        lambda a: a.update(features=a["features"][:2]),
        lambda a: a.update(features=a["features"] * np.nan),
        lambda a: a.update(images=a["images"].astype(np.float64)),
    ],
)
def test_goldens_that_are_none_are_refused(small, change):
    arrays = form.read_bundle(small).arrays(form.GOLDENS)
    change(arrays)
    np.savez(small / form.GOLDENS, **arrays)
    with pytest.raises(ArtifactError, match="expected 4 finite float32 images of 160 px"):
        read_goldens(reseal(small))


def test_pickles_are_not_opened(small):
    np.savez(small / form.GOLDENS, images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(ArtifactError, match="holds no arrays"):
        read_goldens(reseal(small))


def test_goldens_of_another_interface_fail(small, tmp_path):
    arrays = form.read_bundle(small).arrays(form.GOLDENS)
    del arrays["patch_features"]
    np.savez(small / form.GOLDENS, **arrays)
    reseal(small)
    with pytest.raises(VerificationError, match="They are not of one model"):
        install_bundle(small, InstallOptions(target="ort", out=tmp_path / "engine"))


def test_values_that_are_not_finite_fail(small, tmp_path):
    """A weight that FP16 cannot hold, as a typed graph that nobody verified would have it."""
    import onnx
    from onnx import numpy_helper

    model = onnx.load(small / "model.fp16.onnx")
    weight = next(w for w in model.graph.initializer if len(w.dims) == 2 and w.data_type == 10)
    values = numpy_helper.to_array(weight).copy()
    values[0] = np.inf
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, small / "model.fp16.onnx")
    reseal(small)
    options = InstallOptions(target="ort", out=tmp_path / "engine", untested=True)
    with pytest.raises(VerificationError, match="NaN or infinite"):
        install_bundle(small, options)
    assert not (tmp_path / "engine").exists()


def test_a_bar_of_the_bundle_is_what_counts(small, tmp_path):
    reseal(small, min_cosine_p1=1.0)
    with pytest.raises(VerificationError, match="must be 1 or more"):
        install_bundle(small, InstallOptions(target="ort", out=tmp_path / "engine"))
