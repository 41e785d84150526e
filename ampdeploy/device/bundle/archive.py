"""A bundle as one tar file: written so that equal bundles are equal bytes, read with suspicion.

Not compressed: weights hardly shrink, and what an archive unpacks to is then no more than itself.
"""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from ampdeploy.artifacts import atomic_path, explain_os_errors
from ampdeploy.device.bundle.contents import HEAD, MAX_HEAD_BYTES, BundleManifest, parse_head
from ampdeploy.errors import AmpDeployError, ArtifactError

# The folder that `tar -xf` makes, whatever the archive is called.
PREFIX = "ampdeploy-bundle/"
SUFFIX = ".tar"

_CHUNK = 1 << 20
_AGAIN = "Copy it again, or pack it again with `ampdeploy bundle`."


def write_tar(folder: Path, path: Path) -> None:
    """Write the files of a sealed bundle to `path`, atomically; `bundle.json` comes first.

    Raises:
        AmpDeployError: The file cannot be written.
    """
    rest = sorted(entry.name for entry in folder.iterdir() if entry.name not in HEAD)
    names = (*HEAD, *rest)
    needed = sum((folder / name).stat().st_size for name in names)
    with (
        atomic_path(path, needed=needed) as temporary,
        tarfile.open(temporary, "w", format=tarfile.PAX_FORMAT) as archive,
    ):
        for name in names:
            member = tarfile.TarInfo(PREFIX + name)
            member.size = (folder / name).stat().st_size
            member.mode = 0o644
            with open(folder / name, "rb") as content:
                archive.addfile(member, content)


def read_head(path: Path) -> dict[str, bytes]:
    """`bundle.json` and its checksum from an archive: names and contents.

    Raises:
        ArtifactError: It is no archive of a bundle.
    """
    with _opened(path) as archive:
        return _head(archive, path)


def extract(path: Path, folder: Path) -> None:
    """Unpack an archive into `folder`, which must not exist yet, and does not after an error.

    Only plain files that `bundle.json` lists, each once and with the size it states, are ever
    written. Their content is not compared: see `contents.check_files`.

    Raises:
        ArtifactError: Something else is in the archive, or something is missing.
        AmpDeployError: No room, or the folder cannot be written.
    """
    with _opened(path) as archive:
        head = _head(archive, path)
        manifest = parse_head(head, where=path)
        _check_room(manifest, folder.parent)
        with explain_os_errors(folder):
            folder.mkdir()
        try:
            _extract(archive, head, manifest, path, folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _extract(
    archive: tarfile.TarFile,
    head: dict[str, bytes],
    manifest: BundleManifest,
    path: Path,
    folder: Path,
) -> None:
    """Write `head`, and the files that follow it in `archive`."""
    for name, content in head.items():
        with explain_os_errors(folder / name):
            (folder / name).write_bytes(content)
    missing = dict(manifest.files)
    while (member := archive.next()) is not None:
        name = _name(member, path)
        if name not in missing:
            what = "twice" if name in {*HEAD, *manifest.files} else "unlisted"
            raise ArtifactError(f"{path} holds {member.name!r} {what}. {_AGAIN}")
        stated = missing.pop(name).bytes
        if member.size != stated:
            raise ArtifactError(
                f"{path} holds {name} with {member.size} bytes, and bundle.json states "
                f"{stated}. {_AGAIN}"
            )
        _write(archive, member, folder / name, path)
    if missing:
        raise ArtifactError(
            f"{path} lacks {', '.join(missing)}: it was cut short, or something was removed. "
            f"{_AGAIN}"
        )


@contextmanager
def _opened(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        # "r:" takes no compression, so that nothing grows while it is read.
        with tarfile.open(path, "r:") as archive:
            yield archive
    except (tarfile.TarError, EOFError) as error:
        raise ArtifactError(
            f"{path} is no tar of a bundle, or is damaged: {error}. {_AGAIN}"
        ) from error
    except FileNotFoundError as error:
        raise ArtifactError(f"there is no file {path}. Check the path.") from error
    except ValueError as error:  # numbers in headers that make no sense
        raise ArtifactError(f"{path} is damaged: {error}. {_AGAIN}") from error


def _head(archive: tarfile.TarFile, path: Path) -> dict[str, bytes]:
    head = {}
    for wanted in HEAD:
        member = archive.next()
        if member is None or _name(member, path) != wanted:
            found = "nothing" if member is None else repr(member.name)
            raise ArtifactError(
                f"{path} holds {found} where a bundle has {wanted}: it is no bundle of ampdeploy, "
                "or it was packed by hand. Give one that `ampdeploy bundle` wrote, or the folder."
            )
        if member.size > MAX_HEAD_BYTES:
            raise ArtifactError(f"{path} holds {wanted} with {member.size} bytes, more than any.")
        content = archive.extractfile(member)
        assert content is not None  # it is a plain file
        head[wanted] = content.read()
        if len(head[wanted]) != member.size:
            raise ArtifactError(f"{path} ends within {wanted}: it was cut short. {_AGAIN}")
    return head


def _name(member: tarfile.TarInfo, path: Path) -> str:
    """The file's name in the bundle.

    Raises:
        ArtifactError: It is no plain file directly in the bundle's folder.
    """
    name = member.name.removeprefix(PREFIX)
    # A sparse file is a plain one to tarfile, and unpacks to more than is in the archive.
    if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.issparse():
        raise ArtifactError(
            f"{path} holds {member.name!r}, which is a link, folder, device or sparse file. A "
            f"bundle has plain files only; nothing more was unpacked. {_AGAIN}"
        )
    if not member.name.startswith(PREFIX) or "/" in name or "\\" in name or name in ("", ".", ".."):
        raise ArtifactError(
            f"{path} holds {member.name!r}, which would lie outside {PREFIX}. Nothing more was "
            f"unpacked. {_AGAIN}"
        )
    return name


def _check_room(manifest: BundleManifest, folder: Path) -> None:
    needed = sum(facts.bytes for facts in manifest.files.values())
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise AmpDeployError(
            f"the bundle unpacks to {needed / 1e6:.0f} MB, and {folder} has {free / 1e6:.0f} MB "
            "left. Free some space, or give a folder on another disk with --out."
        )


def _write(archive: tarfile.TarFile, member: tarfile.TarInfo, target: Path, path: Path) -> None:
    source = archive.extractfile(member)
    assert source is not None  # it is a plain file
    with explain_os_errors(target, needed=member.size), open(target, "xb") as out:
        left = _copy(source, out, member.size)
    if left:
        raise ArtifactError(
            f"{path} ends within {target.name}, {left} bytes early: it was cut short. {_AGAIN}"
        )


def _copy(source: IO[bytes], out: IO[bytes], size: int) -> int:
    """Copy at most `size` bytes; returns how many were not there."""
    left = size
    while left:
        chunk = source.read(min(left, _CHUNK))
        if not chunk:
            break
        out.write(chunk)
        left -= len(chunk)
    return left
