import dataclasses

import pytest

from ampdeploy.device.memory_budget import SMALLEST_WORKSPACE, memory_budget
from tests.device.engine_samples import ADA, NO_GPU, ORIN

MIB = 1 << 20
GIB = 1 << 30
WEIGHTS = 44 * MIB


def budget(here, *, limit=None, weights=WEIGHTS, free=None):
    if free is not None:
        here = dataclasses.replace(here, memory_free_bytes=free)
    return memory_budget(here, limit_bytes=limit, weight_bytes=weights)


def test_without_a_gpu_tensorrt_decides_and_that_is_said():
    found = budget(NO_GPU)
    assert (found.workspace_bytes, found.tactic_bytes) == (None, None)
    assert found.reason == "TensorRT's default: no GPU here"
    found = budget(NO_GPU, limit=GIB)
    assert (found.workspace_bytes, found.tactic_bytes) == (GIB, None)


def test_unknown_free_memory_is_said():
    found = budget(dataclasses.replace(ADA, memory_free_bytes=None))
    assert found.tactic_bytes is None
    assert "unknown" in found.reason


@pytest.mark.parametrize("free", [1 * GIB, 2 * GIB, 3 * GIB, 5 * GIB, 7 * GIB])
def test_a_small_board_keeps_a_reserve(free):
    found = budget(ORIN, free=free)
    assert found.tactic_bytes <= free - 512 * MIB
    assert found.tactic_bytes.bit_count() == 1
    assert SMALLEST_WORKSPACE <= found.workspace_bytes < free // 2
    assert found.warning is None
    assert "shared" in found.reason


def test_too_little_memory_is_a_warning_with_both_numbers():
    found = budget(ORIN, free=1 * GIB, weights=2 * GIB)
    assert "1074 MB of shared memory are free, and building takes about 6510 MB" in found.warning
    assert found.tactic_bytes >= 6 * GIB
    assert found.workspace_bytes == SMALLEST_WORKSPACE


def test_a_given_limit_is_the_workspaces():
    found = budget(ADA, limit=300 * MIB)
    assert found.workspace_bytes == 300 * MIB
    assert found.tactic_bytes == 16 * GIB
    assert found.reason.startswith("workspace as given")
    assert found.warning is None
    assert "GPU memory are free" in budget(ADA, limit=30 * GIB).warning
