"""Opening and running engines.

Real: engines that TensorRT-RTX builds here, and every refusal up to the missing GPU. On recording
stand-ins of cuda-python and TensorRT, which keep account of memory: loading, running, freeing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import time

import numpy as np
import pytest

from ampdeploy import __version__
from ampdeploy.artifacts import sha256_file
from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.engine.load import LoadedEngine
from ampdeploy.device.engine.manifest import (
    EngineManifest,
    PrecisionFacts,
    ProfileFacts,
    TensorFacts,
    read_manifest,
    write_manifest,
)
from ampdeploy.device.platform import device_facts
from ampdeploy.errors import AmpDeployError, ArtifactError, MissingDependencyError
from ampdeploy.targets.base import get_target, target_for
from ampdeploy.targets.tensorrt import TrtRtxTarget, TrtTarget
from tests.device import stand_ins as nvidia
from tests.targets.onnx_samples import write_linear_model

SIZE, WIDTH, PATCHES = nvidia.SIZE, nvidia.WIDTH, nvidia.PATCHES

needs_no_gpu = pytest.mark.skipif(
    device_facts().gpu is not None, reason="this machine has a GPU that could run the engine"
)


def write_engine(folder, plan=b"a plan", **changes):
    """engine.plan and engine.json, by default for the GPU of the stand-in."""
    path = folder / "engine.plan"
    path.write_bytes(plan)
    images = (3, SIZE, SIZE)
    facts = device_facts()
    manifest = EngineManifest(
        tool_version=__version__,
        model="tiny",
        image_size=SIZE,
    preprocessing={},
        target="trt",
        tensorrt_version="10.13.3.9",
        portable="none",
        compute_capabilities=("8.6",),
        gpu="NVIDIA RTX A2000",
        board=None,
        sm_count=26,
        driver="570.124.06",
        os=facts.os,
        arch=facts.arch,
        plan_sha256=hashlib.sha256(plan).hexdigest(),
        plan_bytes=len(plan),
        onnx="model.fp16.onnx",
        onnx_sha256="0" * 64,
        onnx_data_sha256=None,
        profiles=(
            ProfileFacts(input="images", min=(1, *images), opt=(1, *images), max=(3, *images)),
        ),
        io=(TensorFacts(name="images", mode="input", dtype="FLOAT", shape=(-1, *images)),),
        precision=PrecisionFacts(
            asked="fp16", layers={}, gemm_layers={}, gemm_weights={}, half_share=1.0,
            weight_bytes={}, onnx_weight_bytes={},
        ),
        stripped=False,
        verdict={},
    )  # fmt: skip
    write_manifest(path, dataclasses.replace(manifest, **changes))
    return path


def build_rtx_plan(folder):
    """A plan of a small graph for compute capability 8.6, really built; no GPU is needed."""
    rtx = pytest.importorskip("tensorrt_rtx")
    write_linear_model(folder / "model.onnx", size=SIZE, width=WIDTH)
    logger = rtx.Logger(rtx.Logger.ERROR)
    builder = rtx.Builder(logger)
    network = builder.create_network(0)
    assert rtx.OnnxParser(network, logger).parse_from_file(str(folder / "model.onnx"))
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    profile.set_shape("images", *((batch, 3, SIZE, SIZE) for batch in (1, 1, 3)))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = 1
    assert config.set_compute_capability(rtx.ComputeCapability.SM86, 0)
    return bytes(builder.build_serialized_network(network, config)), rtx.__version__


@needs_no_gpu
def test_a_real_engine_on_a_machine_without_gpu(tmp_path):
    plan, version = build_rtx_plan(tmp_path)
    path = write_engine(tmp_path, plan, target="trt-rtx", tensorrt_version=version, gpu=None)
    assert isinstance(target_for(path), TrtRtxTarget)
    with pytest.raises(MissingDependencyError) as caught:
        target_for(path).open(path)
    message = str(caught.value)
    assert caught.value.exit_code == 4
    assert "an engine for an NVIDIA GPU of compute capability 8.6 on linux" in message
    assert "this machine has no GPU that can be used: no NVIDIA driver" in message
    assert "Run it on a machine like that one" in message


@needs_no_gpu
def test_what_tensorrt_says_is_in_the_error_when_it_takes_no_plan(tmp_path):
    plan, version = build_rtx_plan(tmp_path)
    path = write_engine(tmp_path, plan, target="trt-rtx", tensorrt_version=version)
    flavour = find_flavour("trt-rtx", needed_by="a test")
    with pytest.raises(ArtifactError, match=r"does not load .*TensorRT said: .*cudaError 35"):
        LoadedEngine(path, read_manifest(path), flavour)


def test_the_stand_in_has_only_what_the_real_tensorrt_has():
    real = pytest.importorskip("tensorrt_rtx")
    pairs = [
        (nvidia.Engine, real.ICudaEngine),
        (nvidia.RtxEngine, real.ICudaEngine),
        (nvidia.Context, real.IExecutionContext),
        (nvidia.RuntimeConfig, real.IRuntimeConfig),
        (nvidia.RuntimeCache, real.IRuntimeCache),
        (nvidia.Runtime, real.Runtime),
        (nvidia.Refitter, real.Refitter),
        (nvidia.OnnxParserRefitter, real.OnnxParserRefitter),
        (nvidia.TensorIOMode, real.TensorIOMode),
        (nvidia.TensorLocation, real.TensorLocation),
        (nvidia.DataType, real.DataType),
    ]
    for stand_in, cls in pairs:
        names = [name for name in dir(stand_in) if not name.startswith("_")]
        assert [name for name in names if not hasattr(cls, name)] == [], cls
    assert hasattr(real.DynamicShapesKernelSpecializationStrategy, "EAGER")
    assert hasattr(real.CudaGraphStrategy, "WHOLE_GRAPH_CAPTURE")
    assert tuple(real.Dims((1, 2))) == (1, 2)
    assert real.Dims((1, 2))[0] == 1


@needs_no_gpu
@pytest.mark.parametrize("name", ["trt", "trt-rtx"])
def test_the_targets_say_that_they_need_a_gpu(name):
    with pytest.raises(MissingDependencyError, match=f"target {name} runs engines on an NVIDIA G"):
        get_target(name).check()


def test_the_engine_of_another_machine_is_refused_at_once(tmp_path):
    path = write_engine(tmp_path, arch="aarch64", compute_capabilities=("8.7",), gpu="Orin")
    started = time.perf_counter()
    with pytest.raises(ArtifactError, match="built for aarch64, and this is"):
        get_target("trt").open(path)
    assert time.perf_counter() - started < 1


def test_an_engine_opened_with_the_other_tensorrt(tmp_path):
    with pytest.raises(ArtifactError, match="built for target trt, and is opened with trt-rtx"):
        get_target("trt-rtx").open(write_engine(tmp_path))


def test_an_engine_without_its_manifest(tmp_path):
    path = write_engine(tmp_path)
    path.with_suffix(".json").unlink()
    for opener in (target_for, get_target("trt").open):
        with pytest.raises(ArtifactError, match=r"has no engine\.json beside it"):
            opener(path)


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A machine with an RTX A2000, as far as cuda-python can tell."""
    gpu = nvidia.Gpu()
    nvidia.install_cuda(monkeypatch, gpu)
    nvidia.install_driver(monkeypatch)
    monkeypatch.setenv("AMPDEPLOY_CACHE", str(tmp_path / "cache"))
    return gpu


@pytest.fixture
def trt(monkeypatch, gpu):
    state = nvidia.TensorRt(gpu)
    nvidia.install_tensorrt(monkeypatch, state)
    return state


@pytest.fixture
def rtx(monkeypatch, gpu):
    state = nvidia.TensorRt(gpu)
    nvidia.install_tensorrt(monkeypatch, state, rtx=True, version="1.7.1.116")
    return state


def write_rtx_engine(folder, **changes):
    return write_engine(folder, target="trt-rtx", tensorrt_version="1.7.1.116", **changes)


def images(batch, seed=0):
    return np.random.default_rng(seed).standard_normal((batch, 3, SIZE, SIZE), dtype=np.float32)


def assert_expected(out, batch):
    wanted = nvidia.expected(batch)
    assert set(out) == set(wanted)
    for name, values in wanted.items():
        np.testing.assert_array_equal(out[name], values)
        assert out[name].dtype == np.float32


def test_runs_any_batch_of_the_profile_and_gives_everything_back(tmp_path, gpu, trt):
    path = write_engine(tmp_path)
    with TrtTarget().open(path) as runner:
        assert (runner.image_size, runner.device, runner.batch_range) == (SIZE, "cuda", (1, 1, 3))
        assert runner.output_names == ("features", "patch_features")
        assert runner.activation_bytes == 12345
        results = []
        for seed, batch in enumerate((1, 3, 2, 2, 1)):
            results.append((runner.run(images(batch, seed)), images(batch, seed)))
        assert trt.plan == b"a plan"
    # Checked at the end: no result is a view of memory that the next run writes into.
    for out, batch in results:
        assert_expected(out, batch)
    assert gpu.live == {}
    assert gpu.calls.count("set_input_shape") == 4  # not where the batch stays the same
    assert gpu.calls[-3:] == ["del Context", "del Engine", "del Runtime"]
    runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        runner.run(images(1))
    with pytest.raises(RuntimeError, match="closed"):
        runner.run_device()


def test_images_are_checked_like_those_of_every_runner(tmp_path, trt):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        for wrong in (images(1).astype(np.float64), images(1)[..., :2], images(2)[..., ::-1]):
            with pytest.raises(AmpDeployError, match=r"engine\.plan takes C-contiguous float32"):
                runner.run(wrong)


@pytest.mark.parametrize("method", ["run", "upload"])
def test_a_batch_outside_the_profile_names_both(tmp_path, gpu, trt, method):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        with pytest.raises(
            AmpDeployError, match=r"batches of 1 to 3; it was given 4 .*--engine-batch"
        ):
            getattr(runner, method)(images(4))
        assert "set_input_shape" not in gpu.calls
        assert_expected(runner.run(images(3)), images(3))


def test_the_gpu_is_timed_apart_from_the_copies(tmp_path, trt):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        for method in (runner.run_device, runner.download):
            with pytest.raises(RuntimeError, match="call `"):
                method()
        runner.upload(images(2))
        # The stand-in counts a millisecond for each copy or run between the events.
        assert [runner.run_device(), runner.run_device()] == [1.0, 1.0]
        assert_expected(runner.download(), images(2))
        runner.upload(images(2, seed=5))
        with pytest.raises(RuntimeError, match="computed nothing yet"):
            runner.download()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_a_timed_run_has_events_around_the_engine_and_no_others(tmp_path, gpu, trt, cuda_graph):
    with TrtTarget(cuda_graph=cuda_graph).open(write_engine(tmp_path)) as runner:
        runner.run(images(2))
        assert "cudaEventRecord" not in gpu.calls
        for batch in (images(2), images(3, seed=1)):
            took = runner.run_timed(batch)
            # The stand-in counts a millisecond for each copy, run or capture between the events.
            assert took.compute_ms == 1.0
            assert took.end_to_end_ms > 0
        assert gpu.calls.count("cudaEventRecord") == 4
        assert_expected(runner.download(), images(3, seed=1))
        assert runner.compute_clock.startswith("GPU: CUDA events")


@pytest.mark.parametrize("is_rtx", [False, True])
def test_a_sibling_has_a_context_of_its_own_of_the_same_engine(tmp_path, gpu, monkeypatch, is_rtx):
    version = "1.7.1.116" if is_rtx else "10.13.3.9"
    target = TrtRtxTarget() if is_rtx else TrtTarget()
    nvidia.install_tensorrt(monkeypatch, nvidia.TensorRt(gpu), rtx=is_rtx, version=version)
    path = write_engine(tmp_path, target=target.name, tensorrt_version=version)
    with target.open(path) as runner:
        with runner.sibling() as sibling:
            # Of different batches in turn, which one context would mix up.
            for seed in range(3):
                for each, batch in ((runner, 1), (sibling, 3)):
                    assert_expected(each.run(images(batch, seed)), images(batch, seed))
        assert gpu.calls.count("create_execution_context") == 2
        assert gpu.calls.count("deserialize_cuda_engine") == 1
        assert gpu.calls.count("del Context") == 1
        assert "del Engine" not in gpu.calls
        assert_expected(runner.run(images(2)), images(2))
    assert gpu.live == {}
    assert gpu.calls[-1] == "del Runtime"


def test_a_sibling_may_outlive_the_runner_it_came_from(tmp_path, gpu, trt):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        sibling = runner.sibling()
    assert_expected(sibling.run(images(2)), images(2))
    assert "del Engine" not in gpu.calls
    sibling.close()
    assert gpu.live == {}
    assert gpu.calls[-3:] == ["del Context", "del Engine", "del Runtime"]


def test_a_sibling_without_memory_leaves_the_runner_as_it_was(tmp_path, gpu, trt):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        trt.refuse.add("create_execution_context")
        with pytest.raises(AmpDeployError, match=r"no second execution context .*why create_exec"):
            runner.sibling()
        trt.refuse.clear()
        gpu.fail("cudaMalloc", nvidia.OUT_OF_MEMORY)
        with pytest.raises(AmpDeployError, match="cudaErrorMemoryAlloc"):
            runner.sibling()
        gpu.failures.clear()
        assert_expected(runner.run(images(2)), images(2))
    assert gpu.live == {}


def test_a_cuda_graph_is_captured_once_for_each_change_of_batch(tmp_path, gpu, trt):
    with TrtTarget(cuda_graph=True).open(write_engine(tmp_path)) as runner:
        for seed, batch in enumerate((2, 2, 2, 3, 2)):
            assert_expected(runner.run(images(batch, seed)), images(batch, seed))
        assert gpu.calls.count("cudaGraphInstantiate") == 3
        assert gpu.calls.count("cudaGraphLaunch") == 2
        assert gpu.calls.count("cudaGraphExecDestroy") == 2  # before the shapes changed
        assert gpu.calls.index("cudaGraphExecDestroy") < _last(gpu.calls, "set_input_shape")
        runner.upload(images(3))
        assert runner.run_device() == 1.0  # the capture is not part of it
        assert_expected(runner.download(), images(3))
    assert gpu.live == {}


def _last(calls, name):
    return len(calls) - 1 - calls[::-1].index(name)


def test_a_gpu_out_of_memory_frees_what_it_has(tmp_path, gpu, trt):
    path = write_engine(tmp_path)
    allocations = ["cudaMalloc", "cudaMallocHost", "cudaEventCreateWithFlags"]
    for function, count in zip(allocations, (3, 3, 2), strict=True):
        for at in range(1, count + 1):
            gpu.calls.clear()
            gpu.fail(function, nvidia.OUT_OF_MEMORY, at=at)
            with pytest.raises(AmpDeployError, match=f"{function} failed: cudaErrorMemoryAlloc"):
                TrtTarget().open(path)
            gpu.failures.clear()
            assert gpu.live == {}
            assert {"del Context", "del Engine", "del Runtime"} <= set(gpu.calls)


@pytest.mark.parametrize(
    ("function", "error"),
    [
        ("deserialize_cuda_engine", "does not load"),
        ("create_execution_context", "makes no execution context"),
        ("set_tensor_address", "refused set_tensor_address of 'images'"),
    ],
)
def test_opening_that_tensorrt_refuses_says_why(tmp_path, gpu, trt, function, error):
    trt.refuse.add(function)
    with pytest.raises(AmpDeployError, match=f"{error}.*TensorRT said: why {function} failed"):
        TrtTarget().open(write_engine(tmp_path))
    assert gpu.live == {}
    assert gpu.calls[-1] == "del Runtime"


@pytest.mark.parametrize("function", ["set_input_shape", "execute_async_v3"])
@pytest.mark.parametrize("cuda_graph", [False, True])
def test_running_that_tensorrt_refuses_says_why(tmp_path, gpu, trt, function, cuda_graph):
    with TrtTarget(cuda_graph=cuda_graph).open(write_engine(tmp_path)) as runner:
        runner.run(images(1))
        trt.refuse.add(function)
        with pytest.raises(AmpDeployError, match=rf"refused {function}.*why {function} failed"):
            runner.run(images(2))
    assert gpu.live == {}


@pytest.mark.parametrize(
    "function", ["cudaMemcpyAsync", "cudaStreamSynchronize", "cudaStreamEndCapture"]
)
def test_an_error_of_the_gpu_is_the_one_that_is_told(tmp_path, gpu, trt, function):
    runner = TrtTarget(cuda_graph=True).open(write_engine(tmp_path))
    gpu.fail(function, nvidia.ILLEGAL)
    gpu.fail("cudaFree", nvidia.ILLEGAL)  # as after a real one: nothing works any more
    said = rf"engine\.plan: {function} failed: cudaErrorIllegal"
    with pytest.raises(AmpDeployError, match=said), runner:
        runner.run(images(1))
    assert {kind for kind, _ in gpu.live.values()} == {"device"}
    assert gpu.calls[-1] == "del Runtime"


def test_clean_up_that_fails_after_good_runs_is_an_error(tmp_path, gpu, trt):
    runner = TrtTarget().open(write_engine(tmp_path))
    runner.run(images(1))
    gpu.fail("cudaFree", nvidia.ILLEGAL)
    with pytest.raises(AmpDeployError, match="cudaFree failed"):
        runner.close()
    assert gpu.calls[-1] == "del Runtime"


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("images", (nvidia.TensorIOMode.INPUT, nvidia.DataType.HALF, (-1, 3, SIZE, SIZE))),
        ("images", (nvidia.TensorIOMode.INPUT, nvidia.DataType.FLOAT, (-1, 3, SIZE, -1))),
        ("mask", (nvidia.TensorIOMode.INPUT, nvidia.DataType.FLOAT, (-1, 3, SIZE, SIZE))),
        ("features", (nvidia.TensorIOMode.OUTPUT, nvidia.DataType.FLOAT, (-1,))),
    ],
)
def test_engines_of_others_are_refused(tmp_path, gpu, trt, name, tensor):
    trt.tensors[name] = tensor
    with pytest.raises(ArtifactError, match=rf"engine\.plan has the tensors .*{name} DataType"):
        TrtTarget().open(write_engine(tmp_path))
    assert gpu.live == {}


def test_an_engine_without_patches(tmp_path, trt):
    del trt.tensors["patch_features"]
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        assert set(runner.run(images(1))) == {"features"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compute_capabilities": ("8.7",)}, r"compute capability 8\.7, and this GPU .* has 8\.6"),
        (
            {"tensorrt_version": "10.3.0.26"},
            r"with TensorRT 10\.3\.0\.26, and this is 10\.13\.3\.9",
        ),
        ({"stripped": True}, r"holds no weights, and model\.fp16\.onnx, .* is not beside it"),
        ({"plan_bytes": 7}, "cut short"),
        ({"plan_sha256": "0" * 64}, "another sha256"),
    ],
)
def test_nothing_that_does_not_fit_reaches_tensorrt(tmp_path, gpu, trt, changes, message):
    with pytest.raises(ArtifactError, match=message):
        TrtTarget().open(write_engine(tmp_path, **changes))
    assert "deserialize_cuda_engine" not in gpu.calls
    assert gpu.live == {}


def write_stripped(folder, **changes):
    """A plan without weights, and beside it the ONNX file that it was built from."""
    onnx, data = folder / "model.fp16.onnx", folder / "model.fp16.onnx.data"
    onnx.write_bytes(b"a graph")
    data.write_bytes(b"weights")
    hashes = {"onnx_sha256": sha256_file(onnx), "onnx_data_sha256": sha256_file(data)}
    return write_engine(folder, stripped=True, **{**hashes, **changes})


@pytest.mark.parametrize("is_rtx", [False, True])
def test_a_plan_without_weights_gets_them_when_it_is_opened(tmp_path, gpu, monkeypatch, is_rtx):
    version = "1.7.1.116" if is_rtx else "10.13.3.9"
    target = TrtRtxTarget() if is_rtx else TrtTarget()
    state = nvidia.TensorRt(gpu)
    state.stripped = True
    nvidia.install_tensorrt(monkeypatch, state, rtx=is_rtx, version=version)
    path = write_stripped(tmp_path, target=target.name, tensorrt_version=version)
    before = {file.name: sha256_file(file) for file in tmp_path.iterdir() if file.is_file()}
    with target.open(path) as runner:
        assert_expected(runner.run(images(2)), images(2))
    done = [call for call in gpu.calls if "refit" in call.lower() or "context" in call.lower()]
    assert done == [
        "refit_from_file", "refit_cuda_engine", "del OnnxParserRefitter", "del Refitter",
        "create_execution_context", "del Context",
    ]  # fmt: skip
    assert gpu.live == {}
    after = {file.name: sha256_file(file) for file in tmp_path.iterdir() if file.is_file()}
    assert after == before  # the small plan stays small


def test_a_plan_with_weights_is_not_refitted(tmp_path, gpu, trt):
    with TrtTarget().open(write_engine(tmp_path)) as runner:
        assert_expected(runner.run(images(1)), images(1))
    assert "refit_from_file" not in gpu.calls


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.fp16.onnx", None, r"model\.fp16\.onnx, where they are, is not beside it"),
        ("model.fp16.onnx.data", None, r"model\.fp16\.onnx\.data, where they are, is not beside"),
        ("model.fp16.onnx", b"another graph", r"model\.fp16\.onnx beside it is not the one"),
        ("model.fp16.onnx.data", b"others!", r"model\.fp16\.onnx beside it is not the one"),
    ],
)
def test_wrong_weights_never_reach_tensorrt(tmp_path, gpu, trt, file, content, message):
    path = write_stripped(tmp_path)
    (tmp_path / file).unlink()
    if content is not None:
        (tmp_path / file).write_bytes(content)
    with pytest.raises(ArtifactError, match=message):
        TrtTarget().open(path)
    assert "deserialize_cuda_engine" not in gpu.calls


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "refit_from_file",
            r"does not take those of model\.fp16\.onnx \(odd shape\)\. Tensor.* why",
        ),
        ("missing", r"model\.fp16\.onnx lacks 2 of them, 'blocks\.0\.w' among them"),
        (
            "refit_cuda_engine",
            r"refitting it with those of model\.fp16\.onnx failed\. .* why refit",
        ),
    ],
)
def test_weights_that_tensorrt_does_not_take(tmp_path, gpu, trt, what, message):
    trt.stripped = True
    if what == "missing":
        trt.missing = ["blocks.0.w", "blocks.0.b"]
    else:
        trt.refuse.add(what)
    with pytest.raises(AmpDeployError, match=rf"engine\.plan holds no weights, and .*{message}"):
        TrtTarget().open(write_stripped(tmp_path))
    assert "create_execution_context" not in gpu.calls
    assert gpu.live == {}
    assert gpu.calls[-1] == "del Runtime"


def test_threads_and_a_lean_runtime_are_passed_on(tmp_path, trt):
    with TrtTarget().open(write_engine(tmp_path), threads=2):
        assert (trt.seen_threads, trt.seen_host_code) == (2, False)
    with TrtTarget().open(write_engine(tmp_path, portable="version")):
        assert (trt.seen_threads, trt.seen_host_code) == (1, True)


def test_rtx_compiles_every_kernel_before_it_runs(tmp_path, gpu, rtx):
    with TrtRtxTarget().open(write_rtx_engine(tmp_path)) as runner:
        config = rtx.context_config
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        assert config.cuda_graph_strategy == "disabled"
        assert_expected(runner.run(images(2)), images(2))
    del config, rtx.context_config
    assert gpu.live == {}


def test_rtx_captures_its_graph_itself(tmp_path, gpu, rtx):
    with TrtRtxTarget(cuda_graph=True).open(write_rtx_engine(tmp_path)) as runner:
        assert rtx.context_config.cuda_graph_strategy == "whole"
        assert_expected(runner.run(images(2)), images(2))
    assert "cudaStreamBeginCapture" not in gpu.calls


def test_rtx_keeps_its_kernels_for_the_next_process(tmp_path, rtx):
    path = write_rtx_engine(tmp_path)
    kept = tmp_path / "cache" / "trt-rtx"
    with TrtRtxTarget().open(path) as runner:
        runner.run(images(1))
        assert not kept.exists()
    (file,) = kept.iterdir()
    assert file.read_bytes() == b"kernels of this GPU"
    file.write_bytes(b"kernels of two runs")
    written = file.stat().st_ino
    with TrtRtxTarget().open(path):
        assert rtx.context_config.cache.kernels == b"kernels of two runs"
    assert file.stat().st_ino == written  # nothing new was compiled, so it was left alone
    file.write_bytes(b"damaged")  # TensorRT-RTX refuses it, and compiles again
    with TrtRtxTarget().open(path) as runner:
        runner.run(images(1))
    assert file.read_bytes() == b"kernels of this GPU"


def test_rtx_runs_where_its_kernels_cannot_be_kept(tmp_path, rtx, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    with TrtRtxTarget().open(write_rtx_engine(tmp_path)) as runner:
        assert_expected(runner.run(images(1)), images(1))
    assert "not kept" in caplog.text


@pytest.mark.parametrize(
    "function", ["create_runtime_config", "create_runtime_cache", "set_runtime_cache"]
)
def test_rtx_settings_that_are_refused_are_errors(tmp_path, gpu, rtx, function):
    rtx.refuse.add(function)
    with pytest.raises(AmpDeployError, match=f"why {function} failed"):
        TrtRtxTarget().open(write_rtx_engine(tmp_path))
    assert gpu.live == {}
