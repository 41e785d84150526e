"""What the sampler sees on other machines' sysfs trees and on this one, and what it costs."""

from __future__ import annotations

import json
import os
import sys
import threading
import time

import psutil
import pytest

from ampdeploy.bench import telemetry
from ampdeploy.bench.sensors import kernel, load
from ampdeploy.bench.sensors.load import CpuLoad
from ampdeploy.bench.sensors.survey import survey_sensors
from ampdeploy.bench.telemetry import COST_AT_MOST, Watch
from ampdeploy.report.codec import from_plain, to_plain
from ampdeploy.report.result import Spread, Telemetry
from tests.bench.machines import Nvml, change, install_nvml, plant

FAST = 0.005  # seconds between samples


@pytest.fixture(autouse=True)
def a_machine_of_its_own(monkeypatch, tmp_path):
    """No nvpmodel, no CUDA: what a test sees is what it puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    monkeypatch.setitem(sys.modules, "cuda.cudart", None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def install_nvpmodel(tmp_path, said, status=0):
    """A stand-in of NVIDIA's tool, by its name on the PATH."""
    tool = tmp_path / "bin" / "nvpmodel"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f'#!/bin/sh\n[ "$1" = -q ] || exit 9\nprintf "{said}"\nexit {status}\n')
    tool.chmod(0o755)


def samples(watch, count):
    """Wait until there are that many."""
    end = time.perf_counter() + 20
    while watch._samples < count:
        assert time.perf_counter() < end, "the sampler stands still"
        time.sleep(FAST)


def overwrite(root, name, text):
    """As the kernel does it: a file that is emptied first could be read while it is."""
    with open(root / name, "r+") as file:
        file.write(text)


@pytest.fixture
def cheap(monkeypatch):
    """Sample as often as asked for, whatever it costs."""
    monkeypatch.setattr(telemetry, "COST_AT_MOST", 1.0)


def test_an_agx_orin_is_seen_as_it_changes(tmp_path, cheap):
    root = plant("agx_orin", tmp_path / "root")
    install_nvpmodel(tmp_path, "NV Power Mode: MAXN\\n0\\n")
    with Watch("cuda", root=root, interval=FAST) as watch:
        samples(watch, 3)
        overwrite(root, "sys/class/devfreq/17000000.gpu/cur_freq", "0612000000")
        overwrite(root, "sys/class/thermal/thermal_zone1/temp", "97250")
        overwrite(root, "sys/class/thermal/cooling_device2/cur_state", "1")
        overwrite(root, "sys/devices/platform/soctherm-oc-event/hwmon/hwmon2/oc3_event_cnt", "9")
        samples(watch, watch._samples + 3)
        overwrite(root, "sys/class/thermal/cooling_device2/cur_state", "0")
    seen = watch.result()
    assert seen.power_mode == "nvpmodel MAXN"
    assert set(seen.clocks_mhz) == {"cpu", "gpu"}
    assert seen.clocks_mhz["cpu"] == Spread(min=729.6, median=2201.6, max=2201.6)
    assert (seen.clocks_mhz["gpu"].min, seen.clocks_mhz["gpu"].max) == (612.0, 1300.5)
    # cv0 is switched off and says -256.
    assert set(seen.temperature_c) == {
        "cpu-thermal", "gpu-thermal", "soc0-thermal", "tj-thermal"
    }  # fmt: skip
    assert seen.temperature_c["gpu-thermal"].min == 45.562
    assert seen.temperature_c["gpu-thermal"].max == 97.25
    assert seen.throttled == ("gpu: thermal", "module: instantaneous over-current")
    assert seen.samples == watch._samples >= 6
    assert from_plain(Telemetry, json.loads(json.dumps(to_plain(seen))), where="a test") == seen


def test_other_boards_name_their_parts_otherwise(tmp_path, cheap):
    root = plant("agx_thor", tmp_path / "thor")
    install_nvpmodel(tmp_path, "NV Power Mode: 120W\\n1\\n")
    with Watch("cuda", root=root, interval=FAST) as watch:
        samples(watch, 1)
    seen = watch.result()
    assert {name: spread.max for name, spread in seen.clocks_mhz.items()} == {
        "cpu": 2601.0, "gpu": 1575.0, "memory": 4266.0
    }  # fmt: skip
    assert set(seen.temperature_c) == {"cpu-thermal", "tj-thermal"}  # its GPU is switched off
    assert seen.power_mode == "nvpmodel 120W"
    assert seen.throttled is None
    assert "no throttle alert of a GPU" in seen.why["throttled"]

    root = plant("orin_nx_nano", tmp_path / "nx")
    install_nvpmodel(tmp_path, "not as root", status=1)
    with Watch("cpu", root=root, interval=FAST) as watch:
        samples(watch, 1)
    seen = watch.result()
    assert seen.clocks_mhz["gpu"].max == 624.75
    assert seen.power_mode == "governor schedutil"
    assert seen.throttled == ("gpu: thermal",)


def test_a_servers_throttling_is_what_happened_meanwhile(tmp_path, cheap):
    root = plant("x86_server", tmp_path / "root")
    with Watch("cpu", root=root, interval=FAST) as watch:
        samples(watch, 3)
    seen = watch.result()
    assert seen.throttled == ()
    assert seen.power_mode == "governor powersave"
    assert set(seen.temperature_c) == {"acpitz", "acpitz 2", "x86_pkg_temp"}
    assert seen.temperature_c["acpitz 2"].median == 29.8

    with Watch("cpu", root=root, interval=FAST) as watch:
        overwrite(root, "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "6")
    assert watch.result().throttled == ("cpu: thermal (package)",)


def test_a_cpus_counters_do_not_say_that_the_gpu_was_not_throttled(monkeypatch, tmp_path, cheap):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    root = plant("x86_server", tmp_path / "root")
    with Watch("cuda", root=root, interval=FAST) as watch:
        samples(watch, 3)
    seen = watch.result()
    assert seen.throttled is None
    assert "no throttle alert of a GPU" in seen.why["throttled"]
    assert "nvidia-ml-py" in seen.why["throttled"]
    with Watch("cuda", root=root, interval=FAST) as watch:
        overwrite(root, "sys/devices/system/cpu/cpu0/thermal_throttle/package_throttle_count", "6")
    assert watch.result().throttled == ("cpu: thermal (package)",)

    install_nvml(monkeypatch, Nvml())
    with Watch("cuda", root=root, interval=FAST) as watch:
        samples(watch, 3)
    assert watch.result().throttled == ()


def test_few_samples_do_not_say_that_nothing_was_throttled(tmp_path):
    root = plant("x86_server", tmp_path / "root")
    with Watch("cpu", root=root, interval=60.0) as watch:
        samples(watch, 1)
    seen = watch.result()
    assert seen.throttled is None
    assert seen.why["throttled"] == "1 sample(s); that nothing was seen needs 3"


def test_a_survey_needs_no_more_than_a_moment_to_tell_whether_throttling_is_seen(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    seen, why = survey_sensors("cuda")["throttling"]
    assert seen is None
    assert "nvidia-ml-py" in why
    install_nvml(monkeypatch, Nvml())
    assert survey_sensors("cuda")["throttling"] == ("its reasons are seen", None)


def test_a_gpu_is_seen_through_nvml(monkeypatch, tmp_path, cheap):
    state = Nvml()
    install_nvml(monkeypatch, state)
    with Watch("cuda", root=tmp_path, interval=FAST) as watch:
        samples(watch, 2)
        state.answers["nvmlDeviceGetCurrentClocksEventReasons"] = 0x4 | 0x20
        state.answers["nvmlDeviceGetClockInfo"] = {1: 990, 2: 1593}
        samples(watch, watch._samples + 2)
    assert state.initialised == 0
    seen = watch.result()
    assert seen.power_mode == "power limit 250 W"
    assert (seen.clocks_mhz["gpu"].min, seen.clocks_mhz["gpu"].max) == (990, 1410)
    assert seen.clocks_mhz["gpu_memory"].median == 1593
    assert seen.temperature_c == {"gpu": Spread(min=61, median=61, max=61)}
    assert seen.throttled == ("gpu: power cap", "gpu: thermal slowdown by the driver")


def test_an_older_nvml_is_asked_by_its_own_names(monkeypatch, tmp_path, cheap):
    state = Nvml()
    module = install_nvml(monkeypatch, state)
    for name in ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetCurrentClocksEventReasons"):
        delattr(module, name)
    state.answers |= {
        "nvmlDeviceGetTemperature": 55,
        "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40,
        "nvmlDeviceGetEnforcedPowerLimit": None,
        "nvmlDeviceGetClockInfo": None,
    }
    with Watch("cuda", root=tmp_path, interval=FAST) as watch:
        samples(watch, 1)
    seen = watch.result()
    assert seen.temperature_c["gpu"].max == 55
    assert seen.throttled == ("gpu: thermal slowdown by the hardware",)
    assert (seen.power_mode, seen.clocks_mhz) == (None, {})


def test_nvml_is_left_alone_where_models_run_on_the_cpu(monkeypatch, tmp_path):
    state = Nvml()
    install_nvml(monkeypatch, state)
    with Watch("cpu", root=tmp_path):
        assert state.initialised == 0


def test_what_a_bare_machine_does_not_show_is_explained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with Watch("cuda", root=tmp_path, interval=FAST) as watch:
        samples(watch, 1)
    seen = watch.result()
    assert (seen.clocks_mhz, seen.temperature_c) == ({}, {})
    assert (seen.power_mode, seen.throttled) == (None, None)
    for name in ("clocks_mhz", "temperature_c", "power_mode", "throttled"):
        assert seen.why[name].endswith("pip install nvidia-ml-py")


def test_this_machine_is_watched():
    with Watch("cpu") as watch:
        time.sleep(0.3)
    seen = watch.result()
    assert seen.samples >= 1
    assert seen.seconds >= 0.3
    for name, spread in {**seen.clocks_mhz, **seen.temperature_c}.items():
        assert spread.min <= spread.median <= spread.max, name
    assert seen.other_load is None or 0 <= seen.other_load <= 1


def test_others_are_counted_without_our_own(monkeypatch):
    """Ticks as Linux counts them: this process busy on one core, a neighbour on another."""
    fields = psutil.cpu_times()._fields
    machine = {"user": 100.0, "idle": 300.0}
    own = {"user": 40.0, "system": 0.0}

    psutil_times = type(psutil.cpu_times())

    class Process:
        def cpu_times(self):
            return type("Times", (), own)

    monkeypatch.setattr(
        load.psutil,
        "cpu_times",
        lambda: psutil_times(*({**dict.fromkeys(fields, 0.0), **machine}[f] for f in fields)),
    )
    monkeypatch.setattr(load.psutil, "Process", Process)
    counted = CpuLoad()
    assert counted.others() is None
    # 4 cores, 10 s: ours 10 s, another's 6 s, the host of this virtual machine 2 s.
    machine.update(user=116.0, idle=322.0, steal=2.0)
    own.update(user=49.0, system=1.0)
    assert counted.others() == pytest.approx(8 / 40)
    own.update(user=99.0)  # rounding of ticks never makes it negative
    assert counted.others() == 0.0


def test_the_sampler_bounds_its_own_cost(monkeypatch, tmp_path):
    """A tree with more sensors than a Jetson has: dear or not, it stays below a 1000th."""
    root = plant("agx_orin", tmp_path / "root")
    for number in range(9, 40):
        change(root, f"sys/class/thermal/thermal_zone{number}/type", f"zone{number}")
        change(root, f"sys/class/thermal/thermal_zone{number}/temp", 40000 + number)
    with Watch("cpu", root=root, interval=FAST) as watch:
        time.sleep(3.0)
    # The last sample still had its pause before it; unbounded, it would be some hundred ms.
    assert 0 < watch._cost_s <= COST_AT_MOST * watch.result().seconds + 0.02
    assert watch._samples >= 2


def test_a_hundred_cores_are_sampled_by_a_few(tmp_path):
    for core in range(100):
        change(tmp_path, f"sys/devices/system/cpu/cpufreq/policy{core}/scaling_cur_freq", 1000)
    found = kernel.clocks(tmp_path)["cpu"]
    assert 0 < len(found) <= kernel.MAX_CPUFREQ_POLICIES
    for sensor in found:
        sensor.close()


def test_a_failing_sampler_fails_the_block_but_hides_no_other_error(monkeypatch, tmp_path):
    def fail(self):
        raise RuntimeError("our bug")

    monkeypatch.setattr(Watch, "_read", fail)
    with pytest.raises(RuntimeError, match="our bug"), Watch("cpu", root=tmp_path):
        pass
    with pytest.raises(ValueError, match="the user's"), Watch("cpu", root=tmp_path):
        raise ValueError("the user's")
    assert not any(thread.name == "telemetry" for thread in threading.enumerate())


def test_files_are_closed(tmp_path):
    root = plant("agx_orin", tmp_path / "root")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with Watch("cpu", root=root, interval=FAST):
            assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before
