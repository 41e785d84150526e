"""How much memory TensorRT's builder may take. Left alone it takes what there is, and a board with
8 GB kills it.

Run here: TensorRT for RTX takes and refuses these limits as described, without a GPU. That a build
keeps to them has not been seen: it needs a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ampdeploy.errors import AmpDeployError, ConfigError

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

_MIB = 1 << 20

# What is left to others: the desktop, other processes, and on a Jetson the operating system, which
# lives in the same memory and needs more of it.
DISCRETE_RESERVE = (0.10, 256 * _MIB)
INTEGRATED_RESERVE = (0.20, 512 * _MIB)
# In the host's memory the parsed network, the engine in the making and the serialised plan each
# hold the weights; NVIDIA counts two copies at least ("The Build Phase" in
# https://docs.nvidia.com/deeplearning/tensorrt/latest/architecture/how-trt-works.html). A GPU with
# memory of its own holds the weights of the kernels being timed, and then the engine: once.
COPIES_ON_HOST = 3
COPIES_ON_GPU = 1
# With less than this a kernel of a large model has nowhere to put its intermediate values.
SMALLEST_WORKSPACE = 64 * _MIB
# TensorRT's own limit for TACTIC_DRAM, as a share of all memory; more may be refused.
INTEGRATED_SHARE = 0.75


@dataclass(frozen=True, kw_only=True)
class MemoryBudget:
    """Limits for the builder's pools, bytes; None: TensorRT's default."""

    workspace_bytes: int | None
    """What one layer may use for intermediate values while it runs."""
    tactic_bytes: int | None
    """What trying out kernels may take in all; a power of two of at least 4 KiB, or TensorRT does
    not take it (not documented; what TensorRT for RTX 1.7.1 checks). Where memory is shared with
    the host, it counts all that the builder holds (documentation of TACTIC_DRAM)."""
    reason: str
    """Where the limits come from, for the manifest."""
    warning: str | None = None


def memory_budget(here: DeviceFacts, *, limit_bytes: int | None, weight_bytes: int) -> MemoryBudget:
    """Bound the builder by what the user allows, else by what is free now.

    Args:
        here: This machine.
        limit_bytes: What the user allows in all; None: what is free, less a reserve for others.
        weight_bytes: Weights of the network, as typed.

    Raises:
        ConfigError: Building takes more than `limit_bytes`.
        AmpDeployError: Building takes more than what is free, or than this machine has.
    """
    free = here.memory_free_bytes if here.gpu is not None else None
    total = here.memory_total_bytes if here.gpu is not None else None
    usable = None
    if free is not None:
        share, least = INTEGRATED_RESERVE if here.integrated else DISCRETE_RESERVE
        usable = max(0, free - max(int(free * share), least))
        known = f"{_mib(free)} of free {'shared' if here.integrated else 'GPU'} memory"
    else:
        known = "no GPU here" if here.gpu is None else "free memory unknown"
    bound = usable if limit_bytes is None else min(limit_bytes, total or limit_bytes)
    if bound is None:
        return MemoryBudget(
            workspace_bytes=None, tactic_bytes=None, reason=f"TensorRT's default: {known}"
        )
    on_host = here.gpu is None or here.integrated
    weights = (COPIES_ON_HOST if on_host else COPIES_ON_GPU) * weight_bytes
    needed = weights + SMALLEST_WORKSPACE
    if bound < needed:
        raise _too_little(here, needed=needed, limit_bytes=limit_bytes, bound=bound, known=known)
    pool = None
    warnings = []
    if here.gpu is not None:
        pool = _power_of_two(min(bound, _most(here) or bound))
        if pool < needed:
            warnings.append(
                f"building takes about {_mib(needed)}, and of the {_mib(bound)} that the builder "
                f"may take TensorRT is held to {_mib(pool)}, the next lower power of two; if it "
                f"fails, {_how_to_get(here, needed, limit_bytes, bound)}"
            )
    if usable is not None and usable < bound:
        warnings.append(
            f"the builder may take {_mib(bound)}, and besides a reserve that is more than the "
            f"{known}: close other programs, or lower --memory-limit"
        )
    return MemoryBudget(
        workspace_bytes=max((bound - weights) // 2, SMALLEST_WORKSPACE),
        tactic_bytes=pool,
        reason=f"from {known}" if limit_bytes is None else f"{_mib(limit_bytes)} as given; {known}",
        warning="; ".join(warnings) or None,
    )


def _too_little(
    here: DeviceFacts, *, needed: int, limit_bytes: int | None, bound: int, known: str
) -> AmpDeployError:
    takes = f"building this engine takes about {_mib(needed)}"
    advice = _how_to_get(here, needed, limit_bytes, bound)
    advice = f"{advice[0].upper()}{advice[1:]}."
    if limit_bytes is None:
        return AmpDeployError(
            f"{takes}, and the builder may have {_mib(bound)} of {known}; the rest is left to "
            f"others. {advice}"
        )
    if limit_bytes < needed:
        return ConfigError(f"{takes}, and --memory-limit allows {_mib(limit_bytes)}. {advice}")
    return AmpDeployError(f"{takes}, and this machine has {_mib(bound)} in all. {advice}")


def _how_to_get(here: DeviceFacts, needed: int, limit_bytes: int | None, bound: int) -> str:
    """What to do for the builder to get `needed` bytes instead of what `bound` gives it."""
    smaller = "cut more parameters (--params-cut)"
    enough = needed
    if here.gpu is not None:
        above = 1 << (needed - 1).bit_length()
        most = _most(here)
        if most is None or above <= most:
            enough = above
        total = here.memory_total_bytes
        if enough <= bound or (total is not None and total < needed):
            return f"{smaller}, or build on a machine with more memory"
    free = here.memory_free_bytes if here.gpu is not None else enough
    crowded = free is not None and free < enough
    if limit_bytes is not None:
        raised = f"raise --memory-limit to {_amount(enough)}"
        return f"close other programs and {raised}, or {smaller}" if crowded else raised
    if crowded:
        return f"close other programs, or {smaller}"
    return (
        "close other programs, or let it have some of the reserve with --memory-limit "
        f"{_amount(enough)}"
    )


def _most(here: DeviceFacts) -> int | None:
    """The most that TACTIC_DRAM can be here, bytes; None: unknown."""
    total = here.memory_total_bytes
    if total is None or not here.integrated:
        return total
    return int(total * INTEGRATED_SHARE)


def _mib(size: int) -> str:
    return f"{size / _MIB:.0f} MiB"


def _amount(size: int) -> str:
    """As --memory-limit takes it, rounded up."""
    mib = -(-size // _MIB)
    return f"{mib}MB" if mib % 1024 else f"{mib // 1024}GB"


def _power_of_two(limit: int) -> int:
    """The largest power of two within `limit`, which is at least 1."""
    return 1 << limit.bit_length() - 1
