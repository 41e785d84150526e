"""Clocks, temperatures, throttling and power mode, as the kernel's files tell them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from ampdeploy.bench import host
from ampdeploy.bench.sensors.files import NumberFile, in_order, number, words

_CPU = Path("sys/devices/system/cpu")
_DEVFREQ = Path("sys/class/devfreq")
_THERMAL = Path("sys/class/thermal")
_OVERCURRENT = Path("sys/devices/platform/soctherm-oc-event/hwmon")

# Clocks move together, and a server has hundreds: reading a few keeps the sampler light.
MAX_CPUFREQ_POLICIES = 8

# A Jetson's GPU in devfreq: 17000000.gpu and 17000000.ga10b (Orin), gpu-gpc-0 (Thor).
_GPU_DEVFREQ = re.compile(r"\.(gpu|ga10b|gv11b)$|^gpu-gpc-\d+$")
_MEMORY_DEVFREQ = re.compile(r"^bwmgr$")  # Thor

# A part that is switched off reports what no part that works has.
_LOWEST_CELSIUS, _HIGHEST_CELSIUS = -40.0, 150.0

# What NVIDIA calls the events of its over-current throttling, in the order of their counters.
_EVENTS = {
    "oc1": "under-voltage",
    "oc2": "average over-current",
    "oc3": "instantaneous over-current",
}


class Scaled:
    """A file's number in another unit, or None where it makes no sense."""

    def __init__(
        self, path: Path, scale: float, *, low: float = 0.0, high: float = float("inf")
    ) -> None:
        self._file = NumberFile(path)
        self._scale, self._low, self._high = scale, low, high

    def __call__(self) -> float | None:
        value = self._file.read()
        if value is None or not self._low <= value * self._scale <= self._high:
            return None
        return value * self._scale

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def clocks(root: Path) -> dict[str, list[Scaled]]:
    """Clock -> its sensors, in MHz: ``cpu``, and on a Jetson ``gpu`` and ``memory``."""
    policies = in_order(list((root / _CPU / "cpufreq").glob("policy*/scaling_cur_freq")))
    step = max(1, -(-len(policies) // MAX_CPUFREQ_POLICIES))
    found = {"cpu": [Scaled(path, 1e-3) for path in policies[::step]]}  # kHz
    for name, pattern in (("gpu", _GPU_DEVFREQ), ("memory", _MEMORY_DEVFREQ)):
        found[name] = [Scaled(path / "cur_freq", 1e-6) for path in _devfreq(root, pattern)]  # Hz
    return {name: sensors for name, sensors in found.items() if sensors}


def _devfreq(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    return [
        path for path in in_order(list((root / _DEVFREQ).glob("*"))) if pattern.search(path.name)
    ]


def gpu_load(root: Path) -> float | None:
    """Share of the last moments in which a Jetson's GPU was busy; None where it does not say."""
    for path in _devfreq(root, _GPU_DEVFREQ):
        load = number(path / "device" / "load")  # thousandths
        if load is not None:
            return load / 1000
    return None


def temperatures(root: Path) -> dict[str, list[Scaled]]:
    """Thermal zone -> its sensor, in degrees Celsius. Zones of one name are numbered."""
    found: dict[str, list[Scaled]] = {}
    for zone in in_order(list((root / _THERMAL).glob("thermal_zone*"))):
        name = words(zone / "type") or zone.name
        same = sum(known == name or known.startswith(f"{name} ") for known in found)
        sensor = Scaled(zone / "temp", 1e-3, low=_LOWEST_CELSIUS, high=_HIGHEST_CELSIUS)
        found[f"{name} {same + 1}" if same else name] = [sensor]
    return found


def governors(root: Path) -> tuple[str, ...]:
    """The CPU's frequency governors, each once."""
    files = in_order(list((root / _CPU / "cpufreq").glob("policy*/scaling_governor")))
    return tuple(dict.fromkeys(name for name in map(words, files) if name))


def nvpmodel() -> str | None:
    """A Jetson's power mode, e.g. ``MAXN``; None where there is no nvpmodel, or it does not say."""
    # The first line: "NV Power Mode: MAXN"; the second is the mode's number.
    found = re.search(r"Power Mode:\s*(\S+)", host._output("nvpmodel", "-q") or "")
    return found[1] if found else None


def throttle_counters(root: Path) -> dict[str, list[NumberFile]]:
    """Reason -> counters of how often it lowered clocks since the machine started."""
    found: dict[str, list[NumberFile]] = {}
    for kind in ("core", "package"):
        name = f"thermal_throttle/{kind}_throttle_count"
        for path in in_order(list((root / _CPU).glob(f"cpu[0-9]*/{name}"))):
            found.setdefault(f"cpu: thermal ({kind})", []).append(NumberFile(path))
    for path in in_order(list((root / _OVERCURRENT).glob("hwmon*/oc*_event_cnt"))):
        event = path.name.split("_")[0]
        found.setdefault(f"module: {_EVENTS.get(event, event)}", []).append(NumberFile(path))
    return found


GPU_ALERT = "gpu: thermal"
"""The reason of `throttle_alerts` that is the GPU's own."""


def throttle_alerts(root: Path) -> dict[str, NumberFile]:
    """Reason -> a cooling device that is above 0 while a Jetson's firmware lowers clocks."""
    return dict(_alerts(root))


def _alerts(root: Path) -> Iterator[tuple[str, NumberFile]]:
    for device in in_order(list((root / _THERMAL).glob("cooling_device*"))):
        kind = words(device / "type") or ""
        if kind.endswith("-throttle-alert"):
            part = kind.removesuffix("-throttle-alert")
            yield f"{part}: thermal", NumberFile(device / "cur_state")
