"""PyTorch runs a checkpoint as the model itself computes it."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from ampdeploy.checkpoint import save_model
from ampdeploy.errors import ArtifactError
from ampdeploy.targets.base import get_target
from tests.targets.onnx_samples import images


def test_checkpoint_gives_the_models_own_features(tmp_path, tiny_model):
    path = tmp_path / "baseline.safetensors"
    save_model(tiny_model, path)
    x = images(2, size=tiny_model.spec.image_size)
    with torch.no_grad():
        expected = tiny_model(torch.from_numpy(x))
    with get_target("torch").open(path) as runner:
        out = runner.run(x)
        assert runner.image_size == tiny_model.spec.image_size
    # A GPU, where there is one, rounds differently.
    np.testing.assert_allclose(out["features"], expected.features.numpy(), rtol=1e-2, atol=1e-2)
    assert out["features"].dtype == np.float32
    assert expected.patch_features is not None
    assert out["patch_features"].shape == tuple(expected.patch_features.shape)
    assert runner.output_names == tuple(out)


def test_the_model_is_timed_inside_the_whole_and_shared_by_siblings(tmp_path, tiny_model):
    path = tmp_path / "baseline.safetensors"
    save_model(tiny_model, path)
    x = images(2, size=tiny_model.spec.image_size)
    with get_target("torch").open(path) as runner:
        took = runner.run_timed(x)
        assert 0 < took.compute_ms < took.end_to_end_ms
        assert runner.compute_clock.startswith("host:")
        with runner.sibling() as sibling:
            np.testing.assert_array_equal(sibling.run(x)["features"], runner.run(x)["features"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_cuda_events_time_the_model(tmp_path, tiny_model):
    path = tmp_path / "baseline.safetensors"
    save_model(tiny_model, path)
    with get_target("torch-cuda").open(path) as runner:
        for _ in range(3):
            took = runner.run_timed(images(2, size=tiny_model.spec.image_size))
        assert 0 < took.compute_ms < took.end_to_end_ms
        assert runner.compute_clock.startswith("GPU:")


def test_damaged_checkpoint_is_an_artifact_error(tmp_path):
    path = tmp_path / "slim.safetensors"
    path.write_bytes(b"not safetensors")
    with pytest.raises(ArtifactError):
        get_target("torch").open(path)


BLOCKED = """
import sys
for name in ("torch", "timm"):
    sys.modules[name] = None  # makes `import torch` fail as if it were absent
from ampdeploy.errors import MissingDependencyError
from ampdeploy.targets.base import get_target
try:
    get_target("torch").check()
except MissingDependencyError as error:
    print(error)
"""


def test_without_torch_the_error_says_how_to_install_it():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED], capture_output=True, text=True, check=True
    )
    assert "pip install '.[cpu]' in a checkout of ampdeploy" in done.stdout
