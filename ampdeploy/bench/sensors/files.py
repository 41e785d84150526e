"""Numbers and words in the kernel's files. They are read, never written."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

_LONGEST = 64  # bytes of a number in sysfs, with room


class SensorError(Exception):
    """Why a sensor cannot be read or a measurement means nothing; becomes a ``why``."""


def words(path: Path) -> str | None:
    """The file's first line; None if it cannot be read or is empty."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return None
    lines = text.strip("\0\n ").splitlines()
    return lines[0].strip() if lines else None


def number(path: Path) -> float | None:
    """The number that the file holds; None if it cannot be read."""
    with contextlib.closing(NumberFile(path)) as file:
        return file.read()


def in_order(paths: list[Path]) -> list[Path]:
    """By name, numbers by value: cpu2 before cpu10."""
    return sorted(paths, key=lambda path: [_key(part) for part in re.split(r"(\d+)", str(path))])


def _key(part: str) -> tuple[int, int, str]:
    return (0, int(part), "") if part.isdigit() else (1, 0, part)


class NumberFile:
    """A file with one number, kept open: reading it again costs one system call.

    The kernel computes the content anew for each read from offset 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: int | None = os.open(path, os.O_RDONLY)
        except OSError:
            self._file = None

    def read(self) -> float | None:
        """The number now; None if there is none, as of a part that is switched off."""
        if self._file is None:
            return None
        try:
            return float(os.pread(self._file, _LONGEST, 0))
        except (OSError, ValueError):
            return None

    def close(self) -> None:
        """Closing twice is allowed."""
        if self._file is not None:
            file, self._file = self._file, None
            os.close(file)
