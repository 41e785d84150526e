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
from ampdeploy.errors import AmpDeployError
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import get_target

RUNS = 5  # runtimes size their arenas in the first runs

STATUS = Path("/proc/self/status")


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


def measure(target_name: str, artifact: Path, batch_size: int, threads: int | None) -> MemoryResult:
    """Open and run `artifact` in this process. Meaningful once per process."""
    process = psutil.Process()
    target = get_target(target_name)
    target.check()  # imports the runtime
    rss_runtime = process.memory_info().rss
    with target.open(artifact, threads=threads) as runner:
        rss_loaded = process.memory_info().rss
        shape = (batch_size, 3, runner.image_size, runner.image_size)
        images = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        for _ in range(RUNS):
            runner.run(images)
        peak = peak_rss_bytes()
        device = runner.device
    why = {"weight_bytes": "not counted"}
    if device != "cpu":
        why["memory_bytes"] = f"it ran on {device}, and GPU memory is not measured yet"
    return MemoryResult(
        device=device,
        batch_size=batch_size,
        runs=RUNS,
        rss_runtime_bytes=rss_runtime,
        rss_loaded_bytes=rss_loaded,
        peak_rss_bytes=peak,
        weight_bytes=None,
        activation_bytes=peak - rss_loaded,
        memory_bytes=None if device != "cpu" else peak - rss_runtime,
        why=why,
    )


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
