"""Memory in real child processes."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.memory import measure_memory
from ampdeploy.errors import AmpDeployError, ConfigError
from tests.targets.onnx_samples import write_linear_model

MIB = 1 << 20


def test_larger_model_takes_more_memory(tmp_path):
    # 3 * 64 * 64 inputs: 12288 * 4 bytes per unit of width.
    write_linear_model(tmp_path / "small.onnx", size=64, width=8, patches=False)
    write_linear_model(tmp_path / "large.onnx", size=64, width=2048, patches=False)
    weights = 12288 * 4 * 2048
    small = measure_memory("ort", tmp_path / "small.onnx", batch_size=1, threads=1)
    large = measure_memory("ort", tmp_path / "large.onnx", batch_size=1, threads=1)
    assert large.memory_bytes is not None
    assert small.memory_bytes is not None
    assert large.memory_bytes - small.memory_bytes > 0.8 * weights
    assert large.peak_rss_bytes - large.rss_runtime_bytes == large.memory_bytes
    assert large.peak_rss_bytes >= large.rss_loaded_bytes > large.rss_runtime_bytes > 0
    assert (large.batch_size, large.device) == (1, "cpu")


def test_parents_memory_does_not_leak_into_the_measurement(tmp_path):
    # ru_maxrss survives exec, so a large parent would show up in it; VmHWM does not.
    write_linear_model(tmp_path / "m.onnx", patches=False)
    ballast = np.ones(600 * MIB, np.uint8)
    result = measure_memory("ort", tmp_path / "m.onnx", batch_size=1, threads=1)
    assert ballast[-1] == 1
    assert result.memory_bytes is not None
    assert result.memory_bytes < 300 * MIB


def test_failed_worker_tells_its_reason(tmp_path):
    (tmp_path / "m.onnx").write_text("text")
    with pytest.raises(AmpDeployError, match=r"(?s)memory of m\.onnx on ort at batch 1.*ONNX"):
        measure_memory("ort", tmp_path / "m.onnx", batch_size=1)
    with pytest.raises(AmpDeployError, match="unknown target 'nope'"):
        measure_memory("nope", tmp_path / "m.onnx", batch_size=1)


def test_batch_must_be_positive(tmp_path):
    with pytest.raises(ConfigError, match="batch size is 0"):
        measure_memory("ort", tmp_path / "m.onnx", batch_size=0)
