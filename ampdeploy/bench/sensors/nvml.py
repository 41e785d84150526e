"""One GPU's sensors through NVML, NVIDIA's management library (PyPI: nvidia-ml-py).

Run here: that library's own Python module without a driver. The calls have been run against a
stand-in of the module, not on a GPU. https://docs.nvidia.com/deploy/nvml-api/
"""

from __future__ import annotations

import contextlib
import os
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.closing import Closing
from ampdeploy.errors import AmpDeployError, MissingDependencyError
from ampdeploy.optional import require

if TYPE_CHECKING:
    pass

_BUS_ID_BYTES = 64

# Bits of nvmlDeviceGetCurrentClocksEventReasons; bit 0 says that the GPU is idle, which is none.
_REASONS = {
    0x2: "application clocks setting",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal slowdown by the driver",
    0x40: "thermal slowdown by the hardware",
    0x80: "power brake",
    0x100: "display clocks setting",
    0x200: "board limit",
    0x400: "reliability",
}


class Nvml(Closing):
    """The GPU that CUDA uses first. What it does not support is None."""

    def __init__(self) -> None:
        """Start NVML and find the GPU.

        Raises:
            SensorError: No nvidia-ml-py, no driver, or it cannot be told which GPU is meant.
        """
        self._module = _module()
        try:
            self._module.nvmlInit()
        except self._module.NVMLError as error:
            raise SensorError(f"NVML does not start: {error}") from error
        try:
            self._handle = self._find()
        except BaseException:
            self.close()
            raise

    def _find(self) -> Any:
        nvml = self._module
        try:
            bus_id = _cuda_bus_id()
            if bus_id is not None:
                return nvml.nvmlDeviceGetHandleByPciBusId(bus_id)
            visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0].strip()
            if visible.startswith("GPU-"):
                return nvml.nvmlDeviceGetHandleByUUID(visible)
            count = nvml.nvmlDeviceGetCount()
            if count == 1:
                return nvml.nvmlDeviceGetHandleByIndex(0)
        except nvml.NVMLError as error:
            raise SensorError(f"NVML does not show the GPU: {error}") from error
        # CUDA orders GPUs by speed, NVML by slot.
        raise SensorError(
            f"NVML shows {count} GPUs, and without cuda-python it is not known which of them CUDA "
            "uses: pip install cuda-python"
        )

    def ask(self, *functions: str, of: tuple[Any, ...] = ()) -> Any | None:
        """The answer of the first of `functions` that works; None: none of them does.

        Names change between versions, and what works depends on the GPU and its driver.
        """
        for name in functions:
            function = getattr(self._module, name, None)
            if function is not None:
                with contextlib.suppress(self._module.NVMLError):
                    return function(self._handle, *of)
        return None

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None before Volta."""
        return _thousandth(self.ask("nvmlDeviceGetTotalEnergyConsumption"))

    def watts(self) -> float | None:
        """Power now, of the whole board."""
        return _thousandth(self.ask("nvmlDeviceGetPowerUsage"))

    def power_limit_watts(self) -> float | None:
        """The lowest of the limits in force."""
        return _thousandth(self.ask("nvmlDeviceGetEnforcedPowerLimit"))

    def gpu_mhz(self) -> float | None:
        """Clock of the multiprocessors."""
        return self.ask("nvmlDeviceGetClockInfo", of=(self._module.NVML_CLOCK_SM,))

    def memory_mhz(self) -> float | None:
        """Clock of the memory."""
        return self.ask("nvmlDeviceGetClockInfo", of=(self._module.NVML_CLOCK_MEM,))

    def celsius(self) -> float | None:
        """Temperature of the chip."""
        sensor = self._module.NVML_TEMPERATURE_GPU
        return self.ask("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature", of=(sensor,))

    def utilisation(self) -> float | None:
        """Share of the last moments in which a kernel ran, of any process."""
        rates = self.ask("nvmlDeviceGetUtilizationRates")
        return None if rates is None else rates.gpu / 100

    def compute_processes(self) -> int | None:
        """Processes with a CUDA context on the GPU. 0 in a container that may not see them."""
        found = self.ask("nvmlDeviceGetComputeRunningProcesses")
        return None if found is None else len(found)

    def divided(self) -> bool:
        """Whether the GPU is divided by MIG, so that its power is not that of our part."""
        mode = self.ask("nvmlDeviceGetMigMode")  # [now, after the next reset]
        return mode is not None and mode[0] != 0

    def slowed_by(self) -> tuple[str, ...] | None:
        """Reasons for clocks lower than they could be, now."""
        bits = self.ask(
            "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"
        )
        if bits is None:
            return None
        return tuple(reason for bit, reason in _REASONS.items() if bits & bit)

    def close(self) -> None:
        """End NVML."""
        with contextlib.suppress(self._module.NVMLError):
            self._module.nvmlShutdown()


def _module() -> ModuleType:
    """NVIDIA's module: the one place that imports it."""
    try:
        return require("pynvml", needed_by="reading the GPU's sensors")
    except MissingDependencyError as error:
        # The package on PyPI that is called pynvml is another one.
        raise SensorError(
            "NVIDIA's package nvidia-ml-py is not installed: pip install nvidia-ml-py"
        ) from error


def _thousandth(value: float | None) -> float | None:
    return None if value is None else value / 1000


def _cuda_bus_id() -> str | None:
    """PCI bus id of CUDA's first device; None without cuda-python or without a GPU."""
    from ampdeploy.device.cuda import open_cuda

    try:
        cuda = open_cuda(needed_by="finding the GPU's sensors")
        found: bytes | str = cuda.call("cudaDeviceGetPCIBusId", _BUS_ID_BYTES, 0)
    except AmpDeployError:
        return None
    text = found.decode() if isinstance(found, bytes) else found
    return text.strip("\0 ")
