"""Builds on a machine that runs the engine, on one that does not, and from one to the other.

The GPU is a stand-in of NVIDIA's modules, see `tests.gpu`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest
from ampdeploy.cli import main
from ampdeploy.device.bundle.contents import read_bundle
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.device.platform import device_facts
from ampdeploy.report.result import Report
from tests import gpu, runs

PLANS = (artifacts.BASELINE_PLAN, artifacts.ENGINE_PLAN)
MANIFESTS = (artifacts.BASELINE_ENGINE_JSON, artifacts.ENGINE_JSON)
OPTIONS = ("--target", "trt-rtx", "--width-multiple", "8", "--engine-batch", "1,2,3", "-q")

pytestmark = [
    pytest.mark.skipif(device_facts().gpu is not None, reason="this is the machine without GPU"),
    pytest.mark.timeout(300),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    pytest.importorskip("tensorrt_rtx")
    return tmp_path_factory.mktemp("gpu")


def command(folder: Path, out: Path, *more: str) -> list[str]:
    return runs.arguments(folder / "inputs", out, *OPTIONS, *more)


@pytest.fixture(scope="module")
def tested(folder) -> Path:
    """A finished build of a machine that runs its engine. Do not change it."""
    out = folder / "tested"
    done = gpu.run(folder, command(folder, out))
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def copy(tested, tmp_path) -> Path:
    return Path(shutil.copytree(tested, tmp_path / "copy"))


def test_engines_are_compared_with_float32_at_every_batch_they_are_tuned_for(tested):
    report = Report.read(tested / artifacts.REPORT_JSON)
    assert report.judged_on == "trt-rtx"
    assert set(report.timing) == {"1", "2"}
    for role, plan in zip(("baseline", "pruned"), PLANS, strict=True):
        seen = read_manifest(tested / plan).verdict["engine"]
        assert seen["images"] == 16
        assert set(seen["batches"]) == {"1", "2", "3"}
        for outputs in seen["batches"].values():
            assert set(outputs) == {"features", "patch_features"}
            # FP16 against float32: close, and not the same.
            assert all(0.999 < found["cosine_p1"] < 1 for found in outputs.values())
        test = report.engine[role].test
        assert test.bar_cosine_p1 == 0.999
        assert test.cosine_p1["3"]["features"] == seen["batches"]["3"]["features"]["cosine_p1"]
    assert "The pruned engine was run on 16 images" in (tested / artifacts.REPORT_MD).read_text()


def test_a_bug_that_breaks_both_engines_alike_is_found_and_leaves_none(folder, copy):
    """The evaluation compares the two engines with each other, and would see nothing."""
    more = ("--min-cosine-p1", "0.998")  # so that they are built again
    done = gpu.run(folder, command(folder, copy, *more), fault=gpu.MIXED_UP)
    assert done.returncode == 3, done.stderr
    assert "baseline.plan does not compute what the model computes" in done.stderr
    assert "batch 2, features: cosine p1" in done.stderr
    assert "batch 1," not in done.stderr  # nothing to mix up there
    names = {path.name for path in copy.iterdir()}
    gone = {*PLANS, *MANIFESTS}
    gone |= {artifacts.EVAL, artifacts.BENCH, artifacts.REPORT_JSON, artifacts.REPORT_MD}
    assert not names & gone
    assert not {"engine", "eval", "bench", "report"} & set(Manifest.read(copy).data["stages"])
    assert {artifacts.MODEL_ONNX, artifacts.MODEL_FP16_ONNX, artifacts.SLIM} <= names


def test_an_engine_that_could_not_be_tested_is_not_left_behind(folder, copy):
    more = ("--min-cosine-p1", "0.997")
    done = gpu.run(folder, command(folder, copy, *more), fault=gpu.NO_MEMORY)
    assert done.returncode == 1, done.stderr
    assert "makes no execution context for it, mostly for want of GPU memory" in done.stderr
    assert not {path.name for path in copy.iterdir()} & {*PLANS, *MANIFESTS}


def test_what_was_measured_with_the_engine_stands_where_it_does_not_run(folder, copy, capsys):
    before = Manifest.read(copy).data["stages"]
    report = (copy / artifacts.REPORT_JSON).read_bytes()
    assert main(command(folder, copy)) == 0
    assert Manifest.read(copy).data["stages"] == before
    assert (copy / artifacts.REPORT_JSON).read_bytes() == report
    capsys.readouterr()
    assert main(["report", str(copy), "--json", "-q"]) == 0
    assert capsys.readouterr().out.encode() == report
    assert main(["bundle", str(copy), "-q"]) == 0
    assert artifacts.REPORT_JSON in read_bundle(copy.with_name("copy-bundle")).manifest.files
    # Another engine has to be judged anew, with what there is.
    assert main(command(folder, copy, "--engine-batch", "1,1,2")) == 0
    assert Report.read(copy / artifacts.REPORT_JSON).judged_on == "ort"


def test_an_engine_that_was_not_tested_is_tested_where_it_runs(folder, copy):
    other = command(folder, copy, "--engine-batch", "1,1,3")
    assert main(other) == 0
    why = read_manifest(copy / artifacts.ENGINE_PLAN).verdict["engine"]["untested"]
    assert why.startswith("this machine runs no engine: ")
    untested = Report.read(copy / artifacts.REPORT_JSON)
    assert untested.engine["pruned"].test is None
    assert untested.engine["pruned"].why["test"] == why
    assert f"The pruned engine is not tested: {why}." in (copy / artifacts.REPORT_MD).read_text()
    # Where it would run, it is read as what it is, and made whole when it is built again.
    assert gpu.run(folder, ["report", str(copy), "-q"]).returncode == 0
    done = gpu.run(folder, other)
    assert done.returncode == 0, done.stderr
    report = Report.read(copy / artifacts.REPORT_JSON)
    assert set(report.engine["pruned"].test.cosine_p1) == {"1", "2", "3"}
    assert (report.judged_on, set(report.timing)) == ("trt-rtx", {"1", "2"})


def test_an_engine_for_other_gpus_is_not_run_on_this_one(folder, copy):
    other = command(folder, copy, "--compute-capability", "8.9,12.0")
    why = (
        "this machine runs no such engine: it is for compute capability 8.9, 12.0, and the GPU "
        "here (NVIDIA RTX A2000) has 8.6"
    )
    dry = gpu.run(folder, [*other, "--dry-run"])
    assert f"judged with ort in float32: {why}" in dry.stdout
    done = gpu.run(folder, other)
    assert done.returncode == 0, done.stderr
    assert f"the engines are not tested: {why}" in done.stderr
    report = Report.read(copy / artifacts.REPORT_JSON)
    assert report.judged_on == "ort"
    assert report.ratio.why["latency"] == report.engine["pruned"].why["test"] == why


def test_without_cuda_python_a_build_stops_before_it_begins(folder, tmp_path, monkeypatch, capsys):
    """A driver and TensorRT are enough to build an engine, not to run it."""
    from ampdeploy.stages.judging import this_machine

    runs.arguments(folder / "inputs", tmp_path)  # makes the inputs
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text("#!/bin/sh\necho 'NVIDIA RTX A2000, 8.6, 6138, 5000'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(smi.parent), prepend=":")
    for name in ("cuda.bindings.driver", "cuda.bindings.runtime", "cuda.cuda", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    this_machine.cache_clear()
    try:
        assert main(command(folder, tmp_path / "run")) == 4
    finally:
        this_machine.cache_clear()
    assert "cuda-python" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_what_a_build_no_longer_makes_is_not_left_behind(folder, copy, capsys):
    capsys.readouterr()
    assert main(command(folder, copy, "--engine", "deferred")) == 0
    names = {path.name for path in copy.iterdir()}
    engines = {*PLANS, artifacts.ENGINE_JSON, artifacts.BASELINE_ENGINE_JSON}
    assert not names & engines
    shown = capsys.readouterr().out
    assert artifacts.MODEL_FP16_ONNX in shown
    assert artifacts.ENGINE_PLAN not in shown
    assert "engine" not in Report.read(copy / artifacts.REPORT_JSON).stages_seconds

    (copy / artifacts.ENGINE_PLAN).write_bytes(b"of a build that was killed")
    without = runs.arguments(folder / "inputs", copy, "--target", "ort", *OPTIONS[2:4], "-q")
    assert main(without) == 0
    names = {path.name for path in copy.iterdir()}
    typed = {artifacts.MODEL_FP16_ONNX, artifacts.BASELINE_FP16_ONNX, artifacts.PRECISION}
    assert not names & (typed | engines)
    assert "type" not in Manifest.read(copy).data["stages"]
    assert "type" not in Report.read(copy / artifacts.REPORT_JSON).stages_seconds


def test_a_refused_graph_takes_the_engine_of_an_earlier_one_with_it(folder, copy, capsys):
    assert main(command(folder, copy, "--min-cosine-p1", "1")) == 3
    names = {path.name for path in copy.iterdir()}
    assert not names & {*PLANS, artifacts.ENGINE_JSON, artifacts.MODEL_FP16_ONNX}
    assert not names & {artifacts.PRECISION, artifacts.REPORT_JSON, artifacts.REPORT_MD}
    assert {artifacts.SLIM, artifacts.MODEL_ONNX} <= names
