"""What this machine's meters and sensors are, without measuring anything."""

from __future__ import annotations

from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.bench.sensors.meter import find_meter
from ampdeploy.bench.telemetry import Watch

# What is watched while models are timed.
SENSORS = ("clocks", "temperatures", "power mode", "throttling")


def survey_meter(device: str) -> tuple[str | None, str | None]:
    """Where the energy of models on `device` would be read, or None and why it is not known."""
    try:
        with find_meter(device) as meter:
            return meter.source, None
    except SensorError as reason:
        return None, str(reason)


def survey_sensors(device: str) -> dict[str, tuple[str | None, str | None]]:
    """Name of `SENSORS` -> what is seen, or None and why there is nothing."""
    with Watch(device) as watch:
        pass
    seen = watch.result()
    hidden = watch.why_throttling_is_hidden()
    clocks, temperatures = ", ".join(seen.clocks_mhz), ", ".join(seen.temperature_c)
    return {
        "clocks": (clocks, None) if clocks else (None, seen.why["clocks_mhz"]),
        "temperatures": (
            (temperatures, None) if temperatures else (None, seen.why["temperature_c"])
        ),
        "power mode": (seen.power_mode, seen.why.get("power_mode")),
        "throttling": (None, hidden) if hidden else ("its reasons are seen", None),
    }
