import dataclasses

import pytest

from ampdeploy.device.engine.flavour import find_flavour
from ampdeploy.device.engine.memory_budget import SMALLEST_WORKSPACE, memory_budget
from ampdeploy.device.engine.options import set_memory
from ampdeploy.errors import AmpDeployError, ConfigError
from tests.device.engine_samples import ADA, NO_GPU, ORIN

MIB = 1 << 20
GIB = 1 << 30
WEIGHTS = 44 * MIB
# An 8 GB Orin as its owner meets it, and DINOv2-g in FP16, whole and with 30% cut.
BOARD = dataclasses.replace(
    ORIN, memory_total_bytes=int(7.4 * GIB), memory_free_bytes=int(5.5 * GIB)
)
GIANT, CUT_GIANT = 2_270_000_000, 1_590_000_000


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


@pytest.mark.parametrize(
    ("here", "weights", "limit", "pool"),
    [
        *[(BOARD, WEIGHTS, limit, pool) for limit, pool in ((None, 4), (1, 1), (3, 2), (5, 4))],
        *[(BOARD, WEIGHTS, limit, 4) for limit in (7, 9, 64)],  # more than the machine has
        *[(BOARD, 750_000_000, limit, pool) for limit, pool in ((None, 4), (3, 2), (4, 4))],
        (BOARD, CUT_GIANT, 5, 4),
        *[(ORIN, WEIGHTS, limit, 4) for limit in (None, 8, 64)],
        *[(ADA, GIANT, limit, pool) for limit, pool in ((None, 16), (3, 2), (9, 8), (64, 16))],
    ],
)
def test_what_kernels_may_take_is_always_rounded_down(here, weights, limit, pool):
    found = budget(here, limit=limit and limit * GIB, weights=weights)
    assert found.tactic_bytes == pool * GIB
    assert SMALLEST_WORKSPACE <= found.workspace_bytes < found.tactic_bytes


def test_a_limit_that_is_no_power_of_two_is_rounded_down_and_that_is_said():
    found = budget(BOARD, limit=3 * GIB, weights=750_000_000)
    assert found.tactic_bytes == 2 * GIB
    assert "building takes about 2210 MiB, and of the 3072 MiB" in found.warning
    assert "held to 2048 MiB" in found.warning
    assert "raise --memory-limit to 4GB" in found.warning
    assert budget(BOARD, limit=4 * GIB, weights=750_000_000).warning is None


def test_where_no_limit_would_give_the_builder_more_none_is_advised():
    found = budget(BOARD, limit=5 * GIB, weights=CUT_GIANT)
    assert found.tactic_bytes == 4 * GIB
    assert "cut more parameters (--params-cut), or build on a machine with more" in found.warning
    assert "raise --memory-limit" not in found.warning


def refusal(kind, here, **options):
    with pytest.raises(kind) as raised:
        budget(here, **options)
    assert type(raised.value) is kind
    return str(raised.value)


def test_less_memory_than_building_takes_is_refused_with_both_numbers():
    said = refusal(AmpDeployError, BOARD, weights=CUT_GIANT)
    assert "takes about 4613 MiB, and the builder may have 4506 MiB of 5632 MiB of free" in said
    assert "let it have some of the reserve with --memory-limit 4614MB" in said
    assert budget(BOARD, limit=4614 * MIB, weights=CUT_GIANT).tactic_bytes == 4 * GIB
    said = refusal(AmpDeployError, BOARD, weights=GIANT)
    assert "Close other programs, or cut more parameters (--params-cut)." in said
    assert "--memory-limit" not in said  # there is none that would help
    said = refusal(AmpDeployError, ORIN, free=400 * MIB)
    assert "may have 0 MiB of 400 MiB" in said


def test_a_limit_below_what_building_takes_is_refused_with_both_numbers():
    said = refusal(ConfigError, BOARD, limit=2 * GIB, weights=CUT_GIANT)
    assert "takes about 4613 MiB, and --memory-limit allows 2048 MiB" in said
    assert "Raise --memory-limit to 4614MB." in said
    said = refusal(ConfigError, BOARD, limit=2 * GIB, weights=GIANT)
    assert "Close other programs and raise --memory-limit to 6559MB, or cut more" in said
    said = refusal(ConfigError, ADA, limit=100 * MIB)
    assert "takes about 108 MiB, and --memory-limit allows 100 MiB" in said
    assert "Raise --memory-limit to 128MB." in said
    assert budget(ADA, limit=128 * MIB).tactic_bytes == 128 * MIB
    said = refusal(ConfigError, NO_GPU, limit=100 * MIB)
    assert "takes about 196 MiB" in said
    assert "Raise --memory-limit to 196MB." in said


@pytest.mark.parametrize("limit", [None, 64 * GIB])
def test_a_model_too_large_for_the_machine_is_refused_whatever_is_allowed(limit):
    said = refusal(AmpDeployError, BOARD, limit=limit, weights=3 * GIB)
    assert "takes about 9280 MiB" in said
    assert ("this machine has 7578 MiB in all" in said) == (limit is not None)
    assert "build on a machine with more memory" in said
    assert "raise" not in said.lower()


def test_a_gpu_of_its_own_holds_the_weights_once():
    """In the host's memory there are three copies, but that is not what the GPU has little of."""
    small = dataclasses.replace(ADA, memory_total_bytes=6 * GIB, memory_free_bytes=2 * GIB)
    assert budget(small, weights=1 * GIB).tactic_bytes == 1 * GIB
    refusal(AmpDeployError, small, weights=2 * GIB)


def test_tensorrt_takes_what_is_chosen_and_nothing_between():
    """NVIDIA documents neither; TensorRT for RTX says so without a GPU."""
    flavour = find_flavour("trt-rtx", needed_by="a test")
    config = flavour.trt.Builder(flavour.trt.Logger()).create_builder_config()
    for limit in (65 * MIB, 300 * MIB, 3 * GIB, 20 * GIB):
        found = budget(ADA, limit=limit, weights=0)
        assert set_memory(flavour, config, found)["tactic_bytes"] == found.tactic_bytes
    for size in (3 * GIB, 2048):
        odd = dataclasses.replace(found, tactic_bytes=size)
        with pytest.raises(AmpDeployError, match="did not take TACTIC_DRAM"):
            set_memory(flavour, config, odd)


@pytest.mark.parametrize("here", [ADA, ORIN])
@pytest.mark.parametrize("limit", [300 * MIB, 1 * GIB, 3 * GIB])
def test_a_given_limit_bounds_the_builder_in_all(here, limit):
    found = budget(here, limit=limit)
    free = budget(here)
    assert found.tactic_bytes <= limit
    assert found.tactic_bytes.bit_count() == 1
    assert SMALLEST_WORKSPACE <= found.workspace_bytes < limit // 2
    assert found.workspace_bytes < free.workspace_bytes  # so lowering it helps
    assert found.reason.startswith(f"{limit // MIB} MiB as given; ")
    assert found.warning is None


def test_a_limit_above_what_is_free_is_taken_with_a_warning():
    found = budget(ADA, limit=30 * GIB)
    assert found.tactic_bytes == 16 * GIB
    assert "may take 24576 MiB" in found.warning
    assert "20480 MiB of free GPU memory" in found.warning
