"""What is built of a bundle, used again, and not used again."""

from __future__ import annotations

import dataclasses
import os
import sys

import pytest

from ampdeploy.device.bundle import contents as form
from ampdeploy.device.install.installation import check_installation
from ampdeploy.device.install.make import Job, discard, make
from ampdeploy.device.platform import device_facts
from ampdeploy.targets.base import get_target
from tests import gpu
from tests.device.bundles import QUICK, reseal
from tests.device.engine_samples import ORIN, trt_with_a_gpu

needs_no_gpu = pytest.mark.skipif(
    device_facts().gpu is not None, reason="this is the machine without GPU"
)


@needs_no_gpu
@pytest.mark.timeout(300)
def test_an_engine_that_failed_its_test_is_built_anew(small, tmp_path):
    """On a GPU that is a stand-in; it mixes up images the first time, and then no more."""
    pytest.importorskip("tensorrt_rtx")
    engine = form.read_bundle(small).manifest.engine
    reseal(small, engine=dataclasses.replace(engine, batch=(1, 2, 2)))
    out, work = tmp_path / "engine", tmp_path / ".engine.work"
    command = ["engine", str(small), "--target", "trt-rtx", "--out", str(out), *QUICK[:-1]]
    failed = gpu.run(tmp_path / "gpu", command, fault=gpu.MIXED_UP)
    assert failed.returncode == 3, failed.stderr
    assert "batch 2, features: cosine p1" in failed.stderr
    assert "The engine was deleted" in failed.stderr
    assert "the same command builds it anew" in failed.stderr
    assert not work.exists()
    assert not out.exists()
    passed = gpu.run(tmp_path / "gpu", command)
    assert passed.returncode == 0, passed.stderr
    assert "was built before" not in passed.stderr
    assert "built engine.plan" in passed.stderr
    assert check_installation(out, device_facts()).self_test is not None
    assert not work.exists()


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")
def test_what_is_discarded_leaves_nothing_to_build_it_from(small, tmp_path, monkeypatch):
    """An Orin, put in; builder and timing cache are those of TensorRT for RTX."""
    monkeypatch.setitem(sys.modules, "tensorrt", trt_with_a_gpu())
    bundle = form.read_bundle(small)
    job = Job(
        bundle=bundle,
        target=get_target("trt"),
        here=ORIN,
        work=tmp_path / "work",
        engine=bundle.manifest.engine,
    )
    job.work.mkdir()
    plan = make(job, "pruned")
    make(job, "baseline")
    written = plan.stat().st_mtime_ns
    assert make(job, "pruned").stat().st_mtime_ns == written
    (timings,) = job.work.glob("*.timing")
    discard(job, "pruned")
    assert not timings.exists()
    assert sorted(os.listdir(job.work)) == ["baseline", "baseline.key.json"]
    discard(job, "pruned")  # nothing there, as after a kill in between
    assert make(job, "pruned").stat().st_mtime_ns != written
    assert timings.exists()
