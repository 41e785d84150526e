"""What this machine is to an engine: GPU, driver, memory, Jetson release. Never fails.

An engine is built for one kind of GPU, and its workspace is bounded by the memory that is free, so
these facts are asked for before anything is built or loaded.

Run here: a machine without GPU and driver, and files and tool output as other machines have them.
The calls to CUDA's driver API have been run against a recording stand-in of `cuda-python`, not on a
GPU.
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ampdeploy.bench import host
from ampdeploy.device.cuda import CudaApi, CudaError, driver_api, version_text
from ampdeploy.errors import MissingDependencyError
from ampdeploy.optional import is_jetson

DRIVER_VERSION_FILE = Path("/sys/module/nvidia/version")
DRIVER_PROC_FILE = Path("/proc/driver/nvidia/version")

# Jetson Linux release -> JetPack, from https://developer.nvidia.com/embedded/jetpack-archive; an
# apt upgrade of JetPack 6.2.1 brings 36.4.7, which the archive does not list. What is not here is
# not guessed: it takes the release notes to know.
JETPACK_OF_L4T = {
    "35.1.0": "5.0.2",
    "35.2.1": "5.1",
    "35.3.1": "5.1.1",
    "35.4.1": "5.1.2",
    "35.5.0": "5.1.3",
    "35.6.0": "5.1.4",
    "36.3.0": "6.0",
    "36.4.0": "6.1",
    "36.4.3": "6.2",
    "36.4.4": "6.2.1",
    "36.4.7": "6.2.1",
    "36.5.0": "6.2.2",
    "36.5.2": "6.2.3",
    "38.2.0": "7.0",
    "38.2.1": "7.0",
    "38.4.0": "7.1",
    "39.2.0": "7.2",
    "39.2.1": "7.2.1",
}

_NAME_BYTES = 256
_MIB = 1 << 20


@dataclass(frozen=True, kw_only=True)
class DeviceFacts:
    """One GPU and the machine around it. What is absent, or cannot be found out, is None."""

    gpu: str | None
    """Marketing name; None: no GPU can be used, and `problem` says why."""
    compute_capability: str | None
    """``8.7``."""
    sm_count: int | None
    driver: str | None
    """Version of the kernel driver, e.g. ``570.124.06``."""
    cuda_driver_version: str | None
    """Newest CUDA that the driver serves, e.g. ``12.6``."""
    memory_total_bytes: int | None
    memory_free_bytes: int | None
    """What can still be taken; on an integrated GPU, of the memory shared with the host."""
    integrated: bool | None
    """Jetson: the GPU works in the host's memory."""
    os: str
    """``linux``."""
    arch: str
    """``x86_64``, ``aarch64``."""
    board: str | None
    """Device-tree model, e.g. ``NVIDIA Jetson Orin Nano Developer Kit``."""
    l4t: str | None
    """Jetson Linux release, e.g. ``36.4.3``."""
    jetpack: str | None
    """``6.2``."""
    problem: str | None
    """Why no GPU can be used; None where one can."""


@dataclass(frozen=True, kw_only=True)
class _Gpu:
    gpu: str | None = None
    compute_capability: str | None = None
    sm_count: int | None = None
    cuda_driver_version: str | None = None
    memory_total_bytes: int | None = None
    memory_free_bytes: int | None = None
    integrated: bool | None = None
    problem: str | None = None


def device_facts(index: int = 0, *, free_memory: bool = True) -> DeviceFacts:
    """GPU `index` and the machine around it, asked for anew at every call. Never raises.

    CUDA's driver API answers if cuda-python is installed, else nvidia-smi, which knows less and
    counts GPUs without regard to CUDA_VISIBLE_DEVICES.

    Args:
        index: Of the GPU.
        free_memory: Ask for it, too. On a discrete GPU that starts a CUDA context and ends it
            again, which can take seconds, so that what the context itself takes is accounted for.
    """
    l4t = l4t_release()
    gpu = _ask_cuda(index, free_memory) or _ask_nvidia_smi(index, is_jetson=l4t is not None)
    return DeviceFacts(
        **vars(gpu),
        driver=driver_version(),
        os=platform.system().lower(),
        arch=platform.machine(),
        board=host._first_line(host.DEVICE_TREE_MODEL),
        l4t=l4t,
        jetpack=jetpack_release(l4t),
    )


def _ask_cuda(index: int, free_memory: bool) -> _Gpu | None:
    """The GPU by the driver API; None without cuda-python."""
    try:
        cuda = driver_api(needed_by="asking for the GPU")
    except MissingDependencyError:
        return None
    try:
        cuda.call("cuInit", 0)
        count = cuda.call("cuDeviceGetCount")
        if index >= count:
            return _Gpu(problem=f"CUDA device {index} was asked for, and {count} can be seen")
        return _gpu_of(cuda, cuda.call("cuDeviceGet", index), free_memory)
    except CudaError as error:
        return _Gpu(problem=_in_words(error))
    except Exception as error:
        # Without libcuda the bindings raise a class of their own, another one in each version.
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        return _Gpu(problem=f"no NVIDIA driver can be loaded: {first_line.rstrip('.')}")


def _in_words(error: CudaError) -> str:
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if error.name == "CUDA_ERROR_NO_DEVICE" and visible is not None:
        return f"the driver shows no GPU while CUDA_VISIBLE_DEVICES is {visible!r}"
    return f"CUDA does not start: {str(error).rstrip('.')}"


def _gpu_of(cuda: CudaApi, device: Any, free_memory: bool) -> _Gpu:
    def attribute(name: str) -> int:
        key = getattr(cuda.module.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}")
        return int(cuda.call("cuDeviceGetAttribute", key, device))

    major, minor = (attribute(f"COMPUTE_CAPABILITY_{part}") for part in ("MAJOR", "MINOR"))
    integrated = bool(attribute("INTEGRATED"))
    return _Gpu(
        gpu=_text(cuda.call("cuDeviceGetName", _NAME_BYTES, device)),
        compute_capability=f"{major}.{minor}",
        sm_count=attribute("MULTIPROCESSOR_COUNT"),
        cuda_driver_version=version_text(cuda.call("cuDriverGetVersion")),
        memory_total_bytes=int(cuda.call("cuDeviceTotalMem", device)),
        memory_free_bytes=_free(cuda, device, integrated) if free_memory else None,
        integrated=integrated,
    )


def _text(raw: bytes) -> str:
    return raw.split(b"\0")[0].decode(errors="replace").strip()


def _free(cuda: CudaApi, device: Any, integrated: bool) -> int | None:
    return _shared_free() if integrated else _free_of(cuda, device)


def _shared_free() -> int:
    # On Tegra, CUDA's own figure leaves out what the kernel can reclaim from its caches:
    # https://docs.nvidia.com/cuda/cuda-for-tegra-appnote/ (memory management)
    return int(psutil.virtual_memory().available)


def _free_of(cuda: CudaApi, device: Any) -> int | None:
    """Free bytes of a discrete GPU; None where no context can be had, as in exclusive mode."""
    try:
        context = cuda.call("cuDevicePrimaryCtxRetain", device)
    except CudaError:
        return None
    try:
        cuda.call("cuCtxPushCurrent", context)
        try:
            free, _ = cuda.call("cuMemGetInfo")
        finally:
            cuda.call("cuCtxPopCurrent")
    except CudaError:
        return None
    finally:
        cuda.call("cuDevicePrimaryCtxRelease", device)
    return int(free)


def _ask_nvidia_smi(index: int, *, is_jetson: bool) -> _Gpu:
    """The GPU by nvidia-smi, which is part of the driver."""
    text = host._output(
        "nvidia-smi",
        f"--id={index}",
        "--query-gpu=name,compute_cap,memory.total,memory.free",
        "--format=csv,noheader,nounits",
    )
    lines = (text or "").strip().splitlines()
    parts = [part.strip() for part in lines[0].rsplit(",", 3)] if lines else []
    if len(parts) != 4:
        return _Gpu(
            problem="nvidia-smi finds no NVIDIA GPU or is not installed, and cuda-python, which "
            "could ask the driver, is not installed either"
        )
    name, capability, total, free = parts
    return _Gpu(
        gpu=name,
        compute_capability=capability if re.fullmatch(r"\d+\.\d+", capability) else None,
        # Where memory is shared with the host, nvidia-smi says [N/A].
        memory_total_bytes=int(total) * _MIB if total.isdigit() else None,
        memory_free_bytes=int(free) * _MIB if free.isdigit() else _shared_free(),
        integrated=is_jetson or None,
    )


def driver_version() -> str | None:
    """Version of the NVIDIA kernel driver, e.g. ``570.124.06``."""
    version = host._first_line(DRIVER_VERSION_FILE)
    if version:
        return version
    line = host._first_line(DRIVER_PROC_FILE)
    if line:
        return parse_driver_line(line)
    # In a container the kernel's files can be hidden while the tools are there.
    gpus = host.gpus()
    return str(gpus[0]["driver"]) if gpus else None


def parse_driver_line(line: str) -> str | None:
    """``540.4.0`` of ``NVRM version: NVIDIA UNIX Open Kernel Module for aarch64  540.4.0 ...``."""
    found = re.search(r"Kernel Module.*?\s(\d+(?:\.\d+)+)", line)
    return found[1] if found else None


def l4t_release() -> str | None:
    """Jetson Linux release, e.g. ``36.4.3``; None on anything but a Jetson."""
    release = host.parse_l4t(host._first_line(host.L4T_RELEASE))
    if release:
        return release
    # A container need not have the file; the package knows as well: 36.4.3-20250107174145.
    version = _package_version("nvidia-l4t-core") if is_jetson() else None
    return version.split("-")[0] if version else None


def jetpack_release(l4t: str | None) -> str | None:
    """JetPack of a Jetson, e.g. ``6.2``.

    The installed package decides where there is one: TensorRT comes with it, and it can be newer
    than the Jetson Linux it is installed on. Else the table says what `l4t` was released with.
    """
    if l4t is None:
        return None
    version = _package_version("nvidia-jetpack")  # 6.2.1+b38
    return version.split("+")[0] if version else JETPACK_OF_L4T.get(l4t)


def _package_version(name: str) -> str | None:
    """Version of an installed Debian package; None where it, or dpkg, is not there."""
    text = host._output("dpkg-query", "-W", "-f=${db:Status-Abbrev}${Version}", name)
    # "ii " is installed; "rc " is removed, with its configuration left behind.
    return text[3:].strip() or None if text and text.startswith("ii ") else None
