"""Whether numbers of two reports are of the same thing, measured in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ampdeploy.report.conditions import protocol, timed_with
from ampdeploy.report.result import Dataset, Report, Timing

# What makes two measurements ones of the same machine; see `ampdeploy.bench.host`.
_MACHINE = (
    ("cpu", "CPU"),
    ("cores_usable", "usable cores"),
    ("gpus", "GPU or driver"),
    ("board", "board"),
    ("l4t", "Jetson Linux"),
)


def same_model(new: Report, old: Report) -> Iterator[str]:
    """Reasons why nothing of the two can be compared."""
    yield from _unequal("model", new.model, old.model)


def same_file(new: Report, old: Report) -> Iterator[str]:
    """Reasons why their files cannot be compared."""
    yield from same_model(new, old)
    yield from _unequal("target", new.target, old.target)


def same_work(new: Report, old: Report) -> Iterator[str]:
    """Reasons why one image is not the same work."""
    yield from same_model(new, old)
    yield from _unequal("image size", new.image_size, old.image_size)


def same_machine(new: Report, old: Report) -> Iterator[str]:
    """Reasons why what was measured on their machines cannot be compared."""
    yield from same_file(new, old)
    yield from _unequal("image size", new.image_size, old.image_size)
    yield from _unequal("threads", new.threads, old.threads)
    yield from _unequal("device", new.device, old.device)
    for key, what in _MACHINE:
        yield from _unequal(what, new.host.get(key), old.host.get(key))
    if new.host.get("cpu") is None and old.host.get("cpu") is None:
        yield "neither report says on which CPU it was measured"
    modes = [report.telemetry and report.telemetry.power_mode for report in (new, old)]
    if all(modes):  # one that is unknown is no sign of a change
        yield from _unequal("power mode", *modes)


def same_clock(new: Report, old: Report, timing: str, size: str) -> Iterator[str]:
    """Reasons why their times of a batch size cannot be compared.

    Args:
        new: A report.
        old: The other.
        timing: Field of `Report`: ``timing``, ``cuda_graph_timing`` or ``throughput_timing``.
        size: The batch size.
    """
    yield from same_machine(new, old)
    speed, before = timed_with(new), timed_with(old)
    for what in ("precision", "runtime"):
        if what in speed and what in before:
            yield from _unequal(what, speed[what], before[what])
    now, then = ((getattr(report, timing) or {}).get(size) for report in (new, old))
    if now is None or then is None:
        yield f"how batch {size} was timed is not in both reports"
    elif isinstance(now, Timing):
        yield from _unequal("clock", now.clock, then.clock)
    else:
        yield from _unequal("batches in flight", now.in_flight, then.in_flight)


def same_memory(new: Report, old: Report) -> Iterator[str]:
    """Reasons why their memory cannot be compared."""
    yield from same_machine(new, old)
    yield from _unequal(
        "batch size of memory", new.pruned.memory_batch_size, old.pruned.memory_batch_size
    )


def same_images(new: Report, old: Report) -> Iterator[str]:
    """Reasons why their fidelity cannot be compared."""
    yield from same_work(new, old)
    # Fidelity and accuracy are relative to the dense model, so that must be the same one.
    yield from _unequal_hash("weights", new.weights.sha256, old.weights.sha256)
    yield from _unequal("runtime that judged", new.judged_on, old.judged_on)
    yield from _same_dataset("evaluation images", new.data.eval, old.data.eval)


def same_task(new: Report, old: Report, metric: str) -> Iterator[str]:
    """Reasons why their accuracy in one metric cannot be compared."""
    yield from same_images(new, old)
    yield from _same_dataset("bank images", new.data.bank, old.data.bank)
    tasks = [(report.tasks or {}).get(metric) for report in (new, old)]
    yield from _unequal("protocol", *map(protocol, tasks))


def _same_dataset(what: str, new: Dataset | None, old: Dataset | None) -> Iterator[str]:
    hashes = [None if images is None else images.sha256 for images in (new, old)]
    yield from _unequal_hash(what, *hashes)


def _unequal_hash(what: str, new: str | None, old: str | None) -> Iterator[str]:
    # Twelve digits tell two apart; nobody reads sixty-four.
    yield from _unequal(f"{what} (sha256)", new and new[:12], old and old[:12])


def _unequal(what: str, new: Any, old: Any) -> Iterator[str]:
    if new != old:
        yield f"{what}: {_short(new)} now, {_short(old)} then"


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(f"{gpu['name']} (driver {gpu['driver']})" for gpu in value) or "none"
    return "unknown" if value is None else str(value)
