"""Facts about the machine that a measurement depends on. Standard library and psutil only."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

# Distributions whose version can change a result.
PACKAGES = (
    "ampdeploy",
    "cuda-python",
    "numpy",
    "nvidia-ml-py",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxscript",
    "safetensors",
    "tensorrt",
    "tensorrt-rtx",
    "timm",
    "torch",
    "torchvision",
)

CPUINFO = Path("/proc/cpuinfo")
L4T_RELEASE = Path("/etc/nv_tegra_release")
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")

TOOL_TIMEOUT_S = 20  # nvidia-smi takes seconds to wake a sleeping GPU


def host_facts() -> dict[str, Any]:
    """CPU, memory, operating system, GPUs and library versions of this machine.

    Nothing that names the machine, its user or its folders. What is absent, or cannot be found
    out, is None. GPUs are those nvidia-smi sees.
    """
    return {
        "cpu": cpu_model(),
        "cores_physical": psutil.cpu_count(logical=False),
        "cores_logical": psutil.cpu_count(logical=True),
        "cores_usable": _usable_cores(),
        "ram_bytes": psutil.virtual_memory().total,
        "arch": platform.machine() or None,
        "os": _os_name(),
        "kernel": platform.release() or None,
        "python": platform.python_version(),
        "packages": package_versions(),
        "gpus": gpus(),
        "board": _first_line(DEVICE_TREE_MODEL),
        "l4t": parse_l4t(_first_line(L4T_RELEASE)),
    }


def machine_identity() -> dict[str, Any]:
    """What makes two measurements ones of the same machine: CPU, usable cores, GPUs, drivers."""
    facts = host_facts()
    return {name: facts[name] for name in ("cpu", "cores_usable", "gpus", "board")}


def package_versions() -> dict[str, str | None]:
    """Installed version of each of `PACKAGES`, read from metadata without importing it."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def cpu_model() -> str | None:
    """Marketing name of the CPU."""
    if CPUINFO.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", CPUINFO.read_text(errors="replace"), re.M)
        if found:
            return found[1].strip()
    # /proc/cpuinfo has no model name on Arm; lscpu knows the cores by their part numbers.
    text = _output("lscpu")
    found = re.search(r"^Model name:\s*(.+)$", text, re.M) if text else None
    return found[1].strip() if found else None


def gpus() -> list[dict[str, Any]] | None:
    """Name, driver and memory of each NVIDIA GPU; None where nvidia-smi finds none."""
    text = _output(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader,nounits",
    )
    return parse_nvidia_smi(text) if text else None


def parse_nvidia_smi(text: str) -> list[dict[str, Any]]:
    """The CSV of `gpus`' query; memory, in MiB there, is None where memory is shared (Jetson)."""
    found = []
    for line in text.strip().splitlines():
        name, driver, memory = (part.strip() for part in line.rsplit(",", 2))
        found.append(
            {
                "name": name,
                "driver": driver,
                "memory_bytes": int(memory) << 20 if memory.isdigit() else None,
            }
        )
    return found


def parse_l4t(line: str | None) -> str | None:
    """``36.4.3`` of ``# R36 (release), REVISION: 4.3, GCID: ...``, Jetson's Linux version."""
    found = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", line or "")
    return f"{found[1]}.{found[2]}" if found else None


def _usable_cores() -> int | None:
    # Containers and taskset give a process fewer cores than the machine has.
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count()


def _os_name() -> str:
    try:
        return platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        return platform.system()


def _first_line(path: Path) -> str | None:
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    return text.strip("\0\n ").split("\n")[0] or None


def _output(*command: str) -> str | None:
    """Standard output of a tool, or None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=TOOL_TIMEOUT_S,
            env={**os.environ, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
