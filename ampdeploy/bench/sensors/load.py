"""How much of the CPU others take."""

from __future__ import annotations

import psutil

_TOTAL = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
_IDLE = ("idle", "iowait")


class CpuLoad:
    """Counts from when it is made."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._start = self._read()

    def others(self) -> float | None:
        """Share of the machine's CPU time that others took; None: no time has passed.

        Others are other processes and, on a virtual machine, its neighbours (steal).
        """
        total, busy, own = (now - then for now, then in zip(self._read(), self._start, strict=True))
        # Time is counted in ticks of 10 ms, ours more finely: the difference may be below 0.
        return None if total <= 0 else min(max((busy - own) / total, 0.0), 1.0)

    def _read(self) -> tuple[float, float, float]:
        times = psutil.cpu_times()
        total = sum(getattr(times, name, 0.0) for name in _TOTAL)
        idle = sum(getattr(times, name, 0.0) for name in _IDLE)
        own = self._process.cpu_times()
        return total, total - idle, own.user + own.system
