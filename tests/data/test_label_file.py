"""ImageNet as its archives leave it: class folders in train, a flat val, and a file with labels."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from ampdeploy.data.folder import ImageSet, folder_signature, scan_eval
from ampdeploy.data.label_file import DEVKIT, GROUND_TRUTH, KAGGLE, META, VAL_MAP
from ampdeploy.errors import DataError, MissingDependencyError
from tests.data.samples import fill
from tests.data.test_eval_layouts import WNIDS, make_imagenet

# Class of each image of val, as a position in WNIDS.
TRUTH = (2, 0, 1, 1, 0)


def name_of(number: int) -> str:
    return f"ILSVRC2012_val_{number:08d}"


def make_flat(root, folder="val"):
    """train/<wnid>/*.JPEG and a flat val, without any label file yet."""
    make_imagenet(root, ("train",))
    for number, path in enumerate(fill(root / folder, len(TRUTH), start=100, suffix="jpg"), 1):
        path.rename(path.with_name(f"{name_of(number)}.JPEG"))
    return root


def write_kaggle(path):
    rows = [f"{name_of(n)},{WNIDS[c]} 85 1 499 272 " for n, c in enumerate(TRUTH, 1)]
    path.write_text("\n".join(["ImageId,PredictionString", *reversed(rows)]) + "\n")


def write_val_map(path, *, names=False):
    rows = [f"{name_of(n)}.JPEG\t{WNIDS[c] if names else c}" for n, c in enumerate(TRUTH, 1)]
    path.write_text("\n".join(rows) + "\n")


def write_devkit(folder, ids=(7, 3, 9)):
    """`ids`: class id of each of WNIDS. Ids are in no order of names; parents have children."""
    from scipy.io import savemat

    folder.mkdir(parents=True)
    rows = [(number, wnid, 0) for number, wnid in zip(ids, WNIDS, strict=True)]
    rows.append((1001, "n00001740", 3))
    kind = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("num_children", "O")]
    savemat(folder / META, {"synsets": np.array(rows, dtype=kind).reshape(-1, 1)})
    (folder / GROUND_TRUTH).write_text("".join(f"{ids[c]}\n" for c in TRUTH))


def labels_of(root, **options):
    found = scan_eval(root, limit=None, seed=0, **options)
    return found, {record.path.stem: record.label for record in found.queries.records}


EXPECTED = {name_of(number): WNIDS[c] for number, c in enumerate(TRUTH, 1)}

WRITERS = {
    "kaggle": lambda root: write_kaggle(root / KAGGLE),
    "positions": lambda root: write_val_map(root / VAL_MAP),
    "positions beside the images": lambda root: write_val_map(root / "val" / VAL_MAP),
    "names": lambda root: write_val_map(root / VAL_MAP, names=True),
    "devkit": lambda root: write_devkit(root / DEVKIT / "data"),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_flat_val_gets_its_labels_from_the_file_that_comes_with_it(tmp_path, kind):
    WRITERS[kind](make_flat(tmp_path))
    found, labels = labels_of(tmp_path)
    assert labels == EXPECTED
    assert found.queries.classes == found.bank.classes == list(WNIDS)
    assert (len(found.queries), len(found.bank)) == (5, 12)
    # What a run keeps says it again, without the file.
    stored = ImageSet.from_json(found.queries.to_json())
    assert [r.label for r in stored.records] == [r.label for r in found.queries.records]


def test_kaggles_archive_has_the_file_three_folders_above(tmp_path):
    root = tmp_path / "ILSVRC" / "Data" / "CLS-LOC"
    make_flat(root)
    write_kaggle(tmp_path / KAGGLE)
    assert labels_of(root)[1] == EXPECTED


def test_val_alone_is_labelled_too(tmp_path):
    make_flat(tmp_path)
    write_kaggle(tmp_path / "val" / KAGGLE)
    found, labels = labels_of(tmp_path / "val")
    assert labels == EXPECTED
    assert found.bank is None
    (tmp_path / "val" / KAGGLE).unlink()
    write_val_map(tmp_path / "val" / VAL_MAP)
    assert set(labels_of(tmp_path / "val")[1].values()) == {"0000", "0001", "0002"}


def test_labels_can_be_declined_and_folders_go_first(tmp_path):
    make_flat(tmp_path)
    write_kaggle(tmp_path / KAGGLE)
    assert set(labels_of(tmp_path, labelled=False)[1].values()) == {None}
    make_imagenet(tmp_path / "sorted")
    (tmp_path / "sorted" / VAL_MAP).write_text("nonsense\n")
    assert labels_of(tmp_path / "sorted")[0].queries.classes == list(WNIDS)


def test_other_labels_are_another_data_set(tmp_path):
    make_flat(tmp_path)
    plain, signature = labels_of(tmp_path)[0].queries.sha256, folder_signature(tmp_path)
    write_val_map(tmp_path / VAL_MAP)
    first, signed = labels_of(tmp_path)[0].queries.sha256, folder_signature(tmp_path)
    (tmp_path / VAL_MAP).write_text(
        "".join(f"{name_of(n)}.JPEG 1\n" for n in range(1, 1 + len(TRUTH)))
    )
    other = labels_of(tmp_path)[0].queries.sha256
    assert len({plain, first, other}) == 3
    assert signed != signature


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (KAGGLE, "image,label\n", "line 1 .*its columns are not"),
        (KAGGLE, f"ImageId,PredictionString\n{name_of(1)},\n", "line 2 .*names no class"),
        (KAGGLE, f"ImageId,PredictionString\n{name_of(1)},emu 1 2 3 4\n", "train has none"),
        (KAGGLE, "ImageId,PredictionString\n", "is empty"),
        (VAL_MAP, "one two three\n", "line 1 .*not an image name and a class"),
        (VAL_MAP, f"{name_of(1)}.JPEG 3\n", "class 3, counted from 0, and there are 3"),
        (VAL_MAP, f"{name_of(1)}.JPEG 0\n", "4 of 5 images are not in .*Is it the label file"),
        (GROUND_TRUTH, "1\n", "meta.mat beside it"),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, name, text, message):
    make_flat(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(DataError, match=message):
        scan_eval(tmp_path, limit=None, seed=0)
    assert scan_eval(tmp_path, limit=None, seed=0, labelled=False).queries.labels is None


def test_binary_rubbish_is_refused(tmp_path):
    make_flat(tmp_path)
    (tmp_path / VAL_MAP).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="cannot be read"):
        scan_eval(tmp_path, limit=None, seed=0)


def test_a_damaged_development_kit_is_refused(tmp_path, monkeypatch):
    make_flat(tmp_path)
    write_devkit(tmp_path / "data")
    (tmp_path / "data" / GROUND_TRUTH).write_text("7\n8\n")
    with pytest.raises(DataError, match=r"line 2 .*'8' is no class id"):
        scan_eval(tmp_path, limit=None, seed=0)
    (tmp_path / "data" / META).write_bytes(b"rubbish")
    with pytest.raises(DataError, match=r"not the development kit's meta.mat"):
        scan_eval(tmp_path, limit=None, seed=0)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(MissingDependencyError, match=r"reading meta.mat needs"):
        scan_eval(tmp_path, limit=None, seed=0)
