"""Labels of ImageNet's flat val folder, from the files that come with it.

Known files, the first that is there is taken:

- ``LOC_val_solution.csv`` (Kaggle): ``ILSVRC2012_val_00000001,n01751748 111 108 370 297 ...``.
- ``val_map.txt`` (Swin Transformer's layout and others): an image name and its class on each line,
  the class a folder name, or its position among the sorted folder names, from 0.
- ``ILSVRC2012_validation_ground_truth.txt`` (the development kit's ``data`` folder): a class id on
  each line for the images in the order of their names, which ``meta.mat`` beside it turns into
  folder names; read as torchvision's `ImageNet` does.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ampdeploy.errors import DataError
from ampdeploy.optional import require

KAGGLE = "LOC_val_solution.csv"
VAL_MAP = "val_map.txt"
GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"
META = "meta.mat"
DEVKIT = "ILSVRC2012_devkit_t12"
# How the development kit numbers the images: 1 for the first line of the ground truth.
IMAGE_NAME = "ILSVRC2012_val_{:08d}"

# Kaggle's archive keeps the images this far below the csv file.
_KAGGLE_IMAGES = ("ILSVRC", "Data", "CLS-LOC")


@dataclass(frozen=True, kw_only=True)
class LabelFile:
    """Labels by image name."""

    path: Path
    labels: Mapping[str, str]
    """File name without its suffix -> label."""

    def label_of(self, relative: str) -> str:
        """The label of an image that `check` has seen."""
        return self.labels[PurePosixPath(relative).stem]

    def check(self, names: Sequence[str]) -> None:
        """Make sure that every image has a label.

        Raises:
            DataError: One has none.
        """
        missing = [name for name in names if PurePosixPath(name).stem not in self.labels]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(names)} images are not in {self.path}, e.g. {missing[0]}. "
                "Is it the label file of these images? Remove it to judge without labels."
            )


def label_files(root: Path) -> list[Path]:
    """The label files that belong to the images in `root`, what is preferred first."""
    places = [root / KAGGLE]
    if root.parts[-len(_KAGGLE_IMAGES) :] == _KAGGLE_IMAGES:
        places.append(root.parents[len(_KAGGLE_IMAGES) - 1] / KAGGLE)
    places += [root / VAL_MAP, root / "val" / VAL_MAP]
    folders = (root, root / "data", root / DEVKIT / "data", root / "devkit" / "data")
    places += [folder / GROUND_TRUTH for folder in folders]
    # Not Path.is_file, which raises where a folder above may not be entered.
    return [path for path in places if os.path.isfile(path)]


def find_label_file(root: Path, *, classes: Sequence[str] | None) -> LabelFile | None:
    """The labels of flat images in `root` or its ``val`` folder; None: no file says them.

    Args:
        root: The folder that the user named.
        classes: Names of the class folders in train, sorted; None: there is no train.

    Raises:
        DataError: A file is there and cannot be understood.
        MissingDependencyError: meta.mat is there and scipy is not.
    """
    found = next(iter(label_files(root)), None)
    if found is None:
        return None
    read = {KAGGLE: _read_kaggle, VAL_MAP: _read_val_map, GROUND_TRUTH: _read_ground_truth}
    try:
        labels = read[found.name](found, classes)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(
            f"label file {found} cannot be read: {error}. Repair it, or remove it to judge without "
            "labels."
        ) from error
    return LabelFile(path=found, labels=labels)


def _read_kaggle(path: Path, classes: Sequence[str] | None) -> dict[str, str]:
    with open(path, encoding="utf-8", newline="") as handle:
        rows = csv.DictReader(handle)
        if not {"ImageId", "PredictionString"} <= set(rows.fieldnames or ()):
            raise _not_understood(path, 1, "its columns are not ImageId,PredictionString")
        labels = {}
        for row in rows:
            boxes = (row["PredictionString"] or "").split()
            if not boxes:
                raise _not_understood(path, rows.line_num, "it names no class")
            labels[row["ImageId"]] = boxes[0]
    return _checked(path, labels, classes)


def _read_val_map(path: Path, classes: Sequence[str] | None) -> dict[str, str]:
    pairs = []
    for number, line in enumerate(_lines(path), 1):
        parts = line.split()
        if len(parts) != 2:
            raise _not_understood(path, number, "it is not an image name and a class")
        pairs.append((PurePosixPath(parts[0]).stem, parts[1]))
    if all(label.isdecimal() for _, label in pairs):
        return {name: _name_of(path, int(label), classes) for name, label in pairs}
    return _checked(path, dict(pairs), classes)


def _name_of(path: Path, position: int, classes: Sequence[str] | None) -> str:
    if classes is None:
        return f"{position:04d}"  # sorted by name, these are in the order of their positions
    if position >= len(classes):
        raise DataError(
            f"label file {path} has class {position}, counted from 0, and there are {len(classes)} "
            "class folders in train. Use all of train, or class names instead of positions."
        )
    return classes[position]


def _read_ground_truth(path: Path, classes: Sequence[str] | None) -> dict[str, str]:
    meta = path.with_name(META)
    if not meta.is_file():
        raise DataError(
            f"label file {path} numbers its classes, and {meta}, which says which number is which "
            "class, is not there. Put the development kit's meta.mat beside it."
        )
    names = _read_meta(meta)
    labels = {}
    for number, line in enumerate(_lines(path), 1):
        if not line.isdecimal() or int(line) not in names:
            raise _not_understood(path, number, f"{line!r} is no class id of {META}")
        labels[IMAGE_NAME.format(number)] = names[int(line)]
    return _checked(path, labels, classes)


def _read_meta(path: Path) -> dict[int, str]:
    """Class id -> folder name, of the classes that images have: those without children."""
    io = require("scipy.io", needed_by=f"reading {path.name}")
    try:
        rows = io.loadmat(path, squeeze_me=True)["synsets"]
        return {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in rows
            if int(row["num_children"]) == 0
        }
    except Exception as error:  # a damaged file can raise nearly anything
        raise DataError(
            f"{path} is not the development kit's {META}: {error}. Unpack the kit again."
        ) from error


def _lines(path: Path) -> Iterable[str]:
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def _checked(path: Path, labels: dict[str, str], classes: Sequence[str] | None) -> dict[str, str]:
    """`labels`, if they are names that train has, or may have."""
    named = set(labels.values())
    if not named:
        raise DataError(f"label file {path} is empty. Fetch it again, or remove it.")
    if classes is not None and not named & set(classes):
        raise DataError(
            f"label file {path} names classes ({', '.join(sorted(named)[:3])}, ...) of which train "
            f"has none ({', '.join(classes[:3])}, ...). Name the folders as the file does."
        )
    return labels


def _not_understood(path: Path, line: int, why: str) -> DataError:
    return DataError(
        f"line {line} of label file {path} is not understood: {why}. Repair it, or remove the file "
        "to judge without labels."
    )
