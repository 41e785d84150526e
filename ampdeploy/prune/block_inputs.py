"""Inputs of every block of the dense model, kept so that only a suffix has to run."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ampdeploy.models.device import free_memory
from ampdeploy.models.vision import BlockState, VisionModel
from ampdeploy.progress import log

# Share of the memory that is free when the search starts which cached block inputs may take.
CACHE_SHARE = 0.5


class BlockInputs:
    """Inputs of every block of the dense model, within a memory budget.

    All of them where they fit; otherwise every k-th, and the blocks between are run again when
    the search reaches them, which costs at most one more forward in all.
    """

    def __init__(
        self, model: VisionModel, batches: Iterable[Tensor], images: int, budget_bytes: int
    ) -> None:
        self.model = model
        self.block_forwards = 0
        depth = model.spec.depth
        self._stride = 0
        self._stored: dict[int, list[BlockState]] = {}
        self._segment: dict[int, list[BlockState]] = {}
        for batch in batches:
            state = model.stem(batch)
            if not self._stride:
                per_block = state.tokens[0].nbytes * images
                self._stride = _stride(depth, per_block, budget_bytes)
                self._stored = {index: [] for index in range(0, depth, self._stride)}
            last = max(self._stored)
            for index in range(last + 1):
                if index in self._stored:
                    self._stored[index].append(state)
                if index < last:
                    state = model.run_block(index, state)
            self.block_forwards += last

    def take(self, block: int) -> list[BlockState]:
        """The input of `block`, one state per micro-batch; call it from the last block to the
        first, with everything before `block` still dense."""
        start = block - block % self._stride
        if start == block:
            states = self._stored.pop(block)
            self._segment.clear()
            return states
        if block not in self._segment:
            self._segment = {index: [] for index in range(start + 1, block + 1)}
            for state in self._stored[start]:
                for index in range(start, block):
                    state = self.model.run_block(index, state)
                    self._segment[index + 1].append(state)
                self.block_forwards += block - start
        return self._segment.pop(block)


def _stride(depth: int, bytes_per_block: int, budget_bytes: int) -> int:
    for stride in range(1, depth + 1):
        if (-(-depth // stride) + stride - 1) * bytes_per_block <= budget_bytes:
            return stride
    best = min(range(1, depth + 1), key=lambda s: -(-depth // s) + s)
    log.warning(
        "block inputs of the calibration images need more memory than is free; "
        "going on with the smallest cache (fewer --calib-images would help)"
    )
    return best


def memory_budget(device: torch.device) -> int:
    """Bytes that cached block inputs may take on `device` at this moment."""
    return int(free_memory(device) * CACHE_SHARE)
