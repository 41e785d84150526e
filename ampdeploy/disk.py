"""What there is room for, in words."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path


def megabytes(count: int) -> str:
    """A number of bytes as people read it."""
    if count < 10**5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e6:.1f} MB" if count < 10**7 else f"{count / 1e6:.0f} MB"


def free_near(path: Path) -> str:
    """``, 12 MB left`` on the disk of `path`; empty where the file system does not say."""
    for folder in path.absolute().parents:
        with contextlib.suppress(OSError):
            return f", {megabytes(shutil.disk_usage(folder).free)} left"
    return ""


def file_limit() -> str:
    """`` (the limit is 12 MB)``: what a file of this process may have; empty without a limit."""
    import resource

    limit, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return "" if limit == resource.RLIM_INFINITY else f" (the limit is {megabytes(limit)})"
