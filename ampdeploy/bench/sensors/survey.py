"""What this machine's meters and sensors are, without measuring anything."""

from __future__ import annotations

from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.bench.sensors.meter import find_meter
from ampdeploy.bench.telemetry import Watch

# What is watched while models are timed -> field of `Telemetry`.
SENSORS = {
    "clocks": "clocks_mhz",
    "temperatures": "temperature_c",
    "power mode": "power_mode",
    "throttling": "throttled",
}


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
    found = {
        "clocks": ", ".join(seen.clocks_mhz),
        "temperatures": ", ".join(seen.temperature_c),
        "power mode": seen.power_mode,
        "throttling": None if seen.throttled is None else "its reasons are seen",
    }
    return {
        name: (found[name], None) if found[name] else (None, seen.why[field])
        for name, field in SENSORS.items()
    }
