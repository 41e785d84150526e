"""CUDA's wrapper: the real bindings without a driver, and the rest on a GPU that keeps account."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ampdeploy.device import cuda as cu
from ampdeploy.errors import MissingDependencyError
from tests.device.stand_ins import (
    ILLEGAL,
    NO_DEVICE,
    OUT_OF_MEMORY,
    TOO_OLD,
    Gpu,
    OldHandle,
    install_cuda,
    install_old_cuda,
    runtime_module,
)

ALLOCATING = (
    cu.Stream,
    cu.Event,
    lambda c: cu.DeviceBuffer(c, 64),
    lambda c: cu.PinnedBuffer(c, 8),
)


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    install_cuda(monkeypatch, gpu)
    return gpu


def opened(gpu):
    return cu.open_cuda(needed_by="a test")


def has_driver():
    runtime = pytest.importorskip("cuda.bindings.runtime")
    return runtime.cudaDriverGetVersion()[1] > 0


def test_the_stand_in_has_only_what_the_real_bindings_have():
    real = pytest.importorskip("cuda.bindings.runtime")
    stand_in = runtime_module(Gpu())
    names = [name for name in vars(stand_in) if name.startswith("cuda")]
    assert len(names) > 25
    assert [name for name in names if not hasattr(real, name)] == []
    for name in ("cudaStreamNonBlocking", "cudaEventDefault"):
        assert getattr(stand_in, name) == getattr(real, name)
    for group in ("cudaMemcpyKind", "cudaStreamCaptureMode", "cudaError_t"):
        members = getattr(stand_in, group)
        found = members.__members__ if group == "cudaError_t" else vars(members)
        for name, value in found.items():
            assert int(getattr(getattr(real, group), name)) == int(value), name


def test_real_bindings_say_that_there_is_no_driver():
    if has_driver():
        pytest.skip("this machine has a driver")
    with pytest.raises(MissingDependencyError, match=r"needs an NVIDIA GPU.*no NVIDIA driver"):
        cu.open_cuda(needed_by="a test")


def test_real_bindings_name_the_error_of_a_failed_call():
    if has_driver():
        pytest.skip("this machine has a driver")
    cuda = cu.runtime_api(needed_by="a test")
    assert isinstance(cuda.call("cudaRuntimeGetVersion"), int)
    with pytest.raises(cu.CudaError, match=r"cudaErrorInsufficientDriver \(35\), CUDA driver vers"):
        cuda.call("cudaMalloc", 64)
    for make in ALLOCATING:
        with pytest.raises(cu.CudaError) as caught:
            make(cuda)
        assert caught.value.name == "cudaErrorInsufficientDriver"


def test_without_the_bindings_the_error_names_both_lines(monkeypatch):
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=r"cuda-python>=12\.6.*cuda-python==12\.\*"):
        cu.runtime_api(needed_by="a test")


@pytest.mark.parametrize(
    ("status", "driver", "message"),
    [
        (TOO_OLD, 0, "has no NVIDIA driver"),
        (TOO_OLD, 12060, r"driver is for CUDA 12\.6 .* for CUDA 13\.0.*'cuda-python==12\.\*'"),
        (NO_DEVICE, 13000, r"the driver shows none \(CUDA_VISIBLE_DEVICES is '7'\)"),
        (ILLEGAL, 13000, r"CUDA does not start: .*cudaErrorIllegalAddress \(700\)"),
    ],
)
def test_each_reason_for_no_gpu_has_its_own_advice(gpu, monkeypatch, status, driver, message):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    gpu.driver_version = driver
    gpu.fail("cudaGetDeviceCount", status)
    with pytest.raises(MissingDependencyError, match=message):
        opened(gpu)


def test_a_gpu_that_is_not_there_is_refused(gpu):
    with pytest.raises(MissingDependencyError, match=r"needs CUDA device 1.* shows 1"):
        cu.open_cuda(needed_by="a test", index=1)


def test_everything_is_given_back_once(gpu):
    cuda = opened(gpu)
    for make in ALLOCATING:
        with make(cuda) as owned:
            assert len(gpu.live) == 1
        assert not gpu.live
        owned.close()  # the account would complain about a second return
        with pytest.raises(RuntimeError, match="is closed"):
            _ = owned.handle


def test_copies_go_there_and_back_in_the_order_of_the_stream(gpu):
    cuda = opened(gpu)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    with (
        cu.Stream(cuda) as stream,
        cu.PinnedBuffer(cuda, 40) as host,
        cu.DeviceBuffer(cuda, 40) as device,
        cu.PinnedBuffer(cuda, 40) as back,
    ):
        host.array((2, 3))[:] = values
        cu.copy_to_device(cuda, device, host, 24, stream)
        cu.copy_to_host(cuda, back, device, 24, stream)
        assert np.isnan(back.array((2, 3))).all()  # only queued so far
        stream.synchronize()
        np.testing.assert_array_equal(back.array((2, 3)), values)
        for copy in (
            lambda: cu.copy_to_device(cuda, device, host, 44, stream),
            lambda: host.array((11,)),
        ):
            with pytest.raises(ValueError, match="44 bytes do not fit a buffer of 40"):
                copy()
    assert not gpu.live


def test_out_of_memory_says_how_much_and_what_to_do(gpu):
    cuda = opened(gpu)
    gpu.fail("cudaMalloc", OUT_OF_MEMORY)
    with pytest.raises(cu.CudaError, match=r"4096 bytes.*cudaErrorMemoryAllocation.*smaller batch"):
        cu.DeviceBuffer(cuda, 4096)
    with pytest.raises(ValueError, match="0 bytes"):
        cu.PinnedBuffer(cuda, 0)


def test_clean_up_after_an_error_does_not_hide_it(gpu):
    cuda = opened(gpu)
    gpu.fail("cudaFree", ILLEGAL)
    with pytest.raises(KeyError, match="the cause"), cu.DeviceBuffer(cuda, 8):
        raise KeyError("the cause")
    buffer = cu.DeviceBuffer(cuda, 8)
    with pytest.raises(cu.CudaError, match="cudaFree failed: cudaErrorIllegalAddress"), buffer:
        pass


def test_events_time_what_lies_between_them(gpu):
    cuda = opened(gpu)
    with cu.Stream(cuda) as stream, cu.Event(cuda) as start, cu.Event(cuda) as end:
        start.record(stream)
        gpu.submit(lambda: None)
        end.record(stream)
        end.synchronize()
        assert end.ms_since(start) == 1.0


def test_a_graph_is_captured_without_running_and_launched_whole(gpu):
    cuda = opened(gpu)
    done = []
    with cu.Stream(cuda) as stream:
        with cu.capture_graph(cuda, stream, lambda: gpu.submit(lambda: done.append(1))) as graph:
            assert done == []
            graph.launch(stream)
            graph.launch(stream)
            stream.synchronize()
        assert done == [1, 1]
        assert [kind for kind, _ in gpu.live.values()] == ["stream"]


@pytest.mark.parametrize("function", ["cudaStreamEndCapture", "cudaGraphInstantiate"])
def test_a_capture_that_cuda_refuses_leaves_nothing(gpu, function):
    cuda = opened(gpu)
    gpu.fail(function, ILLEGAL)
    with cu.Stream(cuda) as stream, pytest.raises(cu.CudaError, match=function):
        cu.capture_graph(cuda, stream, lambda: None)
    assert not gpu.live


def test_work_that_fails_while_captured_ends_the_capture(gpu):
    def work():
        raise KeyError("the cause")

    cuda = opened(gpu)
    with cu.Stream(cuda) as stream, pytest.raises(KeyError, match="the cause"):
        cu.capture_graph(cuda, stream, work)
    assert gpu.captured is None
    assert not gpu.live


def test_the_layout_of_older_bindings(monkeypatch):
    gpu = Gpu(handle=OldHandle)
    install_old_cuda(monkeypatch, gpu)
    cuda = opened(gpu)
    assert cuda.module.__name__ == "cuda.cudart"
    with cu.Stream(cuda) as stream:
        assert stream.address == stream.handle.number
