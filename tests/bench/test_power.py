"""Energy: what each machine's meter counts, and when its number is refused.

The machines are sysfs trees and a stand-in of NVIDIA's module; see `machines`. Time is simulated
where a measurement takes minutes.
"""

from __future__ import annotations

import os
import sys
import time
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from ampdeploy.bench import power
from ampdeploy.bench.power import Clock, measure_energy
from ampdeploy.bench.result import BenchResult
from ampdeploy.bench.run import measure_pair
from ampdeploy.bench.sensors import load
from ampdeploy.bench.sensors import meter as meters
from ampdeploy.bench.sensors.files import SensorError
from ampdeploy.bench.sensors.meter import Integral, Meter, RailMeter, find_meter
from ampdeploy.bench.sensors.rails import find_rails, total_of
from ampdeploy.bench.sensors.rapl import Rapl
from ampdeploy.config import BenchConfig
from ampdeploy.errors import ConfigError
from ampdeploy.report.codec import from_plain, to_plain
from ampdeploy.targets.base import Runner
from tests.bench.machines import Nvml, NVMLError, change, install_nvml, plant
from tests.device import stand_ins
from tests.targets.onnx_samples import write_linear_model

RAILS_NX = "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon1"
SUPPLY_THOR = "sys/bus/i2c/drivers/ina238/2-0044/hwmon/hwmon5"


@pytest.fixture
def patient(monkeypatch):
    """A test machine may be so busy that a reading comes late."""
    monkeypatch.setattr(meters, "MAX_GAP_S", 60.0)


@pytest.mark.parametrize(
    ("tree", "labels", "source", "watts"),
    [
        # 20 V * 0.4 A + 20 V * 0.15 A + 5 V * 0.9 A; VDDQ's 1 W comes out of the 5 V.
        ("agx_orin", ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"],
         "INA3221 VDD_GPU_SOC + VDD_CPU_CV + VIN_SYS_5V0 (module)", 15.5),
        # VDD_IN feeds the other two.
        ("orin_nx_nano", ["VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"], "INA3221 VDD_IN (module)", 8.0),
        # VIN feeds the other three.
        ("agx_thor", ["VDD_GPU", "VDD_CPU_SOC_MSS", "VIN_SYS_5V0", "VIN"],
         "INA238 VIN (module and carrier board)", 29.0),
    ],
)  # fmt: skip
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.usefixtures("patient")
def test_the_whole_of_each_jetson_is_counted_once(tmp_path, tree, labels, source, watts, device):
    root = plant(tree, tmp_path)
    rails = find_rails(root)
    assert [rail.label for rail in rails] == labels
    total, name = total_of(rails)
    assert name == source
    assert sum(rail.watts() for rail in total) == pytest.approx(watts)
    with find_meter(device, root) as meter:
        assert meter.source == f"{source}, power read every 100 ms and integrated"
        assert meter.counts_cpu
        assert meter.gpu_load() == {"agx_orin": 0.02, "orin_nx_nano": 0.0, "agx_thor": None}[tree]
        assert_draws(meter, watts)


def assert_draws(meter, watts):
    """Between two readings; each happens at some moment between looking at the clock twice."""
    times = [time.perf_counter()]
    joules = meter.joules()
    times.append(time.perf_counter())
    time.sleep(0.3)
    times.append(time.perf_counter())
    grown = meter.joules() - joules
    times.append(time.perf_counter())
    assert 0.999 * watts * (times[2] - times[1]) <= grown
    assert grown <= 1.001 * watts * (times[3] - times[0])


def test_a_meter_closes_its_files(tmp_path):
    root = plant("agx_orin", tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    with find_meter("cpu", root):
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_thor_without_its_supply_monitor_is_the_sum_of_the_rails(tmp_path):
    root = plant("agx_thor", tmp_path)
    for name in ("in1_input", "curr1_input", "power1_input", "name", "in0_input"):
        (root / SUPPLY_THOR / name).unlink()
    (root / SUPPLY_THOR).rmdir()
    total, name = total_of(find_rails(root))
    assert name == "INA3221 VDD_GPU + VDD_CPU_SOC_MSS + VIN_SYS_5V0 (module)"
    assert sum(rail.watts() for rail in total) == pytest.approx(10 + 7 + 6)


def test_an_unlabelled_supply_monitor_is_vin_only_where_it_is_the_only_one(tmp_path):
    root = plant("agx_thor", tmp_path)
    other = "sys/bus/i2c/drivers/ina238/2-0045/hwmon/hwmon9"
    change(root, f"{other}/in1_input", 12000)
    change(root, f"{other}/curr1_input", 9000)
    assert "VIN" not in [rail.label for rail in find_rails(root)]
    change(root, f"{SUPPLY_THOR}/label", "VIN")
    total, _ = total_of(find_rails(root))
    assert [rail.watts() for rail in total] == [29.0]


def test_channels_that_are_off_and_unknown_rails_are_no_total(tmp_path):
    root = plant("orin_nx_nano", tmp_path)
    change(root, f"{RAILS_NX}/in1_enable", 0)
    with pytest.raises(SensorError, match="VDD_CPU_GPU_CV, VDD_SOC are not those of a known"):
        RailMeter(root)


def test_a_rail_that_stops_answering_ends_the_measurement(tmp_path):
    root = plant("orin_nx_nano", tmp_path)
    with RailMeter(root) as meter:
        assert meter.joules() >= 0
        change(root, f"{RAILS_NX}/curr1_input", "")
        with pytest.raises(SensorError, match="curr1_input of INA3221 VDD_IN cannot be read"):
            meter.joules()
        change(root, f"{RAILS_NX}/curr1_input", 1600)
        with pytest.raises(SensorError, match="curr1_input"):  # what was missed is lost
            meter.joules()


def test_readings_are_integrated_by_the_trapezoidal_rule():
    at = [0.0]
    integral = Integral(lambda: 10 + 4 * at[0], now=lambda: at[0])
    for now in (0.25, 0.5, 1.3):
        at[0] = now
        integral.read()
    assert integral.joules() == pytest.approx(10 * 1.3 + 2 * 1.3**2)  # exact for a straight line
    at[0] += meters.MAX_GAP_S + 0.5
    with pytest.raises(SensorError, match=r"was not read for 1\.5 s"):
        integral.joules()


def test_packages_and_their_memory_are_counted_over_the_end_of_a_counter(tmp_path):
    root = plant("x86_server", tmp_path)
    rapl = Rapl(root)
    assert rapl.names == ("package-0", "dram", "package-1")
    change(root, "sys/class/powercap/intel-rapl:0/energy_uj", 3_000_000)  # + 2 J
    change(root, "sys/class/powercap/intel-rapl:0:0/energy_uj", 9_000_000)  # in the package
    change(root, "sys/class/powercap/intel-rapl:0:1/energy_uj", 750_000)  # + 0.25 J
    change(root, "sys/class/powercap/intel-rapl:1/energy_uj", 671_150)  # + 1 J, around the end
    change(root, "sys/class/powercap/intel-rapl:2/energy_uj", 99_000_000)  # holds it all
    assert rapl.joules() == pytest.approx(3.25)
    assert rapl.joules() == pytest.approx(3.25)
    rapl.close()
    with find_meter("cpu", root) as meter:
        assert meter.source == "RAPL package-0 + dram + package-1"
        assert meter.counts_cpu


def test_a_counter_that_went_back_without_an_end_was_reset(tmp_path):
    root = plant("x86_server", tmp_path)
    (root / "sys/class/powercap/intel-rapl:0/max_energy_range_uj").unlink()
    rapl = Rapl(root)
    change(root, "sys/class/powercap/intel-rapl:0/energy_uj", 1)
    with pytest.raises(SensorError, match="package-0 went back: it was reset"):
        rapl.joules()


def test_counters_that_may_not_be_read_and_machines_without(tmp_path):
    with pytest.raises(SensorError, match=r"no energy counter \(RAPL\); virtual machines"):
        find_meter("cpu", tmp_path)
    root = plant("x86_server", tmp_path)
    counter = root / "sys/class/powercap/intel-rapl:0/energy_uj"
    counter.unlink()
    counter.mkdir()  # opens, and does not read: root may read whatever it is forbidden
    with pytest.raises(SensorError, match="package-0 may not be read: run as root"):
        find_meter("cpu", root)


@pytest.fixture
def no_cuda(monkeypatch):
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_gpu_counts_its_own_energy(monkeypatch, no_cuda, tmp_path):
    state = Nvml()
    install_nvml(monkeypatch, state)
    with find_meter("cuda", tmp_path) as meter:
        assert meter.source == "NVML total energy counter (GPU board)"
        assert not meter.counts_cpu
        assert (meter.joules(), meter.gpu_processes(), meter.gpu_load()) == (5000.0, 1, 0.0)
        state.answers["nvmlDeviceGetTotalEnergyConsumption"] = NVMLError("GPU is lost")
        with pytest.raises(SensorError, match="cannot be read any more"):
            meter.joules()
    assert state.initialised == 0


@pytest.mark.usefixtures("patient")
def test_a_gpu_before_volta_has_its_power_integrated_and_says_so(monkeypatch, no_cuda, tmp_path):
    state = Nvml()
    state.answers["nvmlDeviceGetTotalEnergyConsumption"] = None
    install_nvml(monkeypatch, state)
    with find_meter("cuda", tmp_path) as meter:
        assert "no energy counter" in meter.source
        assert_draws(meter, 70.0)
    assert state.initialised == 0
    state.answers["nvmlDeviceGetPowerUsage"] = None
    with pytest.raises(SensorError, match="neither energy nor power"):
        find_meter("cuda", tmp_path)
    assert state.initialised == 0


def test_gpus_whose_energy_is_not_known(monkeypatch, no_cuda, tmp_path):
    state = Nvml()
    install_nvml(monkeypatch, state)
    state.answers["nvmlDeviceGetMigMode"] = [1, 1]
    with pytest.raises(SensorError, match="divided by MIG"):
        find_meter("cuda", tmp_path)
    state.answers["nvmlDeviceGetMigMode"] = [0, 0]
    state.count = 3
    with pytest.raises(SensorError, match=r"3 GPUs, and without cuda-python it is not known"):
        find_meter("cuda", tmp_path)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-12ab,GPU-34cd")
    find_meter("cuda", tmp_path).close()
    assert state.found_by == "GPU-12ab"
    state.count = 0
    with pytest.raises(SensorError, match="NVML does not start: Driver Not Loaded"):
        find_meter("cuda", tmp_path)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(SensorError, match="pip install nvidia-ml-py"):
        find_meter("cuda", tmp_path)
    assert state.initialised == 0


def test_the_gpu_that_cuda_uses_is_found_among_several(monkeypatch, tmp_path):
    class Gpu(stand_ins.Gpu):
        def cudaDeviceGetPCIBusId(self, length, device):  # noqa: N802 - by NVIDIA's name
            assert device == 0
            return stand_ins.SUCCESS, b"0000:41:00.0\0"

    stand_ins.install_cuda(monkeypatch, Gpu())
    state = Nvml(count=4)
    install_nvml(monkeypatch, state)
    find_meter("cuda", tmp_path).close()
    assert state.found_by == "0000:41:00.0"


class World(Meter):
    """Simulated time, power and load: a stand-in for a machine with a meter."""

    source = "a stand-in"
    counts_cpu = False

    def __init__(self):
        self.time = 100.0
        self.energy = 7.0
        self.idle_watts = 10.0
        self.extra_watts = 0.0
        self.load = None
        self.processes = None
        self.on_idle = lambda: None
        self.idled = 0

    def joules(self):
        return self.energy

    def gpu_load(self):
        return self.load

    def gpu_processes(self):
        return self.processes

    def close(self):
        pass

    def pass_time(self, seconds, extra=0.0):
        self.time += seconds
        self.energy += seconds * (self.idle_watts + extra)

    def sleep(self, seconds):
        self.on_idle()
        self.idled += seconds
        self.pass_time(seconds)

    @property
    def clock(self):
        return Clock(now=lambda: self.time, sleep=self.sleep)


class Model(Runner):
    """A runner whose calls take simulated time and power."""

    def __init__(self, world, name, *, ms, watts):
        super().__init__(name=name, image_size=4, output_names=("features",), device="cpu")
        self.world, self.seconds, self.watts = world, ms / 1000, watts
        self.seen = set()

    def _run_impl(self, images):
        self.seen.add(images.tobytes())
        self.world.pass_time(self.seconds, self.watts)
        return {"features": np.zeros((len(images), 2), np.float32)}

    def _close_impl(self):
        pass


BATCHES = [np.full((2, 3, 4, 4), value, np.float32) for value in (1, 2, 3)]


def simulate(world, *, dense=(40, 12.0), slim=(25, 8.0), seconds=30.0):
    runners = {
        "baseline": Model(world, "dense", ms=dense[0], watts=dense[1]),
        "pruned": Model(world, "slim", ms=slim[0], watts=slim[1]),
    }
    found = power._measure(runners, BATCHES, seconds=seconds, meter=world, clock=world.clock)
    assert all(len(runner.seen) == len(BATCHES) for runner in runners.values())
    return found


def test_idle_power_is_taken_off_each_image():
    world = World()
    found = simulate(world)
    # Two images a call: 12 W * 40 ms / 2, 8 W * 25 ms / 2.
    assert found["baseline"].joules_per_image == pytest.approx(0.24)
    assert found["pruned"].joules_per_image == pytest.approx(0.10)
    dense = found["baseline"]
    assert dense.mean_watts == pytest.approx(22.0)
    assert dense.idle_watts == pytest.approx(10.0)
    assert (dense.batch_size, dense.source) == (2, "a stand-in")
    assert dense.seconds >= 30.0
    assert dense.images == 2 * round(dense.seconds / 0.04)
    assert world.idled == pytest.approx(5 * (power.SETTLE_S + power.IDLE_S))


def test_idle_power_that_drifts_a_little_is_halved():
    world = World()
    world.on_idle = lambda: setattr(world, "idle_watts", world.idle_watts + 0.01)
    found = simulate(world)
    assert found["baseline"].idle_watts == pytest.approx(10.5, abs=0.1)
    assert found["baseline"].joules_per_image == pytest.approx(0.24, rel=0.002)


def test_models_that_draw_more_as_the_machine_warms_are_compared_without_it():
    world = World()

    class Warming(Model):
        """Adds a thousandth more with each second that passes."""

        def _run_impl(self, images):
            then, self.watts = self.watts, self.watts * (1 + 1e-3 * (world.time - 100))
            try:
                return super()._run_impl(images)
            finally:
                self.watts = then

    runners = {
        "baseline": Warming(world, "dense", ms=40, watts=12.0),
        "pruned": Warming(world, "slim", ms=25, watts=8.0),
    }
    found = power._measure(runners, BATCHES, seconds=30.0, meter=world, clock=world.clock)
    dense, slim = (found[role].joules_per_image for role in ("baseline", "pruned"))
    assert dense == pytest.approx(0.24 * (1 + 1e-3 * (world.time - 100) / 2), rel=0.01)
    assert slim / dense == pytest.approx(0.10 / 0.24, rel=0.001)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda w: setattr(w, "processes", 3), r"2 other process\(es\) hold the GPU"),
        (lambda w: setattr(w, "load", 0.3), "busy for 30% of the time while our models waited"),
        (lambda w: setattr(w, "on_idle", lambda: setattr(w, "energy", 3.0)),
         r"went back from \d+ to \d+ J: it was reset"),
        # 21 pauses: 0.84 W from one idle time to the next, 7% of what the dense model adds.
        (lambda w: setattr(w, "on_idle", lambda: setattr(w, "idle_watts", w.idle_watts + 0.04)),
         r"idle power went from 10\.[\d]+ to 11\.[\d]+ W around a run that adds 1[12]\.\d+ W"),
    ],
)  # fmt: skip
def test_a_disturbed_measurement_is_refused(spoil, reason):
    world = World()
    spoil(world)
    with pytest.raises(SensorError, match=reason):
        simulate(world)


def test_a_counter_reset_in_the_middle_of_a_run_is_refused():
    world = World()
    model = Model(world, "dense", ms=40, watts=12.0)
    seen = []

    class Reset(Model):
        def _run_impl(self, images):
            seen.append(1)
            if len(seen) == 500:
                world.energy = 0.0
            return super()._run_impl(images)

    runners = {"baseline": Reset(world, "dense", ms=40, watts=12.0), "pruned": model}
    with pytest.raises(SensorError, match=r"went back from \d+ to \d+ J: it was reset"):
        power._measure(runners, BATCHES, seconds=30.0, meter=world, clock=world.clock)


def test_a_meter_that_does_not_see_the_model_is_refused():
    with pytest.raises(SensorError, match=r"10\.00 W and the idle machine 10\.00 W"):
        simulate(World(), dense=(40, 0.0))


@pytest.mark.parametrize(("counts_cpu", "refused"), [(True, True), (False, False)])
def test_other_processes_on_the_cpu_disturb_what_counts_the_cpu(monkeypatch, counts_cpu, refused):
    world = World()
    world.counts_cpu = counts_cpu
    busy = SimpleNamespace(others=lambda: 0.23)
    monkeypatch.setattr(power, "CpuLoad", lambda: busy)
    if not refused:
        assert simulate(world)["pruned"].images > 0
        return
    with pytest.raises(SensorError, match="other processes took 23% of the CPU"):
        simulate(world)


@pytest.mark.parametrize("brief", [(155.0, 158.0), (160.2, 161.4)])
def test_a_process_that_holds_the_gpu_for_a_moment_of_a_run_is_found(brief):
    world = World()
    came, went = brief
    world.gpu_processes = lambda: 2 if came < world.time < went else 1
    with pytest.raises(SensorError, match=r"1 other process\(es\) hold the GPU"):
        simulate(world)


@pytest.mark.parametrize(("busy_from", "refused"), [(152.0, True), (None, False)])
def test_a_core_that_others_keep_busy_in_one_run_is_not_diluted_by_the_rest(
    monkeypatch, busy_from, refused
):
    """Stand-ins of psutil's counters: 16 cores, one of them another's for the pruned model's run.

    That is 6% of this run, and less than 3% of all that was before.
    """
    world = World()
    world.counts_cpu = True
    fields = type(psutil.cpu_times())._fields

    def cpu_times():
        busy = min(max(world.time - busy_from, 0.0), 15.5) if busy_from else 0.0
        total = 16 * (world.time - 100.0)
        found = {"user": busy, "idle": total - busy}
        return SimpleNamespace(**{name: found.get(name, 0.0) for name in fields})

    monkeypatch.setattr(load.psutil, "cpu_times", cpu_times)
    own = SimpleNamespace(cpu_times=lambda: SimpleNamespace(user=0.0, system=0.0))
    monkeypatch.setattr(load.psutil, "Process", lambda: own)
    if not refused:
        assert simulate(world)["pruned"].images > 0
        return
    with pytest.raises(SensorError, match="other processes took 6% of the CPU"):
        simulate(world)


def test_what_is_too_short_is_refused_and_zero_switches_it_off(tmp_path):
    runners = {"baseline": Model(World(), "dense", ms=1, watts=1.0)}
    images = np.random.default_rng(0).standard_normal((4, 3, 4, 4), dtype=np.float32)
    with pytest.raises(ConfigError, match="energy seconds is 10; a meter needs 30 s"):
        measure_energy(runners, images, batch_size=1, seconds=10, root=tmp_path)
    for wrong in (-1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="energy seconds is"):
            BenchConfig(energy_seconds=wrong)
    assert BenchConfig(energy_seconds=30).energy_seconds == 30.0
    found, why = measure_energy(runners, images, batch_size=1, seconds=0, root=tmp_path)
    assert (found, why) == (None, "switched off: energy_seconds is 0")


def test_a_machine_without_a_meter_says_so_at_once(tmp_path):
    runners = {"baseline": Model(World(), "dense", ms=1, watts=1.0)}
    images = np.random.default_rng(0).standard_normal((4, 3, 4, 4), dtype=np.float32)
    found, why = measure_energy(runners, images, batch_size=1, root=tmp_path)
    assert found is None
    assert "virtual machines have none" in why


@pytest.mark.usefixtures("patient")
def test_the_whole_way_on_a_jetsons_tree(monkeypatch, tmp_path):
    root = plant("orin_nx_nano", tmp_path)
    for name, seconds in (
        ("WARMUP_S", 0.02),
        ("SETTLE_S", 0.01),
        ("IDLE_S", 0.2),
        ("STEP_S", 0.05),
    ):
        monkeypatch.setattr(power, name, seconds)
    monkeypatch.setattr(power, "ENERGY_SECONDS", 0.4)
    # Whatever else runs here, and makes such short times inexact.
    monkeypatch.setattr(power, "OTHERS_AT_MOST", 1.0)
    monkeypatch.setattr(power, "DRIFT_AT_MOST", 10.0)

    def draw(milliamperes):
        # Over the old number: a file that is emptied first could be read while it is.
        with open(root / RAILS_NX / "curr1_input", "r+") as file:
            file.write(str(milliamperes))

    class Busy(Model):
        """Draws more current while it runs."""

        def _run_impl(self, images):
            draw(2600)
            time.sleep(0.02)
            draw(1600)
            return super()._run_impl(images)

    runners = {role: Busy(World(), role, ms=1, watts=0.0) for role in ("baseline", "pruned")}
    images = np.random.default_rng(0).standard_normal((4, 3, 4, 4), dtype=np.float32)
    found, why = measure_energy(runners, images, batch_size=2, root=root)
    assert why is None
    # 13 W in calls and 8 W between them and while idle: most of 5 W is added.
    assert found["pruned"].mean_watts == pytest.approx(12.5, rel=0.2)
    assert found["pruned"].idle_watts == pytest.approx(8.0, rel=0.2)
    assert found["pruned"].source.startswith("INA3221 VDD_IN (module)")


def test_a_benchmark_holds_telemetry_and_why_there_is_no_energy(tmp_path):
    path = tmp_path / "m.onnx"
    write_linear_model(path)
    config = BenchConfig(
        batch_sizes=(1,),
        min_runs=2,
        max_seconds=0.1,
        threads=1,
        throughput_seconds=0,
        energy_seconds=0,
    )
    images = np.random.default_rng(0).standard_normal((4, 3, 8, 8), dtype=np.float32)
    found = measure_pair("ort", path, path, images, config)
    assert found.energy is None
    assert found.why["energy"] == "switched off: energy_seconds is 0"
    assert found.telemetry is not None
    assert found.telemetry.samples >= 1
    assert found.telemetry.seconds > 0
    assert from_plain(BenchResult, to_plain(found), where="a test") == found
