"""The machine while something is measured: a thread of its own reads sensors twice a second.

Sensors are read, never set: what they show explains a measurement, and changing it would make it
one of another machine. The thread bounds its own cost: see `COST_AT_MOST`.
"""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from ampdeploy.bench.sensors import kernel
from ampdeploy.bench.sensors.files import NumberFile, SensorError
from ampdeploy.bench.sensors.load import CpuLoad
from ampdeploy.bench.sensors.nvml import Nvml
from ampdeploy.report.result import Spread, Telemetry

if TYPE_CHECKING:
    from typing_extensions import Self

Sensor = Callable[[], "float | None"]

INTERVAL_S = 0.5
COST_AT_MOST = 0.001  # of one core; where sensors are dear, they are read less often
MIN_FOR_THROTTLED = 3  # samples: fewer say nothing about the time between them


class Watch:
    """Samples the sensors inside its ``with`` block; `result` tells what they said."""

    def __init__(
        self, device: str, *, root: Path = Path("/"), interval: float = INTERVAL_S
    ) -> None:
        """Nothing is read yet.

        Args:
            device: Where the measured models run: ``cpu`` or ``cuda``.
            root: Where ``sys`` lies.
            interval: Seconds between two samples, at least.
        """
        self._device, self._root, self._interval = device, root, interval
        self._clocks: dict[str, list[Sensor]] = {}
        self._temperatures: dict[str, list[Sensor]] = {}
        self._values: dict[tuple[str, str], list[float]] = {}
        self._slowed: dict[str, None] = {}  # an ordered set
        self._sees_throttling = False  # of what the models run on
        self._samples = 0
        self._cost_s = 0.0
        self._end = self._start = 0.0
        self._others: float | None = None
        self._nvml: Nvml | None = None
        self._why_no_nvml: str | None = None
        self._mode: str | None = None
        self._failure: BaseException | None = None
        self._stop = threading.Event()

    def __enter__(self) -> Self:
        with ExitStack() as files:
            self._find(files)
            self._mode = self._power_mode()
            self._before = self._count()
            self._load = CpuLoad()
            self._start = time.perf_counter()
            self._files = files.pop_all()
        self._thread = threading.Thread(target=self._sample, name="telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        with self._files:
            self._end = time.perf_counter()
            self._others = self._load.others()
            for reason, count in self._count().items():
                if count > self._before[reason]:
                    self._slowed[reason] = None
        if self._failure is not None and exc is None:
            raise self._failure

    @property
    def cost(self) -> float:
        """Share of one core that the sampling took, by the thread's own CPU clock."""
        return self._cost_s / max(self._end - self._start, 1e-9)

    def result(self) -> Telemetry:
        """What was seen; to be asked for after the block.

        Lists that are empty are explained in `why`, as are fields that are None.
        """
        clocks, temperatures = self._spreads("clock"), self._spreads("temperature")
        why = {}
        gpu = f"; {self._why_no_nvml}" if self._why_no_nvml else ""
        if not clocks:
            why["clocks_mhz"] = f"the kernel shows no clocks (cpufreq, devfreq){gpu}"
        if not temperatures:
            why["temperature_c"] = f"the kernel shows no thermal zones{gpu}"
        if self._mode is None:
            why["power_mode"] = f"no nvpmodel, and the CPU has no frequency governor{gpu}"
        why_no_throttled = self._why_no_throttled()
        if why_no_throttled is not None:
            why["throttled"] = why_no_throttled
        if self._others is None:
            why["other_load"] = "no CPU time has passed"
        return Telemetry(
            samples=self._samples,
            seconds=self._end - self._start,
            power_mode=self._mode,
            clocks_mhz=clocks,
            temperature_c=temperatures,
            throttled=None if why_no_throttled is not None else tuple(self._slowed),
            other_load=self._others,
            why=why,
        )

    def why_throttling_is_hidden(self) -> str | None:
        """Why this machine does not tell whether what the models run on is throttled.

        None: it does.
        """
        if self._sees_throttling:
            return None
        gpu = f"; {self._why_no_nvml}" if self._why_no_nvml else ""
        if self._device == "cuda":
            return f"the kernel shows no throttle alert of a GPU{gpu}"
        return f"the kernel shows no throttle counters{gpu}"

    def _why_no_throttled(self) -> str | None:
        if self._slowed:  # what was seen was seen; to say that there was nothing takes more
            return None
        why = self.why_throttling_is_hidden()
        if why is None and self._samples < MIN_FOR_THROTTLED:
            why = f"{self._samples} sample(s); that nothing was seen needs {MIN_FOR_THROTTLED}"
        return why

    def _find(self, files: ExitStack) -> None:
        clocks = kernel.clocks(self._root)
        temperatures = kernel.temperatures(self._root)
        self._counters = kernel.throttle_counters(self._root)
        self._alerts = kernel.throttle_alerts(self._root)
        for scaled in (*clocks.values(), *temperatures.values()):
            for sensor in scaled:
                files.callback(sensor.close)
        for counters in (*self._counters.values(), self._alerts.values()):
            for counter in counters:
                files.callback(counter.close)
        self._clocks = {name: list(sensors) for name, sensors in clocks.items()}
        self._temperatures = {name: list(sensors) for name, sensors in temperatures.items()}
        if self._device == "cuda":
            # What the CPU's counters say is reported, but says nothing about the GPU.
            self._sees_throttling = kernel.GPU_ALERT in self._alerts
            self._find_gpu(files)
        else:
            self._sees_throttling = bool(self._counters or self._alerts)

    def _find_gpu(self, files: ExitStack) -> None:
        try:
            nvml = files.enter_context(Nvml())
        except SensorError as reason:
            self._why_no_nvml = str(reason)
            return
        self._nvml = nvml
        # A Jetson's own files come first: its NVML knows less, where it has one.
        for name, sensor in (("gpu", nvml.gpu_mhz), ("gpu_memory", nvml.memory_mhz)):
            if name not in self._clocks and sensor() is not None:
                self._clocks[name] = [sensor]
        if nvml.celsius() is not None:
            self._temperatures["gpu"] = [nvml.celsius]
        self._sees_throttling |= nvml.slowed_by() is not None

    def _power_mode(self) -> str | None:
        mode = kernel.nvpmodel()
        if mode is not None:
            return f"nvpmodel {mode}"
        limit = self._nvml.power_limit_watts() if self._nvml else None
        if limit is not None:
            return f"power limit {limit:g} W"
        governors = kernel.governors(self._root)
        return f"governor {', '.join(governors)}" if governors else None

    def _count(self) -> dict[str, float]:
        return {reason: sum(map(_value, files)) for reason, files in self._counters.items()}

    def _sample(self) -> None:
        try:
            while True:
                before = time.thread_time()
                self._read()
                cost = time.thread_time() - before
                self._cost_s += cost
                self._samples += 1
                if self._stop.wait(max(self._interval, cost / COST_AT_MOST)):
                    return
        except BaseException as error:  # raised where the block ends
            self._failure = error

    def _read(self) -> None:
        for kind, found in (("clock", self._clocks), ("temperature", self._temperatures)):
            for name, sensors in found.items():
                for sensor in sensors:
                    value = sensor()
                    if value is not None:
                        self._values.setdefault((kind, name), []).append(value)
        for reason, alert in self._alerts.items():
            if _value(alert) > 0:
                self._slowed[reason] = None
        for reason in (self._nvml and self._nvml.slowed_by()) or ():
            self._slowed[f"gpu: {reason}"] = None

    def _spreads(self, wanted: str) -> dict[str, Spread]:
        return {
            name: Spread(min=min(values), median=statistics.median(values), max=max(values))
            for (kind, name), values in self._values.items()
            if kind == wanted
        }


def _value(file: NumberFile) -> float:
    return file.read() or 0.0
