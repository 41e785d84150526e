"""ONNX Runtime on small real graphs."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest

from ampdeploy.errors import AmpDeployError, ArtifactError, MissingDependencyError
from ampdeploy.targets.base import get_target
from tests.targets.onnx_samples import SIZE, WIDTH, images, write_huge_model, write_linear_model


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_outputs_are_what_the_graph_computes_at_any_batch(tmp_path, batch):
    path = tmp_path / "model.onnx"
    weight = write_linear_model(path)
    x = images(batch)
    with get_target("ort").open(path, threads=1) as runner:
        out = runner.run(x)
        assert runner.output_names == ("features", "patch_features")
        assert (runner.image_size, runner.device) == (SIZE, "cpu")
    np.testing.assert_allclose(out["features"], x.reshape(batch, -1) @ weight, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(out["patch_features"], x.reshape(batch, 3, -1).swapaxes(1, 2))
    assert out["features"].shape == (batch, WIDTH)


def test_model_without_patch_features(tmp_path):
    write_linear_model(tmp_path / "m.onnx", patches=False)
    with get_target("ort").open(tmp_path / "m.onnx") as runner:
        assert set(runner.run(images(1))) == {"features"} == set(runner.output_names)


def test_static_batch_is_refused_by_us_not_by_the_runtime(tmp_path):
    write_linear_model(tmp_path / "m.onnx", batch=2, patches=False)
    with get_target("ort").open(tmp_path / "m.onnx") as runner:
        runner.run(images(2))
        with pytest.raises(AmpDeployError, match="exactly 2"):
            runner.run(images(1))


def test_text_file_is_an_artifact_error(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("this is a README\n")
    with pytest.raises(ArtifactError, match=r"model\.onnx"):
        get_target("ort").open(path)


@pytest.mark.parametrize(
    ("change", "seen"),
    [
        ({"input_name": "pixel_values"}, "pixel_values"),
        ({"output_name": "logits", "patches": False}, "logits"),
    ],
)
def test_graph_with_other_names_is_refused(tmp_path, change, seen):
    write_linear_model(tmp_path / "m.onnx", **change)
    with pytest.raises(ArtifactError, match=seen):
        get_target("ort").open(tmp_path / "m.onnx")


def test_out_of_memory_says_which_batch(tmp_path):
    write_huge_model(tmp_path / "m.onnx")
    with (
        get_target("ort").open(tmp_path / "m.onnx") as runner,
        pytest.raises(AmpDeployError, match="out of memory on a batch of 1"),
    ):
        runner.run(images(1))


@pytest.mark.skipif(
    "CUDAExecutionProvider" in onnxruntime.get_available_providers(),
    reason="this onnxruntime is a CUDA build",
)
def test_cuda_target_never_falls_back_to_the_cpu(tmp_path):
    write_linear_model(tmp_path / "m.onnx")
    target = get_target("ort-cuda")
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider"):
        target.check()
    with pytest.raises(MissingDependencyError, match="CUDAExecutionProvider"):
        target.open(tmp_path / "m.onnx")
