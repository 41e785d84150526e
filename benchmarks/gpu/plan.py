"""Which rows there are, in which order, and whether there is time for the next one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from ampdeploy.errors import UnknownNameError
from ampdeploy.models.registry import close_matches
from benchmarks.gpu.runtimes import InterpretedWay, TrtWay, ort_ways
from benchmarks.gpu.ways import CPU, CUDA, TorchWay, Way

# Besides the ways: emulated FP16 against the device's, and what TensorRT for RTX says.
EMULATION, RTX_PROBE = "emulation", "rtx-probe"

# Timed end to end as well. On a GPU the one that an application without TensorRT would use.
END_TO_END = {CPU: "fp32-eager", CUDA: "fp16-graph"}

# A row takes at most this many times as long as the last one of its way: models come smallest
# first, and DINOv2 grows about threefold from one size to the next.
GROWTH = 3.0
FIRST_ROW_S, FIRST_COMPILE_S = 5.0, 60.0


def all_ways(batches: tuple[int, ...], compile_mode: str) -> list[Way]:
    """Every way, in the order of the result."""
    return [
        TorchWay("fp32-eager", "PyTorch float32, eager, TF32 off", devices=(CPU, CUDA)),
        TorchWay("tf32-eager", "PyTorch float32, eager, TF32 on", tf32=True),
        TorchWay("fp16-eager", "PyTorch half(), eager", half=True, devices=(CPU, CUDA)),
        TorchWay("fp16-graph", "PyTorch half(), one CUDA graph", half=True, graph=True),
        TorchWay(
            "fp16-compile",
            f"PyTorch half(), blocks by torch.compile(mode={compile_mode!r}), one CUDA graph",
            half=True,
            graph=True,
            compile_mode=compile_mode,
        ),
        InterpretedWay(),
        *ort_ways(),
        TrtWay("trt-rtx", batches),
        TrtWay("trt", batches),
    ]


def choose_ways(ways: list[Way], device: str, names: Sequence[str] | None) -> list[Way]:
    """Those of this kind of device; of them, those in `names` if it is given.

    Raises:
        UnknownNameError: A name that is not among them.
    """
    here = {way.name: way for way in ways if device in way.devices}
    for name in names or ():
        if name not in here:
            raise UnknownNameError(
                f"unknown way {name!r} on {device}.{close_matches(name, here)} Known: "
                f"{', '.join(here)}."
            )
    return [way for name, way in here.items() if names is None or name in names]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One row, or one of the two other things."""

    model: str
    name: str
    """Of the way, or `EMULATION` or `RTX_PROBE`."""
    batch: int | None = None
    way: Way | None = None

    @property
    def row(self) -> str:
        """Its name in the state folder."""
        batch = [str(self.batch)] if self.batch else []
        return "-".join([file_name(self.model), self.name, *batch])


def file_name(model: str) -> str:
    """The name of a model as a part of a file's."""
    return model.replace(":", "-").replace("/", "-")


def plan_jobs(
    models: Sequence[str], typed: Sequence[str], ways: list[Way], batches: Sequence[int]
) -> list[Job]:
    """What most readers want first: plain ways of all models, then typed graphs, compilation, RTX.

    Args:
        models: Smallest first.
        typed: Those of them whose typed graph is made.
        ways: Ways that this machine has.
        batches: Images per call.
    """

    def rows(model: str, chosen: list[Way]) -> list[Job]:
        return [
            Job(model=model, name=way.name, batch=batch, way=way)
            for way in chosen
            for batch in batches
        ]

    plain = [way for way in ways if not way.typed and not way.compiles]
    jobs = [job for model in models for job in rows(model, plain)]
    for model in typed:
        jobs += [Job(model=model, name=EMULATION), *rows(model, [w for w in ways if w.typed])]
    jobs += [job for model in models for job in rows(model, [w for w in ways if w.compiles])]
    return [*jobs, *[Job(model=model, name=RTX_PROBE) for model in typed[:1]]]


class Budget:
    """The minutes of one call, and those of them that compilation may take."""

    def __init__(self, minutes: float, compile_minutes: float) -> None:
        self._end = time.monotonic() + 60 * minutes
        self._minutes, self._compile_minutes = minutes, compile_minutes
        self._compile_left = 60 * compile_minutes
        self._last: dict[str, float] = {}

    def refuses(self, job: Job) -> str | None:
        """Why `job` is not started any more; None: there is time."""
        compiles = job.way is not None and job.way.compiles
        first = FIRST_COMPILE_S if compiles else FIRST_ROW_S
        needed = GROWTH * self._last[job.name] if job.name in self._last else first
        left = self._end - time.monotonic()
        if left < needed:
            return (
                f"{max(0.0, left):.0f} s of {self._minutes:g} minutes were left, and it may take "
                f"{needed:.0f} s; run the same command again to go on"
            )
        if compiles and self._compile_left <= 0:
            return (
                f"compilation used up its {self._compile_minutes:g} minutes; run the same command "
                "again to go on"
            )
        return None

    def spent(self, job: Job, seconds: float) -> None:
        """`job` took so long."""
        self._last[job.name] = seconds
        if job.way is not None and job.way.compiles:
            self._compile_left -= seconds
