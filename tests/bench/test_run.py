"""All measurements of a pair; an engine is timed at the batch sizes that it was built for."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench import run
from ampdeploy.bench.result import BenchResult
from ampdeploy.bench.run import measure_pair, sizes_to_time
from ampdeploy.config import BenchConfig
from ampdeploy.device.engine.manifest import ProfileFacts
from ampdeploy.errors import AmpDeployError
from ampdeploy.report.codec import from_plain, to_plain
from ampdeploy.targets.ort import OrtTarget
from tests.targets.onnx_samples import images, write_linear_model
from tests.targets.test_tensorrt import write_engine


def write_pair(folder, *batches):
    paths = []
    for name, batch in zip(("baseline", "pruned"), batches, strict=True):
        (folder / name).mkdir()
        shapes = [(size, 3, 4, 4) for size in batch]
        profile = ProfileFacts(input="images", min=shapes[0], opt=shapes[1], max=shapes[2])
        paths.append(write_engine(folder / name, profiles=(profile,)))
    return paths


@pytest.mark.parametrize(
    ("batches", "asked", "timed", "left_out", "takes"),
    [
        (((1, 1, 8), (1, 1, 8)), (1, 8), (1, 8), [], ""),
        # As a known bug of TensorRT 10.3 makes it, with default options.
        (((1, 1, 1), (1, 1, 1)), (1, 8), (1,), ["8"], "1"),
        (((1, 1, 8), (2, 2, 4)), (1, 4, 8), (4,), ["1", "8"], "2 to 4"),
        (((4, 4, 4), (4, 4, 4)), (1, 8), (4,), ["1", "8"], "4"),
    ],
)
def test_engines_are_timed_at_what_they_take(tmp_path, batches, asked, timed, left_out, takes):
    sizes, why = sizes_to_time(asked, write_pair(tmp_path, *batches))
    assert sizes == timed
    assert list(why) == left_out
    assert set(why.values()) <= {f"the engine was built for batches of {takes}"}


def measure(folder, **changes):
    options = {"batch_sizes": (1, 3), "min_runs": 2, "max_seconds": 0.1, "loads": 2, "threads": 1}
    config = BenchConfig(**{**options, "throughput_seconds": 0.2, **changes})
    write_linear_model(folder / "m.onnx")
    pair = (folder / "m.onnx", folder / "m.onnx")
    return measure_pair("ort", *pair, np.ascontiguousarray(images(4)), config)


def test_every_clock_is_measured_at_every_size_that_was_asked_for(tmp_path):
    found = measure(tmp_path)
    assert found.not_timed == {}
    assert found.memory["pruned"].batch_size == 3
    for field in ("latency", "compute", "throughput"):
        assert list(getattr(found, field)) == ["1", "3"], field
    for size, whole in found.latency.items():
        compute = found.compute[size]
        assert compute.timing.pairs == whole.timing.pairs
        assert "session.run" in compute.timing.clock
        for role in ("baseline", "pruned"):
            inside, outside = getattr(compute, role), getattr(whole, role)
            # Of each call, so of every quantile of them.
            assert all(a < b for a, b in zip(inside.quantiles, outside.quantiles, strict=True))
    assert found.cuda_graph is None
    assert "target ort" in found.why["cuda_graph"]
    again = from_plain(BenchResult, to_plain(found), where="a test")
    assert again == found


class CountingTarget(OrtTarget):
    """Notes what it opens, and what is open at once."""

    def __init__(self):
        self.opened = []

    def open(self, artifact, *, threads=None):
        self.opened.append(artifact.name)
        return super().open(artifact, threads=threads)


def test_files_are_opened_anew_for_each_load_and_in_turns(tmp_path, monkeypatch):
    target = CountingTarget()
    monkeypatch.setattr(run, "get_target", lambda name: target)
    paths = [tmp_path / "baseline.onnx", tmp_path / "pruned.onnx"]
    for path in paths:
        write_linear_model(path)
    config = BenchConfig(
        batch_sizes=(1, 2), min_runs=7, max_seconds=0.5, loads=3, threads=1, throughput_seconds=0.5
    )
    found = measure_pair("ort", *paths, np.ascontiguousarray(images(4)), config)
    there, back = [path.name for path in paths], [path.name for path in reversed(paths)]
    assert target.opened == there + back + there
    for size in ("1", "2"):
        assert found.latency[size].timing.loads == found.compute[size].timing.loads == 3
        assert found.latency[size].timing.pairs >= 9  # 7 runs over 3 loads
        assert found.throughput[size].timing.loads == 3
        assert found.throughput[size].timing.windows >= 3
    assert found.telemetry.seconds > sum(row.timing.seconds for row in found.latency.values())


def test_files_that_are_too_slow_are_opened_less_often(tmp_path, monkeypatch, caplog):
    target = CountingTarget()
    monkeypatch.setattr(run, "get_target", lambda name: target)
    monkeypatch.setattr(run, "HARD_CAP_FACTOR", 0.0)
    monkeypatch.setattr(run, "OPENING_SECONDS", 0.01)  # which the first load has used up
    found = measure(tmp_path, batch_sizes=(1,), loads=8)
    assert len(target.opened) == 2
    timing = found.latency["1"].timing
    assert timing.loads == 1
    assert timing.capped
    assert found.throughput["1"].timing.loads == timing.loads
    ratio = found.latency["1"].ratio
    assert ratio.ci95_low is None
    assert "an interval needs 5" in ratio.why["ci95_low"]
    assert f"out of time after {timing.loads} of 8 loads" in caplog.text


def test_the_default_number_of_loads_gives_intervals_over_them(tmp_path):
    found = measure(tmp_path, loads=BenchConfig.loads, batch_sizes=(1,))
    assert found.latency["1"].timing.loads == BenchConfig.loads
    for row in (found.latency["1"], found.compute["1"], found.throughput["1"]):
        assert row.ratio.ci95_low < row.ratio.value < row.ratio.ci95_high


def test_energy_is_measured_of_open_runners_in_the_usual_order(tmp_path, monkeypatch):
    seen = {}

    def energy(pair, images, *, batch_size, seconds):
        seen["order"] = list(pair)
        seen["features"] = [runner.run(images[:1])["features"] for runner in pair.values()]
        return None, "no meter"

    monkeypatch.setattr(run, "measure_energy", energy)
    found = measure(tmp_path, loads=2, batch_sizes=(1,), throughput_seconds=0)
    assert seen["order"] == ["baseline", "pruned"]
    assert len(seen["features"]) == 2
    assert found.why["energy"] == "no meter"


def test_throughput_that_nobody_wants_is_null_with_the_reason(tmp_path):
    found = measure(tmp_path, throughput_seconds=0, batch_sizes=(1,))
    assert found.throughput is None
    assert "0 seconds" in found.why["throughput"]


class GraphTarget(OrtTarget):
    """Stands in for a target with CUDA graphs; one whose graph fails raises when opened."""

    def __init__(self, *, graph=False, fails=False):
        self._graph, self._fails = graph, fails

    def with_cuda_graph(self):
        return GraphTarget(graph=True, fails=self._fails)

    def _open_impl(self, artifact, *, threads):
        if self._graph and self._fails:
            raise AmpDeployError("an operator cannot be captured")
        return super()._open_impl(artifact, threads=threads)


@pytest.mark.parametrize("fails", [False, True])
def test_cuda_graphs_are_a_measurement_of_their_own(tmp_path, monkeypatch, fails):
    monkeypatch.setattr(run, "get_target", lambda name: GraphTarget(fails=fails))
    found = measure(tmp_path, batch_sizes=(1,))
    assert found.compute["1"].timing.clock.endswith("session.run")
    if fails:
        assert found.cuda_graph is None
        assert "an operator cannot be captured" in found.why["cuda_graph"]
        assert found.latency["1"].baseline.n >= 2
    else:
        graph = found.cuda_graph["1"]
        assert graph.timing.clock.endswith("session.run; launched as one CUDA graph")
        assert graph.baseline.n >= 2
