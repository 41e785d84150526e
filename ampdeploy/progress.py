"""Progress on stderr: a bar when it is a terminal, one plain line now and then when it is not."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

log = logging.getLogger("ampdeploy")

# One console for bars and lines, so that a line printed under a running bar does not tear it.
console = Console(stderr=True)

# Without a terminal, a line at most this often, so that a CI log shows life but stays readable.
PLAIN_LINE_EVERY_S = 15.0

T = TypeVar("T")


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        prefix = "" if record.levelno < logging.WARNING else f"{record.levelname.capitalize()}: "
        console.print(prefix + self.format(record), markup=False, highlight=False, soft_wrap=True)


def set_up_logging(level: int) -> None:
    """Send the ``ampdeploy`` logger to stderr. Called by the command line, never on import."""
    log.handlers[:] = [_ConsoleHandler()]
    log.setLevel(level)


class Task:
    """One bar: `advance()` as work is done, `note()` for a short text beside it."""

    def __init__(self, description: str, total: int) -> None:
        self.description = description
        self.total = total
        self.done = 0
        self.text = ""
        self._started = self._printed = time.monotonic()

    def advance(self, count: int = 1) -> None:
        self.done += count
        self._show()

    def note(self, text: str) -> None:
        self.text = text

    def _show(self) -> None:
        now = time.monotonic()
        if now - self._printed >= PLAIN_LINE_EVERY_S and self.done < self.total:
            self._printed = now
            left = (now - self._started) / max(self.done, 1) * (self.total - self.done)
            log.info(
                "  %s %d/%d, about %.0f s left %s",
                self.description,
                self.done,
                self.total,
                left,
                self.text,
            )


class _BarTask(Task):
    def __init__(self, description: str, total: int, bar: RichProgress) -> None:
        super().__init__(description, total)
        self._bar = bar
        self._id = bar.add_task(description, total=total, text="")

    def _show(self) -> None:
        self._bar.update(self._id, completed=self.done, text=self.text)


@contextmanager
def task(description: str, total: int) -> Iterator[Task]:
    """Show progress over `total` steps while the block runs.

    Quiet when the ``ampdeploy`` logger is above INFO (``-q``).
    """
    if not (sys.stderr.isatty() and log.isEnabledFor(logging.INFO)):
        yield Task(description, total)
        return
    bar = RichProgress(
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
        console=console,
        transient=True,
    )
    with bar:
        yield _BarTask(description, total, bar)


def track(items: Iterable[T], description: str, total: int) -> Iterator[T]:
    """Yield `items`, showing progress."""
    with task(description, total) as shown:
        for item in items:
            yield item
            shown.advance()
