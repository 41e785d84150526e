"""What the GPU benchmark takes over from an earlier call, and what it must not."""

from __future__ import annotations

import stat
from importlib import metadata

import onnx
import pytest
import torch

from ampdeploy.device.engine.manifest import manifest_path, read_manifest
from benchmarks.gpu import plan, run, runtimes
from benchmarks.gpu.graphs import Graphs
from benchmarks.gpu.options import parse
from benchmarks.gpu.pairs import DENSE, build_pair
from benchmarks.gpu.runtimes import TrtWay
from tests.conftest import CALIB_DATA, TINY

RTX = "trt-rtx"


@pytest.fixture(scope="module")
def pair():
    pytest.importorskip("tensorrt_rtx")
    return build_pair(
        TINY,
        image_size=None,
        params_cut=0.2,
        width_multiple=8,
        seed=0,
        device=torch.device("cpu"),
        images=CALIB_DATA,
        count=4,
    )


@pytest.fixture(scope="module")
def typed(pair, tmp_path_factory):
    """Graphs whose typed one is made. Do not change them."""
    graphs = Graphs(pair, tmp_path_factory.mktemp("graphs"))
    graphs.typed(DENSE)
    return graphs


@pytest.fixture
def built(pair, typed):
    """An engine for batches 1 and 3: (plan, when it was written)."""
    path = TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
    return path, path.stat().st_mtime_ns


def largest(path):
    return read_manifest(path).profiles[0].max[0]


def test_an_engine_serves_all_rows_and_calls_of_the_same_batches(pair, typed, built):
    path, written = built
    way = TrtWay(RTX, (3, 1))
    assert way.engine(pair, DENSE, typed) == way.engine(pair, DENSE, typed) == path
    assert path.stat().st_mtime_ns == written
    assert largest(path) == 3


def test_an_engine_of_other_batches_is_built_again(pair, typed, built):
    assert largest(TrtWay(RTX, (1, 3, 5)).engine(pair, DENSE, typed)) == 5
    assert largest(TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)) == 3


def test_an_engine_whose_writing_was_killed_is_built_again(pair, typed, built, monkeypatch):
    path, _ = built
    way = TrtWay(RTX, (1, 3))
    manifest_path(path).unlink()
    assert largest(way.engine(pair, DENSE, typed)) == 3
    path.write_bytes(path.read_bytes()[:1000])
    assert way.engine(pair, DENSE, typed).stat().st_size == read_manifest(path).plan_bytes

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runtimes, "write_json", killed)  # after plan and manifest
        with pytest.raises(KeyboardInterrupt):
            TrtWay(RTX, (2,)).engine(pair, DENSE, typed)
    assert largest(way.engine(pair, DENSE, typed)) == 3


def test_an_engine_of_another_tensorrt_driver_or_graph_is_built_again(
    pair, typed, built, monkeypatch, tmp_path
):
    import tensorrt_rtx

    path, _ = built
    with monkeypatch.context() as patch:
        patch.setattr(tensorrt_rtx, "__version__", "1.99.0.1")
        TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
        assert read_manifest(path).tensorrt_version == "1.99.0.1"
    TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
    assert read_manifest(path).tensorrt_version == tensorrt_rtx.__version__
    written = path.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        driver = tmp_path / "version"
        driver.write_text("999.1\n")
        patch.setattr("ampdeploy.device.platform.DRIVER_VERSION_FILE", driver)
        TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
        assert read_manifest(path).driver == "999.1"
    assert path.stat().st_mtime_ns != written
    TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
    written, graph = path.stat().st_mtime_ns, typed.typed(DENSE)
    content = graph.read_bytes()
    model = onnx.load(graph)
    model.doc_string = "another graph"
    onnx.save(model, graph)
    try:
        TrtWay(RTX, (1, 3)).engine(pair, DENSE, typed)
    finally:
        graph.write_bytes(content)
    assert path.stat().st_mtime_ns != written


def benchmark(folder, batches="1,3"):
    where = ["--out", str(folder / "gpu.json"), "--state", str(folder / "state")]
    more = ["--models", TINY, "--device", "cpu", "--count", "4", "--batches", batches]
    return run.Benchmark(parse([*where, *more, "--ways", "fp32-eager"], description=""))


def keep_rows(benchmark):
    """Keep a row of PyTorch and one of an engine as if they had been measured."""
    ways = {way.name: way for way in plan.all_ways(benchmark.options.batches, "default")}
    for name in ("fp32-eager", RTX):
        job = plan.Job(model=TINY, name=name, batch=1, way=ways[name])
        benchmark.rows.put(job.row, benchmark._identity(job), {"way": name})


def kept(benchmark):
    return {row["way"] for row in benchmark.finished()[1].values()}


def test_rows_of_an_engine_for_other_batches_do_not_count(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    keep_rows(benchmark(tmp_path))
    assert kept(benchmark(tmp_path)) == {"fp32-eager", RTX}
    assert kept(benchmark(tmp_path, "1,3,5")) == {"fp32-eager"}
    keep_rows(benchmark(tmp_path, "1,3,5"))
    assert kept(benchmark(tmp_path, "1,3,5")) == {"fp32-eager", RTX}


@pytest.mark.parametrize("package", ["tensorrt", "onnxruntime-gpu", "torch"])
def test_rows_of_other_versions_do_not_count(package, tmp_path, monkeypatch):
    """The result names one version of each package, for all rows."""
    keep_rows(benchmark(tmp_path))
    version = metadata.version
    monkeypatch.setattr(
        metadata, "version", lambda name: "99.0" if name == package else version(name)
    )
    upgraded = benchmark(tmp_path)
    assert upgraded.host["packages"][package] == "99.0"
    assert kept(upgraded) == set()


def test_rows_of_another_driver_do_not_count(tmp_path, monkeypatch):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    for driver in ("570.1", "580.2"):
        tool.write_text(f"#!/bin/sh\necho 'NVIDIA H200, {driver}, 143771'\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        found = benchmark(tmp_path)
        assert found.host["gpus"][0]["driver"] == driver
        assert kept(found) == set()
        keep_rows(found)
        assert "fp32-eager" in kept(benchmark(tmp_path))


def test_rows_of_another_tensorrt_do_not_count_where_no_package_tells(tmp_path, monkeypatch):
    """As on a Jetson, whose TensorRT pip does not know: the module itself says its version."""
    trt = pytest.importorskip("tensorrt_rtx")
    keep_rows(benchmark(tmp_path))
    monkeypatch.setattr(trt, "__version__", "1.99.0.1")
    assert kept(benchmark(tmp_path)) == {"fp32-eager"}
