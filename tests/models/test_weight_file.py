"""Weight files that this user may not read, or that no user can."""

from __future__ import annotations

import os

import pytest
import torch
from safetensors.torch import save_file

from ampdeploy.errors import WeightsError
from ampdeploy.models.weight_file import EXTENSIONS, check_weight_file, read_weight_file
from tests.unprivileged import open_folder, run_locked_out

IMPORTS = """
from ampdeploy.errors import WeightsError
from ampdeploy.models.weight_file import check_weight_file, read_weight_file
"""
READ = """
for path in map(Path, sys.argv[1:]):
    for read in (check_weight_file, read_weight_file):
        try:
            read(path)
            print("fine")
        except WeightsError as error:
            print(error)
"""


def test_below_a_folder_that_may_not_be_entered():
    with open_folder() as folder:
        locked = folder / "locked"
        locked.mkdir()
        inside, beside = locked / "a.safetensors", folder / "b.safetensors"
        for path in (inside, beside):
            save_file({"patch_embed.proj.weight": torch.ones(2)}, path)
            path.chmod(0o644)
        shown = run_locked_out(locked, IMPORTS, READ, [inside, beside]).splitlines()
    assert shown[2:] == ["fine", "fine"]
    for line in shown[:2]:
        assert line.startswith(f"cannot read weights {inside}: Permission denied.")


def test_a_file_that_may_not_be_read():
    with open_folder() as folder:
        paths = [folder / f"a{suffix}" for suffix in EXTENSIONS]
        for path in paths:
            path.write_bytes(b"x" * 100)
            path.chmod(0o600 if os.getuid() == 0 else 0)
        shown = run_locked_out(paths[0], IMPORTS, READ, paths).splitlines()
    assert shown[::2] == ["fine"] * len(paths)  # that it is a file can be seen
    for path, line in zip(paths, shown[1::2], strict=True):
        assert line.startswith(f"cannot read weights {path}: Permission denied."), line


def test_paths_nobody_can_follow(tmp_path):
    (tmp_path / "me.pth").symlink_to(tmp_path / "me.pth")
    with pytest.raises(WeightsError, match=r"cannot read weights .*me\.pth: Too many levels"):
        read_weight_file(tmp_path / "me.pth")
    with pytest.raises(WeightsError, match=r"cannot read weights .*: File name too long"):
        check_weight_file(tmp_path / ("x" * 300 + ".pth"))
    for name in ("nul\0.pth", "me.txt/file.pth"):
        (tmp_path / "me.txt").touch()
        with pytest.raises(WeightsError, match="does not exist"):
            check_weight_file(tmp_path / name)
