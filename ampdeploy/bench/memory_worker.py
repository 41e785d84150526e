"""The process that `ampdeploy.bench.memory` starts: runs one artifact, prints one line of JSON."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path

import numpy as np
import psutil

from ampdeploy.bench.memory import MemoryResult
from ampdeploy.bench.memory_gauge import Gauge, open_gauge
from ampdeploy.bench.weights import file_bytes, weight_bytes
from ampdeploy.errors import AmpDeployError
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import get_target

RUNS = 5  # runtimes size their arenas in the first runs

# Targets for which no CUDA context is made: it would be counted as memory of the process.
ON_THE_HOST = ("ort", "torch")

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


def peak_rss_bytes() -> int:
    """Highest resident size of this process so far.

    Not `getrusage(RUSAGE_SELF).ru_maxrss` on Linux: that survives exec, so a process started by a
    large one (a build that holds a model) would report its parent's size. VmHWM begins anew.
    """
    if STATUS.is_file():
        found = re.search(r"^VmHWM:\s+(\d+) kB$", STATUS.read_text(), re.M)
        if found:
            return int(found[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def reset_peak_rss() -> bool:
    """Let `peak_rss_bytes` begin anew from what is resident now; False where it cannot.

    Opening a file can take more than running it does, and would hide what the runs take.
    """
    try:
        CLEAR_REFS.write_text("5")  # https://docs.kernel.org/filesystems/proc.html
    except OSError:
        return False
    return True


def mapped_bytes(process: psutil.Process) -> int:
    """Resident pages of mapped files: libraries, and weights that are read when first used."""
    return int(getattr(process.memory_info(), "shared", 0))  # Linux only


def measure(target_name: str, artifact: Path, batch_size: int, threads: int | None) -> MemoryResult:
    """Open and run `artifact` in this process. Meaningful once per process."""
    process = psutil.Process()
    target = get_target(target_name)
    target.check()  # imports the runtime
    gauge = None if target_name in ON_THE_HOST else _gauge()
    rss_runtime = process.memory_info().rss
    free = _Free(gauge)
    with target.open(artifact, threads=threads) as runner:
        rss_loaded, mapped_loaded = process.memory_info().rss, mapped_bytes(process)
        free.look()
        peak_loading = peak_rss_bytes()
        began_anew = reset_peak_rss()
        shape = (batch_size, 3, runner.image_size, runner.image_size)
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for _ in range(RUNS):
            runner.run(images)
            free.look()
        peak_running = peak_rss_bytes()
        mapped = max(mapped_bytes(process) - mapped_loaded, 0)
        device = runner.device
        stated = getattr(runner, "activation_bytes", None)
    peak = max(peak_loading, peak_running)
    found: dict[str, int | str] = {"weight_bytes": weight_bytes(artifact)}
    if device == "cpu":
        found |= dict.fromkeys(("device_bytes", "available_drop_bytes"), "it ran on the CPU")
        found["memory_bytes"] = peak - rss_runtime
        found["activation_bytes"] = "the peak was while the file was opened"
        if began_anew or peak_running > peak_loading:
            found["activation_bytes"] = max(peak_running - rss_loaded - mapped, 0)
    else:
        found |= free.found()
        if stated is not None:
            found["activation_bytes"] = stated
    return MemoryResult(
        device=device,
        batch_size=batch_size,
        runs=RUNS,
        file_bytes=file_bytes(artifact),
        rss_runtime_bytes=rss_runtime,
        rss_loaded_bytes=rss_loaded,
        peak_rss_bytes=peak,
        **{name: value if isinstance(value, int) else None for name, value in found.items()},
        why={name: value for name, value in found.items() if isinstance(value, str)},
    )


def _gauge() -> Gauge | str:
    """A gauge of the GPU's memory, or why there is none."""
    try:
        return open_gauge(needed_by="measuring the GPU's memory")
    except AmpDeployError as error:
        return str(error)


class _Free:
    """Free memory of a GPU before a model was opened, once it was, and after each of its runs."""

    def __init__(self, gauge: Gauge | str | None) -> None:
        self._gauge = gauge
        self._seen: list[int] = []
        self.look()

    def look(self) -> None:
        if isinstance(self._gauge, Gauge):
            self._seen.append(self._gauge.free_bytes())

    def found(self) -> dict[str, int | str]:
        """Field of `MemoryResult` -> bytes, or why they are not known."""
        fields = ("device_bytes", "available_drop_bytes", "memory_bytes", "activation_bytes")
        if not isinstance(self._gauge, Gauge):
            return dict.fromkeys(fields, self._gauge or "this target is not known to use a GPU")
        before, loaded, *_ = self._seen
        lowest = min(self._seen)
        taken: int | str = before - lowest
        working: int | str = loaded - lowest
        if lowest == before:
            taken = working = "free memory did not fall: something else gave memory back meanwhile"
        own, drop = ("device_bytes", "available_drop_bytes")
        other = "the GPU has memory of its own"
        if self._gauge.shared:
            own, drop = drop, own
            other = "the GPU shares the host's memory"
        return {own: taken, drop: other, "memory_bytes": taken, "activation_bytes": working}


def main() -> int:
    """Entry point of ``python -m ampdeploy.bench.memory_worker``."""
    parser = argparse.ArgumentParser(prog="ampdeploy.bench.memory_worker")
    parser.add_argument("target")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("--batch-size", type=int, required=True)
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    try:
        result = measure(options.target, options.artifact, options.batch_size, options.threads)
    except AmpDeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(to_plain(result), allow_nan=False))
    return 0


if __name__ == "__main__":
    sys.exit(main())
