"""Peak memory of an artifact, measured in a process of its own.

Inside a process that has already run other models, freed memory hides what a new one needs.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from ampdeploy.errors import AmpDeployError, ConfigError
from ampdeploy.report.codec import from_plain
from ampdeploy.report.result import Explained

MAX_WORKER_SECONDS = 1800
STDERR_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class MemoryResult(Explained):
    """Memory of one fresh process, in bytes."""

    device: str
    """Where the artifact ran: ``cpu`` or ``cuda``."""
    batch_size: int
    runs: int
    file_bytes: int
    """The artifact on disk, a data file beside it included."""
    rss_runtime_bytes: int
    """Resident after importing the runtime (and starting CUDA), before the artifact is opened."""
    rss_loaded_bytes: int
    """Resident once the artifact is open."""
    peak_rss_bytes: int
    """Highest resident size of the process, while opening or running."""
    weight_bytes: int | None
    """Of the file's tensors, as stored; of an engine, of the network that it was built from."""
    activation_bytes: int | None
    """Working memory beyond the loaded model: of a TensorRT context, as the engine says; on a CPU
    what the runs made resident, pages of mapped files left out; else what the runs took of the
    GPU's memory."""
    device_bytes: int | None
    """What opening and running took of the GPU's own memory, its CUDA context left out. Other
    processes on the GPU would be counted too."""
    available_drop_bytes: int | None
    """Where GPU and host share memory: by how much MemAvailable fell, whoever took it."""
    memory_bytes: int | None
    """What this model adds to a process that has its runtime loaded: weights, working memory and
    one input batch. On a CPU peak_rss - rss_runtime, on a GPU with memory of its own
    `device_bytes`, where memory is shared `available_drop_bytes`."""


def measure_memory(
    target: str, artifact: Path, *, batch_size: int, threads: int | None = None
) -> MemoryResult:
    """Open and run `artifact` in a fresh process and read its peak resident size.

    Args:
        target: Name of the target that opens it.
        artifact: The file.
        batch_size: Images per run; random, not zeros.
        threads: CPU threads of the runtime; None: its default.

    Raises:
        ConfigError: `batch_size` is below 1.
        AmpDeployError: The process failed; the message ends with what it last said.
    """
    if batch_size < 1:
        raise ConfigError(f"batch size is {batch_size}; it must be 1 or more.")
    command = [sys.executable, "-m", "ampdeploy.bench.memory_worker", target, str(artifact)]
    command += ["--batch-size", str(batch_size)]
    if threads is not None:
        command += ["--threads", str(threads)]
    what = f"measuring the memory of {artifact.name} on {target} at batch {batch_size}"
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=MAX_WORKER_SECONDS)
    except subprocess.TimeoutExpired as error:
        raise AmpDeployError(
            f"{what} did not end within {MAX_WORKER_SECONDS} s and was stopped. "
            "Use a smaller batch."
        ) from error
    if done.returncode != 0:
        raise AmpDeployError(f"{what} failed: {_ending(done.returncode)}.\n{_tail(done.stderr)}")
    # The runtime may have printed to standard output before our one line.
    last_line = done.stdout.strip().split("\n")[-1]
    return from_plain(MemoryResult, json.loads(last_line), where="the memory worker's answer")


def _ending(returncode: int) -> str:
    if returncode == -signal.SIGKILL:
        return (
            "its process was killed, most likely because the machine ran out of memory; use a "
            "smaller batch"
        )
    if returncode < 0:
        return f"its process died of {signal.Signals(-returncode).name}"
    return f"its process ended with exit code {returncode}"


def _tail(text: str) -> str:
    lines = text.strip().splitlines()[-STDERR_TAIL_LINES:]
    return "\n".join(lines) if lines else "It wrote nothing to stderr."
