"""Run code as a user who may not enter a folder: root may enter any, so root steps down first."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

# After the imports, since the checkout may lie where nobody may read.
_STEP_DOWN = """
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""


@contextmanager
def open_folder() -> Iterator[Path]:
    """A temporary folder that every user may enter, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def run_locked_out(locked: Path, imports: str, code: str, arguments: Sequence[Path]) -> str:
    """What `code` prints, run where `locked` may not be entered.

    Args:
        locked: A folder of the current user.
        imports: Everything that `code` needs, beside `os`, `sys` and `Path`.
        code: Finds `arguments` in ``sys.argv[1:]``.
        arguments: Paths.
    """
    script = f"import os, sys\nfrom pathlib import Path\n{imports}\n{_STEP_DOWN}\n{code}"
    locked.chmod(0o700 if os.getuid() == 0 else 0)
    try:
        done = subprocess.run(
            [sys.executable, "-c", script, *map(str, arguments)], capture_output=True, text=True
        )
    finally:
        locked.chmod(0o700)  # so that it can be deleted
    assert done.returncode == 0, done.stderr
    return done.stdout
