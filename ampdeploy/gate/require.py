"""Things that must have been proven, whatever the numbers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ampdeploy.gate.finding import Finding, Status
from ampdeploy.report.result import EngineTest, Report

_Outcome = tuple[Status, str]


def check(names: tuple[str, ...], report: Report) -> list[Finding]:
    """A finding for each of `names`, which are keys of `REQUIREMENTS`."""
    findings = []
    for name in names:
        status, reason = REQUIREMENTS[name](report)
        findings.append(
            Finding(rule=f"require {name}", scope="", status=status, measured="–", reason=reason)
        )
    return findings


def _engine_tested(report: Report) -> _Outcome:
    if not report.engine:
        return Status.NOT_MEASURED, report.why.get("engine", "the report names no engine")
    seen = []
    for role, engine in report.engine.items():
        if engine.test is None:
            return Status.NOT_MEASURED, f"{role} engine: {engine.why['test']}"
        below = _below(engine.test)
        if below:
            return Status.FAIL, f"{role} engine: {below}"
        worst = min(p1 for outputs in engine.test.cosine_p1.values() for p1 in outputs.values())
        seen.append(f"{role} {worst:.6f} on {engine.test.images} images")
    return Status.PASS, f"smallest 1st percentile of the cosine: {', '.join(seen)}"


def _below(test: EngineTest) -> str:
    """What of the test is not up to its bar; nothing: all of it is."""
    if not test.cosine_p1 or not all(test.cosine_p1.values()):
        return "its test compared nothing"
    for batch, outputs in test.cosine_p1.items():
        below = _outputs_below(outputs, test.bar_cosine_p1)
        if below:
            return f"batch {batch}, {below}"
    return ""


def _outputs_below(outputs: Mapping[str, float], bar: float) -> str:
    for name, p1 in outputs.items():
        if not p1 >= bar:  # NaN is not
            return f"{name} has a 1st-percentile cosine of {p1:.6f}; {bar} is the bar"
    return ""


def _precision_proven(report: Report) -> _Outcome:
    if not report.precision:
        return Status.NOT_MEASURED, report.why.get("precision", "the report names no model")
    seen = []
    for role, proof in report.precision.items():
        if not proof.cosine_p1:
            return Status.NOT_MEASURED, f"{role}: its proof compared nothing"
        below = _outputs_below(proof.cosine_p1, proof.bar_cosine_p1)
        if below:
            return Status.FAIL, f"{role}: {below}"
        seen.append(f"{role} {min(proof.cosine_p1.values()):.6f} on {proof.images} images")
    return Status.PASS, f"smallest 1st percentile of the cosine: {', '.join(seen)}"


def _warmup_settled(report: Report) -> _Outcome:
    if not report.timing:
        return Status.NOT_MEASURED, report.why.get("timing", "no batch size was timed")
    clocks = {"": report.timing, " with CUDA graph": report.cuda_graph_timing or {}}
    unsettled = [
        f"batch {size}{what}"
        for what, timings in clocks.items()
        for size, timing in timings.items()
        if not timing.warmup_stable
    ]
    if unsettled:
        return Status.FAIL, f"latency had not settled: {'; '.join(unsettled)}"
    return Status.PASS, f"at batch {', '.join(sorted(report.timing, key=int))}"


def _no_throttling(report: Report) -> _Outcome:
    telemetry = report.telemetry
    if telemetry is None:
        return Status.NOT_MEASURED, report.why["telemetry"]
    if telemetry.throttled is None:
        return Status.NOT_MEASURED, telemetry.why["throttled"]
    if telemetry.throttled:
        return Status.FAIL, f"lower clocks were seen: {', '.join(telemetry.throttled)}"
    return Status.PASS, f"none in {telemetry.samples} samples over {telemetry.seconds:.0f} s"


def _all_timed(report: Report) -> _Outcome:
    if not report.timing:
        return Status.NOT_MEASURED, report.why.get("timing", "no batch size was timed")
    if report.not_timed:
        reasons = (f"batch {size}: {why}" for size, why in report.not_timed.items())
        return Status.NOT_MEASURED, "; ".join(reasons)
    capped = [size for size, timing in report.timing.items() if timing.capped]
    if capped:
        return Status.FAIL, f"timing at batch {', '.join(capped)} was stopped at its time limit"
    return Status.PASS, f"batch {', '.join(sorted(report.timing, key=int))}"


REQUIREMENTS: dict[str, Callable[[Report], _Outcome]] = {
    "engine-tested": _engine_tested,
    "precision-proven": _precision_proven,
    "warm-up-settled": _warmup_settled,
    "no-throttling": _no_throttling,
    "all-timed": _all_timed,
}
