"""Energy of a CPU: RAPL, in the kernel's powercap files.

https://www.kernel.org/doc/html/latest/power/powercap/powercap.html. Readable by root only since
2020, when it was found to leak secrets (CVE-2020-8694); virtual machines have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ampdeploy.bench.sensors.files import NumberFile, SensorError, in_order, number, words

_POWERCAP = Path("sys/class/powercap")


@dataclass(kw_only=True)
class _Domain:
    name: str
    counter: NumberFile
    """Microjoules; begins anew at `size`."""
    size: float | None
    last: float
    joules: float = 0.0

    def count(self) -> float:
        now = self.counter.read()
        if now is None:
            raise SensorError(f"RAPL's counter of {self.name} cannot be read any more")
        step = now - self.last
        if step < 0:
            if self.size is None:
                raise SensorError(f"RAPL's counter of {self.name} went back: it was reset")
            step += self.size
        self.last = now
        self.joules += step / 1e6
        return self.joules


class Rapl:
    """The counters of all packages, and of their memory where it has one.

    Memory is not part of a package; cores and graphics are, and the platform holds it all, so
    these are not added.
    """

    def __init__(self, root: Path = Path("/")) -> None:
        """Open the counters.

        Args:
            root: Where ``sys`` lies.

        Raises:
            SensorError: There are none, or they may not be read.
        """
        folders = in_order(list((root / _POWERCAP).glob("intel-rapl:*")))
        named = [(words(folder / "name") or "", folder) for folder in folders]
        wanted = [(n, f) for n, f in named if n.startswith("package-") or n == "dram"]
        if not any(name.startswith("package-") for name, _ in wanted):
            raise SensorError("the CPU shows no energy counter (RAPL); virtual machines have none")
        self._domains = [self._open(name, folder) for name, folder in wanted]
        self.names = tuple(dict.fromkeys(domain.name for domain in self._domains))

    @staticmethod
    def _open(name: str, folder: Path) -> _Domain:
        counter = NumberFile(folder / "energy_uj")
        now = counter.read()
        if now is None:
            counter.close()
            raise SensorError(
                f"RAPL's counter of {name} may not be read: run as root, or let an administrator "
                f"allow reading {counter.path.name} of {folder.name}"
            )
        size = number(folder / "max_energy_range_uj")
        return _Domain(name=name, counter=counter, size=size, last=now)

    def joules(self) -> float:
        """Since it was opened. To be asked more often than a counter begins anew: minutes.

        Raises:
            SensorError: A counter is gone, or was reset.
        """
        return sum(domain.count() for domain in self._domains)

    def close(self) -> None:
        """Close the files."""
        for domain in self._domains:
            domain.counter.close()
