"""Energy of each model's runs, with what the machine draws anyway taken off.

Model A without a pause, B, B, A, each half of a model's time, and idle before, between and after.
Both models are open all the time, so idle is a device that has them loaded and waits. Short bursts
lie: NVML looks at some GPUs a quarter of the time only (Yang, Adamek, Armour,
https://arxiv.org/abs/2312.02741), so each model runs for half a minute at least, both halves
together.

What drifts in a straight line cancels: in idle power between the idle times before and after a run,
in what a model itself adds (a warmer chip leaks more) between A B and B A. What is left has no
interval, as two runs of a model are too few for one: the part of a drift that is not straight, of
idle power at most half of `DRIFT_AT_MOST`, 2.5% of joules per image; other processes up to
`OTHERS_AT_MOST`; and the meter's own error, of which a factor cancels in the ratio of two models
and not in their joules.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ampdeploy.bench.latency import make_batches
from ampdeploy.bench.result import EnergyResult
from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.bench.sensors.load import CpuLoad
from ampdeploy.bench.sensors.meter import Meter, find_meter
from ampdeploy.config.bench import ENERGY_SECONDS, check_energy_seconds
from ampdeploy.progress import log
from ampdeploy.targets.base import Runner

WARMUP_S = 3.0  # until clocks have risen
SETTLE_S = 5.0  # until they have fallen again, before idle is measured
IDLE_S = 10.0
STEP_S = 0.5  # between two looks at an idle machine
LOOK_S = 1.0  # between two looks at the counter: after a reset it needs longer to catch up

OTHERS_AT_MOST = 0.05  # of the CPU's time, or of the GPU's while we are idle
ADDED_AT_LEAST = 0.01  # by a run to idle power: below, it is lost in the meter's own error
DRIFT_AT_MOST = 0.05  # of idle power around a run, relative to what the run adds


@dataclass(frozen=True, kw_only=True)
class Clock:
    """Time, so that tests need not wait."""

    now: Callable[[], float] = time.perf_counter
    sleep: Callable[[float], None] = time.sleep


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Energy over some time."""

    joules: float
    seconds: float
    images: int

    @property
    def watts(self) -> float:
        return self.joules / self.seconds


@dataclass(frozen=True, kw_only=True)
class _Busy:
    """One run, and idle power around it."""

    span: _Span
    idle_watts: float


def measure_energy(
    runners: Mapping[str, Runner],
    images: np.ndarray,
    *,
    batch_size: int,
    seconds: float | None = None,
    root: Path = Path("/"),
) -> tuple[dict[str, EnergyResult] | None, str | None]:
    """Energy per image of each model where this machine has a meter that can be trusted.

    Args:
        runners: Open runners by role, all on one device.
        images: (N, 3, S, S) float32 real images, preprocessed.
        batch_size: Images per call.
        seconds: Each model runs for this long, in two halves; None: `ENERGY_SECONDS`; 0: not at
            all.
        root: Where ``sys`` lies.

    Returns:
        Role -> energy; or None, and why there is none.

    Raises:
        ConfigError: `seconds` is too short to mean anything.
        AmpDeployError: A model cannot run these images.
    """
    check_energy_seconds(seconds)
    if seconds == 0:
        return None, "switched off: energy_seconds is 0"
    device = next(iter(runners.values())).device
    try:
        with find_meter(device, root) as meter:
            found = _measure(
                runners,
                make_batches(images, batch_size, np.random.default_rng(0)),
                seconds=ENERGY_SECONDS if seconds is None else seconds,
                meter=meter,
                clock=Clock(),
            )
        return found, None
    except SensorError as reason:
        return None, str(reason)


def _measure(
    runners: Mapping[str, Runner],
    batches: list[np.ndarray],
    *,
    seconds: float,
    meter: Meter,
    clock: Clock,
) -> dict[str, EnergyResult]:
    order = (*runners, *reversed(list(runners)))
    half = seconds / 2
    whole = len(order) * (WARMUP_S + half) + (1 + len(order)) * (SETTLE_S + IDLE_S)
    log.info("        energy by %s: about %.0f s", meter.source, whole)
    runs: dict[str, list[_Busy]] = {role: [] for role in runners}
    before = _idle(meter, clock)
    for role in order:
        _run(runners[role], batches, WARMUP_S, _Count(meter, clock))
        count = _Count(meter, clock)
        images = _run(runners[role], batches, half, count)
        span = count.end(images=images)
        after = _idle(meter, clock)
        runs[role].append(_Busy(span=span, idle_watts=_idle_watts(before, after, span)))
        before = after
    return {
        role: _joined(halves, batch_size=len(batches[0]), source=meter.source)
        for role, halves in runs.items()
    }


def _joined(halves: list[_Busy], *, batch_size: int, source: str) -> EnergyResult:
    seconds = sum(half.span.seconds for half in halves)
    images = sum(half.span.images for half in halves)
    joules = sum(half.span.joules for half in halves)
    idle_joules = sum(half.idle_watts * half.span.seconds for half in halves)
    return EnergyResult(
        batch_size=batch_size,
        images=images,
        seconds=seconds,
        mean_watts=joules / seconds,
        idle_watts=idle_joules / seconds,
        source=source,
        joules_per_image=(joules - idle_joules) / images,
    )


def _run(runner: Runner, batches: list[np.ndarray], seconds: float, count: _Count) -> int:
    """Call after call without a pause, for `seconds` and up to the end of the last call.

    Returns:
        Images that went through.
    """
    calls = 0
    while count.seconds() < seconds:
        runner.run(batches[calls % len(batches)])
        calls += 1
        count.look()
    return calls * len(batches[0])


def _idle(meter: Meter, clock: Clock) -> _Span:
    clock.sleep(SETTLE_S)
    count = _Count(meter, clock)
    loads = []
    while count.seconds() < IDLE_S:
        clock.sleep(STEP_S)
        count.look()
        load = meter.gpu_load()
        if load is not None:
            loads.append(load)
    # Ours has nothing to do, so what the GPU does is another's.
    if loads and np.mean(loads) > OTHERS_AT_MOST:
        raise SensorError(
            f"the GPU was busy for {np.mean(loads):.0%} of the time while our models waited, so "
            "another process uses it: stop that first"
        )
    return count.end(images=0)


class _Count:
    """A meter's joules from now on, looked at now and then.

    So that no reset is missed, and nobody else who comes and goes meanwhile.
    """

    def __init__(self, meter: Meter, clock: Clock) -> None:
        self._meter, self._clock = meter, clock
        # Of this time alone: over a longer one, a core that others keep busy now would be diluted.
        self._load = CpuLoad()
        self._first = self._last = meter.joules()
        self._start = self._looked = clock.now()

    def seconds(self) -> float:
        return self._clock.now() - self._start

    def look(self) -> None:
        if self._clock.now() - self._looked >= LOOK_S:
            self._read()
            _check_gpu_alone(self._meter)

    def end(self, *, images: int) -> _Span:
        seconds = self.seconds()
        span = _Span(joules=self._read() - self._first, seconds=seconds, images=images)
        _check_gpu_alone(self._meter)
        if self._meter.counts_cpu:
            _check_cpu_alone(self._load)
        return span

    def _read(self) -> float:
        joules = self._meter.joules()
        if joules < self._last:
            raise SensorError(
                f"the energy counter went back from {self._last:.0f} to {joules:.0f} J: it was "
                "reset, as when the driver is loaded anew"
            )
        self._last, self._looked = joules, self._clock.now()
        return joules


def _check_gpu_alone(meter: Meter) -> None:
    processes = meter.gpu_processes()
    if processes is not None and processes > 1:  # ours is one, also where its number is not ours
        raise SensorError(
            f"{processes - 1} other process(es) hold the GPU, whose energy is counted for all: "
            "stop them first (nvidia-smi lists them)"
        )


def _check_cpu_alone(load: CpuLoad) -> None:
    others = load.others()
    if others is not None and others > OTHERS_AT_MOST:
        raise SensorError(
            f"other processes took {others:.0%} of the CPU, and their energy is counted too: stop "
            f"them first; {OTHERS_AT_MOST:.0%} is tolerated"
        )


def _idle_watts(before: _Span, after: _Span, busy: _Span) -> float:
    """Idle power around a run, once it is known to be something to take off."""
    idle = (before.watts + after.watts) / 2
    added = busy.watts - idle
    if added < ADDED_AT_LEAST * idle:
        raise SensorError(
            f"the run drew {busy.watts:.2f} W and the idle machine {idle:.2f} W: the meter does "
            "not see what the model adds"
        )
    drift = abs(after.watts - before.watts)
    if drift > DRIFT_AT_MOST * added:
        raise SensorError(
            f"idle power went from {before.watts:.2f} to {after.watts:.2f} W around a run that "
            f"adds {added:.2f} W, so what to take off is not known: let the machine come to rest"
        )
    return idle
