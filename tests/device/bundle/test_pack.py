"""One bundle takes the place of another, or leaves it where it was."""

from __future__ import annotations

import os
import shutil

import pytest

from ampdeploy.cli import main
from ampdeploy.device.bundle import contents as form
from ampdeploy.device.platform import device_facts
from tests.device.bundles import killed, reseal, tree


@pytest.fixture
def out(packed, tmp_path):
    """An older bundle, in the place of the next one."""
    folder = tmp_path / "b"
    shutil.copytree(packed, folder)
    reseal(folder, min_cosine_p1=0.5)
    return folder


@pytest.mark.timeout(300)
@pytest.mark.parametrize("renames", [1, 2, 3])
def test_killed_between_the_renames_a_whole_bundle_is_there_again(
    deferred_run, packed, out, tmp_path, renames
):
    before, command = tree(out), ["bundle", str(deferred_run), "--out", str(out), "-q"]
    killed(command, "bundle.place", "os.rename", calls=renames, after=True)
    assert out.exists() == (renames > 1)
    # The next one is killed as well, but not before it has put that right.
    killed(command, "bundle.pack", "_fill")
    if renames == 1:
        assert tree(out) == before
    else:
        assert tree(out)["model.fp16.onnx"] == tree(packed)["model.fp16.onnx"]
        assert form.read_bundle(out).manifest.min_cosine_p1 == 0.999
    form.check_files(form.read_bundle(out), device_facts())
    assert not (tmp_path / ".b.old").exists()
    assert main(command) == 0
    assert form.read_bundle(out).manifest.min_cosine_p1 == 0.999
    assert os.listdir(tmp_path) == ["b"]


def test_a_rename_that_fails_is_undone(deferred_run, out, tmp_path, monkeypatch, capsys):
    before, rename = tree(tmp_path), os.rename

    def fails(source, target):
        if target == out and source.name.endswith(".packing"):
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fails)
    assert main(["bundle", str(deferred_run), "--out", str(out), "-q"]) == 1
    assert "Input/output error" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_what_is_no_bundle_is_not_taken_for_the_one_before(deferred_run, out, tmp_path, capsys):
    mine = tmp_path / ".b.old"
    mine.mkdir()
    (mine / "thesis.txt").write_text("draft")
    before = tree(tmp_path)
    assert main(["bundle", str(deferred_run), "--out", str(out), "-q"]) == 1
    assert f"{mine}, which exists and is no bundle" in capsys.readouterr().err
    assert tree(tmp_path) == before


def test_what_a_killed_process_of_our_number_left_goes(deferred_run, tmp_path):
    """In a container every process may have the same one."""
    stale = tmp_path / f".b.{os.getpid()}.packing"
    stale.mkdir()
    (stale / "goldens.npz").write_bytes(b"half")
    assert main(["bundle", str(deferred_run), "--out", str(tmp_path / "b"), "-q"]) == 0
    assert os.listdir(tmp_path) == ["b"]
    assert (tmp_path / "b" / "goldens.npz").read_bytes() != b"half"
