"""Machines that this one is not: sysfs trees, and a stand-in of NVIDIA's module pynvml.

The trees are in `sysfs`, each with a line on where its layout comes from. The stand-in is of
NVIDIA's own Python module (PyPI: nvidia-ml-py), not any part of ampdeploy.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

TREES = Path(__file__).parent / "sysfs"


def plant(tree, root):
    """Write a tree's files below `root`, and return it."""
    for line in (TREES / f"{tree}.txt").read_text().splitlines():
        if not line.startswith("#"):
            # A name may hold a colon; what follows ": " is the content, of some files nothing.
            name, _, content = line.removesuffix(":").partition(": ")
            change(root, name, content)
    return root


def change(root, name, content):
    """Give one file of a tree another content."""
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{content}\n" if content != "" else "")


class NVMLError(Exception):
    """As the module's own: not supported, unless it says other."""

    def __str__(self):
        return str(self.args[0]) if self.args else "Not Supported"


class Nvml:
    """State behind the stand-in. Answers are by NVIDIA's names; what has none is not supported."""

    def __init__(self, count=1):
        self.count = count
        self.initialised = 0
        self.found_by = None
        self.answers = {
            "nvmlDeviceGetTotalEnergyConsumption": 5_000_000,  # mJ
            "nvmlDeviceGetPowerUsage": 70_000,  # mW
            "nvmlDeviceGetEnforcedPowerLimit": 250_000,
            "nvmlDeviceGetTemperatureV": 61,
            "nvmlDeviceGetCurrentClocksEventReasons": 0x1,
            "nvmlDeviceGetComputeRunningProcesses": [SimpleNamespace(pid=1)],
            "nvmlDeviceGetUtilizationRates": SimpleNamespace(gpu=0, memory=0),
            "nvmlDeviceGetClockInfo": {1: 1410, 2: 1593},
        }

    def ask(self, name, *of):
        assert self.initialised == 1, f"{name} before nvmlInit or after nvmlShutdown"
        answer = self.answers.get(name)
        if answer is None:
            raise NVMLError()
        if isinstance(answer, Exception):
            raise answer
        return answer[of[0]] if isinstance(answer, dict) else answer

    def start(self):
        if self.count == 0:
            raise NVMLError("Driver Not Loaded")
        self.initialised += 1

    def stop(self):
        self.initialised -= 1

    def find(self, how):
        self.found_by = how
        return "the handle"


# Names that the module has; of a version that lacks one, the test deletes it.
_NAMES = (
    "nvmlDeviceGetTotalEnergyConsumption", "nvmlDeviceGetPowerUsage",
    "nvmlDeviceGetEnforcedPowerLimit", "nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature",
    "nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons",
    "nvmlDeviceGetComputeRunningProcesses", "nvmlDeviceGetUtilizationRates",
    "nvmlDeviceGetClockInfo", "nvmlDeviceGetMigMode",
)  # fmt: skip


def install_nvml(monkeypatch, state):
    """Put the stand-in where pynvml is imported from; returns the module."""

    def asker(name):
        def function(handle, *of):
            assert handle == "the handle"
            return state.ask(name, *of)

        return function

    module = ModuleType("pynvml")
    module.__spec__ = ModuleSpec("pynvml", None)
    vars(module).update(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_CLOCK_MEM=2,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=state.start,
        nvmlShutdown=state.stop,
        nvmlDeviceGetCount=lambda: state.count,
        nvmlDeviceGetHandleByIndex=lambda index: state.find(index),
        nvmlDeviceGetHandleByUUID=lambda uuid: state.find(uuid),
        nvmlDeviceGetHandleByPciBusId=lambda bus_id: state.find(bus_id),
        **{name: asker(name) for name in _NAMES},
    )
    monkeypatch.setitem(sys.modules, "pynvml", module)
    return module
