"""Layouts that `scan_eval` tells apart."""

from __future__ import annotations

import logging
import shutil

import pytest

from ampdeploy.data.folder import scan_eval
from ampdeploy.errors import DataError
from tests.data.samples import fill

WNIDS = ("n01440764", "n01443537", "n02102040")


def make_imagenet(root, splits=("train", "val")):
    """ImageNet's layout: <split>/<wnid>/*.JPEG."""
    start = 0
    for split in splits:
        for wnid in WNIDS:
            count = 4 if split == "train" else 2
            for path in fill(root / split / wnid, count, start=start, suffix="jpg"):
                path.rename(path.with_name(f"{wnid}_{path.stem}.JPEG"))
            start += count


@pytest.mark.parametrize("judged", ["val", "test"])
def test_imagenet_layout_gives_bank_and_queries(tmp_path, judged):
    make_imagenet(tmp_path, ("train", judged))
    found = scan_eval(tmp_path, limit=None, seed=0)
    assert (found.queries.root, len(found.queries)) == (tmp_path / judged, 6)
    assert found.bank is not None
    assert (found.bank.root, len(found.bank)) == (tmp_path / "train", 12)
    assert found.queries.classes == found.bank.classes == list(WNIDS)


def test_val_goes_before_test(tmp_path):
    make_imagenet(tmp_path, ("train", "val", "test"))
    assert scan_eval(tmp_path, limit=None, seed=0).queries.root == tmp_path / "val"


def test_limit_counts_per_split(tmp_path):
    make_imagenet(tmp_path)
    found = scan_eval(tmp_path, limit=5, seed=0)
    assert (len(found.queries), len(found.bank)) == (5, 5)


def test_class_folders_alone_vote_on_each_other(tmp_path):
    make_imagenet(tmp_path)
    found = scan_eval(tmp_path / "val", limit=None, seed=0)
    assert found.bank is None
    assert found.queries.classes == list(WNIDS)


@pytest.mark.parametrize("folder", ["", "pictures"])
def test_images_without_classes_are_unlabelled(tmp_path, folder):
    """One folder is no class: every prediction would be right."""
    fill(tmp_path / folder, 4)
    found = scan_eval(tmp_path, limit=None, seed=0)
    assert (found.bank, found.queries.labels, len(found.queries)) == (None, None, 4)


def test_flat_val_is_judged_without_labels_or_bank(tmp_path, caplog):
    """ImageNet's val as it comes out of the archive."""
    make_imagenet(tmp_path, ("train",))
    fill(tmp_path / "val", 5, start=100)
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        found = scan_eval(tmp_path, limit=None, seed=0)
    assert (found.bank, found.queries.labels) == (None, None)
    assert f"for fidelity alone: {tmp_path / 'val'} has no two folders" in caplog.text


def test_labels_can_be_insisted_on_or_declined(tmp_path):
    fill(tmp_path / "flat", 3)
    with pytest.raises(DataError, match="<class>/<image>"):
        scan_eval(tmp_path / "flat", limit=None, seed=0, labelled=True)
    make_imagenet(tmp_path / "set")
    found = scan_eval(tmp_path / "set", limit=None, seed=0, labelled=False)
    assert (found.bank, found.queries.labels) == (None, None)


def test_a_loose_image_beside_folders_makes_the_set_unlabelled(tmp_path, caplog):
    """A folder of holiday pictures by year, and one that was not sorted in yet."""
    fill(tmp_path / "2023", 2)
    fill(tmp_path / "2024", 2, start=10)
    fill(tmp_path, 1, start=20)
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        found = scan_eval(tmp_path, limit=None, seed=0)
    assert (found.bank, found.queries.labels, len(found.queries)) == (None, None, 5)
    assert [line for line in caplog.messages if "image020.png" in line] == [
        f"  taken as unlabelled, for fidelity alone: 1 of 5 images in {tmp_path} lie in no folder, "
        "e.g. image020.png"
    ]
    with pytest.raises(DataError, match="outside any class folder"):
        scan_eval(tmp_path, limit=None, seed=0, labelled=True)


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_loose_image_in_either_split_does_too(tmp_path, split):
    make_imagenet(tmp_path)
    fill(tmp_path / split, 1, start=100)
    found = scan_eval(tmp_path, limit=None, seed=0)
    assert (found.queries.root, found.bank) == (tmp_path / "val", None)
    assert found.queries.labels is None
    with pytest.raises(DataError, match="outside any class folder"):
        scan_eval(tmp_path, limit=None, seed=0, labelled=True)


def test_folders_taken_as_classes_are_said_to_be_and_can_be_declined(tmp_path, caplog):
    fill(tmp_path / "2023", 2)
    fill(tmp_path / "2024", 2, start=10)
    with caplog.at_level(logging.INFO, logger="ampdeploy"):
        assert scan_eval(tmp_path, limit=None, seed=0).queries.classes == ["2023", "2024"]
    assert f"the folders in {tmp_path} are taken as classes" in caplog.text
    declined = scan_eval(tmp_path, limit=None, seed=0, labelled=False)
    assert (declined.queries.labels, len(declined.queries)) == (None, 4)


def test_bank_without_the_queries_classes(tmp_path, caplog):
    fill(tmp_path / "train" / "cat", 2)
    fill(tmp_path / "train" / "dog", 2, start=10)
    fill(tmp_path / "val" / "emu", 2, start=20)
    fill(tmp_path / "val" / "fox", 2, start=30)
    with pytest.raises(DataError, match=r"none of the 2 classes .* \(emu, fox, \.\.\.\)"):
        scan_eval(tmp_path, limit=None, seed=0)
    fill(tmp_path / "val" / "dog", 2, start=40)
    with caplog.at_level(logging.WARNING, logger="ampdeploy"):
        assert scan_eval(tmp_path, limit=None, seed=0).bank is not None
    assert "can never be voted for: emu, fox" in caplog.text


def test_an_image_that_is_judged_does_not_vote_for_itself(tmp_path, caplog):
    make_imagenet(tmp_path)
    judged = sorted((tmp_path / "val" / WNIDS[0]).iterdir())[0]
    shutil.copy(judged, tmp_path / "train" / WNIDS[0] / "again.JPEG")
    with caplog.at_level(logging.WARNING, "ampdeploy"):
        found = scan_eval(tmp_path, limit=None, seed=0)
    assert len(found.bank) == 12
    assert not {r.sha256 for r in found.bank.records} & {r.sha256 for r in found.queries.records}
    assert "1 images of" in caplog.text
    shutil.rmtree(tmp_path / "train")
    shutil.copytree(tmp_path / "val", tmp_path / "train")
    with pytest.raises(DataError, match="every image in"):
        scan_eval(tmp_path, limit=None, seed=0)
