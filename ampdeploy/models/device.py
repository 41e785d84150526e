"""Which torch device a stage runs on, and what memory it has."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch

from ampdeploy.errors import ConfigError, MissingDependencyError


def resolve_device(name: str) -> torch.device:
    """``auto`` is CUDA if there is one, else CPU; ``cpu``, ``cuda``, ``cuda:N`` are themselves.

    Raises:
        ConfigError: Not a device name.
        MissingDependencyError: CUDA was asked for and is not here; never a silent CPU run.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"unknown device {name!r}. Use auto, cpu, cuda or cuda:N.") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise MissingDependencyError(
                f"device {name!r} was asked for, but torch {torch.__version__} sees {count} CUDA "
                "devices. Check the driver with nvidia-smi, or use --device cpu."
            )
    return device


def free_memory(device: torch.device) -> int:
    """Bytes that can still be taken on `device` at this moment."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(psutil.virtual_memory().available, _container_memory())


def _container_memory() -> int:
    """Bytes that this container may still take (cgroup v2), which the host's figures do not say."""
    group = Path("/sys/fs/cgroup")
    try:
        limit = (group / "memory.max").read_text().strip()
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):
        return sys.maxsize
    return max(int(limit) - used, 0) if limit.isdigit() else sys.maxsize
