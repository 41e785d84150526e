"""What the GPU and its software are, and what state it is in. Settings are never changed."""

from __future__ import annotations

import shutil
import subprocess
from typing import Any

import torch

# Names that `nvidia-smi --help-query-gpu` has had for years.
STATE = (
    "pstate",
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "temperature.gpu",
    "power.draw",
    "power.limit",
    "utilization.gpu",
    "memory.used",
    "compute_mode",
    "mig.mode.current",
    "clocks_throttle_reasons.active",
)
TIMEOUT_S = 20
TENANTS = (
    "unknown: a virtual machine or container does not see who else uses the GPU's server; "
    "utilization.gpu and memory.used before the run are the only hint"
)


def card_state() -> dict[str, str] | None:
    """Clocks, temperature, power and throttling as nvidia-smi gives them; None without it.

    A field that this driver does not know is left out.
    """
    if shutil.which("nvidia-smi") is None:
        return None
    whole = _query(",".join(STATE))
    if whole is not None:
        return dict(zip(STATE, (part.strip() for part in whole.split(",")), strict=True))
    # One unknown name fails the whole query, so the fields are asked for one by one.
    found = {field: _query(field) for field in STATE}
    return {field: text for field, text in found.items() if text is not None}


def _query(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = done.stdout.strip().splitlines()
    return lines[0] if done.returncode == 0 and lines else None


def software_facts(device: torch.device) -> dict[str, Any]:
    """The GPU as torch sees it, CUDA's versions, and torch's settings that change results."""
    facts: dict[str, Any] = {
        "device": device.type,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "fp16_reduced_precision_reduction": (
            torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
        ),
        "tenants": TENANTS,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
        }
    return facts
