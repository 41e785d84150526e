"""What every runner refuses, and which target is picked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError, UnknownNameError
from ampdeploy.targets.base import Runner, get_target, target_for, target_names

SIZE = 4


class MeanRunner(Runner):
    """Features are the mean of each channel."""

    def __init__(self, *, batches: tuple[int, int | None] = (1, None)) -> None:
        super().__init__(name="mean", image_size=SIZE, output_names=("features",), batches=batches)
        self.closed_times = 0
        self.ran: list[int] = []

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.ran.append(len(images))
        return {"features": images.mean(axis=(2, 3))}

    def _close_impl(self) -> None:
        self.closed_times += 1


def ones(*shape: int, dtype: type = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


def test_valid_images_run():
    with MeanRunner() as runner:
        out = runner.run(ones(2, 3, SIZE, SIZE))
    np.testing.assert_array_equal(out["features"], ones(2, 3))


@pytest.mark.parametrize(
    ("images", "seen"),
    [
        (ones(2, 3, SIZE, SIZE, dtype=np.float64), "dtype is float64"),
        (ones(2, 3, SIZE, SIZE, dtype=np.uint8), "dtype is uint8"),
        (ones(2, 3, 5, 5), r"shape is \(2, 3, 5, 5\)"),
        (ones(2, SIZE, SIZE, 3), r"shape is \(2, 4, 4, 3\)"),
        (ones(3, SIZE, SIZE), r"shape is \(3, 4, 4\)"),
        (ones(0, 3, SIZE, SIZE), r"shape is \(0, 3, 4, 4\)"),
        (ones(2, 3, SIZE, SIZE).transpose(0, 1, 3, 2), "strides"),
        ([[1.0]], "given a list"),
    ],
)
def test_other_images_are_refused_with_what_was_seen_and_expected(images, seen):
    with MeanRunner() as runner, pytest.raises(AmpDeployError, match=seen) as caught:
        runner.run(images)
    assert "(B, 3, 4, 4)" in str(caught.value)


def test_fixed_batch_is_enforced():
    with MeanRunner(batches=(2, 2)) as runner:
        runner.run(ones(2, 3, SIZE, SIZE))
        with pytest.raises(AmpDeployError, match=r"exactly 2; it was given 3"):
            runner.run(ones(3, 3, SIZE, SIZE))
    with (
        MeanRunner(batches=(2, 4)) as runner,
        pytest.raises(AmpDeployError, match=r"2 to 4; it was given 1"),
    ):
        runner.run(ones(1, 3, SIZE, SIZE))


@pytest.mark.parametrize(
    ("batches", "count", "ran"),
    [
        ((1, None), 7, [7]),
        ((1, 3), 7, [3, 3, 1]),
        ((2, 3), 7, [3, 3, 2]),
        ((8, 8), 7, [8]),
        ((8, 8), 3, [8]),
        ((8, 8), 16, [8, 8]),
    ],
)
def test_any_number_of_images_runs_in_the_batches_that_there_are(batches, count, ran):
    images = np.random.default_rng(0).random((count, 3, SIZE, SIZE), dtype=np.float32)
    with MeanRunner(batches=batches) as runner:
        out = runner.run_all(images)
        np.testing.assert_allclose(out["features"], images.mean(axis=(2, 3)), rtol=1e-6)
        assert runner.ran == ran
        with pytest.raises(AmpDeployError, match=r"shape is \(0, 3, 4, 4\)"):
            runner.run_all(images[:0])


def test_a_runner_without_a_clock_of_its_device_says_so():
    with MeanRunner() as runner:
        took = runner.run_timed(ones(2, 3, SIZE, SIZE))
        assert took.end_to_end_ms > 0
        assert took.compute_ms is None
        assert runner.why_no_compute_clock
        with pytest.raises(AmpDeployError, match="dtype is float64"):
            runner.run_timed(ones(2, 3, SIZE, SIZE, dtype=np.float64))
        with pytest.raises(NotImplementedError, match="MeanRunner cannot be run by several"):
            runner.sibling()
    with pytest.raises(RuntimeError, match="closed"):
        runner.sibling()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run_timed(ones(2, 3, SIZE, SIZE))


class ForgetfulRunner(MeanRunner):
    """Promises a clock and has none."""

    compute_clock = "promised"


def test_a_clock_that_was_promised_must_exist():
    with ForgetfulRunner() as runner, pytest.raises(NotImplementedError, match="ForgetfulRunner"):
        runner.run_timed(ones(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("name", target_names())
def test_only_tensorrt_launches_cuda_graphs(name):
    target = get_target(name)
    graphed = target.with_cuda_graph()
    if name.startswith("trt"):
        assert type(graphed) is type(target)
    else:
        assert graphed is None
        assert "CUDA graph" in target.why_no_cuda_graph


def test_leaving_the_block_closes_once_and_running_then_is_a_bug():
    with MeanRunner() as runner:
        pass
    runner.close()
    assert runner.closed_times == 1
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(ones(1, 3, SIZE, SIZE))


@pytest.mark.parametrize("name", target_names())
def test_every_registered_target_has_its_own_name(name):
    assert get_target(name).name == name


def test_unknown_target_suggests_a_near_one():
    with pytest.raises(UnknownNameError, match=r"'ort-cud'.*Did you mean 'ort-cuda'"):
        get_target("ort-cud")


def test_target_by_suffix():
    assert target_for(Path("a/model.onnx")).name == "ort"
    assert target_for(Path("slim.safetensors")).name == "torch"
    with pytest.raises(ArtifactError, match=r"\.onnx \(ort\).*\.plan \(trt, trt-rtx\)"):
        target_for(Path("model.pt"))


@pytest.mark.parametrize("file", ["engine.plan", "engine.engine"])
def test_an_engine_is_opened_by_what_built_it(tmp_path, file):
    with pytest.raises(ArtifactError, match=r"has no engine\.json beside it"):
        target_for(tmp_path / file)
    with pytest.raises(ArtifactError, match="--target trt or trt-rtx"):
        get_target("ort").open(tmp_path / file)


def test_opening_checks_suffix_file_and_threads(tmp_path):
    ort = get_target("ort")
    with pytest.raises(ArtifactError, match="--target torch"):
        ort.open(tmp_path / "slim.safetensors")
    with pytest.raises(ArtifactError, match="no file"):
        ort.open(tmp_path / "absent.onnx")
    with pytest.raises(ConfigError, match="threads is 0"):
        ort.open(tmp_path / "absent.onnx", threads=0)
