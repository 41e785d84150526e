"""Find the image files of a folder, the same ones in the same order on every machine."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from pathlib import Path

from ampdeploy.errors import DataError

IMAGE_SUFFIXES = frozenset(
    {
        ".apng",
        ".bmp",
        ".gif",
        ".jp2",
        ".jpeg",
        ".jpg",
        ".pgm",
        ".png",
        ".ppm",
        ".tif",
        ".tiff",
        ".webp",
    }
)


def find_images(root: Path) -> list[str]:
    """Files below `root` with an image suffix, as sorted posix paths relative to it.

    Suffixes are compared without case. Hidden files and folders are left out. Symlinks are
    followed, and a folder that can be reached twice (a loop) is entered once.

    Raises:
        DataError: `root` is missing or not a folder, or it or a folder in it cannot be read.
    """
    if not is_folder(root):
        problem = "is a file, not a folder" if root.exists() else "does not exist"
        raise DataError(f"image folder {root} {problem}. Give the path of a folder of images.")
    found: list[str] = []
    entered: set[tuple[int, int]] = set()
    pending = [""]
    while pending:
        relative = pending.pop()
        files, folders = _list_folder(root, relative, entered)
        found += files
        pending += sorted(folders, reverse=True)  # popped first to last
    return sorted(found)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; unlike `Path.is_dir` the same on every version of Python.

    Raises:
        DataError: Nobody can say, e.g. because a folder above it may not be entered.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL in the name
        return False
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(
        f"cannot read image folder {path}: {error.strerror}. Check the path, and that this user "
        "may read it and enter the folders above it."
    )


def _list_folder(
    root: Path, relative: str, entered: set[tuple[int, int]]
) -> tuple[list[str], list[str]]:
    """Image files and subfolders of one folder; nothing if it was entered before."""
    folder = root / relative
    files: list[str] = []
    folders: list[str] = []
    try:
        facts = folder.stat()
        if (facts.st_dev, facts.st_ino) in entered:
            return files, folders
        entered.add((facts.st_dev, facts.st_ino))
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                name = f"{relative}/{entry.name}" if relative else entry.name
                if _leads_to_folder(entry):
                    folders.append(name)
                elif _has_image_suffix(entry.name):
                    files.append(name)
    except OSError as error:
        # Its images would silently be missing from the sample, so this is not skipped.
        raise _unreadable(folder, error) from error
    return files, folders


def _leads_to_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError as error:
        # A symlink to itself, or to where this user may not look. One with an image's name counts
        # as a file, which is skipped later with its reason; any other could be a whole folder.
        if error.errno == errno.ELOOP or _has_image_suffix(entry.name):
            return False
        raise _unreadable(Path(entry.path), error) from error


def _has_image_suffix(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES


def sample_order(names: list[str], seed: int) -> list[str]:
    """`names` shuffled by `seed`.

    The order is that of a hash of seed and name, so it depends neither on the file system nor on
    the Python version, and adding a file leaves the others in their order.
    """

    def key(name: str) -> bytes:
        return hashlib.sha256(f"{seed}\0".encode() + os.fsencode(name)).digest()

    return sorted(names, key=key)


def folder_signature(root: Path) -> str:
    """SHA-256 over name, size and modification time of every image file below `root`.

    Cheap: no file is opened. Equal signatures mean that a rescan would find the same.

    Raises:
        DataError: As `find_images`.
    """
    digest = hashlib.sha256()
    for name in find_images(root):
        try:
            facts = os.stat(root / name)
            size, modified = facts.st_size, facts.st_mtime_ns
        except OSError:  # a broken symlink is part of the folder's state too
            size = modified = -1
        digest.update(os.fsencode(name) + f"\0{size}\0{modified}\n".encode())
    return digest.hexdigest()
