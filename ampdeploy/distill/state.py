"""The trainer's state on disk, and what makes a resumed run equal to one never stopped.

The file holds tensors and plain containers only, so it loads with ``weights_only=True``.
"""

from __future__ import annotations

import random
import signal
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ampdeploy.artifacts import atomic_path
from ampdeploy.progress import log

STATE_VERSION = 1


def rng_state() -> dict[str, Any]:
    """The states of torch's, CUDA's, Python's and numpy's generators, as plain data."""
    numpy: Any = np.random.get_state(legacy=True)
    name, keys, position, has_gauss, cached = numpy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Put the generators back to where `rng_state` saw them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def seed_everything(seed: int) -> None:
    """Seed the four generators whose states are kept."""
    torch.manual_seed(seed)  # CUDA's as well
    random.seed(seed)
    np.random.seed(seed)


@dataclass(kw_only=True)
class TrainState:
    """How far a run has come. Epoch and place in the epoch follow from `step`."""

    step: int = 0
    """Finished optimizer steps."""
    seconds: float = 0.0
    """Time spent in them, over all the processes that took part."""
    history: list[dict[str, Any]] = field(default_factory=list)
    """One row per finished step."""
    rng: dict[str, Any] = field(default_factory=rng_state)
    """The generators at the end of the last finished step."""

    def finish_step(self, row: dict[str, Any], seconds: float) -> None:
        self.step += 1
        self.seconds += seconds
        self.history.append(row)
        self.rng = rng_state()


def save_state(
    path: Path,
    identity: str,
    state: TrainState,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write everything that the next step depends on, atomically.

    Raises:
        AmpDeployError: The folder cannot be written, or the disk is full.
    """
    content = {
        "version": STATE_VERSION,
        "identity": identity,
        **vars(state),
        "student": student.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with atomic_path(path) as temporary, open(temporary, "wb") as handle:
        try:
            torch.save(content, handle)
        except RuntimeError as error:
            # A write that failed (disk full) makes torch's archive writer fail once more, about
            # its own position; the first error is the one to report.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def load_state(
    path: Path, identity: str, student: nn.Module, optimizer: torch.optim.Optimizer
) -> TrainState | None:
    """Put `student` and `optimizer` where a stopped run left them.

    Args:
        path: What `save_state` wrote; it need not exist.
        identity: Of this run; a state with another one is left alone.
        student: Loaded in place.
        optimizer: Loaded in place.

    Returns:
        How far that run came, or None, with a line in the log, when there is nothing to resume.
    """
    if not path.exists():
        return None
    try:
        content = _read_checked(path)
    # A damaged file fails in the archive, the unpickler or the tensors, each with its own error,
    # and the cure is the same for all.
    except Exception as error:
        log.warning("  %s is damaged (%s); distillation starts over", path, error)
        return None
    if content.get("version") != STATE_VERSION or content.get("identity") != identity:
        log.info("  %s belongs to another run (options or inputs changed); not resumed", path)
        return None
    student.load_state_dict(content["student"])
    optimizer.load_state_dict(content["optimizer"])
    set_rng_state(content["rng"])
    return TrainState(**{key: content[key] for key in ("step", "seconds", "history", "rng")})


def _read_checked(path: Path) -> dict[str, Any]:
    # torch is built without the archive's CRC check on reading: it loads flipped bits happily. So
    # the file is read twice, which costs seconds, once, on a resume; weights that went bad
    # unnoticed would cost the run.
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise ValueError(f"wrong checksum of {broken}")
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict):
        raise ValueError(f"it holds a {type(content).__name__}, not a trainer state")
    return content


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the block ends.

    An interrupt between two parameters of one optimizer step would leave weights of no step at
    all, and the state saved on the way out would not be exact.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python delivers signals to the main thread only
        return
    held: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, frame: held.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if held:
            signal.raise_signal(signal.SIGINT)
