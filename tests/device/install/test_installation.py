"""Installations: checked, put in place of each other, and put right after a kill."""

from __future__ import annotations

import os
import shutil

import pytest

from ampdeploy.artifacts import sha256_file
from ampdeploy.cli import main
from ampdeploy.device.install import installation
from ampdeploy.device.install.installation import check_installation, put_in_place, recover
from ampdeploy.errors import AmpDeployError, ArtifactError
from tests.device.bundles import QUICK, killed, tree
from tests.device.engine_samples import ADA, NO_GPU, ORIN
from tests.targets.test_tensorrt import write_engine


def put(folder, *, target="trt", **engine):
    """An installation with the files that it needs to be checked; its plan is none."""
    folder.mkdir()
    write_engine(folder, target=target, **engine)
    return write_installation(folder, target)


def write_installation(folder, target):
    return installation.write_installation(
        folder, tool_version="0", model="tiny", image_size=8, preprocessing={}, target=target,
        precision="fp16", artifact="engine.plan", bundle_sha256="0" * 64, runtime={}, device={},
        engine={}, notes=(), self_test=None, untested=None, comparison=None,
        why_no_comparison=None,
    )  # fmt: skip


def test_an_installation_of_another_machine_is_refused(tmp_path):
    put(tmp_path / "a", arch="aarch64", compute_capabilities=("8.7",), gpu="Orin")
    with pytest.raises(ArtifactError, match="built for aarch64, and this is x86_64"):
        check_installation(tmp_path / "a", ADA)
    put(tmp_path / "b", arch="x86_64", compute_capabilities=("8.6",))
    with pytest.raises(ArtifactError, match=r"built for compute capability 8\.6, and this GPU"):
        check_installation(tmp_path / "b", ADA)
    with pytest.raises(ArtifactError, match="built for x86_64, and this is aarch64"):
        check_installation(tmp_path / "b", ORIN)


def test_an_installed_plan_without_weights_needs_its_onnx_file(tmp_path):
    put(tmp_path / "a", stripped=True)
    with pytest.raises(ArtifactError, match=r"model\.fp16\.onnx, where they are, is not beside it"):
        check_installation(tmp_path / "a", NO_GPU)


def test_a_changed_installation_is_refused(small, tmp_path):
    out = tmp_path / "engine"
    assert main(["engine", str(small), "--target", "ort", "--out", str(out), *QUICK]) == 0
    with open(out / "model.fp16.onnx", "ab") as handle:
        handle.write(b"more")
    with pytest.raises(ArtifactError, match=r"model\.fp16\.onnx was changed"):
        check_installation(out, NO_GPU)
    (out / "model.fp16.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.fp16\.onnx is missing"):
        check_installation(out, NO_GPU)


def test_an_installation_that_arrives_damaged_is_taken_back(small, other, tmp_path):
    out, new = tmp_path / "engine", tmp_path / "new"
    command = ["--target", "ort", "--out", str(out), *QUICK]
    assert main(["engine", str(small), *command]) == 0
    assert main(["engine", str(other), *command]) == 0
    before = tree(tmp_path)
    shutil.copytree(out, new)
    (new / "model.fp16.onnx").write_bytes(b"of a disk that lies")
    damaged = tree(new)
    with pytest.raises(ArtifactError, match="was changed"):
        put_in_place(new, out, NO_GPU)
    assert tree(new) == damaged
    shutil.rmtree(new)
    assert tree(tmp_path) == before


def test_a_rename_that_fails_is_undone(small, other, tmp_path, monkeypatch):
    out, new = tmp_path / "engine", tmp_path / "new"
    command = ["--target", "ort", "--out", str(out), *QUICK]
    assert main(["engine", str(small), *command]) == 0
    assert main(["engine", str(other), *command]) == 0
    shutil.copytree(out, new)
    before, rename = tree(tmp_path), os.rename

    def fails(source, target):
        if target == out and source == new:
            raise OSError(5, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(installation.os, "rename", fails)
    with pytest.raises(AmpDeployError, match="Input/output error"):
        put_in_place(new, out, NO_GPU)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_killed_between_the_renames(small, other, tmp_path, renames):
    out, previous = tmp_path / "engine", tmp_path / "engine.previous"
    command = ["--target", "ort", "--out", str(out), *QUICK]
    for source in (small, other):
        assert main(["engine", str(source), *command]) == 0
    older, old = tree(previous), tree(out)
    killed(
        ["engine", str(small), *command],
        "install.installation",
        "os.rename",
        calls=renames,
        after=True,
    )
    assert out.exists() == (renames != 2)
    recover(out)
    if renames < 3:
        assert (tree(out), tree(previous)) == (old, older)
    else:
        assert tree(previous) == old
        assert tree(out)["model.fp16.onnx"] == older["model.fp16.onnx"]
    check_installation(out, NO_GPU)
    assert main(["engine", str(small), *command]) == 0
    assert sorted(os.listdir(tmp_path)) == ["device", "engine", "engine.previous"]


def test_nothing_but_an_installation_is_replaced(small, tmp_path, capsys):
    out = tmp_path / "engine"
    command = ["engine", str(small), "--target", "ort", "--out", str(out), *QUICK]
    out.mkdir()
    (out / "thesis.txt").write_text("draft")
    assert main(command) == 1
    assert "no installation of ampdeploy; nothing there was touched" in capsys.readouterr().err
    assert tree(out) == {"thesis.txt": sha256_file(out / "thesis.txt")}
    shutil.move(out, tmp_path / "engine.previous")
    assert main(command) == 1
    shutil.move(tmp_path / "engine.previous", tmp_path / "elsewhere")
    out.symlink_to(tmp_path / "elsewhere")
    assert main(command) == 1
    assert sorted(os.listdir(tmp_path / "elsewhere")) == ["thesis.txt"]


def test_the_last_installation_is_kept(small, other, tmp_path):
    out = tmp_path / "engine"
    install_command = ["--target", "ort", "--out", str(out), *QUICK]
    assert main(["engine", str(small), *install_command]) == 0
    first = tree(out)
    assert main(["engine", str(other), *install_command]) == 0
    second = tree(out)
    assert tree(tmp_path / "engine.previous") == first != second
    assert main(["engine", str(small), *install_command]) == 0
    assert tree(tmp_path / "engine.previous") == second
    assert tree(out)["model.fp16.onnx"] == first["model.fp16.onnx"]
    assert sorted(os.listdir(tmp_path)) == ["device", "engine", "engine.previous"]
