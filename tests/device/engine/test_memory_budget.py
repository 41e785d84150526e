import dataclasses

import pytest

from ampdeploy.device.engine.memory_budget import SMALLEST_WORKSPACE, memory_budget
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
    assert (found.workspace_bytes, found.tactic_bytes) == ((GIB - 3 * WEIGHTS) // 2, None)
    assert found.reason == "1024 MiB as given; no GPU here"


def test_unknown_free_memory_is_said():
    found = budget(dataclasses.replace(ADA, memory_free_bytes=None))
    assert found.tactic_bytes is None
    assert "unknown" in found.reason
    limited = budget(dataclasses.replace(ADA, memory_free_bytes=None), limit=2 * GIB)
    assert limited.tactic_bytes == 2 * GIB
    assert limited.reason == "2048 MiB as given; free memory unknown"


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
    assert "building takes about 6208 MiB, besides a reserve, of 1024 MiB of free" in found.warning
    assert "--memory-limit" not in found.warning  # there is none that would help
    assert found.tactic_bytes >= 6 * GIB
    assert found.workspace_bytes == SMALLEST_WORKSPACE


@pytest.mark.parametrize("here", [ADA, ORIN])
@pytest.mark.parametrize("limit", [300 * MIB, 1 * GIB, 3 * GIB])
def test_a_given_limit_bounds_the_builder_in_all(here, limit):
    found = budget(here, limit=limit)
    free = budget(here)
    assert found.tactic_bytes <= limit
    assert found.tactic_bytes.bit_count() == 1
    assert SMALLEST_WORKSPACE <= found.workspace_bytes <= (limit - 3 * WEIGHTS) // 2
    assert found.workspace_bytes < free.workspace_bytes  # so lowering it helps
    assert found.reason.startswith(f"{limit // MIB} MiB as given; ")
    assert found.warning is None


def test_a_limit_above_what_is_free_is_taken_with_a_warning():
    found = budget(ADA, limit=30 * GIB)
    assert found.tactic_bytes == 16 * GIB
    assert "may take 30720 MiB" in found.warning
    assert "20480 MiB of free GPU memory" in found.warning


def test_a_limit_below_what_building_takes_says_how_much_that_is():
    found = budget(ADA, limit=100 * MIB)
    assert "building takes about 196 MiB, more than the 100 MiB allowed" in found.warning
    assert (found.workspace_bytes, found.tactic_bytes) == (SMALLEST_WORKSPACE, 256 * MIB)
