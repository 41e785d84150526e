"""The device side: build, test, compare, install; or leave everything as it was.

Real: ONNX Runtime from start to end, and engines that TensorRT for RTX builds here.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys

import pytest

from ampdeploy import artifacts
from ampdeploy.artifacts import sha256_file
from ampdeploy.cli import main
from ampdeploy.config import EngineConfig, sizes_to_test
from ampdeploy.device.bundle import archive
from ampdeploy.device.bundle import contents as form
from ampdeploy.device.engine.flavour import describe_flavour
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.device.install.bundle import UNFINISHED, InstallOptions, install_bundle
from ampdeploy.device.install.installation import check_installation, read_installation
from ampdeploy.device.install.make import Job, avoid_known_bugs
from ampdeploy.device.platform import device_facts
from ampdeploy.disk import megabytes
from ampdeploy.export.write import write_graph
from ampdeploy.optional import available
from ampdeploy.precision.graph import load_model
from ampdeploy.targets.base import get_target
from tests.device.bundles import QUICK, killed, reseal, swap_goldens, tree
from tests.device.engine_samples import NO_GPU, ORIN, trt_with_a_gpu

needs_no_gpu = pytest.mark.skipif(
    device_facts().gpu is not None, reason="this machine has a GPU that would test the engine"
)


def test_a_bundle_becomes_a_tested_installation(packed_tar, tmp_path, capsys):
    tar = tmp_path / "tiny.tar"
    shutil.copy(packed_tar, tar)
    assert main(["engine", str(tar), "--target", "ort", "--json", "-q"]) == 0
    said = json.loads(capsys.readouterr().out)
    out = tmp_path / "tiny-engine"
    assert said["path"] == str(out)
    assert sorted(os.listdir(out)) == ["install.json", "model.fp16.onnx"]
    assert sorted(os.listdir(tmp_path)) == ["tiny-engine", "tiny.tar"]
    found = said["installation"]
    assert found == artifacts.read_json(out / "install.json")
    with get_target("ort").open(out / found["artifact"]) as runner:
        assert runner.image_size == found["image_size"] == 160
    tested = found["self_test"]
    assert (tested["images"], tested["min_cosine_p1"]) == (16, 0.999)
    assert set(tested["batches"]) == {"1", "8"}
    for outputs in tested["batches"].values():
        assert set(outputs) == {"features", "patch_features"}
        assert all(0.999 <= seen["cosine_min"] <= 1 for seen in outputs.values())
        assert [outputs[name]["vectors"] for name in outputs] == [16, 1600]
    assert tested["knn"]["bank_images"] == 40
    assert tested["knn"]["agreement"] >= 0.9
    comparison = found["comparison"]
    assert 0.9 < comparison["fidelity_to_baseline"]["cosine_mean"] < 0.9999
    assert comparison["baseline_agreement"]["cosine_p1"] > 0.999
    assert comparison["latency_ms"]["baseline"]["n"] >= 20
    assert comparison["latency_ms"]["ratio"]["value"] > 0
    assert found["untested"] is None
    assert found["files"]["model.fp16.onnx"]["sha256"] == sha256_file(out / "model.fp16.onnx")
    assert main(["engine", str(out)]) == 0
    assert "p1 cosine" in capsys.readouterr().out


def test_what_fails_its_test_is_not_installed(small, tmp_path, capsys):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "ort", "--out", str(out), *QUICK]
    assert main(command) == 0
    before = tree(out)
    swap_goldens(small)
    assert main(command) == 3
    said = capsys.readouterr().err
    assert "batch 1, features: cosine p1 0.9" in said
    assert "must be 0.999 or more" in said
    assert "what was installed before is as it was" in said
    assert tree(out) == before
    assert not (tmp_path / "engine.previous").exists()


@pytest.mark.parametrize("name", ["model.fp16.onnx", "goldens.npz", "README.md"])
def test_a_tampered_bundle_changes_nothing(small, tmp_path, capsys, name):
    data = bytearray((small / name).read_bytes())
    data[100] ^= 1
    (small / name).write_bytes(data)
    out = tmp_path / "engine"
    assert main(["engine", str(small), "--target", "ort", "--out", str(out), *QUICK]) == 1
    assert f"{name}: changed" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["device"]


def test_a_tampered_archive_is_refused_and_a_good_copy_then_works(small, tmp_path, capsys):
    tar = tmp_path / "b.tar"
    archive.write_tar(small, tar)
    good = tar.read_bytes()
    bad = bytearray(good)
    bad[good.index(b"pytorch") if b"pytorch" in good else len(good) // 2] ^= 1
    tar.write_bytes(bad)
    command = ["engine", str(tar), "--target", "ort", *QUICK]
    assert main(command) == 1
    said = capsys.readouterr().err
    assert f"{tar} is not the bundle that was packed" in said
    assert "changed, another sha256" in said
    assert ".work" not in said
    assert sorted(os.listdir(tmp_path)) == ["b.tar", "device"]
    tar.write_bytes(good)
    assert main(command) == 0
    assert sorted(os.listdir(tmp_path)) == ["b-engine", "b.tar", "device"]


@pytest.mark.parametrize("share", [0.3, 0.95])
def test_a_truncated_archive_leaves_nothing_behind(packed_tar, tmp_path, capsys, share):
    tar = tmp_path / "t.tar"
    shutil.copy(packed_tar, tar)
    os.truncate(tar, int(packed_tar.stat().st_size * share))
    assert main(["engine", str(tar), "--target", "ort", *QUICK]) == 1
    assert "Copy it again" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["t.tar"]


def test_a_graph_that_failed_its_test_leaves_nothing_behind(small, tmp_path, capsys):
    swap_goldens(small)
    tar = tmp_path / "b.tar"
    archive.write_tar(small, tar)
    assert main(["engine", str(tar), "--target", "ort", *QUICK]) == 3
    assert sorted(os.listdir(tmp_path)) == ["b.tar", "device"]


LIMITED = """
import resource, sys
from ampdeploy.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))
sys.exit(main(sys.argv[1:]))
"""


def test_a_copy_for_which_there_is_no_room_does_not_take_the_rest(small, tmp_path):
    """By a limit of files; the same system calls fail as on a full disk."""
    command = ["engine", str(small), "--target", "ort", "--out", str(tmp_path / "engine"), *QUICK]
    done = subprocess.run([sys.executable, "-c", LIMITED, *command], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    size = (small / "model.fp16.onnx").stat().st_size
    assert f"It takes {megabytes(size)}." in done.stderr
    assert os.listdir(tmp_path) == ["device"]


def test_two_at_once_do_not_mix(small, tmp_path, capsys):
    work = tmp_path / ".engine.work"
    work.mkdir()
    with artifacts.run_lock(work):
        out = ["--out", str(tmp_path / "engine")]
        assert main(["engine", str(small), "--target", "ort", *out, *QUICK]) == 1
    assert "another ampdeploy is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--target", "torch"], 2, "needs a build host"),
        (["--target", "trx"], 2, "unknown target 'trx'"),
    ],
)
def test_targets_that_devices_do_not_have(small, arguments, code, said, capsys):
    assert main(["engine", str(small), *arguments, "-q"]) == code
    assert said in capsys.readouterr().err


def test_paths_that_are_no_bundle(tmp_path, capsys):
    assert main(["engine", str(tmp_path / "nothing")]) == 1
    assert "there is nothing at" in capsys.readouterr().err
    assert main(["engine", str(tmp_path)]) == 1
    assert (
        "is no run (manifest.json), no bundle (bundle.json) and no inst" in capsys.readouterr().err
    )
    (tmp_path / "file.tar").write_text("hello")
    assert main(["engine", str(tmp_path / "file.tar")]) == 1
    assert "no tar of a bundle" in capsys.readouterr().err


def test_a_baseline_that_cannot_be_built_costs_the_comparison_and_nothing_else(
    small, tmp_path, capsys, caplog
):
    (small / "baseline.fp16.onnx").write_bytes(b"no graph")
    reseal(small)
    out = tmp_path / "engine"
    assert main(["engine", str(small), "--target", "ort", "--out", str(out)]) == 0
    found = check_installation(out, NO_GPU)
    assert found.self_test is not None
    assert found.comparison is None
    assert "baseline.fp16.onnx" in found.why_no_comparison
    assert "tested and installed, but not compared" in caplog.text
    assert f"not compared with the unpruned model: {found.why_no_comparison}" in (
        capsys.readouterr().out
    )
    assert sorted(os.listdir(tmp_path)) == ["device", "engine"]


@pytest.mark.parametrize("compare", [True, False])
def test_killed_over_the_comparison_the_tested_artifact_is_installed(
    small, tmp_path, capsys, compare
):
    """As by a board out of memory; the same command goes on with the comparison alone."""
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "ort", "--out", str(out), "-q"]
    killed(command, "install.bundle", "compare_with_baseline")
    found = check_installation(out, NO_GPU)
    assert found.self_test is not None
    assert (found.comparison, found.why_no_comparison) == (None, UNFINISHED)
    installed = (out / "model.fp16.onnx").stat().st_ino
    # To check it is another command than the one that goes on.
    assert main(["engine", str(out)]) == 0
    assert "`ampdeploy engine` on the bundle, with the options" in capsys.readouterr().out
    assert main(command if compare else [*command, "--no-compare"]) == 0
    found = check_installation(out, NO_GPU)
    assert (found.comparison is not None) == compare
    assert found.why_no_comparison == (None if compare else "--no-compare was given")
    assert (out / "model.fp16.onnx").stat().st_ino == installed
    # What is there was not installed over itself, which would have cost its predecessor.
    assert sorted(os.listdir(tmp_path)) == ["device", "engine"]


def test_another_bundle_does_not_go_on_with_the_comparison(small, other, tmp_path):
    out = tmp_path / "engine"
    command = ["--target", "ort", "--out", str(out)]
    killed(["engine", str(small), *command, "-q"], "install.bundle", "compare_with_baseline")
    assert main(["engine", str(other), *command, *QUICK]) == 0
    assert read_installation(out).bundle_sha256 == form.read_bundle(other).sha256
    previous = read_installation(tmp_path / "engine.previous")
    assert previous.bundle_sha256 == form.read_bundle(small).sha256


@needs_no_gpu
def test_the_builders_memory_can_be_limited(small, tmp_path, capsys):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--out", str(out), "--memory-limit", "1GB", *QUICK]
    assert main([*command, "--target", "ort"]) == 2
    assert "target ort builds no engine whose memory could be limited" in capsys.readouterr().err
    assert main([*command, "--target", "trt-rtx", "--untested"]) == 0
    assert read_installation(out).engine["memory_limit_bytes"] == 1 << 30
    said = read_manifest(out / "engine.plan").options
    assert said["memory"] == "1024 MiB as given; no GPU here"
    assert 0 < said["workspace_bytes"] < 1 << 29
    assert main(["engine", str(out), "--memory-limit", "1GB"]) == 2
    assert "is an installation: nothing is built" in capsys.readouterr().err


def test_options_of_a_bundle_are_refused_for_a_run(deferred_run, capsys):
    assert main(["engine", str(deferred_run), "--untested", "--target", "ort", "-q"]) == 2
    assert "--target, --untested is for a bundle" in capsys.readouterr().err


def test_weights_in_a_file_of_their_own_come_along(small, tmp_path):
    for name in ("model.fp16.onnx", "baseline.fp16.onnx"):
        write_graph(load_model(small / name), small / name, single_file_limit=0)
    files = reseal(small).manifest.files
    assert {"model.fp16.onnx.data", "baseline.fp16.onnx.data"} <= set(files)
    options = InstallOptions(target="ort", out=tmp_path / "engine", compare=False)
    out, found = install_bundle(small, options)
    assert sorted(found.files) == ["model.fp16.onnx", "model.fp16.onnx.data"]
    assert found.files["model.fp16.onnx.data"] == files["model.fp16.onnx.data"]
    check_installation(out, NO_GPU)


@pytest.mark.parametrize(
    ("version", "batch", "said"),
    [("10.3.0.30", (2, 2, 2), "Batch 1,2,8 became 2,2,2"), ("10.16.2.1", (1, 2, 8), None)],
)
def test_the_devices_tensorrt_decides_which_bugs_are_avoided(small, tmp_path, version, batch, said):
    """TensorRT is a stand-in here, and an Orin: neither can be had. The list of bugs is real."""
    trt = trt_with_a_gpu()
    trt.__version__ = version
    asked = EngineConfig(batch=(1, 2, 8), strip_weights=True, compute_capabilities=("8.9",))
    bundle = form.read_bundle(small)
    job = Job(bundle=bundle, target=get_target("trt"), here=ORIN, work=tmp_path, engine=asked)
    vars(job)["flavour"] = describe_flavour("trt", trt)
    avoid_known_bugs(job)
    assert job.engine == EngineConfig(batch=batch)
    assert job.batches == sizes_to_test(batch)
    assert job.usual_batch == 2
    assert any("has its weights" in note for note in job.notes)
    changed = [note for note in job.notes if "became" in note]
    assert len(changed) == (said is not None)
    assert all(str(said) in note for note in changed)


def test_engines_of_a_run_are_built_here(deferred_run, tmp_path, capsys):
    """Deferred for the device; where TensorRT for RTX is, they can be built all the same."""
    run = tmp_path / "run"
    shutil.copytree(deferred_run, run)
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["config"]["target"] = "trt-rtx"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["engine", str(run), "--json", "-q", "--memory-limit", "2GB"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"engine.plan", "baseline.plan"}
    for name, facts in said.items():
        assert facts["plan_sha256"] == sha256_file(run / name)
        assert facts["precision"]["asked"] == "fp16"
        assert facts["options"]["memory"].startswith("2048 MiB as given; ")
    assert said["engine.plan"]["onnx_sha256"] == sha256_file(run / "model.fp16.onnx")


def test_a_run_without_an_engine_says_so(deferred_run, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    manifest = json.loads((deferred_run / "manifest.json").read_text())
    config = manifest["config"]
    config["target"] = "ort"
    config["precision"]["precision"], config["engine"]["when"] = "fp32", "now"
    (run / "manifest.json").write_text(json.dumps(manifest))
    assert main(["engine", str(run), "-q"]) == 2
    assert "target ort, which has no engine" in capsys.readouterr().err


@needs_no_gpu
def test_an_engine_that_cannot_be_tested_is_built_kept_and_installed_only_if_asked(
    small, tmp_path, capsys, caplog
):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "trt-rtx", "--out", str(out)]
    assert main([*command, "-q"]) == 4
    said = capsys.readouterr().err
    plan = tmp_path / ".engine.work" / "pruned" / "engine.plan"
    assert "the engine was built and cannot be tested here" in said
    assert device_facts().problem in said
    assert str(plan) in said
    assert not out.exists()
    built = sha256_file(plan)
    with caplog.at_level("INFO", "ampdeploy"):
        assert main([*command, "--untested"]) == 0
    assert "engine.plan was built before" in caplog.text
    shown = capsys.readouterr()
    assert "NOT TESTED" in shown.out
    assert (shown.out + shown.err).count(device_facts().problem) == 1
    assert sha256_file(out / "engine.plan") == built
    found = check_installation(out, device_facts())
    assert device_facts().problem in (found.untested or "")
    assert found.self_test is None
    engine = read_manifest(out / "engine.plan")
    assert engine.onnx_sha256 == sha256_file(small / "model.fp16.onnx")
    assert engine.precision.half_share > 0.9
    assert engine.verdict["outputs"]["features"]["cosine_p1"] > 0.999
    assert not (tmp_path / ".engine.work").exists()


@needs_no_gpu
def test_what_the_engine_depends_on_builds_it_again(small, tmp_path, caplog):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "trt-rtx", "--out", str(out), "-q"]
    assert main(command) == 4
    plan = tmp_path / ".engine.work" / "pruned" / "engine.plan"
    first = plan.stat().st_mtime_ns
    engine = form.read_bundle(small).manifest.engine
    reseal(small, engine=dataclasses.replace(engine, batch=(1, 2, 4)))
    assert main(command) == 4
    assert plan.stat().st_mtime_ns != first
    assert read_manifest(plan).profiles[0].max[0] == 4
    second = plan.stat().st_mtime_ns
    os.truncate(plan, 1000)
    assert main(command) == 4
    assert plan.stat().st_mtime_ns != second
    assert plan.stat().st_size == read_manifest(plan).plan_bytes


@pytest.mark.skipif(available("tensorrt"), reason="TensorRT is here")
def test_target_trt_without_tensorrt_says_how_to_get_it(small, tmp_path, capsys):
    assert main(["engine", str(small), "--out", str(tmp_path / "engine"), "-q"]) == 4
    said = capsys.readouterr().err
    assert "target trt needs the package 'tensorrt'" in said
    assert "--target ort takes the bundle's graph" in said
    assert "pip install onnxruntime" in said
    assert os.listdir(tmp_path) == ["device"]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("bundle.archive", "_write"),
        ("bundle.contents", "check_files"),
        ("install.bundle", "make"),
        ("install.bundle", "self_test"),
        ("install.bundle", "write_installation"),
        ("install.bundle", "put_in_place"),
    ],
)
def test_killed_at_any_step_the_same_command_goes_on(small, tmp_path, module, name):
    tar, out = tmp_path / "b.tar", tmp_path / "b-engine"
    archive.write_tar(small, tar)
    command = ["engine", str(tar), "--target", "ort", *QUICK]
    killed(command, module, name, calls=2 if name == "_write" else 1)
    assert not out.exists()
    assert main(command) == 0
    check_installation(out, NO_GPU)
    assert sorted(os.listdir(tmp_path)) == ["b-engine", "b.tar", "device"]


@needs_no_gpu
def test_a_killed_build_leaves_no_plan_and_a_finished_one_is_used(small, tmp_path, caplog):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "trt-rtx", "--out", str(out), "--untested"]
    plan = tmp_path / ".engine.work" / "pruned" / "engine.plan"
    killed([*command, "-q"], "engine.build", "write_manifest")
    assert plan.exists()
    with caplog.at_level("INFO", "ampdeploy"):
        killed([*command, "-q"], "install.bundle", "make", after=True)
        built = plan.stat().st_mtime_ns
        assert main(command) == 0
    assert "was built before" in caplog.text
    assert (out / "engine.plan").stat().st_mtime_ns == built
