"""Which batch sizes are timed: an engine takes those that it was built for, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from ampdeploy.bench.run import measure_pair, sizes_to_time
from ampdeploy.config import BenchConfig
from ampdeploy.device.engine.manifest import ProfileFacts
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


def test_graphs_are_timed_at_what_was_asked_for(tmp_path):
    write_linear_model(tmp_path / "m.onnx")
    config = BenchConfig(batch_sizes=(1, 3), min_runs=2, max_seconds=0.1, threads=1)
    pair = (tmp_path / "m.onnx", tmp_path / "m.onnx")
    found = measure_pair("ort", *pair, np.ascontiguousarray(images(4)), config)
    assert set(found["latency"]) == {"1", "3"}
    assert found["not_timed"] == {}
    assert found["memory"]["pruned"]["batch_size"] == 3
