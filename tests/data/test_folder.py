"""Scanning folders: what is found, in which order, what is skipped, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil

import pytest

from ampdeploy.artifacts import sha256_file
from ampdeploy.data.folder import (
    ImageSet,
    Skipped,
    folder_signature,
    scan_eval,
    scan_folder,
)
from ampdeploy.errors import ArtifactError, ConfigError, DataError
from tests.data.samples import fill
from tests.unprivileged import open_folder, run_locked_out


def names(images: ImageSet) -> list[str]:
    return [record.relative for record in images.records]


def test_finds_nested_files_and_any_case_of_suffix(tmp_path):
    fill(tmp_path / "a" / "deep", 2)
    fill(tmp_path, 1, start=10).pop().rename(tmp_path / "UPPER.PNG")
    fill(tmp_path / "b", 1, start=20, suffix="jpg").pop().rename(tmp_path / "b" / "x.JPeG")
    (tmp_path / "notes.txt").write_text("not an image")
    images = scan_folder(tmp_path, limit=None, seed=0)
    assert sorted(names(images)) == [
        "UPPER.PNG",
        "a/deep/image000.png",
        "a/deep/image001.png",
        "b/x.JPeG",
    ]
    assert (images.found, len(images), images.skipped) == (4, 4, ())
    for record in images.records:
        assert record.path == tmp_path / record.relative
        assert record.sha256 == sha256_file(record.path)
        assert record.label is None


def test_hidden_files_and_folders_are_left_out(tmp_path):
    fill(tmp_path / "a", 2)
    fill(tmp_path / ".thumbnails", 2)
    (tmp_path / "a" / "._image000.png").write_bytes(b"resource fork")
    assert scan_folder(tmp_path, limit=None, seed=0).found == 2


def test_symlinks_are_followed_but_loops_are_not(tmp_path):
    fill(tmp_path / "elsewhere", 2)
    root = tmp_path / "root"
    fill(root / "a", 2, start=10)
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "up").symlink_to(root)
    (tmp_path / "elsewhere" / "over").symlink_to(root / "a")
    images = scan_folder(root, limit=None, seed=0)
    assert sorted(record.path.name for record in images.records) == [
        "image000.png",
        "image001.png",
        "image010.png",
        "image011.png",
    ]


def test_order_is_the_seeds_and_nobody_elses(tmp_path):
    fill(tmp_path / "one", 12)
    for number in reversed(range(12)):  # other creation order, other place
        name = f"image{number:03d}.png"
        (tmp_path / "two").mkdir(exist_ok=True)
        shutil.copy(tmp_path / "one" / name, tmp_path / "two" / name)
    one, two = (scan_folder(tmp_path / name, limit=None, seed=7) for name in ("one", "two"))
    assert names(one) == names(two)
    assert one.sha256 == two.sha256
    assert names(one) != sorted(names(one))
    other = scan_folder(tmp_path / "one", limit=None, seed=8)
    assert names(other) != names(one)
    assert other.sha256 != one.sha256


def test_order_is_frozen(tmp_path):
    """Published results name a seed: the sample behind it must never move."""
    fill(tmp_path, 6)
    images = scan_folder(tmp_path, limit=None, seed=0)
    assert "".join(name[len("image00")] for name in names(images)) == "510432"


def test_a_smaller_sample_is_the_start_of_a_larger_one(tmp_path):
    fill(tmp_path, 12)
    everything = scan_folder(tmp_path, limit=None, seed=3)
    few = scan_folder(tmp_path, limit=5, seed=3)
    assert names(few) == names(everything)[:5]
    assert few.found == 12
    assert len(scan_folder(tmp_path, limit=100, seed=3)) == 12


def test_bad_files_are_replaced_by_the_next_and_named(tmp_path, caplog):
    fill(tmp_path, 40)
    order = names(scan_folder(tmp_path, limit=None, seed=0))
    (tmp_path / order[2]).write_bytes(b"")
    with caplog.at_level(logging.WARNING, logger="ampdeploy"):
        images = scan_folder(tmp_path, limit=25, seed=0)
    assert names(images) == [*order[:2], *order[3:26]]
    assert images.skipped == (Skipped(relative=order[2], reason="the file is empty"),)
    assert f"{order[2]}: the file is empty" in caplog.text


def test_broken_link_is_skipped_and_a_folder_named_like_an_image_is_entered(tmp_path):
    fill(tmp_path, 30)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    fill(tmp_path / "folder.jpg", 1, start=50)
    images = scan_folder(tmp_path, limit=None, seed=0)
    assert len(images) == 31
    assert [item.relative for item in images.skipped] == ["gone.jpg"]


def test_self_referring_link_is_skipped(tmp_path):
    fill(tmp_path, 20)
    (tmp_path / "me.jpg").symlink_to(tmp_path / "me.jpg")
    images = scan_folder(tmp_path, limit=None, seed=0)
    assert [item.relative for item in images.skipped] == ["me.jpg"]


def test_long_lists_of_skips_end_in_a_count(tmp_path, caplog):
    fill(tmp_path, 160)
    for path in sorted(tmp_path.iterdir())[:8]:
        path.write_text("broken")
    with caplog.at_level(logging.WARNING, logger="ampdeploy"):
        images = scan_folder(tmp_path, limit=None, seed=0)
    assert len(images.skipped) == 8
    assert len(caplog.records) == 6
    assert "3 more" in caplog.messages[-1]


def test_over_five_percent_bad_is_an_error(tmp_path):
    fill(tmp_path, 18)
    (tmp_path / "one.jpg").write_text("broken")
    with pytest.raises(DataError, match=r"more than 5%: one\.jpg \(not an image"):
        scan_folder(tmp_path, limit=None, seed=0)
    fill(tmp_path, 1, start=18)  # 1 of 20 is exactly 5%
    assert len(scan_folder(tmp_path, limit=None, seed=0)) == 19


def test_a_folder_of_rubbish_lists_the_first(tmp_path):
    for number in range(30):
        (tmp_path / f"{number}.jpg").write_text("broken")
    with pytest.raises(DataError, match="cannot be used") as caught:
        scan_folder(tmp_path, limit=10, seed=0)
    assert str(caught.value).count(".jpg (") == 5


def test_fewer_than_needed(tmp_path):
    fill(tmp_path, 3)
    with pytest.raises(DataError, match=r"3 usable images \(3 found, 0 skipped\), and 4 are"):
        scan_folder(tmp_path, limit=None, seed=0, minimum=4)


@pytest.mark.parametrize(("limit", "minimum"), [(0, 1), (3, 4)])
def test_limit_that_cannot_do(tmp_path, limit, minimum):
    fill(tmp_path, 3)
    with pytest.raises(ConfigError, match=f"limit of {limit} images"):
        scan_folder(tmp_path, limit=limit, seed=0, minimum=minimum)


@pytest.mark.parametrize("scan", [folder_signature, lambda r: scan_folder(r, limit=None, seed=0)])
def test_missing_folder_and_file(tmp_path, scan):
    with pytest.raises(DataError, match="does not exist"):
        scan(tmp_path / "nowhere")
    (tmp_path / "set.zip").write_bytes(b"PK")
    with pytest.raises(DataError, match="is a file, not a folder"):
        scan(tmp_path / "set.zip")


def test_empty_folder_says_what_it_looks_for(tmp_path):
    (tmp_path / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"holds no images.*\.jpeg \.jpg"):
        scan_folder(tmp_path, limit=None, seed=0)


IMPORTS = """
from ampdeploy.data.folder import folder_signature, scan_eval, scan_folder
from ampdeploy.data.walk import find_images
from ampdeploy.errors import DataError
"""
SCANS = """
print(*find_images(Path(sys.argv[1])))
for root in map(Path, sys.argv[2:]):
    for scan in (folder_signature, scan_folder, scan_eval):
        try:
            scan(root) if scan is folder_signature else scan(root, limit=None, seed=0)
        except DataError as error:
            print(error)
"""


def test_folders_that_may_not_be_entered():
    """Above the folder, the folder itself, one in it, and one that a link in it leads to."""
    with open_folder() as base:
        above, linking, fine = base / "above", base / "linking", base / "fine"
        locked = above / "locked"
        for number, folder in enumerate((locked / "cat", linking, fine)):
            fill(folder, 1, start=number)
        (linking / "more").symlink_to(locked / "cat")
        (fine / "linked.jpg").symlink_to(locked / "cat" / "image000.png")
        roots = [locked / "cat", locked, above, linking]
        shown = run_locked_out(locked, IMPORTS, SCANS, [fine, *roots]).splitlines()
    # A linked image that cannot be read is left to the scan, which skips it like any other.
    assert shown[0] == "image002.png linked.jpg"
    expected = [  # `scan_eval`, the last of three, looks for val/ first
        *[locked / "cat", locked / "cat", locked / "cat" / "val"],
        *[locked, locked, locked / "val"],
        *[locked] * 3,
        *[linking / "more"] * 3,
    ]
    for line, folder in zip(shown[1:], expected, strict=True):
        assert line.startswith(f"cannot read image folder {folder}: Permission denied."), line


def test_paths_nobody_can_follow(tmp_path):
    (tmp_path / "me").symlink_to(tmp_path / "me")
    with pytest.raises(DataError, match=r"cannot read image folder .*me: Too many levels"):
        scan_folder(tmp_path / "me", limit=None, seed=0)
    with pytest.raises(DataError, match=r"cannot read image folder .*: File name too long"):
        scan_eval(tmp_path / ("x" * 300), limit=None, seed=0)
    with pytest.raises(DataError, match="does not exist"):
        scan_folder(tmp_path / "nul\0", limit=None, seed=0)


def test_names_that_are_not_utf8(tmp_path):
    fill(tmp_path, 1)
    os.rename(tmp_path / "image000.png", os.fsencode(tmp_path) + b"/caf\xe9.png")
    images = scan_folder(tmp_path, limit=None, seed=0)
    stored = json.loads(json.dumps(images.to_json()))
    assert ImageSet.from_json(stored) == images
    assert ImageSet.from_json(stored).records[0].path.is_file()
    assert folder_signature(tmp_path)


def test_labels_are_the_first_folder(tmp_path):
    fill(tmp_path / "cat" / "deeper", 2)
    fill(tmp_path / "ant", 3, start=10)
    images = scan_folder(tmp_path, limit=None, seed=0, labelled=True)
    assert images.classes == ["ant", "cat"]
    assert images.labels == [
        {"ant": 0, "cat": 1}[record.relative.split("/")[0]] for record in images.records
    ]
    unlabelled = scan_folder(tmp_path, limit=None, seed=0)
    assert (unlabelled.classes, unlabelled.labels) == ([], None)


def test_images_outside_class_folders_explain_the_layout(tmp_path):
    fill(tmp_path / "cat", 2)
    fill(tmp_path, 1, start=10)
    with pytest.raises(DataError, match=r"1 of the 3 images .*<class>/<image>"):
        scan_folder(tmp_path, limit=None, seed=0, labelled=True)


def test_json_round_trip(tmp_path):
    fill(tmp_path / "cat", 20)
    fill(tmp_path / "dog", 10, start=30)
    (tmp_path / "dog" / "bad.png").write_text("broken")
    images = scan_folder(tmp_path, limit=None, seed=4, labelled=True)
    stored = json.loads(json.dumps(images.to_json()))
    assert stored["found"] == 31
    assert stored["seed"] == 4
    assert stored["skipped"] == [["dog/bad.png", images.skipped[0].reason]]
    shutil.rmtree(tmp_path / "cat")  # nothing is looked at again
    assert ImageSet.from_json(stored) == images


def test_subset_has_its_own_hash(tmp_path):
    fill(tmp_path, 4)
    images = scan_folder(tmp_path, limit=None, seed=0)
    subset = dataclasses.replace(images, records=images.records[:2])
    assert subset.sha256 == scan_folder(tmp_path, limit=2, seed=0).sha256 != images.sha256
    assert ImageSet.from_json(subset.to_json()) == subset


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("files"),
        lambda data: data["files"][0].pop(),
        lambda data: data.update(files=None),
        lambda data: data["files"][0].__setitem__(1, "0" * 64),
    ],
)
def test_damaged_json_is_refused(tmp_path, damage):
    fill(tmp_path, 2)
    stored = scan_folder(tmp_path, limit=None, seed=0).to_json()
    damage(stored)
    with pytest.raises(ArtifactError, match="stored list of"):
        ImageSet.from_json(stored)


def test_signature_follows_names_sizes_and_times(tmp_path):
    paths = fill(tmp_path / "a", 3)
    (tmp_path / "gone.jpg").symlink_to(tmp_path / "nowhere.jpg")
    seen = [folder_signature(tmp_path)]
    (tmp_path / "notes.txt").write_text("not an image")
    assert folder_signature(tmp_path) == seen[0]
    os.utime(paths[0], ns=(1, 1))
    seen.append(folder_signature(tmp_path))
    paths[0].write_bytes(paths[0].read_bytes() + b"x")
    os.utime(paths[0], ns=(1, 1))
    seen.append(folder_signature(tmp_path))
    paths[1].rename(tmp_path / "a" / "renamed.png")
    seen.append(folder_signature(tmp_path))
    paths[2].unlink()
    seen.append(folder_signature(tmp_path))
    assert len(set(seen)) == len(seen)
