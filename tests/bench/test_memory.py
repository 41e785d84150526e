"""Memory: on the CPU in real child processes, on a GPU against the stand-in of cuda-python."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import struct
import sys
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from ampdeploy.bench import memory_gauge, memory_worker
from ampdeploy.bench.memory import measure_memory
from ampdeploy.bench.memory_worker import RUNS, measure, peak_rss_bytes, reset_peak_rss
from ampdeploy.bench.weights import file_bytes, weight_bytes
from ampdeploy.device.engine.manifest import read_manifest, write_manifest
from ampdeploy.errors import AmpDeployError, ArtifactError, ConfigError
from tests.device import stand_ins as nvidia
from tests.targets.onnx_samples import write_linear_model
from tests.targets.test_tensorrt import write_engine

MIB = 1 << 20
GIB = 1 << 30


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
    assert large.weight_bytes == weights
    assert large.file_bytes == (tmp_path / "large.onnx").stat().st_size > weights
    assert large.activation_bytes is not None
    # Opening it takes its weights twice for a moment, running it next to nothing.
    assert 0 <= large.activation_bytes < 0.2 * weights
    assert large.peak_rss_bytes > large.rss_loaded_bytes
    assert large.device_bytes is large.available_drop_bytes is None
    assert large.why["device_bytes"] == "it ran on the CPU"


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


def test_weights_are_counted_as_they_are_stored(tmp_path):
    path = tmp_path / "m.onnx"
    write_linear_model(path, size=8, width=4)
    assert weight_bytes(path) == 192 * 4 * 4 + 3 * 8  # the matrix, and a shape of three int64
    model = onnx.load(path)
    half = numpy_helper.from_array(np.zeros((192, 4), np.float16), "weight")
    model.graph.initializer[0].CopyFrom(half)
    onnx.save(model, path)
    assert weight_bytes(path) == 192 * 4 * 2 + 3 * 8
    model.graph.initializer[0].data_type = TensorProto.FLOAT8E4M3FN
    onnx.save(model, path)
    assert weight_bytes(path) == "the size of ONNX's type 17 is not known here"


def test_weights_outside_the_onnx_file_count(tmp_path):
    path = tmp_path / "m.onnx"
    weight = write_linear_model(path, size=16, width=64, patches=False)
    model = onnx.load(path)
    onnx.save(model, path, save_as_external_data=True, location="m.onnx.data")
    assert path.stat().st_size < 10_000
    assert weight_bytes(path) == weight.nbytes
    assert file_bytes(path) >= weight.nbytes + path.stat().st_size


def test_weights_of_a_checkpoint(tmp_path):
    from safetensors.numpy import save_file

    path = tmp_path / "m.safetensors"
    tensors = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(7, np.float16)}
    save_file(tensors, path, metadata={"format": "np"})
    assert weight_bytes(path) == 3 * 5 * 4 + 7 * 2
    header = json.dumps({"a": {"dtype": "F32"}}).encode()
    for damaged in (
        b"",
        b"abc",
        struct.pack("<Q", 1 << 60),
        struct.pack("<Q", len(header)) + header,
    ):
        path.write_bytes(damaged)
        with pytest.raises(ArtifactError, match=r"m\.safetensors is not a safetensors file"):
            weight_bytes(path)
    with pytest.raises(ArtifactError, match="cannot read"):
        weight_bytes(tmp_path / "none.safetensors")
    with pytest.raises(ArtifactError, match=r"m\.txt cannot be counted"):
        weight_bytes(tmp_path / "m.txt")


class Gpu(nvidia.Gpu):
    """The stand-in, with a memory of 6 GiB that what is allocated comes out of."""

    integrated = 0
    context = 300 * MIB
    taken_by_others = 0

    def cudaDeviceGetAttribute(self, key, device):  # noqa: N802 - by NVIDIA's names
        assert (key, device) == ("integrated", 0)
        return nvidia.SUCCESS, self.integrated

    def cudaMemGetInfo(self):  # noqa: N802
        blocks = (block for kind, block in self.live.values() if kind == "device")
        used = sum(ctypes.sizeof(block) for block in blocks)
        # The first question starts CUDA, which takes memory of its own.
        context = self.context if self.calls.count("cudaMemGetInfo") > 1 else 0
        return nvidia.SUCCESS, 6 * GIB - used - context - self.taken_by_others, 6 * GIB


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    gpu = Gpu()
    nvidia.install_cuda(monkeypatch, gpu)
    nvidia.install_driver(monkeypatch)
    nvidia.install_tensorrt(monkeypatch, nvidia.TensorRt(gpu))
    monkeypatch.setenv("AMPDEPLOY_CACHE", str(tmp_path / "cache"))
    return gpu


def engine(folder, **weights):
    path = write_engine(folder)
    manifest = read_manifest(path)
    precision = dataclasses.replace(manifest.precision, weight_bytes=weights)
    write_manifest(path, dataclasses.replace(manifest, precision=precision))
    return path


def test_an_engine_takes_memory_of_the_gpu(tmp_path, gpu):
    path = engine(tmp_path, HALF=1000, FLOAT=24)
    found = measure("trt", path, 2, None)
    # Buffers for its largest batch of 3; CUDA's context is not among it.
    floats = 3 * (3 * nvidia.SIZE**2 + nvidia.WIDTH + nvidia.PATCHES * nvidia.WIDTH)
    assert found.device_bytes == found.memory_bytes == 4 * floats
    assert found.device == "cuda"
    assert found.weight_bytes == 1024
    assert found.activation_bytes == 12345  # as the engine says
    assert found.available_drop_bytes is None
    assert found.why == {"available_drop_bytes": "the GPU has memory of its own"}
    assert gpu.calls.count("cudaMemGetInfo") == 1 + 2 + RUNS
    assert gpu.live == {}


def test_an_engine_that_does_not_say_its_activations(monkeypatch, tmp_path, gpu):
    monkeypatch.delattr(nvidia.Engine, "device_memory_size_v2")
    run = nvidia.Context.execute_async_v3

    def takes_memory(context, stream):
        gpu.taken_by_others = 5 * MIB
        return run(context, stream)

    monkeypatch.setattr(nvidia.Context, "execute_async_v3", takes_memory)
    found = measure("trt", engine(tmp_path), 1, None)
    assert found.activation_bytes == 5 * MIB
    assert found.weight_bytes is None
    assert found.why["weight_bytes"] == "the engine's manifest does not say"


def test_where_memory_is_shared_the_hosts_counts(monkeypatch, tmp_path, gpu):
    gpu.integrated = 1
    left = iter([4 * GIB, 4 * GIB - 30 * MIB, *[4 * GIB - 50 * MIB] * RUNS])
    memory = lambda: SimpleNamespace(available=next(left))  # noqa: E731
    monkeypatch.setattr(memory_gauge, "psutil", SimpleNamespace(virtual_memory=memory))
    found = measure("trt", engine(tmp_path, HALF=8), 1, None)
    assert found.available_drop_bytes == found.memory_bytes == 50 * MIB
    assert found.why == {"device_bytes": "the GPU shares the host's memory"}


def test_memory_that_did_not_fall_is_no_measurement(monkeypatch, tmp_path, gpu):
    gpu.integrated = 1
    left = iter([4 * GIB, *[5 * GIB] * (RUNS + 1)])
    memory = lambda: SimpleNamespace(available=next(left))  # noqa: E731
    monkeypatch.setattr(memory_gauge, "psutil", SimpleNamespace(virtual_memory=memory))
    found = measure("trt", engine(tmp_path), 1, None)
    assert found.memory_bytes is found.available_drop_bytes is None
    assert "gave memory back meanwhile" in found.why["memory_bytes"]


def test_a_gpu_that_cannot_be_asked_says_why(monkeypatch, tmp_path, gpu):
    gpu.fail("cudaMemGetInfo", nvidia.ILLEGAL)
    found = measure("trt", engine(tmp_path), 1, None)
    for name in ("device_bytes", "available_drop_bytes", "memory_bytes"):
        assert getattr(found, name) is None
        assert "cudaMemGetInfo failed: cudaErrorIllegalAddress" in found.why[name]
    assert found.activation_bytes == 12345


@pytest.mark.parametrize("grows", [True, False])
def test_without_a_peak_that_begins_anew_only_a_new_peak_counts(monkeypatch, tmp_path, grows):
    write_linear_model(tmp_path / "m.onnx", patches=False)
    monkeypatch.setattr(memory_worker, "CLEAR_REFS", tmp_path / "none" / "clear_refs")
    peaks = iter([50 * GIB, 50 * GIB + (MIB if grows else 0)])
    monkeypatch.setattr(memory_worker, "peak_rss_bytes", lambda: next(peaks))
    found = measure("ort", tmp_path / "m.onnx", 1, 1)
    if grows:
        assert found.activation_bytes == pytest.approx(
            50 * GIB + MIB - found.rss_loaded_bytes, abs=30 * MIB
        )
    else:
        assert found.activation_bytes is None
        assert found.why["activation_bytes"] == "the peak was while the file was opened"
    assert found.memory_bytes == found.peak_rss_bytes - found.rss_runtime_bytes


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's file")
def test_the_peak_begins_anew():
    ballast = np.ones(300 * MIB, np.uint8)
    before = peak_rss_bytes()
    assert ballast[-1] == 1
    del ballast
    # The kernel counts pages in batches.
    assert peak_rss_bytes() >= before - 8 * MIB
    if not reset_peak_rss():
        pytest.skip("this machine does not let a process reset its peak")
    assert peak_rss_bytes() < before - 200 * MIB


def test_weights_that_are_read_when_first_used_are_no_working_memory(tmp_path):
    """PyTorch maps a checkpoint, so its weights become resident in the first run."""
    from ampdeploy.checkpoint import save_model
    from ampdeploy.models.build import build_model

    path = tmp_path / "m.safetensors"
    save_model(build_model("timm:vit_tiny_patch16_224"), path)
    found = measure_memory("torch", path, batch_size=1, threads=1)
    assert found.weight_bytes is not None
    assert found.activation_bytes is not None
    assert found.weight_bytes > 20 * MIB
    assert found.memory_bytes is not None
    assert found.memory_bytes > found.weight_bytes
    assert found.activation_bytes < found.memory_bytes - 0.9 * found.weight_bytes
