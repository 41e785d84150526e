"""Throughput: how many batches are in flight, whose turn it is, and what is counted."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from ampdeploy.bench.throughput import count_windows, join_windows
from ampdeploy.errors import AmpDeployError, ConfigError, DataError
from ampdeploy.targets.base import Runner, get_target
from tests.targets.onnx_samples import images, write_linear_model

SIZE = 8


class Device:
    """What the runners of both models run on: it notes who runs when, and how many at once."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.running: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.order: list[str] = []
        self.together = False
        self.closed = 0

    def enter(self, name: str) -> None:
        with self.lock:
            self.running[name] = self.running.get(name, 0) + 1
            self.most[name] = max(self.most.get(name, 0), self.running[name])
            self.together |= sum(count > 0 for count in self.running.values()) > 1
            if not self.order or self.order[-1] != name:
                self.order.append(name)

    def leave(self, name: str) -> None:
        with self.lock:
            self.running[name] -= 1


class WaitingRunner(Runner):
    """A model whose every call takes `seconds`, however many are under way."""

    def __init__(self, name: str, device: Device, seconds: float) -> None:
        super().__init__(name=name, image_size=SIZE, output_names=("features",))
        self._machine, self._seconds = device, seconds
        self.fails = False

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        assert not self._timed  # one runner's clock is for one thread
        if self.fails:
            raise AmpDeployError("out of memory")
        self._machine.enter(self.name)
        time.sleep(self._seconds)
        self._machine.leave(self.name)
        return {"features": images.mean(axis=(2, 3))}

    def _sibling_impl(self) -> WaitingRunner:
        return WaitingRunner(self.name, self._machine, self._seconds)

    def _close_impl(self) -> None:
        self._machine.closed += 1


def throughput(pair, pixels, **options):
    return join_windows([count_windows(pair, pixels, **options)])


def measure(device, *, in_flight, seconds=0.8, slow=0.01, batch_size=2):
    pair = {
        "baseline": WaitingRunner("baseline", device, slow),
        "pruned": WaitingRunner("pruned", device, slow / 2),
    }
    return throughput(pair, images(4), batch_size=batch_size, seconds=seconds, in_flight=in_flight)


@pytest.mark.parametrize("in_flight", [1, 3])
def test_models_take_turns_with_as_many_in_flight_as_asked(in_flight):
    device = Device()
    found = measure(device, in_flight=in_flight)
    assert device.most == {"baseline": in_flight, "pruned": in_flight}
    assert not device.together
    # Warm-up, then A B, B A, A B ...: neighbours in `order` are never the same model.
    windows = found.timing.windows
    assert len(device.order) == 2 + 2 * windows - (windows - 1)
    assert found.timing.in_flight == in_flight
    assert device.closed == 2 * (in_flight - 1)  # the siblings; the caller's own stay open


def test_what_is_counted_is_known():
    found = measure(Device(), in_flight=2)
    # Two at once, 2 images in 10 ms each: 400 images/s, less what sleeping too long takes.
    assert 200 < found.baseline < 400.1
    assert 400 < found.pruned < 800.1
    assert found.ratio.value == pytest.approx(found.pruned / found.baseline)
    assert 4 <= found.timing.windows <= 8
    assert found.timing.seconds < 0.9


def test_the_pruned_model_may_be_made_ready_and_begin_first():
    device = Device()
    pair = {
        "baseline": WaitingRunner("baseline", device, 0.01),
        "pruned": WaitingRunner("pruned", device, 0.005),
    }
    counted = count_windows(pair, images(4), batch_size=2, seconds=0.4, first=1)
    assert device.order[:4] == ["pruned", "baseline", "pruned", "baseline"]  # warm-up, first round
    assert (counted.rates[:, 1] > counted.rates[:, 0]).all()  # the columns are not by turns


def test_slow_models_get_one_round_and_no_interval():
    found = measure(Device(), in_flight=2, seconds=0.01, slow=0.05)
    assert found.timing.windows == 1
    assert found.timing.window_seconds > 0.03
    assert found.ratio.ci95_low is None
    assert "1 load of both files" in found.ratio.why["ci95_low"]


def test_what_fails_in_a_thread_is_the_error():
    device = Device()
    broken = WaitingRunner("pruned", device, 0.001)
    broken.fails = True
    pair = {"baseline": WaitingRunner("baseline", device, 0.001), "pruned": broken}
    with pytest.raises(AmpDeployError, match="out of memory"):
        throughput(pair, images(4), batch_size=1, seconds=0.1)


@pytest.mark.parametrize("wrong", [{"in_flight": 0}, {"seconds": 0}, {"batch_size": 0}])
def test_numbers_must_be_above_zero(wrong):
    with pytest.raises(ConfigError, match="above 0"):
        measure(Device(), **{"in_flight": 1, **wrong})


def test_both_models_and_real_images_are_needed():
    runner = WaitingRunner("baseline", Device(), 0.001)
    with pytest.raises(ConfigError, match="baseline and pruned"):
        throughput({"baseline": runner}, images(4), batch_size=1, seconds=1)
    with pytest.raises(DataError, match="at least 2"):
        throughput({"baseline": runner, "pruned": runner}, images(1), batch_size=1, seconds=1)


def test_a_real_session_is_shared_by_its_siblings(tmp_path):
    weight = write_linear_model(tmp_path / "m.onnx")
    with get_target("ort").open(tmp_path / "m.onnx", threads=1) as runner:
        found = throughput(
            {"baseline": runner, "pruned": runner}, images(4), batch_size=2, seconds=0.3
        )
        sibling = runner.sibling()
        sibling.close()
        x = images(2)
        np.testing.assert_allclose(
            runner.run(x)["features"], x.reshape(2, -1) @ weight, rtol=1e-4, atol=1e-4
        )
    assert found.baseline > 0
    assert found.timing.windows >= 4
