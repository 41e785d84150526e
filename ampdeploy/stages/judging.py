"""What evaluates a build on this machine, and which files that takes."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig
from ampdeploy.run import RUNS_ENGINE
from ampdeploy.stages.common import runnable_artifacts

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

# With the float32 graphs that the engines come from, where the engines do not run.
INSTEAD_OF_THE_ENGINE = "ort"


@dataclass(frozen=True, kw_only=True)
class Judge:
    """What evaluates a build here."""

    target: str
    why_no_engine: str | None
    """Why it is not the target that the result is for; None: it is."""


def find_judge(config: BuildConfig) -> Judge:
    """The build's own target; where its engine cannot run, ONNX Runtime in float32."""
    why = _why_no_engine(config) if config.builds_engine else None
    return Judge(target=INSTEAD_OF_THE_ENGINE if why else config.target, why_no_engine=why)


def _why_no_engine(config: BuildConfig) -> str | None:
    if config.engine.when == "deferred":
        return "the engine is built and measured on the device"
    here = this_machine()
    if here.gpu is None:
        # Its first clause: what follows can be long, and `ampdeploy doctor` has it.
        reason = (here.problem or "no GPU was found").partition(": ")[0]
        return f"this machine runs no engine: {reason}"
    # Unless GPUs are named, every engine is built for the one that is here, too.
    built_for, own = config.engine.compute_capabilities, here.compute_capability
    if built_for and own is not None and own not in built_for:
        return (
            f"this machine runs no such engine: it is for compute capability "
            f"{', '.join(built_for)}, and the GPU here ({here.gpu}) has {own}"
        )
    return None


@functools.cache
def this_machine() -> DeviceFacts:
    """Facts of this machine, asked for once: one build has one answer to what it can run."""
    from ampdeploy.device.platform import device_facts

    return device_facts()


def machine_options(config: BuildConfig) -> dict[str, Any]:
    """Whether this machine runs the engine of the build; empty for a build without one."""
    return {RUNS_ENGINE: find_judge(config).why_no_engine is None} if config.builds_engine else {}


def judged_artifacts(config: BuildConfig) -> tuple[str, ...]:
    """All files that may be judged, whatever this machine can run.

    So that what a run is made of can be told on every machine alike.
    """
    if not config.builds_engine:
        return runnable_artifacts(config, config.target)
    graphs = runnable_artifacts(config, INSTEAD_OF_THE_ENGINE)
    if config.engine.when == "deferred":
        return graphs
    return (*graphs, artifacts.BASELINE_PLAN, artifacts.ENGINE_PLAN)
