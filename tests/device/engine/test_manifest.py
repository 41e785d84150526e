import dataclasses
import hashlib
import json
import subprocess
import sys
import time

import pytest

from ampdeploy.device.engine.manifest import (
    EngineManifest,
    PrecisionFacts,
    ProfileFacts,
    TensorFacts,
    check_fits,
    check_plan_file,
    manifest_path,
    read_manifest,
    write_manifest,
)
from ampdeploy.errors import ArtifactError
from tests.device.engine_samples import ADA, NO_GPU, ORIN

PLAN = b"plan" * 1000
VERSION = "10.13.3.9"

MANIFEST = EngineManifest(
    tool_version="0.1.0",
    model="dinov2_s",
    image_size=224,
    preprocessing={},
    target="trt",
    tensorrt_version=VERSION,
    portable="none",
    compute_capabilities=("8.9",),
    gpu=ADA.gpu,
    board=None,
    sm_count=128,
    driver=ADA.driver,
    os="linux",
    arch="x86_64",
    plan_sha256=hashlib.sha256(PLAN).hexdigest(),
    plan_bytes=len(PLAN),
    onnx="model.fp16.onnx",
    onnx_sha256="0" * 64,
    onnx_data_sha256=None,
    profiles=(
        ProfileFacts(
            input="images", min=(1, 3, 224, 224), opt=(1, 3, 224, 224), max=(8, 3, 224, 224)
        ),
    ),
    io=(TensorFacts(name="images", mode="input", dtype="FLOAT", shape=(-1, 3, 224, 224)),),
    precision=PrecisionFacts(
        asked="fp16",
        layers={"MATRIX_MULTIPLY": {"HALF": 72}},
        gemm_layers={"HALF": 73},
        gemm_weights={"HALF": 21_000_000},
        half_share=1.0,
        weight_bytes={"HALF": 44_000_000},
        onnx_weight_bytes={"FLOAT16": 44_000_000},
        why_no_engine_outputs="no GPU",
    ),
    stripped=False,
    verdict={"cosine_p1": 0.9998, "images": 32},
    options={"memory": "as given", "workspace_bytes": 1 << 30},
    warnings=("one",),
)


def changed(**fields):
    return dataclasses.replace(MANIFEST, **fields)


def here(base=ADA, **fields):
    return dataclasses.replace(base, **fields)


@pytest.fixture
def plan(tmp_path):
    path = tmp_path / "engine.plan"
    path.write_bytes(PLAN)
    write_manifest(path, MANIFEST)
    return path


def test_a_manifest_comes_back_as_it_was_written(plan):
    assert manifest_path(plan).name == "engine.json"
    assert read_manifest(plan) == MANIFEST
    check_plan_file(plan, read_manifest(plan))


def test_a_plan_alone_is_refused(plan):
    manifest_path(plan).unlink()
    with pytest.raises(ArtifactError, match=r"no engine\.json beside it"):
        read_manifest(plan)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda data: data.update(schema_version=3), "schema version 3"),
        (lambda data: data.pop("plan_sha256"), "has no 'plan_sha256'"),
        (lambda data: data.update(compute_capabilities="8.9"), "compute_capabilities"),
        (lambda data: data.update(surprise=1), "unknown keys 'surprise'"),
    ],
)
def test_a_damaged_or_newer_manifest_is_refused(plan, change, match):
    data = json.loads(manifest_path(plan).read_text())
    change(data)
    manifest_path(plan).write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=match):
        read_manifest(plan)


def test_half_a_manifest_is_refused(plan):
    text = manifest_path(plan).read_text()
    manifest_path(plan).write_text(text[: len(text) // 2])
    with pytest.raises(ArtifactError, match="not JSON"):
        read_manifest(plan)


@pytest.mark.parametrize(
    ("blob", "match"),
    [
        (PLAN[:-1], "was cut short"),
        (b"", "0 bytes of 4000"),
        (PLAN + b"x", "something was added"),
        (b"x" + PLAN[1:], "another sha256"),
    ],
)
def test_a_plan_that_is_not_the_manifests_is_refused(plan, blob, match):
    plan.write_bytes(blob)
    with pytest.raises(ArtifactError, match=match):
        check_plan_file(plan, MANIFEST)


def test_a_plan_that_is_gone_is_refused(plan):
    plan.unlink()
    with pytest.raises(ArtifactError, match="cannot read"):
        check_plan_file(plan, MANIFEST)


JETSON = changed(
    compute_capabilities=("8.7",), gpu="Orin", arch="aarch64", board=ORIN.board, sm_count=8
)
RTX = changed(
    target="trt-rtx",
    tensorrt_version="1.7.1.116",
    compute_capabilities=("8.6", "8.9"),
    gpu=None,
)
FOR_NEWER = changed(portable="version")
SAME_CC = changed(portable="same-cc")
AMPERE_PLUS = changed(portable="ampere-plus")
SUPER = "NVIDIA Jetson Orin Nano Developer Kit Super"
OTHER_BOARD = "NVIDIA Jetson AGX Orin Developer Kit"


@pytest.mark.parametrize(
    ("manifest", "machine", "version"),
    [
        (MANIFEST, ADA, VERSION),
        (MANIFEST, ADA, "10.13.3"),  # a system package's short form of the same
        (MANIFEST, here(driver="999.1"), VERSION),
        (MANIFEST, NO_GPU, VERSION),  # nothing is known against it
        (FOR_NEWER, ADA, "10.16.2"),
        (FOR_NEWER, ADA, "11.4.1"),
        (SAME_CC, here(gpu="NVIDIA L4"), VERSION),
        (AMPERE_PLUS, here(gpu="NVIDIA H100", compute_capability="9.0"), VERSION),
        (JETSON, ORIN, VERSION),
        (JETSON, here(ORIN, board=SUPER), VERSION),
        (JETSON, here(ORIN, sm_count=4), VERSION),  # another power mode
        (SAME_CC, here(sm_count=112), VERSION),
        (RTX, ADA, "1.7.1.116"),
        (RTX, here(os="windows", compute_capability="8.6"), "1.7.1.116"),
    ],
)
def test_an_engine_that_fits(manifest, machine, version):
    check_fits(manifest, machine, version, manifest.target)


@pytest.mark.parametrize(
    ("manifest", "machine", "version", "match"),
    [
        (MANIFEST, ADA, "10.16.2.10", r"built with TensorRT 10\.13\.3\.9, and this is 10\.16\.2"),
        (MANIFEST, ADA, "10.13.3.10", r"this is 10\.13\.3\.10"),
        (FOR_NEWER, ADA, "10.3.0", "newer releases of the same major"),
        (changed(portable="version", tensorrt_version="11.0"), ADA, "12.0", "this is 12.0"),
        (MANIFEST, here(os="windows"), VERSION, "built on linux, and this is windows"),
        (MANIFEST, ORIN, VERSION, "built for x86_64, and this is aarch64"),
        (
            MANIFEST,
            here(compute_capability="8.6", gpu="NVIDIA GeForce RTX 3090"),
            VERSION,
            r"capability 8\.9, and this GPU \(NVIDIA GeForce RTX 3090\) has 8\.6",
        ),
        (MANIFEST, here(gpu="NVIDIA L4"), VERSION, "this is NVIDIA L4 .*same-cc"),
        (FOR_NEWER, here(gpu="NVIDIA L4"), VERSION, "this is NVIDIA L4"),
        (MANIFEST, here(sm_count=112), VERSION, "of 128 SMs, and this one has 112 .*same-cc"),
        (SAME_CC, here(compute_capability="8.6"), VERSION, r"has 8\.6"),
        (AMPERE_PLUS, here(compute_capability="7.5"), VERSION, r"from compute capability 8\.0 on"),
        (AMPERE_PLUS, here(ORIN, arch="x86_64"), VERSION, "do not run on a Jetson"),
        (JETSON, here(ORIN, board=OTHER_BOARD), VERSION, f"this is {OTHER_BOARD}"),
        (RTX, here(compute_capability="12.0"), "1.7.1.116", r"8\.6, 8\.9, and this GPU"),
        (RTX, ADA, "1.8.0.1", r"this is 1\.8\.0\.1"),
    ],
)
def test_an_engine_that_does_not_fit_is_refused_with_the_reason(manifest, machine, version, match):
    with pytest.raises(ArtifactError, match=match):
        check_fits(manifest, machine, version, manifest.target)


def test_every_mismatch_is_named_and_no_version_of_another_kind_is_compared():
    with pytest.raises(ArtifactError) as raised:
        check_fits(MANIFEST, ORIN, "1.7.1.116", "trt-rtx")
    message = str(raised.value)
    assert "built for target trt, and is opened with trt-rtx" in message
    assert "aarch64" in message
    assert "8.7" in message
    assert "1.7.1.116" not in message


def test_refusing_takes_well_under_a_second_and_no_tensorrt(plan):
    started = time.monotonic()
    with pytest.raises(ArtifactError):
        check_fits(read_manifest(plan), ORIN, VERSION, "trt")
    assert time.monotonic() - started < 0.5
    code = "import sys, ampdeploy.device.engine.manifest; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    modules = set(loaded.stdout.split())
    assert "ampdeploy.device.engine.manifest" in modules, loaded.stderr
    assert not {"tensorrt", "tensorrt_rtx", "torch", "onnx"} & modules
