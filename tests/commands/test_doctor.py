"""`ampdeploy doctor`: the truth about this machine, and about broken ones, without ever failing."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import types

import pytest

from ampdeploy.cli import main
from ampdeploy.commands import doctor
from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.platform import device_facts
from ampdeploy.device.radar.bugs import bug_table
from ampdeploy.targets.base import target_names


def facts_of(capsys) -> dict:
    assert main(["doctor", "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def gpu() -> str | None:
    return device_facts().gpu


def test_the_facts_of_this_machine(capsys, gpu):
    facts = facts_of(capsys)
    assert set(facts["targets"]) == set(facts["can"]) == set(target_names())
    assert facts["device"]["gpu"] == gpu
    assert facts["device"]["problem"] is None or gpu is None
    assert facts["can"]["ort"] == {"do": "run", "why": None}
    assert facts["modules"]["onnx"]["version"]
    assert facts["known_bugs"]["data_version"] == bug_table().data_version
    for name, able in facts["can"].items():
        assert (able["why"] is None) == (able["do"] in ("run", "build and run")), name


def test_rtx_builds_where_there_is_no_gpu(capsys, gpu):
    rtx = pytest.importorskip("tensorrt_rtx")
    facts = facts_of(capsys)
    assert facts["tensorrt"]["trt-rtx"] == {"version": rtx.__version__, "problem": None}
    if gpu is None:
        assert facts["can"]["trt-rtx"]["do"] == "build only"
        assert "GPU" in facts["can"]["trt-rtx"]["why"]
    assert "fp16-variance" in [bug["id"] for bug in facts["known_bugs"]["bugs"]]


def test_a_gpu_that_rtx_does_not_list_can_be_built_for_but_not_run():
    pytest.importorskip("tensorrt_rtx")
    flavour = find_flavour("trt-rtx", needed_by="a test")
    hopper = dataclasses.replace(device_facts(), gpu="NVIDIA H200", compute_capability="9.0")
    said = doctor._unlisted(flavour, hopper)
    assert said is not None
    assert "SM 9.0" in said
    assert flavour.version in said
    ada = dataclasses.replace(hopper, compute_capability="8.9")
    assert doctor._unlisted(flavour, ada) is None


def test_what_a_person_reads(capsys):
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in (
        "Python 3",
        "GPU: ",
        "Packages:",
        "TensorRT:",
        "Targets:",
        "trt-rtx",
        "Known bugs",
    ):
        assert part in shown
    pytest.importorskip("tensorrt_rtx")
    # On a line of its own, so that it can be copied.
    assert "https://github.com/NVIDIA/TensorRT/issues/2781" in map(str.strip, shown.splitlines())


def test_without_torch_a_device_is_told_once_and_that_it_needs_none(monkeypatch, capsys):
    absent = ("torch", "torchvision", "timm", "safetensors", "PIL", "onnx", "onnxscript")
    for name in absent:
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    assert main(["doctor"]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "torch, torchvision, timm, safetensors, pillow, onnx, onnxscript. The verbs" in words
    assert "a device, with engine and bench --inputs, does not" in words
    assert "torch, torch-cuda nothing needs the package 'torch'" in words
    assert "PIL" not in words
    # For the packages, and for the targets that are PyTorch itself.
    assert words.count(".[cpu]") == 2


BROKEN = {
    # The loader's real message: no machine has this library.
    "tensorrt": "import ctypes; ctypes.CDLL('libnvinfer.so.999')",
    # What torchvision does on a torch that it was not built for.
    "torchvision": "raise RuntimeError('operator torchvision::nms does not exist')",
    "onnxscript": "import surely_not_installed",
    "timm": "raise ImportError()",
}


def test_a_broken_package_is_a_line_and_no_traceback(tmp_path):
    for name, code in BROKEN.items():
        (tmp_path / f"{name}.py").write_text(code)
    done = subprocess.run(
        [sys.executable, "-m", "ampdeploy", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    facts = json.loads(done.stdout)
    said = facts["tensorrt"]["trt"]["problem"]
    assert "shared library libnvinfer.so.999 is missing" in said
    assert "TensorRT, whose parts must all be of one version" in said
    assert facts["can"]["trt"]["do"] == "nothing"
    assert said.rstrip(".") in facts["can"]["trt"]["why"]
    assert "--engine deferred" in facts["can"]["trt"]["why"]
    modules = {name: state["problem"] for name, state in facts["modules"].items()}
    assert "operator torchvision::nms does not exist" in modules["torchvision"]
    assert "'surely_not_installed'" in modules["onnxscript"]
    assert "no reason given" in modules["timm"]
    assert modules["onnx"] is None
    assert facts["can"]["ort"]["do"] == "run"


@pytest.fixture
def tensorrt_10_3(monkeypatch):
    """NVIDIA's module as JetPack 6 has it, as far as it is asked what it can do."""
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.3.0.30"
    names = {
        "Builder": ["build_serialized_network"],
        "OnnxParser": ["parse_from_file"],
        "IExecutionContext": ["execute_async_v3"],
        "ICudaEngine": ["num_io_tensors"],
        "BuilderFlag": ["FP16", "VERSION_COMPATIBLE"],
    }
    for owner, members in names.items():
        setattr(module, owner, type(owner, (), dict.fromkeys(members)))
    module.NetworkDefinitionCreationFlag = type("Flag", (), {"STRONGLY_TYPED": 1})
    monkeypatch.setitem(sys.modules, "tensorrt", module)


@pytest.mark.usefixtures("tensorrt_10_3")
def test_known_bugs_of_the_tensorrt_that_is_here(capsys, gpu):
    facts = facts_of(capsys)
    assert facts["tensorrt"]["trt"] == {"version": "10.3.0.30", "problem": None}
    bugs = {bug["id"]: bug for bug in facts["known_bugs"]["bugs"] if bug["target"] == "trt"}
    assert bugs["dynamic-batch-transformer"]["certain"] is True
    assert bugs["dynamic-batch-transformer"]["applies"] == "static-batch"
    assert bugs["rope-vit-wrong"]["link"].endswith("/4742")
    assert "horizontal-gemm-fusion-thor" not in bugs
    if gpu is None:
        assert facts["can"]["trt"]["do"] == "nothing"
        assert "GPU" in facts["can"]["trt"]["why"]
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert "trt: transformer + dynamic-batch (10.3 to before 10.5; any GPU)" in shown
    assert "way out: build for one batch size" in shown


JETSON = {
    "gpu": "Orin", "compute_capability": "8.7", "sm_count": 8, "driver": "540.4.0",
    "cuda_driver_version": "12.6", "memory_total_bytes": 8 << 30, "memory_free_bytes": 4 << 30,
    "integrated": True, "os": "linux", "arch": "aarch64",
    "board": "NVIDIA Jetson Orin Nano Developer Kit", "l4t": "36.4.3", "jetpack": "6.2",
    "problem": None,
}  # fmt: skip


def test_a_jetson_is_shown_with_its_jetpack():
    assert doctor._device_lines(JETSON) == [
        "GPU: Orin, SM 8.7, driver 540.4.0, CUDA up to 12.6, 8.0 GiB shared with the host",
        "NVIDIA Jetson Orin Nano Developer Kit: JetPack 6.2, L4T 36.4.3",
    ]
    little = {**dict.fromkeys(JETSON), "gpu": "NVIDIA L4", "l4t": "99.1.0"}
    assert doctor._device_lines(little) == [
        "GPU: NVIDIA L4",
        "Jetson: JetPack of unknown version, L4T 99.1.0",
    ]


def test_meters_and_sensors_of_this_machine_are_there_or_explained(capsys, gpu):
    facts = facts_of(capsys)
    assert set(facts["meters"]) == {"cpu", "cuda"}
    for meter in facts["meters"].values():
        assert (meter["source"] is None) != (meter["problem"] is None)
    if gpu is None:
        assert "no GPU can be used" in facts["meters"]["cuda"]["problem"]
    assert list(facts["sensors"]) == ["clocks", "temperatures", "power mode", "throttling"]
    for sensor in facts["sensors"].values():
        assert (sensor["seen"] is None) != (sensor["why"] is None)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    for part in ("Energy of models on:", "cpu", "cuda", "Watched while timing:", "power mode"):
        assert part in shown


def test_a_meter_that_breaks_is_a_line_and_no_traceback(monkeypatch, capsys):
    def broken(*arguments):
        raise ZeroDivisionError("of a meter")

    monkeypatch.setattr("ampdeploy.bench.sensors.survey.find_meter", broken)
    monkeypatch.setattr("ampdeploy.bench.sensors.survey.Watch", broken)
    facts = facts_of(capsys)
    said = "unexpected ZeroDivisionError: of a meter"
    assert facts["meters"]["cpu"] == {"source": None, "problem": said}
    assert facts["sensors"]["clocks"] == {"seen": None, "why": said}


def test_what_a_jetson_can_measure(monkeypatch, tmp_path):
    from ampdeploy.bench.sensors import survey
    from ampdeploy.bench.sensors.meter import RailMeter
    from tests.bench.machines import plant

    root = plant("orin_nx_nano", tmp_path)
    monkeypatch.setattr(survey, "find_meter", lambda name: RailMeter(root))
    found = doctor._meters(dataclasses.replace(device_facts(), gpu="Orin"))
    assert found["cpu"] == found["cuda"]
    assert found["cuda"]["problem"] is None
    source = found["cuda"]["source"]
    assert source.startswith("INA3221 VDD_IN (module)")
    assert doctor._able(found)[1] == ("cuda", "yes", source)
