"""What measures energy on this machine, as one thing that counts joules.

Which one: a Jetson's rails, else for a model on the GPU that GPU's own counter, else for a model on
the CPU its counters (RAPL). Each says in `source` what its joules are the energy of.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ampdeploy.bench.sensors import kernel
from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.bench.sensors.nvml import Nvml
from ampdeploy.bench.sensors.rails import find_rails, total_of
from ampdeploy.bench.sensors.rapl import Rapl
from ampdeploy.closing import Closing

if TYPE_CHECKING:
    pass

SAMPLE_S = 0.1  # between two readings of power where there is no counter
MAX_GAP_S = 1.0  # between two readings; beyond, what happened in between is not known


class Meter(Closing):
    """Counts joules inside its ``with`` block."""

    source: str
    """What is read, and of what it is the energy."""
    counts_cpu: ClassVar[bool]
    """Whether other processes on the CPU disturb it."""

    @abstractmethod
    def joules(self) -> float:
        """Energy since some moment.

        Raises:
            SensorError: It cannot be read any more.
        """

    def gpu_load(self) -> float | None:
        """Share of the last moments in which the GPU was busy; None where it does not say."""
        return None

    def gpu_processes(self) -> int | None:
        """Processes on the GPU, ours among them; None where it does not say."""
        return None

    @abstractmethod
    def close(self) -> None:
        """Give back what it holds."""


class Integral:
    """Joules from readings of watts, by the trapezoidal rule, in a thread of its own."""

    def __init__(
        self, watts: Callable[[], float], *, now: Callable[[], float] = time.perf_counter
    ) -> None:
        """Take the first reading.

        Args:
            watts: Power now; raises SensorError.
            now: Seconds.
        """
        self._watts, self._now = watts, now
        self._lock = threading.Lock()
        self._joules = 0.0
        self._failure: SensorError | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._last = (now(), watts())

    def start(self) -> None:
        """Read every `SAMPLE_S` from now on."""
        self._thread = threading.Thread(target=self._run, name="power", daemon=True)
        self._thread.start()

    def joules(self) -> float:
        """Up to now: it is read once more."""
        self.read()
        if self._failure is not None:
            raise self._failure
        return self._joules

    def read(self) -> None:
        """Add what has passed since the last reading."""
        with self._lock:
            if self._failure is not None:
                return
            try:
                then, before = self._last
                watts = self._watts()
                now = self._now()
                if now - then > MAX_GAP_S:
                    raise SensorError(
                        f"power was not read for {now - then:.1f} s; more than {MAX_GAP_S:g} s "
                        "leave open what happened in between"
                    )
                self._joules += (before + watts) / 2 * (now - then)
                self._last = (now, watts)
            except SensorError as failure:
                self._failure = failure

    def close(self) -> None:
        """Stop reading."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_S):
            self.read()


class RailMeter(Meter):
    """A Jetson's supply."""

    counts_cpu: ClassVar[bool] = True

    def __init__(self, root: Path = Path("/")) -> None:
        """Find the rails.

        Raises:
            SensorError: There are none, or it is not known which make up the whole.
        """
        rails = find_rails(root)
        if not rails:
            raise SensorError("there is no INA3221 as on a Jetson")
        self._root, self._rails = root, rails
        try:
            self._total, name = total_of(rails)
            self._integral = Integral(self._watts)
        except BaseException:
            self._close_rails()
            raise
        self.source = f"{name}, power read every {SAMPLE_S * 1000:.0f} ms and integrated"
        self._integral.start()

    def _watts(self) -> float:
        return sum(rail.watts() for rail in self._total)

    def joules(self) -> float:
        return self._integral.joules()

    def gpu_load(self) -> float | None:
        return kernel.gpu_load(self._root)

    def close(self) -> None:
        self._integral.close()
        self._close_rails()

    def _close_rails(self) -> None:
        for rail in self._rails:
            rail.close()


class GpuMeter(Meter):
    """The GPU's board, by NVML.

    Its counter integrates in the driver. A GPU before Volta has none; what its power readings
    integrate to is used then, and `source` says so.
    """

    counts_cpu: ClassVar[bool] = False

    def __init__(self) -> None:
        """Find the GPU's counter.

        Raises:
            SensorError: No NVML, or it tells neither energy nor power of this GPU alone.
        """
        self._nvml = Nvml()
        self._integral: Integral | None = None
        try:
            if self._nvml.divided():
                raise SensorError("the GPU is divided by MIG, and its power is that of all parts")
            if self._nvml.joules() is not None:
                self.source = "NVML total energy counter (GPU board)"
                return
            self._integral = Integral(self._watts)
        except BaseException:
            self._nvml.close()
            raise
        self.source = (
            "NVML power (GPU board; it has no energy counter), read every "
            f"{SAMPLE_S * 1000:.0f} ms and integrated"
        )
        self._integral.start()

    def _watts(self) -> float:
        watts = self._nvml.watts()
        if watts is None:
            raise SensorError("NVML tells neither energy nor power of this GPU")
        return watts

    def joules(self) -> float:
        if self._integral is not None:
            return self._integral.joules()
        joules = self._nvml.joules()
        if joules is None:
            raise SensorError("NVML's energy counter cannot be read any more")
        return joules

    def gpu_load(self) -> float | None:
        return self._nvml.utilisation()

    def gpu_processes(self) -> int | None:
        return self._nvml.compute_processes()

    def close(self) -> None:
        if self._integral is not None:
            self._integral.close()
        self._nvml.close()


class CpuMeter(Meter):
    """The CPU's packages and their memory, by RAPL."""

    counts_cpu: ClassVar[bool] = True

    def __init__(self, root: Path = Path("/")) -> None:
        """Open the counters.

        Raises:
            SensorError: There are none, or they may not be read.
        """
        self._rapl = Rapl(root)
        self.source = f"RAPL {' + '.join(self._rapl.names)}"

    def joules(self) -> float:
        return self._rapl.joules()

    def close(self) -> None:
        self._rapl.close()


def find_meter(device: str, root: Path = Path("/")) -> Meter:
    """The meter for models that run on `device`, ``cpu`` or ``cuda``.

    Args:
        device: Where they run.
        root: Where ``sys`` lies.

    Raises:
        SensorError: This machine has none, and why.
    """
    rails = find_rails(root)
    for rail in rails:
        rail.close()
    if rails:
        return RailMeter(root)
    return GpuMeter() if device == "cuda" else CpuMeter(root)
