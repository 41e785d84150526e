"""Where a bundle goes: it is made beside that place, and then takes that of the one before.

Only renames inside one folder, in an order from which every interruption can be put right:

    start     out = old,  .out.PID.packing = new
    1                     .out.PID.packing = new,  .out.old = old
    2         out = new,                           .out.old = old
    3         out = new,  .out.PID.packing = old

Between 1 and 2 there is no `out`; `scratch`, which every packing begins with, goes back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil

from ampdeploy.artifacts import explain_os_errors
from ampdeploy.device.bundle import archive
from ampdeploy.device.bundle import contents as form
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.progress import log


def is_tar(out: Path) -> bool:
    """Whether `out` is to be one file."""
    return out.suffix == archive.SUFFIX


def check_replaceable(out: Path) -> None:
    """Refuse to overwrite anything but a bundle.

    Raises:
        AmpDeployError: Something else is there, or where the one before goes meanwhile.
    """
    for path in (out,) if is_tar(out) else (out, _old_of(out)):
        if path.exists() and not _is_bundle(path):
            raise AmpDeployError(
                f"the bundle needs the place of {path}, which exists and is no bundle; nothing "
                "there was touched. Choose another --out, or move that away."
            )


def _is_bundle(path: Path) -> bool:
    """Whether `path` is one, or an empty folder."""
    if is_tar(path):
        return path.is_file() and _is_bundle_tar(path)
    return path.is_dir() and ((path / form.BUNDLE_JSON).is_file() or _is_empty(path))


def _is_bundle_tar(path: Path) -> bool:
    try:
        archive.read_head(path)
    except ArtifactError:
        return False
    return True


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _old_of(out: Path) -> Path:
    """Where `out` is while the new one takes its place."""
    return out.with_name(f".{out.name}.old")


def _scratch_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.packing")


@contextlib.contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """An empty folder next to `out`, gone at the end. What killed processes left is put right."""
    folder = _scratch_of(out)
    with explain_os_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        for stale in out.parent.glob(f".{out.name}.*.packing"):
            pid = stale.name.split(".")[-2]
            # In a container, which starts anew, the dead may have had our own number.
            if stale == folder or (pid.isdigit() and not psutil.pid_exists(int(pid))):
                shutil.rmtree(stale, ignore_errors=True)
        _recover(out)
        folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _recover(out: Path) -> None:
    """Put right what a packing left that was killed between its renames."""
    old = _old_of(out)
    if is_tar(out) or not old.exists():
        return
    if not out.exists() or _is_empty(out):
        os.rename(old, out)
        log.warning("a packing was interrupted: %s is the bundle that it was before", out)
        return
    # The new one is in place. Under this name nobody takes what a kill leaves of it for a bundle.
    doomed = _scratch_of(out)
    os.rename(old, doomed)
    shutil.rmtree(doomed)


def put(folder: Path, out: Path) -> None:
    """Let the finished `folder`, a `scratch`, become `out`; what is there goes to `folder`."""
    old = _old_of(out)
    with explain_os_errors(out):
        if not out.exists():
            os.rename(folder, out)
            return
        try:
            os.rename(out, old)
            os.rename(folder, out)
        except BaseException:
            if old.exists() and not out.exists():
                os.rename(old, out)
            raise
        os.rename(old, folder)
