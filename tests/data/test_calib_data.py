"""The image set that ships with the project."""

from __future__ import annotations

import logging
from pathlib import Path

from ampdeploy.artifacts import sha256_file
from ampdeploy.data.folder import scan_eval, scan_folder

CATEGORIES = 30
TRAIN_EACH, VAL_EACH = 14, 6
MAX_BYTES = 7_000_000


def listed(root: Path) -> dict[str, str]:
    lines = (root / "SHA256SUMS").read_text().splitlines()
    return {name: digest for digest, name in (line.split("  ", 1) for line in lines)}


def test_files_are_exactly_those_listed(calib_data):
    files = {
        path.relative_to(calib_data).as_posix(): path
        for split in ("train", "val")
        for path in (calib_data / split).rglob("*")
        if path.is_file()
    }
    assert {name: sha256_file(path) for name, path in files.items()} == listed(calib_data)
    assert sum(path.stat().st_size for path in files.values()) <= MAX_BYTES


def test_every_file_decodes_and_counts_are_as_documented(calib_data, caplog):
    with caplog.at_level(logging.WARNING, logger="ampdeploy"):
        found = scan_eval(calib_data, limit=None, seed=0)
    assert caplog.text == ""
    assert found.bank is not None
    assert found.queries.classes == found.bank.classes
    assert len(found.bank.classes) == CATEGORIES
    assert len(found.bank) == CATEGORIES * TRAIN_EACH >= 400
    assert len(found.queries) == CATEGORIES * VAL_EACH
    for images, each in ((found.bank, TRAIN_EACH), (found.queries, VAL_EACH)):
        assert images.skipped == ()
        assert images.labels is not None
        assert {images.labels.count(label) for label in range(CATEGORIES)} == {each}


def test_train_and_val_share_nothing(calib_data):
    digests = list(listed(calib_data).values())
    assert len(set(digests)) == len(digests)
    names = [name.split("/", 1) for name in listed(calib_data)]
    train, val = ({rest for split, rest in names if split == which} for which in ("train", "val"))
    assert len(train) == CATEGORIES * TRAIN_EACH
    assert not train & val


def test_any_folder_of_it_is_big_enough_to_calibrate(calib_data):
    images = scan_folder(calib_data / "train", limit=256, seed=0, minimum=256)
    assert len(images) == 256
    assert len({record.relative.split("/")[0] for record in images.records}) == CATEGORIES
