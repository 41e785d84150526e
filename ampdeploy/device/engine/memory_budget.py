"""How much memory TensorRT's builder may take. Left alone it takes what there is, and a board with
8 GB kills it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

_MIB = 1 << 20

# What is left to others: the desktop, other processes, and on a Jetson the operating system, which
# lives in the same memory and needs more of it.
DISCRETE_RESERVE = (0.10, 256 * _MIB)
INTEGRATED_RESERVE = (0.20, 512 * _MIB)
# The parsed network, the engine in the making and the serialised plan each hold the weights.
COPIES_OF_WEIGHTS = 3
# With less than this a kernel of a large model has nowhere to put its intermediate values.
SMALLEST_WORKSPACE = 64 * _MIB


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Limits for the builder's pools, bytes; None: TensorRT's default."""

    workspace_bytes: int | None
    """What one layer may use for intermediate values while it runs."""
    tactic_bytes: int | None
    """What trying out kernels may take in all; a power of two, or TensorRT does not take it. Where
    memory is shared with the host, it counts all that the builder holds (documentation of
    TACTIC_DRAM)."""
    reason: str
    """Where the limits come from, for the manifest."""
    warning: str | None = None


def memory_budget(here: DeviceFacts, *, limit_bytes: int | None, weight_bytes: int) -> MemoryBudget:
    """Bound the builder by what the user allows, else by what is free now.

    Args:
        here: This machine.
        limit_bytes: What the user allows in all; None: what is free, less a reserve for others.
        weight_bytes: Weights of the network, as typed.
    """
    free = here.memory_free_bytes if here.gpu is not None else None
    usable = None
    if free is not None:
        share, least = INTEGRATED_RESERVE if here.integrated else DISCRETE_RESERVE
        usable = free - max(int(free * share), least)
        known = f"{_mib(free)} of free {'shared' if here.integrated else 'GPU'} memory"
    else:
        known = "no GPU here" if here.gpu is None else "free memory unknown"
    bound = usable if limit_bytes is None else limit_bytes
    if bound is None:
        return MemoryBudget(
            workspace_bytes=None, tactic_bytes=None, reason=f"TensorRT's default: {known}"
        )
    weights = COPIES_OF_WEIGHTS * weight_bytes
    needed = weights + SMALLEST_WORKSPACE
    warning = None
    if bound < needed:
        warning = f"building takes about {_mib(needed)}, "
        if limit_bytes is None:
            warning += f"besides a reserve, of {known}: close other programs"
        else:
            warning += f"more than the {_mib(bound)} allowed: raise --memory-limit"
    elif usable is not None and usable < bound:
        warning = (
            f"the builder may take {_mib(bound)}, and besides a reserve that is more than the "
            f"{known}: close other programs, or lower --memory-limit"
        )
    return MemoryBudget(
        workspace_bytes=max((bound - weights) // 2, SMALLEST_WORKSPACE),
        tactic_bytes=None if here.gpu is None else _power_of_two(bound, at_least=needed),
        reason=f"from {known}" if limit_bytes is None else f"{_mib(bound)} as given; {known}",
        warning=warning,
    )


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"


def _power_of_two(limit: int, *, at_least: int) -> int:
    """The largest power of two within `limit`; above it only where `at_least` does not fit."""
    below = 1 << max(limit, 1).bit_length() - 1
    return below if below >= at_least else 1 << (at_least - 1).bit_length()
