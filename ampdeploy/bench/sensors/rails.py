"""Power of a Jetson: the INA3221 and INA238 monitors on its supply rails, in sysfs.

Layouts, none of which was read from a device here:

- AGX Orin: `VDD_GPU_SOC`, `VDD_CPU_CV`, `VIN_SYS_5V0` on one INA3221, `VDDQ_VDD2_1V8AO` on a
  second. Orin NX and Nano: `VDD_IN`, `VDD_CPU_GPU_CV`, `VDD_SOC`. From "Software-Based Power
  Consumption Modeling" in
  https://docs.nvidia.com/jetson/archives/r36.4.4/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonOrinNanoSeriesJetsonOrinNxSeriesAndJetsonAgxOrinSeries.html
  and from the kernel's device trees ``tegra234-p3701.dtsi`` and ``tegra234-p3767.dtsi``.
- AGX Thor: `VDD_GPU`, `VDD_CPU_SOC_MSS`, `VIN_SYS_5V0` on an INA3221, and `VIN`, the supply of
  module and carrier board, on an INA238 without a label:
  https://docs.nvidia.com/jetson/archives/r38.2/DeveloperGuide/SD/PlatformPowerAndPerformance/JetsonThor.html
  and https://github.com/rbonghi/jetson_stats/pull/900.

Files and units: https://www.kernel.org/doc/html/latest/hwmon/ina3221.html and ina238.html.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ampdeploy.bench.sensors.files import NumberFile, SensorError, in_order, number, words

_DRIVERS = Path("sys/bus/i2c/drivers")
_CHANNELS = (1, 2, 3)  # of an INA3221; its in7 is a sum over channels, not a rail

# What makes up the whole, the first that is there in full. Nothing may be in it twice: VDD_IN feeds
# VDD_CPU_GPU_CV and VDD_SOC; VIN feeds all of Thor. On AGX Orin, VDDQ_VDD2_1V8AO is left out: the
# bus voltage in published readings is the 5 V of VIN_SYS_5V0, which then feeds it.
_TOTALS = (
    (("VIN",), "module and carrier board"),
    (("VDD_IN",), "module"),
    (("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"), "module"),
    (("VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0"), "module"),
)


@dataclass(frozen=True, kw_only=True)
class Rail:
    """One supply rail."""

    label: str
    chip: str
    """``INA3221`` or ``INA238``."""
    voltage: NumberFile
    """Millivolts."""
    current: NumberFile
    """Milliamperes."""

    def watts(self) -> float:
        """Power now. Voltage and current are read one after the other.

        Raises:
            SensorError: One of them cannot be read.
        """
        voltage, current = self.voltage.read(), self.current.read()
        if voltage is None or current is None:
            file = self.voltage if voltage is None else self.current
            raise SensorError(f"{file.path.name} of {self.chip} {self.label} cannot be read")
        return voltage * current / 1e6

    def close(self) -> None:
        """Close both files."""
        self.voltage.close()
        self.current.close()


def find_rails(root: Path = Path("/")) -> list[Rail]:
    """The rails with a monitor; empty on anything but a Jetson. The caller closes them.

    Args:
        root: Where ``sys`` lies.
    """
    rails = []
    for monitor in _monitors(root, "ina3221"):
        for channel in _CHANNELS:
            label = words(monitor / f"in{channel}_label")
            off = number(monitor / f"in{channel}_enable") == 0
            if label and label != "NC" and not off:
                rails.append(_rail(label, monitor, channel))
    # Without an INA3221 it is no Jetson, and an INA238 may supply anything.
    supplies = _monitors(root, "ina238") if rails else []
    for monitor in supplies:
        label = words(monitor / "label") or ("VIN" if len(supplies) == 1 else None)
        if label:
            rails.append(_rail(label, monitor, 1))
    return rails


def _monitors(root: Path, driver: str) -> list[Path]:
    return in_order(list((root / _DRIVERS / driver).glob("*/hwmon/hwmon*")))


def _rail(label: str, monitor: Path, channel: int) -> Rail:
    return Rail(
        label=label,
        chip=monitor.parents[2].name.upper(),
        voltage=NumberFile(monitor / f"in{channel}_input"),
        current=NumberFile(monitor / f"curr{channel}_input"),
    )


def total_of(rails: list[Rail]) -> tuple[list[Rail], str]:
    """The rails that together feed the module, and in words what they are.

    Raises:
        SensorError: These are not the rails of a Jetson whose layout is known.
    """
    by_label = {rail.label: rail for rail in rails}
    for labels, scope in _TOTALS:
        if all(label in by_label for label in labels):
            found = [by_label[label] for label in labels]
            chips = " and ".join(sorted({rail.chip for rail in found}))
            return found, f"{chips} {' + '.join(labels)} ({scope})"
    raise SensorError(
        f"the rails {', '.join(by_label)} are not those of a known Jetson, so what adds up to the "
        "whole is not known"
    )
