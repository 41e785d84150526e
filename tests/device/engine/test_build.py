"""Engines that TensorRT for RTX really builds, without a GPU; and `trt` with a GPU put in."""

import dataclasses
import hashlib
import logging
import os
import signal
import sys
import types

import numpy as np
import pytest
from onnx import TensorProto, helper

from ampdeploy.config import EngineConfig
from ampdeploy.device.engine import build as module
from ampdeploy.device.engine import monitor as build_monitor
from ampdeploy.device.engine.build import build_engine
from ampdeploy.device.engine.manifest import (
    check_fits,
    check_plan_file,
    manifest_path,
    read_manifest,
)
from ampdeploy.errors import (
    AmpDeployError,
    ArtifactError,
    ConfigError,
    MissingDependencyError,
    VerificationError,
)
from ampdeploy.export.onnx import export_onnx
from tests.device.engine_samples import ADA, NO_GPU, ORIN, to_fp16, trt_with_a_gpu, write_graph
from tests.mlp_kinds import SIZE, make

VERDICT = {"cosine_p1": 0.9999}
WEIGHT = np.ones((192, 4), np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("graphs")


@pytest.fixture(scope="module")
def exported(folder):
    path = folder / "model.onnx"
    export_onnx(make("plain"), path, opset=18)
    return path


@pytest.fixture(scope="module")
def typed(exported, folder):
    return to_fp16(exported, folder / "model.fp16.onnx")


def build(onnx, plan, **changes):
    options = {
        "target": "trt-rtx",
        "config": EngineConfig(),
        "model": "tiny",
        "image_size": SIZE,
        "precision": "fp16",
        "verdict": VERDICT,
        "here": NO_GPU,
        **changes,
    }
    return build_engine(onnx, plan, **options)


@pytest.fixture
def plan(tmp_path):
    """Where to build; after a refusal nothing may lie there."""
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "engine.plan"


def refused(error, match, onnx, plan, **changes):
    with pytest.raises(error, match=match) as raised:
        build(onnx, plan, **changes)
    assert list(plan.parent.iterdir()) == []
    return str(raised.value)


def test_a_typed_graph_becomes_a_plan_and_a_manifest(typed, plan):
    manifest = build(typed, plan, config=EngineConfig(batch=(2, 4, 8)))
    assert sorted(path.name for path in plan.parent.iterdir()) == ["engine.json", "engine.plan"]
    assert read_manifest(plan) == manifest
    check_plan_file(plan, manifest)
    check_fits(manifest, ADA, manifest.tensorrt_version, "trt-rtx")
    assert manifest.compute_capabilities == ("8.0", "8.6", "8.9", "12.0", "12.1")
    assert manifest.onnx == "model.fp16.onnx"
    assert manifest.onnx_sha256 == hashlib.sha256(typed.read_bytes()).hexdigest()
    assert manifest.verdict == VERDICT
    (profile,) = manifest.profiles
    assert (profile.min[0], profile.opt[0], profile.max[0]) == (2, 4, 8)
    assert [(t.name, t.mode, t.dtype, t.shape) for t in manifest.io] == [
        ("images", "input", "FLOAT", (-1, 3, SIZE, SIZE)),
        ("features", "output", "FLOAT", (-1, 32)),
        ("patch_features", "output", "FLOAT", (-1, 16, 32)),
    ]


def test_the_proof_of_fp16(typed, exported, plan):
    proof = build(typed, plan).precision
    assert proof.half_share == 1.0
    # 3 blocks of qkv, q k^T, (q k^T) v, proj, fc1, fc2; and the patch embedding.
    assert proof.gemm_layers == {"HALF": 19}
    assert proof.gemm_weights == {"HALF": 3 * 12 * 32 * 32 + 3 * 14 * 14 * 32}
    assert proof.layers["NORMALIZATION"] == {"FLOAT": 7}
    assert proof.layers["SOFTMAX"] == {"FLOAT": 3}
    # All the file's weights are in the network, in the same type.
    assert proof.weight_bytes["HALF"] == proof.onnx_weight_bytes["FLOAT16"] > 100_000
    assert proof.engine_outputs is None
    assert proof.why_no_engine_outputs == "no GPU here to load the engine"
    plain = build(exported, plan, precision="fp32").precision
    assert plain.gemm_layers == {"FLOAT": 19}
    assert plain.half_share == 0.0


@pytest.mark.parametrize("kind", ["packed_swiglu", "eva_mixed_rope"])
def test_other_kinds_of_models(kind, folder, plan):
    source = folder / f"{kind}.onnx"
    export_onnx(make(kind), source, opset=18)
    manifest = build(to_fp16(source, folder / f"{kind}.fp16.onnx"), plan)
    assert manifest.precision.half_share == 1.0


def test_fp16_asked_and_not_built_is_refused(exported, plan):
    refused(VerificationError, "FP16 was asked for, and 0% of the weights", exported, plan)


def test_fp32_asked_and_not_built_is_refused(typed, plan):
    refused(VerificationError, "FP32 was asked for, and 19", typed, plan, precision="fp32")


def test_an_island_of_fp32_is_allowed_and_said(exported, folder, plan):
    onnx = to_fp16(exported, folder / "island.onnx", float_blocks=("blocks.1.",))
    manifest = build(onnx, plan)
    assert manifest.precision.gemm_layers == {"HALF": 13, "FLOAT": 6}
    assert manifest.precision.half_share == pytest.approx(0.78, abs=0.01)
    assert "only 78% of the weights are multiplied in FP16" in manifest.warnings


def test_an_engine_that_is_mostly_fp32_is_refused(exported, folder, plan):
    onnx = to_fp16(exported, folder / "islands.onnx", float_blocks=("blocks.1.", "blocks.2."))
    refused(VerificationError, "56% of the weights.*at least 67%", onnx, plan)


def test_fp16_weights_that_are_multiplied_in_fp32_are_refused(tmp_path, plan):
    # The file is half the size, and nothing is computed in FP16 by it.
    node = helper.make_node
    nodes = [
        node("Flatten", ["images"], ["flat"]),
        node("Cast", ["flat"], ["half"], to=TensorProto.FLOAT16),
        node("MatMul", ["half", "w1"], ["hidden"]),
        node("Cast", ["hidden"], ["wide"], to=TensorProto.FLOAT),
        node("Cast", ["w2"], ["wide_weight"], to=TensorProto.FLOAT),
        node("MatMul", ["wide", "wide_weight"], ["features"], name="second"),
    ]
    weights = {"w1": np.ones((192, 64), np.float16), "w2": np.ones((64, 4), np.float16)}
    onnx = write_graph(tmp_path / "model.onnx", nodes, weights)
    match = r"1 matrix products of model\.onnx have FP16 weights.*second \(FLOAT\)"
    refused(VerificationError, match, onnx, plan, image_size=8)


def linear(path, **changes):
    nodes = [
        helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], [changes.get("output", "features")]),
    ]
    return write_graph(path, nodes, {"w": WEIGHT}, **changes)


@pytest.mark.parametrize(
    ("write", "match"),
    [
        (lambda path: linear(path, batch=2), r"shape \(2, 3, 8, 8\).*dynamic batch"),
        (lambda path: linear(path, output="logits"), r"outputs are \['images', 'logits'\]"),
        (lambda path: path.write_bytes(b"no graph at all"), "Failed to parse the ONNX model"),
        (lambda path: path.write_bytes(b"hello world"), r"inputs and outputs are \[\]"),
        (lambda path: path.write_bytes(b""), r"inputs and outputs are \[\]"),
        (lambda path: None, "there is no ONNX file"),
    ],
)
def test_a_file_that_is_no_export_is_refused(write, match, tmp_path, plan):
    onnx = tmp_path / "model.onnx"
    write(onnx)
    refused(ArtifactError, match, onnx, plan, image_size=8, precision="fp32")


def test_what_the_parser_says_is_in_the_error(tmp_path, plan):
    nodes = [helper.make_node("Unheard", ["images"], ["features"], name="blocks.0/odd")]
    onnx = write_graph(tmp_path / "model.onnx", nodes, {})
    refused(ArtifactError, r"'blocks\.0/odd' \(Unheard\).*Plugin not found", onnx, plan)


def test_the_gpus_of_an_engine_are_chosen(typed, plan):
    chosen = EngineConfig(compute_capabilities=("7.5", "8.9", "7.5"))
    manifest = build(typed, plan, config=chosen)
    assert manifest.compute_capabilities == ("7.5", "8.9")
    other = build(typed, plan, config=EngineConfig(compute_capabilities=("8.9",)))
    assert manifest.plan_sha256 != other.plan_sha256
    hopper = EngineConfig(compute_capabilities=("9.0",))
    plan.unlink()
    manifest_path(plan).unlink()
    refused(
        ConfigError, r"not build for compute capability 9\.0; it knows", typed, plan, config=hopper
    )


@pytest.mark.parametrize("portable", ["version", "same-cc", "ampere-plus"])
def test_portability_is_not_for_tensorrt_for_rtx(portable, typed, plan):
    config = EngineConfig(portable=portable)
    refused(
        ConfigError, f"--portable {portable} is not for target trt-rtx", typed, plan, config=config
    )


def test_leaving_weights_out_takes_a_gpu(typed, plan):
    config = EngineConfig(strip_weights=True)
    refused(
        MissingDependencyError, "only on a machine with an NVIDIA GPU", typed, plan, config=config
    )


def test_what_tensorrt_says_of_a_failed_build_is_in_the_error(typed, plan):
    # The same, said to a machine that is told to have a GPU: TensorRT itself fails.
    config = EngineConfig(strip_weights=True)
    message = refused(AmpDeployError, "built no engine", typed, plan, config=config, here=ADA)
    assert "TensorRT said: IBuilder::buildSerializedNetwork: Error Code" in message


@pytest.fixture
def strips(monkeypatch):
    """TensorRT that strips: its flags are taken for harmless ones, so that the real builder, which
    cannot strip without a GPU, builds all the same."""
    trt = trt_with_a_gpu()
    real = trt.BuilderFlag
    trt.BuilderFlag = types.SimpleNamespace(
        TF32=real.TF32, STRIP_PLAN=real.DEBUG, REFIT_IDENTICAL=real.DEBUG
    )
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    return trt


def test_an_engine_without_weights_is_seen_to_take_them(typed, plan, strips):
    stripped = {"target": "trt", "here": ADA, "config": EngineConfig(strip_weights=True)}
    manifest = build(typed, plan, **stripped)
    done = [call for call in strips.calls if not call.startswith("inspected")]
    assert done[-2:] == ["weights of model.fp16.onnx", "refit"]
    assert manifest.stripped
    assert manifest.plan_sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
    strips.calls.clear()
    assert not build(typed, plan, target="trt", here=ADA).stripped
    assert "refit" not in strips.calls


def test_an_engine_that_could_not_be_completed_is_not_written(typed, plan, strips):
    strips.Refitter.missing = ("blocks.0.w",)
    match = r"engine of model\.fp16\.onnx holds no weights, .* lacks 1 of them, 'blocks\.0\.w'"
    config = EngineConfig(strip_weights=True)
    refused(AmpDeployError, match, typed, plan, target="trt", here=ADA, config=config)


def test_a_memory_limit_reaches_the_builder(typed, plan):
    manifest = build(typed, plan, config=EngineConfig(memory_limit_bytes=1 << 30))
    assert manifest.options["memory"] == "1024 MiB as given; no GPU here"
    assert 500 << 20 < manifest.options["workspace_bytes"] < 512 << 20


def test_a_memory_limit_below_what_building_takes_is_refused(typed, plan):
    config = EngineConfig(memory_limit_bytes=1 << 20)
    match = r"takes about \d+ MiB, and --memory-limit allows 1 MiB\. Raise --memory-limit to \d+MB"
    refused(ConfigError, match, typed, plan, config=config)


NO_KERNEL = "Could not find any implementation for node {ForeignNode[/blocks.0/Add.../norm/Mul]}"
DRIVER_OUT = "[defaultAllocator.cpp::allocate::31] Error Code 1: Cuda Runtime (out of memory)"
REFUSED = "Requested amount of GPU memory (15485030400 bytes) could not be allocated."
SKIPPED = (
    "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on requested size of 9385"
)


@pytest.mark.parametrize(
    ("errors", "warnings", "raise_limit"),
    [
        # https://github.com/NVIDIA/TensorRT/issues/4258 and 477
        ([DRIVER_OUT, "autotuning: User allocator error allocating", NO_KERNEL], [], False),
        ([DRIVER_OUT, f"{NO_KERNEL}, try increasing the workspace size"], [], False),
        ([NO_KERNEL], [REFUSED], False),
        (["[executionContext.cpp] Error Code 2: OutOfMemory (Requested size was 9)"], [], False),
        ([f"{NO_KERNEL} due to insufficient workspace. See verbose log"], [], True),
        ([NO_KERNEL], ["Some tactics do not have sufficient workspace memory to run."], True),
        ([NO_KERNEL], [SKIPPED], True),
        ([NO_KERNEL], [SKIPPED.replace("insufficient", "insuficient")], True),
        ([f"{NO_KERNEL} due to insufficient workspace"], [REFUSED], False),
        ([NO_KERNEL], ["Detected subnormal FP16 values."], None),
        (["Assertion bound >= 0 failed."], [SKIPPED, REFUSED], None),
    ],
)
def test_too_little_memory_and_too_low_a_limit_get_other_advice(
    errors, warnings, raise_limit, typed, plan, monkeypatch
):
    """What TensorRT says is put in its mouth; it cannot be made to say it without a GPU."""
    trt = trt_with_a_gpu()

    class Builder(trt.Builder):
        def __init__(self, logger):
            super().__init__(logger)
            self.told = logger

        def build_serialized_network(self, network, config):  # returns None: it failed
            for severity, lines in (("WARNING", warnings), ("ERROR", errors)):
                for line in lines:
                    self.told.log(getattr(trt.ILogger.Severity, severity), line)

    trt.Builder = Builder
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    said = refused(AmpDeployError, "built no engine", typed, plan, target="trt", here=ADA)
    assert errors[-1].rstrip(".") in said
    assert ("Raise --memory-limit" in said) == (raise_limit is True)
    assert ("less memory to the builder with --memory-limit" in said) == (raise_limit is False)
    assert ("lower the largest batch (--engine-batch" in said) == (raise_limit is not None)
    assert ("Run with -v" in said) == (raise_limit is None)


def test_an_engine_that_does_not_load_where_it_was_built_is_not_written(typed, plan):
    # The driver is missing, and the facts of the machine deny it.
    refused(AmpDeployError, "does not load the engine.*TensorRT said", typed, plan, here=ADA)


def test_trt_takes_its_package_and_a_gpu(typed, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    refused(MissingDependencyError, "tensorrt", typed, plan, target="trt")
    monkeypatch.setitem(sys.modules, "tensorrt", trt_with_a_gpu())
    message = refused(MissingDependencyError, "this machine has none", typed, plan, target="trt")
    assert "--engine deferred" in message
    assert "--target trt-rtx" in message


def test_another_image_size_is_refused(typed, plan):
    match = r"shape \(-1, 3, 56, 56\), expected \(-1, 3, 224, 224\)"
    refused(ArtifactError, match, typed, plan, image_size=224)


def test_an_unknown_precision(typed, plan):
    refused(ConfigError, "'int8' is none of fp32, fp16", typed, plan, precision="int8")


def test_ctrl_c_stops_the_build_and_leaves_nothing(typed, plan, caplog):
    class CtrlC(logging.Handler):
        def emit(self, record):
            if record.getMessage().startswith("TensorRT: Building engine,"):
                os.kill(os.getpid(), signal.SIGINT)

    logger = logging.getLogger("ampdeploy")
    logger.setLevel(logging.DEBUG)
    logger.addHandler(CtrlC())
    with pytest.raises(KeyboardInterrupt):
        build(typed, plan)
    assert list(plan.parent.iterdir()) == []
    assert "BuildCanceled" in caplog.text  # TensorRT was told, and stopped
    logger.handlers.clear()
    build(typed, plan)
    check_plan_file(plan, read_manifest(plan))


def test_progress_reaches_the_end(typed, plan, monkeypatch):
    tasks = []
    original = build_monitor.BuildProgress
    monkeypatch.setattr(
        build_monitor, "BuildProgress", lambda task: tasks.append(task) or original(task)
    )
    build(typed, plan)
    (shown,) = tasks
    assert (shown.description, shown.total) == ("building trt-rtx engine", 100)
    assert 50 < shown.done <= 100
    assert shown.text  # the phase it is in


def test_a_crash_between_plan_and_manifest_is_seen(typed, plan, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            build(typed, plan)
    assert plan.exists()
    with pytest.raises(ArtifactError, match=r"no engine\.json"):
        read_manifest(plan)
    build(typed, plan)
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_manifest", killed)
        with pytest.raises(KeyboardInterrupt):
            build(typed, plan, config=EngineConfig(compute_capabilities=("8.9",)))
    with pytest.raises(ArtifactError, match="of another build"):
        check_plan_file(plan, read_manifest(plan))


def test_no_timing_cache_for_tensorrt_for_rtx(typed, plan, tmp_path):
    manifest = build(typed, plan, timing_cache=tmp_path / "timings")
    assert manifest.options["timing_cache"].startswith("none: TensorRT for RTX")
    assert not (tmp_path / "timings").exists()


@pytest.fixture
def trt(monkeypatch):
    module = trt_with_a_gpu()
    monkeypatch.setitem(sys.modules, "tensorrt", module)
    return module


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX")
def test_trt_builds_for_its_own_gpu(typed, plan, tmp_path, trt):
    timings = tmp_path / "timings"
    manifest = build(typed, plan, target="trt", here=ADA, timing_cache=timings)
    assert manifest.compute_capabilities == ("8.9",)
    assert (manifest.gpu, manifest.driver, manifest.sm_count) == (ADA.gpu, ADA.driver, 128)
    assert manifest.board is None
    assert manifest.precision.engine_outputs == {"HALF": 1}
    assert "inspected at images (1, 3, 56, 56)" in trt.calls
    # 20 GiB are free, a tenth is left to others, and the real builder takes powers of two.
    assert manifest.options["tactic_bytes"] == 16 << 30
    assert 8 << 30 < manifest.options["workspace_bytes"] < 9 << 30
    name = "trt-10.13.3.9-NVIDIA_GeForce_RTX_4090-8.9-128-570.124.06.timing"
    assert [path.name for path in timings.iterdir()] == [name]
    assert manifest.options["timing_cache"] == name
    (timings / name).write_bytes(b"damaged")
    build(typed, plan, target="trt", here=ADA, timing_cache=timings)
    check_fits(read_manifest(plan), ADA, "10.13.3.9", "trt")


def test_a_jetsons_board_is_in_the_manifest(typed, plan, trt):
    manifest = build(typed, plan, target="trt", here=ORIN)
    assert manifest.board == ORIN.board
    assert manifest.arch == "aarch64"
    agx = dataclasses.replace(ORIN, board="NVIDIA Jetson AGX Orin Developer Kit")
    with pytest.raises(ArtifactError, match="AGX"):
        check_fits(manifest, agx, "10.13.3.9", "trt")


def test_the_built_engine_has_the_last_word_on_fp16(typed, plan, monkeypatch):
    said = '{"Layers": [{"Outputs": [{"Format/Datatype": "Row major linear FP32"}]}]}'
    monkeypatch.setitem(sys.modules, "tensorrt", trt_with_a_gpu(inspector=said))
    match = "no layer of the built engine puts out FP16"
    refused(VerificationError, match, typed, plan, target="trt", here=ADA)


# What TensorRT 10 says of an engine with a dynamic batch, asked without an execution context.
NO_TYPE = '{"Layers": [{"Outputs": [{"Format/Datatype": "N/A due to dynamic shapes"}]}]}'


@pytest.mark.parametrize("said", ["not JSON", '{"Layers": ["only", "names"]}', NO_TYPE])
def test_an_inspector_that_says_nothing_is_noted(said, typed, plan, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorrt", trt_with_a_gpu(inspector=said))
    proof = build(typed, plan, target="trt", here=ADA).precision
    assert proof.engine_outputs is None
    assert "inspector" in proof.why_no_engine_outputs


def test_compute_capabilities_are_not_for_trt(typed, plan, trt):
    config = EngineConfig(compute_capabilities=("8.9",))
    match = "builds for the GPU it runs on"
    refused(ConfigError, match, typed, plan, target="trt", here=ADA, config=config)
