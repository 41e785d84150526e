"""What must be alike for two measurements to be compared, for the gate and for tables alike."""

from __future__ import annotations

from ampdeploy.report.result import Report, Task

# Target -> distributions whose version is that of its runtime, where no engine names its own.
_RUNTIMES = {
    "torch": ("torch",),
    "ort": ("onnxruntime", "onnxruntime-gpu"),
    "trt": ("tensorrt",),
    "trt-rtx": ("tensorrt-rtx",),
}


def timed_with(report: Report) -> dict[str, str]:
    """What speed depends on besides the machine: precision, runtime and power mode.

    What is unknown is left out: it is no sign of a change.
    """
    found = {"precision": "float32" if report.precision is None else "FP16"}
    packages = report.host.get("packages") or {}
    names = _RUNTIMES.get(report.target.removesuffix("-cuda"), ())
    versions = [f"{name} {packages[name]}" for name in names if packages.get(name)]
    if report.engine:
        # An engine runs only with the version that built it, and names its build.
        versions = sorted({engine.tensorrt for engine in report.engine.values()})
    if versions:
        found["runtime"] = ", ".join(versions)
    if report.telemetry is not None and report.telemetry.power_mode is not None:
        found["power mode"] = report.telemetry.power_mode
    return found


def protocol(task: Task | None) -> str | None:
    """What was done for a metric: the first sentence; remarks on this run's result follow."""
    return None if task is None else task.protocol.partition(". ")[0]
