"""An installed engine: what `install.json` says of it, and how one takes the place of another.

Only renames inside one folder, in an order from which every interruption can be put right:

    start     out = old,  out.previous = older
    1         out = old,                         .out.older = older
    2                     out.previous = old,    .out.older = older
    3         out = new,  out.previous = old,    .out.older = older
    4         out = new,  out.previous = old

Between 2 and 3 there is no `out`; `recover`, which every installation begins with, goes back.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy.artifacts import explain_os_errors, read_json, sha256_file, write_json
from ampdeploy.config import ENGINE_TARGETS
from ampdeploy.device.bundle.contents import FileFacts
from ampdeploy.device.self_test import SelfTest
from ampdeploy.errors import AmpDeployError, ArtifactError
from ampdeploy.progress import log
from ampdeploy.report.codec import from_plain, to_plain

if TYPE_CHECKING:
    from ampdeploy.device.platform import DeviceFacts

INSTALL_SCHEMA_VERSION = 1
INSTALL_JSON = "install.json"


@dataclass(frozen=True, kw_only=True)
class Installation:
    """The content of `install.json`."""

    schema_version: int = INSTALL_SCHEMA_VERSION
    tool_version: str
    model: str
    image_size: int
    preprocessing: dict[str, Any]
    target: str
    precision: str
    artifact: str
    """The file that the target opens."""
    bundle_sha256: str
    """Of the `bundle.json` it comes from."""
    runtime: dict[str, str]
    """Name -> version of what runs it."""
    device: dict[str, Any]
    """The machine: `DeviceFacts`."""
    engine: dict[str, Any] | None
    """How the engine was built, known bugs avoided; None: the target runs the graph itself."""
    notes: tuple[str, ...]
    self_test: SelfTest | None
    untested: str | None
    """Why nothing could be tested here; None: it was."""
    comparison: dict[str, Any] | None
    why_no_comparison: str | None
    files: dict[str, FileFacts]


def write_installation(folder: Path, **facts: Any) -> Installation:
    """Write `install.json` for the files that are in `folder`."""
    files = {
        path.name: FileFacts(bytes=path.stat().st_size, sha256=sha256_file(path))
        for path in sorted(folder.iterdir())
        if path.name != INSTALL_JSON
    }
    installation = Installation(files=files, **facts)
    write_json(folder / INSTALL_JSON, to_plain(installation))
    return installation


def add_comparison(
    folder: Path,
    installation: Installation,
    *,
    comparison: dict[str, Any] | None,
    why_no_comparison: str | None,
    notes: Iterable[str] = (),
) -> Installation:
    """Write into `install.json` how the installed artifact compares with the unpruned model.

    Args:
        folder: The installation.
        installation: What `install.json` says so far.
        comparison: The result; None: there is none.
        why_no_comparison: Why not; None: there is one.
        notes: What to add to its notes.

    Returns:
        What it says now.
    """
    complete = replace(
        installation,
        comparison=comparison,
        why_no_comparison=why_no_comparison,
        notes=(*installation.notes, *notes),
    )
    write_json(folder / INSTALL_JSON, to_plain(complete))
    return complete


def read_installation(folder: Path) -> Installation:
    """What is installed in `folder`.

    Raises:
        ArtifactError: Nothing, or `install.json` is damaged or of a newer ampdeploy.
    """
    path = folder / INSTALL_JSON
    data = read_json(path)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != INSTALL_SCHEMA_VERSION:
        raise ArtifactError(
            f"{path} has schema version {version!r}; this ampdeploy reads "
            f"{INSTALL_SCHEMA_VERSION}. Use the version that installed it, or install it again."
        )
    return from_plain(Installation, data, where=str(path))


def check_installation(folder: Path, here: DeviceFacts) -> Installation:
    """Make sure that an installation is whole, and that its engine belongs to this machine.

    Raises:
        ArtifactError: A file is missing or changed, or the engine was built for another machine;
            every problem is named.
    """
    found = read_installation(folder)
    if found.target in ENGINE_TARGETS:
        from ampdeploy.device.engine.flavour import find_flavour
        from ampdeploy.device.engine.manifest import check_fits, read_manifest
        from ampdeploy.device.engine.refit import check_weights

        # What can be known without TensorRT comes first: it may not even be here.
        engine = read_manifest(folder / found.artifact)
        check_fits(engine, here, engine.tensorrt_version, found.target)
        check_weights(folder / found.artifact, engine)
        flavour = find_flavour(found.target, needed_by=f"the engine in {folder}")
        check_fits(engine, here, flavour.version, found.target)
    problems = []
    for name, facts in found.files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            problems.append(f"{name} is missing")
        elif path.stat().st_size != facts.bytes or sha256_file(path) != facts.sha256:
            problems.append(f"{name} was changed")
    if problems:
        raise ArtifactError(
            f"{folder} is not what was installed: {'; '.join(problems)}. Install it again from "
            "the bundle."
        )
    return found


def previous_of(out: Path) -> Path:
    """Where the installation goes that `out` replaces."""
    return out.with_name(f"{out.name}.previous")


def _older_of(out: Path) -> Path:
    return out.with_name(f".{out.name}.older")


def check_replaceable(out: Path) -> None:
    """Refuse to replace anything but an installation.

    Raises:
        AmpDeployError: Something else is at `out`, or at the place of its predecessor.
    """
    for path in (out, previous_of(out)):
        if not path.exists() and not path.is_symlink():
            continue
        empty = path.is_dir() and not any(path.iterdir())
        if path.is_symlink() or not (empty or (path / INSTALL_JSON).is_file()):
            raise AmpDeployError(
                f"{path} exists and is no installation of ampdeploy; nothing there was touched. "
                "Choose another --out."
            )


def recover(out: Path) -> None:
    """Put right what an installation that was killed left behind."""
    previous, older = previous_of(out), _older_of(out)
    with explain_os_errors(out):
        if not out.exists() and previous.exists():
            os.rename(previous, out)
            log.warning("an installation was interrupted: %s is what it was before", out)
        if not older.exists():
            return
        if previous.exists():
            shutil.rmtree(older)  # the new one was in place
        else:
            os.rename(older, previous)
        _sync(out.parent)


def put_in_place(new: Path, out: Path, here: DeviceFacts) -> None:
    """Let `new` become `out`; what was `out` becomes `out.previous`.

    Args:
        new: A complete installation in the same file system.
        out: Where it goes.
        here: Of the machine, for the last check.

    Raises:
        AmpDeployError: It could not, or what arrived is not whole; all is as it was before.
    """
    recover(out)
    check_replaceable(out)
    previous, older = previous_of(out), _older_of(out)
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.rename(source, target)
        moved.append((source, target))

    _sync(new)
    try:
        with explain_os_errors(out):
            if previous.exists():
                move(previous, older)
            if out.exists():
                move(out, previous)
            move(new, out)
            _sync(out.parent)
        check_installation(out, here)
    except BaseException:
        for source, target in reversed(moved):
            os.rename(target, source)
        log.warning("%s is what it was before", out)
        raise
    # The new one is in; what is left of the oldest goes now, or with the next installation.
    shutil.rmtree(older, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Ask the disk to keep the folder's entries, where it can be asked."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
