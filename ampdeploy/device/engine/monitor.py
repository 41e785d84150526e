"""Progress of a TensorRT build, and Ctrl-C in the middle of one.

A build is minutes inside one call of C++, which calls back, to show progress and to write its log.
An exception in a callback ends the process, and Ctrl-C would raise one in the main thread. So long
calls run in a thread of their own: Ctrl-C reaches the thread that waits for it, and a build is told
to stop at its next step.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from ampdeploy.progress import Task, log, task

T = TypeVar("T")

PERCENT = 100
WAKE_UP_S = 0.5  # how often the waiting thread looks up; signals wake it at once


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class BuildProgress:
    """Nested phases as one number. Called from any of TensorRT's threads."""

    def __init__(self, shown: Task) -> None:
        """Show progress on `shown`, a task of 100 steps."""
        self._shown = shown
        self._phases: dict[str, _Phase] = {}
        self._lock = threading.Lock()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase begins, inside `parent` or by itself."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(steps, 1))
            self._shown.note(name)
        log.debug("TensorRT: %s, %d steps", name, steps)

    def step(self, name: str, step: int) -> None:
        """Step number `step` of a phase, from 0, is done."""
        with self._lock:
            phase = self._phases.get(name)
            if phase is None:
                return
            phase.done = step + 1
            percent = int(self._fraction(phase) * PERCENT)
            # What comes later can turn out larger than it looked: never go back.
            if percent > self._shown.done:
                self._shown.advance(percent - self._shown.done)

    def finish(self, name: str) -> None:
        """A phase is over, all of its steps done or not."""
        with self._lock:
            self._phases.pop(name, None)

    def _fraction(self, phase: _Phase) -> float:
        share = min(phase.done / phase.steps, 1.0)
        seen = 0
        while phase.parent in self._phases and seen < len(self._phases):
            phase = self._phases[phase.parent]
            share = min((phase.done + share) / phase.steps, 1.0)
            seen += 1  # names can repeat: no circle may hold us
        return share


def make_monitor(trt: Any, progress: BuildProgress, cancelled: threading.Event) -> Any:
    """An `IProgressMonitor` that shows `progress`, and stops the build once `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        # No exception may leave these: they are called from C++.
        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            with contextlib.suppress(Exception):
                progress.start(phase_name, parent_phase, num_steps)

        def phase_finish(self, phase_name: str) -> None:
            with contextlib.suppress(Exception):
                progress.finish(phase_name)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with contextlib.suppress(Exception):
                progress.step(phase_name, step)
            return not cancelled.is_set()

    return Monitor()


def run_monitored(
    call: Callable[[], T], *, trt: Any, builder_config: Any, has_monitor: bool, description: str
) -> T:
    """Run a build with progress shown, so that Ctrl-C stops it.

    Args:
        call: The build; runs in another thread.
        trt: The TensorRT module.
        builder_config: Where the monitor is registered.
        has_monitor: Whether this TensorRT has progress monitors.
        description: Of the progress bar.

    Returns:
        What `call` returns.

    Raises:
        KeyboardInterrupt: Ctrl-C; the build has been stopped.
    """
    cancelled = threading.Event()

    def cancel() -> None:
        cancelled.set()
        log.info("stopping TensorRT at its next step; Ctrl-C again to end at once")

    with task(description, PERCENT) as shown:
        if has_monitor:
            monitor = make_monitor(trt, BuildProgress(shown), cancelled)
            builder_config.progress_monitor = monitor
        return run_aside(call, on_interrupt=cancel)


def run_aside(call: Callable[[], T], *, on_interrupt: Callable[[], None] | None = None) -> T:
    """Run a call into TensorRT in a thread of its own, and wait for its end.

    Args:
        call: What to run; its exceptions are raised here.
        on_interrupt: Asks `call` to stop; called on Ctrl-C.

    Returns:
        What `call` returns.

    Raises:
        KeyboardInterrupt: Ctrl-C; `call` has ended, or this was the second one.
    """
    finished = threading.Event()
    results: list[T] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            results.append(call())
        except BaseException as error:
            failures.append(error)
        finally:
            finished.set()

    # A daemon: a second Ctrl-C ends the process without waiting for TensorRT.
    thread = threading.Thread(target=work, name="tensorrt", daemon=True)
    try:
        thread.start()  # inside: Ctrl-C can come while it waits for the thread to begin
        _wait(finished)
    except KeyboardInterrupt:
        if on_interrupt is not None:
            on_interrupt()
        if thread.ident is not None:
            _wait(finished)
        raise
    if failures:
        raise failures[0]
    return results[0]


def _wait(finished: threading.Event) -> None:
    # Not Thread.join: interrupted by Ctrl-C it takes the thread for ended, up to Python 3.12.
    while not finished.wait(WAKE_UP_S):
        pass
