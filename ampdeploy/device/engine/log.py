"""TensorRT's log, so that an error can say what TensorRT itself said about it.

TensorRT reports a failure as None or False and writes the reason to its logger. It takes one logger
for the whole process: while any builder, runtime or refitter lives, another one is ignored (it says
so in a warning). So there is one here for each TensorRT module, and it is kept.
"""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

from ampdeploy.progress import log

# Enough to hold the story of one failure; a build can warn thousands of times.
KEPT_LINES = 200
SHOWN_ERRORS = 4
SHOWN_WARNINGS = 2
SHOWN_CHARACTERS = 400

_ERRORS = ("INTERNAL_ERROR", "ERROR")

# Name of the TensorRT module -> its logger.
_loggers: dict[str, Any] = {}


class TrtLogger(Protocol):
    """What `make_logger` returns, besides being TensorRT's ILogger."""

    def clear(self) -> None:
        """Forget what was said so far: what comes is about something else."""

    def errors(self) -> list[str]:
        """Errors since the last `clear`, oldest first."""

    def warnings(self) -> list[str]:
        """Warnings since the last `clear`, oldest first."""

    def explain(self) -> str:
        """The last errors, or else warnings, as a sentence for a message."""


def make_logger(trt: Any) -> Any:
    """The logger of this process for TensorRT's module `trt`, with nothing in it yet.

    Errors and warnings are kept for `explain`. They and TensorRT's information also go to
    ampdeploy's log at the level that ``-v`` shows; a failure is told in the exception.

    Args:
        trt: The imported module, ``tensorrt`` or ``tensorrt_rtx``.

    Returns:
        A `TrtLogger` that TensorRT takes as its ILogger.
    """
    name = trt.__name__
    if name not in _loggers:
        _loggers[name] = _logger_class(trt)()
    logger = _loggers[name]
    logger.clear()
    return logger


def _logger_class(trt: Any) -> type:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._lines: deque[tuple[str, str]] = deque(maxlen=KEPT_LINES)

        def log(self, severity: Any, message: str) -> None:
            # Called from C++, on any of its threads: an exception here would end the process.
            try:
                level = severity.name
                if level == "VERBOSE":
                    return
                text = " ".join(message.split())
                if level != "INFO":
                    self._lines.append((level, text))
                log.debug("TensorRT %s: %s", level.lower().replace("_", " "), text)
            except Exception:
                return

        def clear(self) -> None:
            self._lines.clear()

        def errors(self) -> list[str]:
            return [text for level, text in list(self._lines) if level in _ERRORS]

        def warnings(self) -> list[str]:
            return [text for level, text in list(self._lines) if level == "WARNING"]

        def explain(self) -> str:
            said = self.errors()[-SHOWN_ERRORS:] or self.warnings()[-SHOWN_WARNINGS:]
            if not said:
                return "TensorRT gave no reason."
            short = [
                text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS] + "..."
                for text in said
            ]
            return f"TensorRT said: {' | '.join(short)}".rstrip(".") + "."

    return Logger
