"""Find the image files of a folder, the same ones in the same order on every machine."""

from __future__ import annotations

import hashlib
import os
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
        DataError: `root` is missing or not a folder, or a folder in it cannot be listed.
    """
    if not root.is_dir():
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
                if _is_folder(entry):
                    folders.append(name)
                elif os.path.splitext(entry.name)[1].lower() in IMAGE_SUFFIXES:
                    files.append(name)
    except OSError as error:
        # Its images would silently be missing from the sample, so this is not skipped.
        raise DataError(
            f"cannot list image folder {folder}: {error.strerror}. Make it readable, or give a "
            "folder without it."
        ) from error
    return files, folders


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symlink to itself; as a file it is skipped later, with its reason
        return False


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
