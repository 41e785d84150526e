"""Interleaving, proven by a runner that writes down every call; statistics on known samples."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest

from ampdeploy.bench import latency, turns
from ampdeploy.bench.intervals import (
    rates_over_loads,
    ratio_of_calls,
    ratio_over_loads,
    student_t,
)
from ampdeploy.bench.latency import (
    join_clocks,
    join_loads,
    make_batches,
    measure_interleaved,
    measure_load,
    ratio_of_medians,
    summarise,
)
from ampdeploy.bench.turns import windows_agree
from ampdeploy.errors import ConfigError, DataError
from ampdeploy.targets import base
from ampdeploy.targets.base import Runner

SIZE = 4


class RecordingRunner(Runner):
    """Writes (its name, which buffer) to a shared list."""

    def __init__(self, name: str, calls: list[tuple[str, int]]) -> None:
        super().__init__(name=name, image_size=SIZE, output_names=("features",))
        self._calls = calls

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self._calls.append((self.name, images.ctypes.data))
        return {"features": images.mean(axis=(2, 3))}

    def _close_impl(self) -> None:
        pass


def pictures(count: int) -> np.ndarray:
    rng = np.random.default_rng(1)
    return rng.standard_normal((count, 3, SIZE, SIZE), dtype=np.float32)


def measure(count: int, **options):
    calls: list[tuple[str, int]] = []
    runners = {name: RecordingRunner(name, calls) for name in ("baseline", "pruned")}
    options = {"batch_size": 2, "min_runs": 12, "max_seconds": 0.05, **options}
    return measure_interleaved(runners, pictures(count), **options), calls


@pytest.mark.parametrize("count", [2, 3, 4, 20])
def test_calls_interleave_and_alternate_and_rotate_buffers(count):
    result, calls = measure(count)
    both = [calls[i : i + 2] for i in range(0, len(calls), 2)]
    assert len(both) == result.timing.warmup_pairs + result.timing.pairs
    # However many pairs warm up, what is timed begins with the baseline.
    pairs = both[result.timing.warmup_pairs :]
    for index, ((first, buffer), (second, other_buffer)) in enumerate(pairs):
        assert buffer == other_buffer
        expected = ("baseline", "pruned") if index % 2 == 0 else ("pruned", "baseline")
        assert (first, second) == expected
    buffers = {buffer for _, buffer in calls}
    assert len(buffers) == result.timing.buffers == min(count, latency.BUFFERS)
    # No buffer is tied to one order: over full rounds, each is first with either model equally.
    cycle = pairs[: 2 * len(buffers) ** 2]
    if len(cycle) == 2 * len(buffers) ** 2:
        orders = collections.Counter((pair[0][1], pair[0][0]) for pair in cycle)
        assert set(orders.values()) == {len(buffers)}


def test_counts_follow_from_the_samples():
    result, _ = measure(6, batch_size=3)
    assert result.baseline.n == result.pruned.n == result.timing.pairs >= 12
    assert not result.timing.capped
    assert 0 < result.baseline.min <= result.baseline.p50 <= result.baseline.p90
    assert result.baseline.p90 <= result.baseline.max


class Clock:
    """Stands in for the `time` module: it moves only when a `CostlyRunner` runs."""

    def __init__(self) -> None:
        self.now_ns = 0

    def perf_counter_ns(self) -> int:
        return self.now_ns

    def perf_counter(self) -> float:
        return self.now_ns / 1e9


class CostlyRunner(Runner):
    """Takes `first_ms` on the clock, and `growth` times as long with every further call."""

    def __init__(self, clock: Clock, first_ms: float, growth: float = 1.0) -> None:
        super().__init__(name="costly", image_size=SIZE, output_names=("features",))
        self._clock = clock
        self._ms = first_ms
        self._growth = growth

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self._clock.now_ns += round(self._ms * 1e6)
        self._ms *= self._growth
        return {"features": images.mean(axis=(2, 3))}

    def _close_impl(self) -> None:
        pass


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    for module in (turns, base):
        monkeypatch.setattr(module, "time", made)
    return made


def test_known_costs_are_measured_exactly(clock):
    runners = {"baseline": CostlyRunner(clock, 40), "pruned": CostlyRunner(clock, 30)}
    result = measure_interleaved(runners, pictures(4), batch_size=2, min_runs=10, max_seconds=2.8)
    assert (result.baseline.p50, result.pruned.p50) == (40, 30)
    assert (result.ratio.value, result.ratio.ci95_low, result.ratio.ci95_high) == (0.75, 0.75, 0.75)
    # Three windows of three pairs of 70 ms settle; then 2.8 s hold 40 pairs.
    assert (result.timing.warmup_pairs, result.timing.warmup_stable) == (9, True)
    assert result.timing.warmup_seconds == pytest.approx(0.63)
    assert (result.timing.pairs, result.timing.capped) == (40, False)
    assert result.timing.seconds == pytest.approx(2.8)


class DeviceRunner(CostlyRunner):
    """Spends all but `copies_ms` of each call on the device, which has a clock of its own."""

    compute_clock = "the device's"

    def __init__(self, clock: Clock, first_ms: float, copies_ms: float) -> None:
        super().__init__(clock, first_ms)
        self._copies_ms = copies_ms
        self.asked: list[bool] = []

    def _run_impl(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.asked.append(self._timed)
        return super()._run_impl(images)

    def _compute_ms(self) -> float:
        self._clock.now_ns += 10**9  # reading the device's clock is no part of the call
        return self._ms - self._copies_ms


def test_both_clocks_are_read_in_the_same_calls(clock):
    runners = {"baseline": DeviceRunner(clock, 40, 10), "pruned": DeviceRunner(clock, 30, 15)}
    load = measure_load(runners, pictures(4), batch_size=2, min_runs=10, max_seconds=2)
    found = join_clocks([load])
    whole, compute = found.end_to_end, found.compute
    assert compute is not None
    assert (whole.baseline.p50, whole.pruned.p50) == (40, 30)
    assert (compute.baseline.p50, compute.pruned.p50) == (30, 15)
    assert (whole.ratio.value, compute.ratio.value) == (0.75, 0.5)
    assert compute.timing.pairs == whole.timing.pairs == whole.baseline.n == compute.pruned.n
    assert "end to end" in whole.timing.clock
    assert compute.timing.clock == "the device's"
    runner = runners["baseline"]
    assert all(runner.asked)
    runner.run(pictures(1))
    assert runner.asked[-1] is False  # nobody asked for the time of a plain run


def test_clocks_of_different_kinds_are_not_compared(clock):
    runners = {"baseline": DeviceRunner(clock, 40, 10), "pruned": CostlyRunner(clock, 30)}
    load = measure_load(runners, pictures(4), batch_size=2, min_runs=10, max_seconds=2)
    found = join_clocks([load])
    assert found.compute is None
    assert (found.end_to_end.baseline.p50, found.end_to_end.pruned.p50) == (40, 30)


def test_min_runs_are_made_beyond_max_seconds(clock):
    runners = {"baseline": CostlyRunner(clock, 40), "pruned": CostlyRunner(clock, 30)}
    result = measure_interleaved(runners, pictures(4), batch_size=2, min_runs=60, max_seconds=2.8)
    assert (result.timing.pairs, result.timing.capped) == (60, False)


def test_hard_cap_stops_models_that_are_too_slow_and_says_so(clock, caplog):
    runners = {"baseline": CostlyRunner(clock, 4000), "pruned": CostlyRunner(clock, 3000)}
    result = measure_interleaved(runners, pictures(4), batch_size=2, min_runs=30, max_seconds=2)
    assert not result.timing.warmup_stable
    assert result.timing.warmup_pairs == 1
    assert (result.timing.pairs, result.timing.capped) == (2, True)  # 14 s, over 6 * 2 s
    assert (result.ratio.value, result.ratio.ci95_low) == (0.75, None)
    said = " ".join(record.getMessage() for record in caplog.records)
    assert "stopped after 2 of 30 runs" in said
    assert "did not settle" in said


def test_latency_that_keeps_rising_does_not_count_as_warm(clock):
    rising = {
        "baseline": CostlyRunner(clock, 10, growth=1.01),
        "pruned": CostlyRunner(clock, 10),
    }
    result = measure_interleaved(rising, pictures(4), batch_size=1, min_runs=10, max_seconds=4)
    assert not result.timing.warmup_stable
    assert result.timing.warmup_seconds >= 2


def loads_of(ratios, *, jitter=0.0, pairs=20, seed=0):
    """Samples (pairs, 2) in ms of loads with these ratios of their own."""
    rng = np.random.default_rng(seed)
    return [np.exp(rng.normal(0, jitter, (pairs, 2))) * (10.0, 10.0 * ratio) for ratio in ratios]


def test_loads_are_joined_and_counted(clock):
    loads = []
    for first_ms in (40, 41, 42, 43):
        runners = {"baseline": CostlyRunner(clock, first_ms), "pruned": CostlyRunner(clock, 30)}
        loads.append(measure_load(runners, pictures(4), batch_size=2, min_runs=10, max_seconds=2))
    found = join_clocks(loads).end_to_end
    assert found.timing.loads == 4
    assert found.timing.pairs == found.baseline.n == sum(len(load.samples_ms) for load in loads)
    assert found.timing.warmup_pairs == 4 * 9
    assert found.timing.seconds == pytest.approx(sum(load.seconds for load in loads))
    assert (found.timing.warmup_stable, found.timing.capped) == (True, False)
    capped = [*loads, dataclasses.replace(loads[0], capped=True, warmup_stable=False)]
    timing = join_clocks(capped).end_to_end.timing
    assert (timing.warmup_stable, timing.capped) == (False, True)


def test_interval_over_loads_is_students_t_of_their_ratios():
    logs = np.log([0.79, 0.83, 0.80, 0.82, 0.81, 0.84, 0.80])  # what comes first is slower
    found = ratio_over_loads(loads_of(np.exp(logs)))
    # By least squares: a constant, and +-1 for who was opened first.
    design = np.array([[1.0, 1.0 - 2 * (i % 2)] for i in range(7)])
    fitted, (left,), _, _ = np.linalg.lstsq(design, logs, rcond=None)
    spread = np.sqrt(left / 5 * np.linalg.inv(design.T @ design)[0, 0])
    assert np.log(found.value) == pytest.approx(fitted[0])
    assert np.log(found.ci95_high / found.value) == pytest.approx(2.570582 * spread, rel=2e-3)
    assert np.log(found.ci95_low / found.value) == pytest.approx(-2.570582 * spread, rel=2e-3)


def test_who_was_opened_first_does_not_count():
    """3% for it, in five loads, which have one of the two more often."""
    ordered = np.exp(0.03 * np.array([1, -1, 1, -1, 1]))
    found = ratio_over_loads(loads_of(0.8 * ordered))
    assert (found.value, found.ci95_low, found.ci95_high) == pytest.approx((0.8, 0.8, 0.8))


@pytest.mark.parametrize(("count", "said"), [(1, "1 load of"), (4, "4 loads of")])
def test_few_loads_give_no_interval_but_a_reason(count, said):
    found = ratio_over_loads(loads_of([0.8] * count))
    assert (found.value, found.ci95_low, found.ci95_high) == (pytest.approx(0.8), None, None)
    assert said in found.why["ci95_low"]


def test_of_models_that_are_open_the_interval_is_about_this_load(clock):
    loads = loads_of([0.8], jitter=0.02, pairs=60)
    dense, slim = loads[0].T
    assert ratio_of_calls(loads) == ratio_of_medians(dense, slim)


def test_files_opened_anew_are_run_in_for_one_window(clock):
    runners = {"baseline": CostlyRunner(clock, 40), "pruned": CostlyRunner(clock, 30)}
    options = {"batch_size": 2, "min_runs": 5, "max_seconds": 0.7}
    load = measure_load(runners, pictures(4), reopened=True, **options)
    assert load.warmup_pairs == 8  # of 70 ms: the first to fill half a second
    assert load.warmup_seconds == pytest.approx(0.56)
    slow = {"baseline": CostlyRunner(clock, 4000), "pruned": CostlyRunner(clock, 3000)}
    assert measure_load(slow, pictures(4), reopened=True, **options).warmup_pairs == 3


def test_the_pruned_model_may_begin():
    calls: list[tuple[str, int]] = []
    runners = {name: RecordingRunner(name, calls) for name in ("baseline", "pruned")}
    load = measure_load(runners, pictures(4), batch_size=1, min_runs=5, max_seconds=0.01, first=1)
    timed_calls = calls[2 * load.warmup_pairs :]
    assert [name for name, _ in timed_calls[:4]] == ["pruned", "baseline", "baseline", "pruned"]


def test_what_a_load_does_to_all_its_calls_is_in_the_interval():
    """2% of each load's own, far more than the jitter of its calls shows."""
    covered = {"loads": 0, "calls": 0}
    for seed in range(200):
        own = np.exp(np.random.default_rng(1000 + seed).normal(0, 0.02, 6))
        loads = loads_of(own, jitter=0.01, seed=seed)
        for name, found in (
            ("loads", ratio_over_loads(loads)),
            ("calls", ratio_of_calls(loads)),
        ):
            covered[name] += found.ci95_low <= 1.0 <= found.ci95_high
    assert 181 <= covered["loads"] <= 198  # 190 expected, standard deviation 3.1
    assert covered["calls"] < 150


def test_rates_over_loads_are_compared_load_by_load():
    ratios = (1.24, 1.25, 1.26, 1.25, 1.25, 1.24)
    loads = [np.array([[100.0, ratio * 100]] * 2) for ratio in ratios]
    found = rates_over_loads(loads)
    logs = np.log(ratios)
    assert np.log(found.value) == pytest.approx(logs.mean())
    left = sum(np.sum((turn - turn.mean()) ** 2) for turn in (logs[::2], logs[1::2]))
    reach = 2.776445 * np.sqrt(left / 4 / 6)
    assert np.log(found.ci95_high / found.value) == pytest.approx(reach, rel=2e-3)
    few = rates_over_loads(loads[:3])
    assert few.ci95_low is None
    assert "3 loads" in few.why["ci95_low"]


def test_clocks_of_loads_are_kept_apart():
    loads = [
        latency.Load(
            samples_ms=np.full((6, 2, 2), [[4.0, 2.0], [3.0, 1.0]]),
            clocks=("outer", "inner"),
            buffers=2,
            warmup_pairs=3,
            warmup_seconds=0.1,
            warmup_stable=True,
            seconds=0.2,
            capped=False,
        )
    ] * 4
    outer, inner = join_loads(loads)
    assert (outer.ratio.value, inner.ratio.value) == (0.75, 0.5)
    assert (outer.timing.clock, inner.timing.clock) == ("outer", "inner")


def test_batches_are_distinct_real_and_contiguous():
    source = pictures(5)
    batches = make_batches(source, 3, np.random.default_rng(0))
    assert len({batch.tobytes() for batch in batches}) == len(batches) == latency.BUFFERS
    known = {image.tobytes() for image in source}
    for batch in batches:
        assert batch.flags.c_contiguous
        assert {image.tobytes() for image in batch} <= known


def test_batch_larger_than_the_image_set_repeats_images():
    batches = make_batches(pictures(3), 7, np.random.default_rng(0))
    assert [len(batch) for batch in batches] == [7, 7, 7]
    assert len({batch.tobytes() for batch in batches}) == 3


@pytest.mark.parametrize(
    ("source", "seen"),
    [(pictures(1), "at least 2"), (np.zeros((4, 3, SIZE, SIZE), np.float32), "constant")],
)
def test_images_that_would_flatter_are_refused(source, seen):
    with pytest.raises(DataError, match=seen):
        make_batches(source, 2, np.random.default_rng(0))


def test_two_models_are_needed():
    runner = RecordingRunner("baseline", [])
    with pytest.raises(ConfigError, match="baseline and pruned"):
        measure_interleaved({"baseline": runner}, pictures(2), batch_size=1)


def test_summary_of_known_samples():
    few = summarise(np.arange(1.0, 101.0))
    assert (few.p50, few.mean, few.min, few.max, few.n) == (50.5, 50.5, 1.0, 100.0, 100)
    assert few.p90 == pytest.approx(90.1)
    assert few.p99 is None
    assert "500" in few.why["p99"]
    many = summarise(np.arange(1.0, 1001.0))
    assert many.p99 == pytest.approx(990.01)
    assert many.why == {}


def test_ratio_of_constant_samples_is_exact():
    ratio = ratio_of_medians(np.full(40, 4.0), np.full(40, 3.0), rng=np.random.default_rng(0))
    assert (ratio.value, ratio.ci95_low, ratio.ci95_high) == (0.75, 0.75, 0.75)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    hits = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        ratio = ratio_of_medians(rng.normal(10, 1, 80), rng.normal(8, 1, 80), rng=rng)
        hits += ratio.ci95_low <= 0.8 <= ratio.ci95_high
    assert hits >= 33  # 38 expected; the seeds are fixed


def test_interval_is_the_same_for_the_same_seed():
    rng = np.random.default_rng(5)
    a, b = rng.normal(10, 1, 50), rng.normal(9, 1, 50)
    first, second = (ratio_of_medians(a, b, rng=np.random.default_rng(1)) for _ in range(2))
    assert first == second


def test_rates_cover_the_truth_as_often_as_they_say():
    hits = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        drift = rng.normal(0, 0.3, (6, 1))  # of the machine: it must cancel
        logs = drift + rng.normal(0, 0.02, (6, 2)) + [0.0, np.log(1.1)]
        ratio = rates_over_loads([np.exp(load[None]) for load in logs])
        hits += ratio.ci95_low <= 1.1 <= ratio.ci95_high
    assert 181 <= hits <= 198  # 190 expected, standard deviation 3.1


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(3, 3.182446), (7, 2.364624), (9, 2.262157), (30, 2.042272)]
)
def test_students_t(freedom, quantile):
    assert student_t(freedom) == pytest.approx(quantile, rel=2e-3)
    with pytest.raises(ValueError, match="2 degrees"):
        student_t(2)


def test_few_pairs_get_no_interval_but_a_reason():
    ratio = ratio_of_medians(np.full(4, 2.0), np.full(4, 1.0), rng=np.random.default_rng(0))
    assert (ratio.value, ratio.ci95_low) == (0.5, None)
    assert "4 pairs" in ratio.why["ci95_low"]


def test_windows_agree_only_when_three_do_for_both_models():
    near, far = np.array([10.0, 5.0]), np.array([10.0, 5.5])
    assert windows_agree([near, near, near])
    assert windows_agree([far, near, near, near])  # old windows do not matter
    assert not windows_agree([near, near])
    assert not windows_agree([near, near, far])
