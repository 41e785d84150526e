"""Image folders: which files are used, in which order, and what was skipped and why."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from ampdeploy.artifacts import sha256_json
from ampdeploy.data.decode import UnreadableImageError, decode_rgb, read_bytes
from ampdeploy.data.label_file import LabelFile, find_label_file, label_files
from ampdeploy.data.walk import (
    IMAGE_SUFFIXES,
    find_images,
    is_folder,
    sample_order,
)
from ampdeploy.data.walk import folder_signature as images_signature
from ampdeploy.errors import ArtifactError, ConfigError, DataError
from ampdeploy.progress import log, task

__all__ = [
    "EvalImages",
    "ImageRecord",
    "ImageSet",
    "Skipped",
    "class_folders",
    "folder_signature",
    "scan_eval",
    "scan_folder",
]

# A damaged file now and then is normal in a large collection; more than this means that the folder
# is not what the user thinks it is, and a result from what is left would not represent it.
MAX_SKIPPED_FRACTION = 0.05

# Skipped files named one by one, in the log and in errors, before only their number is given.
NAMED_SKIPS = 5

# Pillow releases the GIL while it decodes; beyond this, reading the disk is what limits.
DECODE_THREADS = min(8, os.cpu_count() or 1)

# Files handed to the threads at a time; at most this many records are waited for at once.
SCAN_CHUNK = 256


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One file that was decoded once and can be used."""

    path: Path
    relative: str
    """Posix path relative to the set's root."""
    sha256: str
    """Of the file's bytes, hexadecimal."""
    label: str | None
    """Name of the first folder below the root, or as a label file says; None in an unlabelled
    set."""

    @property
    def has_own_label(self) -> bool:
        """Whether the label is another than the folder's name."""
        return self.label is not None and self.label != _folder_of(self.relative)


@dataclass(frozen=True, kw_only=True)
class Skipped:
    """One file that could not be used."""

    relative: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class ImageSet:
    """A sample of a folder's images, in sampled order: the order in which they are used."""

    root: Path
    records: tuple[ImageRecord, ...]
    skipped: tuple[Skipped, ...]
    found: int
    """Image files in the folder, sampled or not."""
    seed: int

    def __len__(self) -> int:
        return len(self.records)

    @cached_property
    def classes(self) -> list[str]:
        """The labels that occur, sorted; empty in an unlabelled set."""
        return sorted({record.label for record in self.records if record.label is not None})

    @cached_property
    def labels(self) -> list[int] | None:
        """Per record, its label's position in `classes`; None in an unlabelled set."""
        index = {name: position for position, name in enumerate(self.classes)}
        labels = [index[record.label] for record in self.records if record.label is not None]
        return labels if labels and len(labels) == len(self.records) else None

    @cached_property
    def sha256(self) -> str:
        """Identity of the sample: names, contents, order and labels, wherever the folder lies."""
        # A label that is the folder's name is part of `relative` already.
        return sha256_json(
            [
                [record.relative, record.sha256, *([record.label] if record.has_own_label else [])]
                for record in self.records
            ]
        )

    def first(self, count: int) -> ImageSet:
        """The first `count` images, in order."""
        return dataclasses.replace(self, records=self.records[:count])

    def after(self, count: int) -> ImageSet:
        """The images behind the first `count`, in order."""
        return dataclasses.replace(self, records=self.records[count:])

    def without(self, others: ImageSet) -> ImageSet:
        """The images whose content is not in `others`, in order."""
        known = {record.sha256 for record in others.records}
        kept = tuple(record for record in self.records if record.sha256 not in known)
        return dataclasses.replace(self, records=kept)

    def to_json(self) -> dict[str, Any]:
        """Plain data that `from_json` turns into the same set."""
        return {
            "root": str(self.root),
            "found": self.found,
            "seed": self.seed,
            "sha256": self.sha256,
            "skipped": [[item.relative, item.reason] for item in self.skipped],
            "files": [[record.relative, record.sha256, record.label] for record in self.records],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ImageSet:
        """The set that `to_json` described. No file is looked at.

        Raises:
            ArtifactError: `data` is not that, or its hash does not fit its files.
        """
        try:
            root = Path(data["root"])
            images = cls(
                root=root,
                records=tuple(
                    ImageRecord(path=root / name, relative=name, sha256=digest, label=label)
                    for name, digest, label in data["files"]
                ),
                skipped=tuple(Skipped(relative=name, reason=why) for name, why in data["skipped"]),
                found=data["found"],
                seed=data["seed"],
            )
            stored = data["sha256"]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(
                f"the stored list of images is damaged ({type(error).__name__}: {error}). "
                "Build the run again with --no-resume."
            ) from error
        if stored != images.sha256:
            raise ArtifactError(
                f"the stored list of {len(images)} images below {root} has hash {images.sha256}, "
                f"not {stored} as recorded. Build the run again with --no-resume."
            )
        return images


@dataclass(frozen=True, kw_only=True)
class EvalImages:
    """What a model is judged on."""

    queries: ImageSet
    bank: ImageSet | None
    """Labelled images that vote in k-NN; None: the other queries do (leave-one-out)."""


def folder_signature(root: Path) -> str:
    """As `ampdeploy.data.walk.folder_signature`, and of the label files that `scan_eval` reads.

    Raises:
        DataError: As `find_images`.
    """
    images = images_signature(root)
    labels = [
        [str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in label_files(root)
    ]
    return sha256_json([images, labels]) if labels else images


def class_folders(root: Path) -> list[str]:
    """Names of the folders right below `root`, sorted; empty folders too."""
    with os.scandir(root) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def scan_folder(
    root: Path,
    *,
    limit: int | None,
    seed: int,
    labelled: bool = False,
    labels: LabelFile | None = None,
    minimum: int = 1,
) -> ImageSet:
    """Sample the images below `root`, decoding each one once to know that it can be used.

    Files that cannot be used are skipped, named in the log and kept in `ImageSet.skipped`; the
    next one of the sampled order takes their place.

    Args:
        root: Folder of images, nested or not.
        limit: Stop at this many usable images; None takes all.
        seed: Of the shuffle that decides which come first.
        labelled: Take the name of the first folder below `root` as the label.
        labels: Take the labels from here instead.
        minimum: Fewest usable images that are of use to the caller.

    Raises:
        DataError: The folder is missing, not readable or has no images; over
            `MAX_SKIPPED_FRACTION` of the tried files are unusable; fewer than `minimum` are left;
            or images lie outside the class folders of a labelled set, or are not in `labels`.
        ConfigError: `limit` is below 1 or below `minimum`.
    """
    if limit is not None and limit < max(1, minimum):
        raise ConfigError(
            f"a limit of {limit} images cannot give the {max(1, minimum)} that are needed. "
            "Raise it."
        )
    names = find_images(root)
    if not names:
        raise DataError(
            f"image folder {root} holds no images. Files with these suffixes count, in it or in "
            f"its subfolders: {' '.join(sorted(IMAGE_SUFFIXES))}."
        )
    label_of: Callable[[str], str | None] = _no_label
    if labels is not None:
        labels.check(names)
        label_of = labels.label_of
    elif labelled:
        _check_class_folders(root, names)
        label_of = _folder_of
    records, skipped = _decode_in_order(root, sample_order(names, seed), limit, label_of)
    _report_skipped(root, skipped)
    tried = len(records) + len(skipped)
    if len(skipped) > MAX_SKIPPED_FRACTION * tried:
        raise DataError(
            f"{len(skipped)} of the {tried} images tried in {root} cannot be used, more than "
            f"{MAX_SKIPPED_FRACTION:.0%}: {_name_some(skipped)}. Repair or remove them."
        )
    if len(records) < minimum:
        raise DataError(
            f"{root} holds {len(records)} usable image{'s' * (len(records) != 1)} ({len(names)} "
            f"found, {len(skipped)} skipped), and {minimum} are needed. Add images, or give a "
            "larger folder."
        )
    return ImageSet(
        root=root, records=tuple(records), skipped=tuple(skipped), found=len(names), seed=seed
    )


def scan_eval(
    root: Path, *, limit: int | None, seed: int, labelled: bool | None = None
) -> EvalImages:
    """Find the images to judge on: k-NN bank and queries, or queries alone.

    With ``train/`` and ``val/`` (or ``test/``) in `root`, train is the bank and val the queries.
    Without, the images below `root` are the queries and vote on each other. A flat ``val/``, as
    ImageNet's archive has it, gets its labels from a file beside it: see
    `ampdeploy.data.label_file`.

    Args:
        root: Class-per-folder images, a folder with such train/ and val/, or images alone.
        limit: At most this many from each split; None takes all.
        seed: Of the sampling.
        labelled: Whether the folders below `root` (or below each split) are classes. None finds
            out: two or more folders with no image beside them are, anything else is an unlabelled
            set, on which only fidelity can be measured.

    Raises:
        DataError: As `scan_folder`; a labelled bank has none of the queries' classes.
    """
    query_root, bank_root = _find_splits(root)
    labels = None if labelled is False else _labels_from_file(root, query_root, bank_root)
    if labelled is None:
        labelled = labels is not None or _folders_are_classes(query_root, bank_root)
    queries = scan_folder(query_root, limit=limit, seed=seed, labelled=labelled, labels=labels)
    if bank_root is None or not labelled:
        return EvalImages(queries=queries, bank=None)
    found = scan_folder(bank_root, limit=limit, seed=seed, labelled=True)
    # An image that is judged must not vote for itself, or train the probe that judges it.
    bank = found.without(queries)
    if len(bank) < len(found):
        shared = len(found) - len(bank)
        log.warning("%d images of %s are among those judged too; left out", shared, bank_root)
    _check_bank(queries, bank)
    return EvalImages(queries=queries, bank=bank)


def _find_splits(root: Path) -> tuple[Path, Path | None]:
    """Where the queries and the bank are."""
    judged = next((root / name for name in ("val", "test") if is_folder(root / name)), None)
    if judged is not None and is_folder(root / "train"):
        return judged, root / "train"
    return root, None


def _labels_from_file(root: Path, query_root: Path, bank_root: Path | None) -> LabelFile | None:
    """Labels of flat queries; None where folders say them, or nothing does.

    A bank has to be in class folders all the same.
    """
    if not label_files(root) or class_folders(query_root):
        return None
    if bank_root is not None and _why_no_classes(bank_root):
        return None
    found = find_label_file(root, classes=class_folders(bank_root) if bank_root else None)
    if found is not None:
        log.info("  labels of %s are taken from %s", query_root, found.path)
    return found


def _folders_are_classes(query_root: Path, bank_root: Path | None) -> bool:
    """What the layout says; what is made of it is logged, because it is a guess."""
    why_not = _why_no_classes(query_root)
    if why_not is None and bank_root is not None:
        why_not = _why_no_classes(bank_root)
    if why_not is None:
        log.info("  the folders in %s are taken as classes", query_root)
    else:
        log.info("  taken as unlabelled, for fidelity alone: %s", why_not)
    return why_not is None


def _why_no_classes(root: Path) -> str | None:
    names = find_images(root)
    folders = {name.split("/")[0] for name in names if "/" in name}
    if len(folders) < 2:
        return f"{root} has no two folders of images"
    loose = [name for name in names if "/" not in name]
    if loose:
        return f"{len(loose)} of {len(names)} images in {root} lie in no folder, e.g. {loose[0]}"
    return None


def _check_bank(queries: ImageSet, bank: ImageSet) -> None:
    if not len(bank):
        raise DataError(
            f"every image in {bank.root} is also in {queries.root}, so none is left to judge with. "
            "Give train and val folders with different images."
        )
    missing = [name for name in queries.classes if name not in set(bank.classes)]
    if len(missing) == len(queries.classes):
        raise DataError(
            f"none of the {len(missing)} classes in {queries.root} ({', '.join(missing[:3])}, ...) "
            f"is among those in {bank.root}. Use the same folder names in both, or a higher limit."
        )
    if missing:
        log.warning(
            "%d classes of %s have no image in %s and can never be voted for: %s",
            len(missing),
            queries.root,
            bank.root,
            ", ".join(missing[:NAMED_SKIPS]),
        )


def _check_class_folders(root: Path, names: list[str]) -> None:
    loose = [name for name in names if "/" not in name]
    if loose:
        raise DataError(
            f"{len(loose)} of the {len(names)} images in {root} lie outside any class folder, "
            f"e.g. {loose[0]}. Labelled images are laid out as {root.name}/<class>/<image>: move "
            "them into their class folder."
        )


def _no_label(relative: str) -> None:
    return None


def _folder_of(relative: str) -> str:
    return relative.split("/")[0]


def _decode_in_order(
    root: Path, names: list[str], limit: int | None, label_of: Callable[[str], str | None]
) -> tuple[list[ImageRecord], list[Skipped]]:
    """Go down `names` until `limit` are good; stop early once too many are known to be bad."""
    records: list[ImageRecord] = []
    skipped: list[Skipped] = []
    wanted = len(names) if limit is None else min(limit, len(names))
    waiting = iter(names)
    with (
        ThreadPoolExecutor(DECODE_THREADS) as pool,
        task(f"check {root.name}", wanted) as shown,
    ):
        while len(skipped) <= MAX_SKIPPED_FRACTION * len(names):
            # Never more than are still missing, so the result is that of one at a time.
            chunk = list(itertools.islice(waiting, min(wanted - len(records), SCAN_CHUNK)))
            if not chunk:
                break
            for result in pool.map(partial(_try_image, root, label_of=label_of), chunk):
                if isinstance(result, Skipped):
                    skipped.append(result)
                else:
                    records.append(result)
                    shown.advance()
    return records, skipped


def _try_image(
    root: Path, relative: str, *, label_of: Callable[[str], str | None]
) -> ImageRecord | Skipped:
    path = root / relative
    try:
        data = read_bytes(path)
        decode_rgb(data, path)
    except UnreadableImageError as error:
        return Skipped(relative=relative, reason=error.reason)
    return ImageRecord(
        path=path,
        relative=relative,
        sha256=hashlib.sha256(data).hexdigest(),
        label=label_of(relative),
    )


def _report_skipped(root: Path, skipped: list[Skipped]) -> None:
    for item in skipped[:NAMED_SKIPS]:
        log.warning("skipped %s: %s", root / item.relative, item.reason)
    if len(skipped) > NAMED_SKIPS:
        log.warning("skipped %d more images in %s", len(skipped) - NAMED_SKIPS, root)


def _name_some(skipped: list[Skipped]) -> str:
    named = "; ".join(f"{item.relative} ({item.reason})" for item in skipped[:NAMED_SKIPS])
    rest = len(skipped) - NAMED_SKIPS
    return f"{named}; and {rest} more" if rest > 0 else named
