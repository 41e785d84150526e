"""ONNX Runtime on small real graphs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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


def test_the_runtimes_own_call_is_timed_inside_the_whole(tmp_path):
    write_linear_model(tmp_path / "m.onnx", size=64)
    with get_target("ort").open(tmp_path / "m.onnx", threads=1) as runner:
        for _ in range(5):
            took = runner.run_timed(images(4, size=64))
            assert 0 < took.compute_ms < took.end_to_end_ms
        assert runner.compute_clock.endswith("session.run")


def test_siblings_compute_the_same_in_several_threads(tmp_path):
    weight = write_linear_model(tmp_path / "m.onnx")
    batches = [images(3, seed=seed) for seed in range(40)]
    with get_target("ort").open(tmp_path / "m.onnx", threads=1) as runner:
        with runner.sibling() as sibling, ThreadPoolExecutor(2) as threads:
            halves = [
                threads.submit(lambda r, b: [r.run(x)["features"] for x in b], *job)
                for job in ((runner, batches[::2]), (sibling, batches[1::2]))
            ]
            found = [half.result() for half in halves]
        with pytest.raises(RuntimeError, match="closed"):
            sibling.run(images(1))
        runner.run(images(1))  # closing a sibling leaves the session open
    for outputs, inputs in zip(found, (batches[::2], batches[1::2]), strict=True):
        for out, x in zip(outputs, inputs, strict=True):
            np.testing.assert_allclose(out, x.reshape(3, -1) @ weight, rtol=1e-4, atol=1e-4)


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
