"""Facts of this machine, and of others from their files, their tools' output and their driver."""

from __future__ import annotations

import os
import platform
import stat
import sys

import psutil
import pytest

from ampdeploy import optional
from ampdeploy.bench import host
from ampdeploy.device import platform as device
from ampdeploy.device.platform import JETPACK_OF_L4T, device_facts
from tests.device.stand_ins import NO_DEVICE, install_driver

SMI_GPU = "NVIDIA RTX A2000 12GB, 8.6, 12282, 11000"
SMI_HOST = "NVIDIA RTX A2000 12GB, 550.54.15, 12282"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A machine with no NVIDIA file, tool or package until a test adds them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    for owner, name in [
        (host, "L4T_RELEASE"),
        (host, "DEVICE_TREE_MODEL"),
        (optional, "L4T_RELEASE"),
        (optional, "DEVICE_TREE_COMPATIBLE"),
        (device, "DRIVER_VERSION_FILE"),
        (device, "DRIVER_PROC_FILE"),
    ]:
        monkeypatch.setattr(owner, name, tmp_path / name)
    for name in ("cuda.bindings.driver", "cuda.cuda"):
        monkeypatch.setitem(sys.modules, name, None)

    def add_tool(name: str, script: str) -> None:
        path = tools / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    machine = type("Machine", (), {})()
    machine.file = lambda name, text: (tmp_path / name).write_text(text)
    machine.tool = add_tool
    return machine


def jetson(machine, release, packages=""):
    """Files of a Jetson Orin Nano; `packages` are the lines of a shell case."""
    machine.file("L4T_RELEASE", release)
    machine.file("DEVICE_TREE_MODEL", "NVIDIA Jetson Orin Nano Developer Kit\0")
    machine.file("DEVICE_TREE_COMPATIBLE", "nvidia,p3768-0000+p3767-0005\0nvidia,tegra234\0")
    # dpkg-query -W -f=... NAME
    machine.tool("dpkg-query", f'case "$3" in\n{packages}\n*) exit 1;;\nesac')


def test_this_machine_never_fails_and_gives_a_gpu_or_the_reason():
    facts = device_facts()
    assert (facts.os, facts.arch) == (platform.system().lower(), platform.machine())
    assert (facts.gpu is None) == (facts.problem is not None)
    if facts.gpu is None:
        assert facts.compute_capability is None
        assert facts.memory_free_bytes is None


def test_no_driver_is_the_reason_that_the_real_bindings_give():
    pytest.importorskip("cuda.bindings.driver")
    if os.path.exists("/proc/driver/nvidia/version"):
        pytest.skip("this machine has a driver")
    assert "no NVIDIA driver can be loaded: " in device_facts().problem


def test_nothing_installed(machine):
    facts = device_facts()
    assert facts.gpu is None
    assert "nvidia-smi finds no NVIDIA GPU" in facts.problem
    assert "cuda-python" in facts.problem
    assert (facts.driver, facts.board, facts.l4t, facts.jetpack) == (None, None, None, None)


def test_a_desktop_gpu_by_its_driver(machine, monkeypatch):
    calls = install_driver(monkeypatch)
    machine.file("DRIVER_VERSION_FILE", "570.124.06\n")
    facts = device_facts()
    assert (facts.gpu, facts.compute_capability, facts.sm_count) == ("NVIDIA RTX A2000", "8.6", 26)
    assert (facts.driver, facts.cuda_driver_version) == ("570.124.06", "12.6")
    assert (facts.memory_total_bytes, facts.memory_free_bytes) == (6 << 30, 5 << 30)
    assert facts.integrated is False
    assert facts.problem is None
    # The context that was needed for the free memory is gone again.
    assert calls[-3:] == ["cuMemGetInfo", "cuCtxPopCurrent", "cuDevicePrimaryCtxRelease"]


def test_no_context_is_started_for_what_is_not_asked(machine, monkeypatch):
    calls = install_driver(monkeypatch)
    facts = device_facts(free_memory=False)
    assert facts.gpu == "NVIDIA RTX A2000"
    assert facts.memory_free_bytes is None
    assert not {"cuMemGetInfo", "cuDevicePrimaryCtxRetain"} & set(calls)


def test_a_gpu_whose_free_memory_cannot_be_asked_for_is_still_one(machine, monkeypatch):
    install_driver(monkeypatch, context=304)
    facts = device_facts()
    assert facts.gpu == "NVIDIA RTX A2000"
    assert facts.memory_free_bytes is None


def test_a_driver_that_does_not_start_is_named_with_its_error(machine, monkeypatch):
    install_driver(monkeypatch, init=304)
    assert "CUDA does not start: cuInit failed: CUDA_ERROR_OPERATING_SYSTEM (304)" in (
        device_facts().problem
    )
    install_driver(monkeypatch, init=NO_DEVICE)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    facts = device_facts()
    assert facts.gpu is None
    assert "CUDA_VISIBLE_DEVICES is ''" in facts.problem


def test_an_index_beyond_the_gpus_is_said_so(machine, monkeypatch):
    install_driver(monkeypatch)
    facts = device_facts(index=2)
    assert facts.gpu is None
    assert "CUDA device 2" in facts.problem


def test_without_cuda_python_nvidia_smi_answers(machine):
    machine.tool(
        "nvidia-smi",
        f'case "$*" in\n*compute_cap*) echo "{SMI_GPU}";;\n*) echo "{SMI_HOST}";;\nesac',
    )
    facts = device_facts()
    assert (facts.gpu, facts.compute_capability) == ("NVIDIA RTX A2000 12GB", "8.6")
    assert facts.memory_total_bytes == 12282 << 20
    assert facts.memory_free_bytes == 11000 << 20
    assert facts.driver == "550.54.15"
    assert (facts.integrated, facts.problem) == (None, None)


def test_a_jetson_shares_its_memory(machine, monkeypatch):
    install_driver(monkeypatch, name="Orin", capability=(8, 7), integrated=1)
    jetson(machine, "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic\n")
    machine.file(
        "DRIVER_PROC_FILE",
        "NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0  Release Build\n",
    )
    facts = device_facts()
    assert (facts.gpu, facts.compute_capability, facts.integrated) == ("Orin", "8.7", True)
    assert facts.board == "NVIDIA Jetson Orin Nano Developer Kit"
    assert (facts.l4t, facts.jetpack, facts.driver) == ("36.4.3", "6.2", "540.4.0")
    # CUDA's own figure, 5 GiB in the stand-in, leaves out what the kernel could reclaim.
    assert facts.memory_free_bytes != 5 << 30
    assert 0 < facts.memory_free_bytes <= psutil.virtual_memory().total


def test_a_jetson_without_cuda_python(machine):
    jetson(machine, "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n")
    machine.tool("nvidia-smi", 'echo "Orin (nvgpu), [N/A], [N/A], [N/A]"')
    facts = device_facts()
    assert (facts.gpu, facts.compute_capability, facts.integrated) == ("Orin (nvgpu)", None, True)
    assert facts.memory_total_bytes is None
    assert facts.memory_free_bytes <= psutil.virtual_memory().total
    assert facts.jetpack == "6.1"


def test_the_installed_jetpack_counts_more_than_the_table(machine):
    # JetPack's packages can be upgraded on top of an older Jetson Linux.
    jetson(
        machine,
        "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n",
        "nvidia-jetpack) printf 'ii 6.2.1+b38';;",
    )
    assert device_facts().jetpack == "6.2.1"


def test_a_removed_jetpack_package_does_not_count(machine):
    jetson(
        machine,
        "# R36 (release), REVISION: 4.0, GCID: 37537400, BOARD: generic\n",
        "nvidia-jetpack) printf 'rc 6.2.1+b38';;",
    )
    assert device_facts().jetpack == "6.1"


def test_a_container_on_a_jetson_may_know_only_the_package(machine):
    jetson(machine, "", "nvidia-l4t-core) printf 'ii 36.4.4-20250616085344';;")
    facts = device_facts()
    assert (facts.l4t, facts.jetpack) == ("36.4.4", "6.2.1")


def test_an_unknown_release_is_not_guessed(machine):
    jetson(machine, "# R99 (release), REVISION: 1.0, GCID: 1, BOARD: generic\n")
    facts = device_facts()
    assert (facts.l4t, facts.jetpack) == ("99.1.0", None)


@pytest.mark.parametrize(
    ("line", "version"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC "
            "2023",
            "535.104.05",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.124.06  Release Build",
            "570.124.06",
        ),
        ("something else", None),
    ],
)
def test_driver_version_of_the_kernel_s_line(line, version):
    assert device.parse_driver_line(line) == version


def test_the_table_agrees_with_the_supported_releases():
    # TensorRT 10 begins with JetPack 6.1; these are the releases that the tool is made for.
    assert {JETPACK_OF_L4T[l4t] for l4t in JETPACK_OF_L4T if l4t.startswith("36.4")} == {
        "6.1", "6.2", "6.2.1",
    }  # fmt: skip
    assert JETPACK_OF_L4T["38.4.0"] == "7.1"
