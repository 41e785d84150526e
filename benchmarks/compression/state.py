"""Finished rows on disk: a stopped comparison goes on where it was."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ampdeploy.artifacts import prepare_folder, read_json, write_json


class Rows:
    """One file per row, under the row's name; of another comparison, a row is as good as absent."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "rows"
        prepare_folder(self._folder)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def find(self, name: str, identity: str) -> dict[str, Any] | None:
        """The row, if it was finished for the same images, model and options."""
        path = self._path(name)
        if not path.exists():
            return None
        stored = read_json(path)
        row: dict[str, Any] | None = stored["row"] if stored["identity"] == identity else None
        return row

    def put(self, name: str, identity: str, row: dict[str, Any]) -> None:
        """Store a finished row atomically."""
        write_json(self._path(name), {"identity": identity, "row": row})

    def forget(self, methods: list[str]) -> None:
        """Delete the rows of these methods."""
        for path in self._folder.glob("*.json"):
            if path.stem.rsplit("-", 2)[0] in methods:
                path.unlink()
