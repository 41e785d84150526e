"""Builds that end in a TensorRT engine: on a machine without GPU, with real TensorRT for RTX."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, sha256_file
from ampdeploy.cli import main
from ampdeploy.device.bundle.contents import read_bundle
from ampdeploy.device.engine.manifest import check_plan_file, read_manifest
from ampdeploy.device.platform import device_facts
from ampdeploy.optional import available
from ampdeploy.pipeline import rerun_config
from ampdeploy.report.result import Report
from tests import runs

# The tiny model is 64 wide: on a GPU's grid of 64 nothing of it could go.
FINE = ("--width-multiple", "8")

no_gpu = pytest.mark.skipif(device_facts().gpu is not None, reason="this machine runs engines")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("inputs")


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    """A finished build for trt-rtx."""
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path_factory.mktemp("runs") / "rtx"
    assert main(runs.arguments(inputs, out, "--target", "trt-rtx", "-q", *FINE)) == 0
    return out


@pytest.fixture(scope="module")
def deferred(inputs, tmp_path_factory) -> Path:
    """A finished build whose engine is left to the device."""
    out = tmp_path_factory.mktemp("runs") / "deferred"
    options = ("--target", "trt", "--engine", "deferred", "-q", *FINE)
    assert main(runs.arguments(inputs, out, *options)) == 0
    return out


def test_engines_of_both_models_with_their_evidence(finished):
    for plan in (artifacts.ENGINE_PLAN, artifacts.BASELINE_PLAN):
        manifest = read_manifest(finished / plan)
        check_plan_file(finished / plan, manifest)
        assert manifest.target == "trt-rtx"
        assert manifest.precision.asked == "fp16"
        assert manifest.precision.half_share == 1.0
        assert manifest.onnx_sha256 == sha256_file(finished / manifest.onnx)
        assert manifest.verdict["outputs"]["features"]["cosine_p1"] > 0.999
    small, large = (finished / name for name in (artifacts.ENGINE_PLAN, artifacts.BASELINE_PLAN))
    assert small.stat().st_size < large.stat().st_size


def test_precision_json_says_why_of_every_node(finished):
    found = json.loads((finished / artifacts.PRECISION).read_text())
    assert set(found) == {"baseline", "pruned"}
    for facts in found.values():
        assert facts["decisions"]
        assert all(decision["reason"] for decision in facts["decisions"])
        assert facts["range_images"] == 16


@no_gpu
def test_the_report_says_what_was_not_measured_here(finished):
    report = Report.read(finished / artifacts.REPORT_JSON)
    assert report.baseline.latency_ms is None
    assert "runs no engine" in report.ratio.why["latency"]
    assert report.judged_on == "ort"
    assert report.fidelity is not None
    assert report.precision is not None
    assert report.engine is not None
    assert report.engine["pruned"].sha256 == sha256_file(finished / artifacts.ENGINE_PLAN)
    assert report.pruned.file_bytes == (finished / artifacts.ENGINE_PLAN).stat().st_size
    text = (finished / artifacts.REPORT_MD).read_text()
    assert "not with the engines" in text
    assert "## Precision" in text


def test_nothing_runs_twice_and_a_lost_engine_is_built_again(finished, inputs, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    command = runs.arguments(inputs, out, "--target", "trt-rtx", *FINE)
    before = Manifest.read(out).data["stages"]
    assert main(command) == 0
    assert Manifest.read(out).data["stages"] == before
    (out / artifacts.ENGINE_PLAN).write_bytes(b"cut short")
    assert main(command) == 0
    after = Manifest.read(out).data["stages"]
    assert after["type"] == before["type"]
    assert after["engine"] != before["engine"]
    check_plan_file(out / artifacts.ENGINE_PLAN, read_manifest(out / artifacts.ENGINE_PLAN))


@no_gpu
def test_the_engine_does_not_open_here(finished, inputs, capsys):
    command = ["eval", "--run", str(finished), "--images", str(inputs), "--target", "trt-rtx"]
    assert main(command) == 4
    assert "this machine has no GPU that can be used" in capsys.readouterr().err


@no_gpu
def test_an_engine_that_does_not_run_here_is_not_timed_and_the_code_says_so(
    finished, inputs, capsys
):
    plans = (str(finished / artifacts.ENGINE_PLAN), str(finished / artifacts.BASELINE_PLAN))
    command = ["bench", plans[0], "--baseline", plans[1], "--images", str(inputs)]
    assert main(command) == 4
    shown = capsys.readouterr().err
    assert "this machine has no GPU that can be used" in shown
    assert "memory" not in shown


@no_gpu
def test_why_there_is_no_gpu_is_said_once(finished, inputs, tmp_path, capsys):
    out = tmp_path / "again"
    shutil.copytree(finished, out)
    (out / artifacts.ENGINE_PLAN).unlink()
    (out / artifacts.BENCH).unlink()
    assert main(runs.arguments(inputs, out, "--target", "trt-rtx", *FINE)) == 0
    shown = " ".join(capsys.readouterr().err.split())
    reason = f"this machine runs no engine: {device_facts().problem.partition(': ')[0]}"
    assert shown.count(f"the engines are not tested: {reason} ") == 1
    assert shown.count(reason) == 1
    assert "latency and memory are not measured: see above" in shown
    assert device_facts().problem not in shown


def test_the_batches_that_are_timed_follow_the_engine(inputs, tmp_path, capsys):
    def command(*options):
        words = runs.arguments(inputs, tmp_path / "run", "--dry-run", "--json", "-q", *options)
        at = words.index("--bench-batches")
        return [*words[:at], *words[at + 2 :]]

    def timed(*options):
        assert main(command(*options)) == 0
        return json.loads(capsys.readouterr().out)["config"]["bench"]["batch_sizes"]

    deferred = ("--target", "trt", "--engine", "deferred")
    assert timed(*deferred) == timed("--target", "ort") == [1, 8]
    assert timed(*deferred, "--engine-batch", "1,1,1") == [1]
    assert timed(*deferred, "--engine-batch", "2,4,4") == [4]
    # Nothing is timed with this engine, so what is asked for stands.
    given = ("--engine-batch", "1,1,1", "--bench-batches", "1,8")
    assert timed(*deferred, *given) == [1, 8]
    assert main(command("--target", "trt-rtx", *given)) == 2
    assert "batch sizes [8] are to be timed" in capsys.readouterr().err


def test_a_deferred_build_has_everything_but_the_engine(deferred):
    names = {path.name for path in deferred.iterdir()}
    assert {artifacts.MODEL_FP16_ONNX, artifacts.BASELINE_FP16_ONNX} <= names
    assert not {artifacts.ENGINE_PLAN, artifacts.BASELINE_PLAN} & names
    bundle = read_bundle(deferred.with_name("deferred-bundle"))
    assert bundle.manifest.onnx == artifacts.MODEL_FP16_ONNX
    report = Report.read(deferred / artifacts.REPORT_JSON)
    assert report.why["engine"] == "it is built on the device, from the bundle"
    assert rerun_config(deferred).engine.when == "deferred"
    smaller = report.pruned.file_bytes
    assert smaller == (deferred / artifacts.MODEL_FP16_ONNX).stat().st_size


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_without_tensorrt_a_build_stops_at_once_with_three_ways_on(inputs, tmp_path, capsys, dry):
    pytest.importorskip("torch")
    if shutil.which("nvidia-smi"):
        pytest.skip("this machine may have TensorRT")
    out = tmp_path / "run"
    assert main(runs.arguments(inputs, out, "--target", "trt", *dry)) == 4
    message = capsys.readouterr().err
    for way in ("--engine deferred", "--target trt-rtx", "pip install"):
        assert message.count(way) == 1
    assert not out.exists()


@pytest.mark.skipif(available("tensorrt"), reason="TensorRT is here")
@pytest.mark.parametrize("json_", [(), ("--json",)])
def test_without_tensorrt_the_plan_is_shown_all_the_same(inputs, tmp_path, capsys, json_):
    command = runs.arguments(inputs, tmp_path / "run", "--target", "trt", "--dry-run", *json_)
    assert main(command) == 4
    shown = capsys.readouterr()
    assert "target trt needs the package 'tensorrt'" in shown.err
    if json_:
        found = json.loads(shown.out)
        assert "engine" in [stage["name"] for stage in found["stages"]]
        assert found["expected"]["missing"] in shown.err
    else:
        assert "  engine   would run" in shown.out
        assert "M parameters" in shown.out
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(available("tensorrt"), reason="TensorRT is here")
def test_the_ways_on_are_those_of_the_verb(deferred, inputs, tmp_path, capsys):
    assert main(["engine", str(deferred), "-q"]) == 4
    message = capsys.readouterr().err
    assert f"ampdeploy bundle {deferred}" in message
    assert "--engine deferred" not in message
    # Up to the widths, nothing takes TensorRT.
    prune = [*runs.prune_arguments(inputs, tmp_path / "run"), "--target", "trt", "--dry-run", *FINE]
    assert main(prune) == 0


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ("a,b,c", "Write it like 1,1,8."),
        ("1,8", "that is 2 numbers, not 3"),
        ("0,1,8", "the smallest batch is 0; it must be 1 or more"),
        ("1,0,8", "the usual batch is 0"),
        ("4,2,8", "the usual batch, 2, is below the smallest, 4"),
        ("1,4,2", "the largest batch, 2, is below the usual, 4"),
        # 3 x 160 x 160 numbers an image, of fewer than 2^31.
        ("1,1,27963", "the largest batch is 27963, and at 160 px no engine takes more than 27962"),
    ],
)
def test_a_profile_that_makes_no_sense_says_which_number(inputs, tmp_path, capsys, batch, message):
    deferred = ("--target", "trt", "--engine", "deferred", "--engine-batch", batch, "--dry-run")
    assert main(runs.arguments(inputs, tmp_path / "run", *deferred)) == 2
    assert message in capsys.readouterr().err


def test_the_largest_batch_of_a_tensor_is_taken(inputs, tmp_path, capsys):
    deferred = ("--target", "trt", "--engine", "deferred", "--engine-batch", "1,1,27962")
    assert main(runs.arguments(inputs, tmp_path / "run", *deferred, "--dry-run")) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "ort", "--precision", "fp16"), "would compute in FP32 all the same"),
        (("--target", "ort", "--engine", "deferred"), "builds no engine"),
        (
            ("--target", "ort", "--strip-weights", "--engine-batch", "1,2,3", "--dry-run"),
            "Leave --engine-batch, --strip-weights out",
        ),
        (("--target", "ort", "--portable", "version"), "Leave --portable out"),
        (("--target", "ort", "--compute-capability", "8.9"), "Leave --compute-capability out"),
        (("--target", "trt-rtx", "--engine-batch", "4,2,8"), "smallest, usual and largest"),
        (("--target", "trt-rtx", "--engine-batch", "1,1,1"), "but the engine takes 1 to 1"),
        (("--target", "trt-rtx", "--portable", "anywhere"), "unknown portability"),
        (("--target", "trt-rtx", "--precision", "fp8"), "unknown precision"),
        (("--target", "trt-rtx", "--compute-capability", "hopper"), "give major and minor"),
        (("--target", "ort", "--min-cosine-p1", "0.99"), "judges FP16"),
        (("--target", "trt-rtx", "--min-cosine-p1", "1.5"), "at most 1"),
        # No machine is needed to know these, so a build for a device knows them as well.
        (
            ("--target", "trt-rtx", "--engine", "deferred", "--portable", "same-cc"),
            "--portable same-cc is not for target trt-rtx",
        ),
        (
            ("--target", "trt", "--engine", "deferred", "--compute-capability", "8.7"),
            "builds for the GPU it runs on",
        ),
    ],
)
def test_options_that_make_no_sense(inputs, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    assert main(runs.arguments(inputs, out, *options)) == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
def test_the_place_of_the_bundle_is_looked_at_first(inputs, tmp_path, capsys, dry):
    taken = tmp_path / "run-bundle"
    taken.mkdir()
    (taken / "thesis.txt").write_text("draft 17")
    options = ("--target", "trt", "--engine", "deferred", *dry)
    assert main(runs.arguments(inputs, tmp_path / "run", *options)) == 1
    assert f"{taken}, which exists and is no bundle" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert [path.name for path in taken.iterdir()] == ["thesis.txt"]


def test_a_dry_run_for_a_device_names_the_bugs_that_it_may_have(inputs, tmp_path, capsys):
    options = ("--target", "trt", "--engine", "deferred", "--dry-run")
    command = runs.arguments(inputs, tmp_path / "run", *options)
    assert main(command) == 0
    shown = capsys.readouterr().out
    assert "Known bug dynamic-batch-transformer may be met (10.3 to before 10.5" in shown
    assert "rope-vit-wrong" not in shown
    assert main([*command, "--json"]) == 0
    notes = json.loads(capsys.readouterr().out)["expected"]["known_bugs"]
    assert [note for note in notes if "dynamic-batch-transformer" in note]


def test_fp16_that_cannot_be_vouched_for_leaves_no_engine(inputs, tmp_path, capsys):
    pytest.importorskip("tensorrt_rtx")
    out = tmp_path / "run"
    options = ("--target", "trt-rtx", "--min-cosine-p1", "1", "-q", *FINE)
    assert main(runs.arguments(inputs, out, *options)) == 3
    assert "cannot be typed to FP16" in capsys.readouterr().err
    names = {path.name for path in out.iterdir()}
    assert not names & {artifacts.ENGINE_PLAN, artifacts.MODEL_FP16_ONNX, artifacts.PRECISION}
