"""Nothing half-written, nothing overwritten, nothing misread."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ampdeploy import artifacts
from ampdeploy.artifacts import Manifest, StageRecord, atomic_path, run_lock, write_json
from ampdeploy.disk import megabytes
from ampdeploy.errors import AmpDeployError, ArtifactError


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"new": float("nan")})

    def fail_half_way(temporary):
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        artifacts.write_with(path, fail_half_way)
    assert artifacts.read_json(path) == {"old": 1}
    assert os.listdir(tmp_path) == ["a.json"]


LIMITED = """
import resource, sys
from pathlib import Path
import torch
from ampdeploy.errors import AmpDeployError
from ampdeploy.artifacts import write_text
from ampdeploy.checkpoint import write_safetensors
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
for write in (
    lambda p: write_text(p, "x" * (1 << 20)),
    lambda p: write_safetensors(p, {"a": torch.zeros(1 << 20)}, {}),
):
    try:
        write(Path(sys.argv[1]))
    except AmpDeployError as error:
        print(error)
"""


def test_a_limit_of_files_is_a_user_error_and_leaves_the_old_file(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, str(path)], capture_output=True, text=True, check=True
    )
    said = "a file may not be as large as that here (the limit is 65.5 kB). It takes "
    assert done.stdout.count(said) == done.stdout.count("ulimit -f") == 2
    assert f"{said}1.0 MB" in done.stdout
    assert f"{said}4.2 MB" in done.stdout
    assert "disk is full" not in done.stdout
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["model.safetensors"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
@pytest.mark.parametrize(
    ("needed", "said"), [(None, "left). Nothing was"), (52_428_800, "left). It takes 52 MB. Noth")]
)
def test_a_full_disk_says_what_is_left_and_what_it_takes(tmp_path, needed, said):
    path = tmp_path / "new" / "model.onnx"
    with (
        pytest.raises(
            AmpDeployError, match=r"the disk is full \(No space.*, \d+ MB left"
        ) as caught,
        artifacts.explain_os_errors(path, needed=needed),
        open("/dev/full", "wb", buffering=0) as full,
    ):
        full.write(b"x")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("count", "said"),
    [(12, "0.0 kB"), (52_000, "52.0 kB"), (999_999, "1.0 MB"), (3 * 10**9, "3000 MB")],
)
def test_amounts_as_people_read_them(count, said):
    assert megabytes(count) == said


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(AmpDeployError, match=r"cannot write .*file/run"):
        artifacts.prepare_folder(blocked / "run")
    with pytest.raises(AmpDeployError, match="cannot write"), atomic_path(blocked / "x") as path:
        path.write_text("x")


def test_damaged_and_foreign_json(tmp_path):
    path = tmp_path / "x.json"
    with pytest.raises(ArtifactError, match="does not exist"):
        artifacts.read_json(path)
    path.write_text('{"a": ')
    with pytest.raises(ArtifactError, match="damaged"):
        artifacts.read_json(path)


def record(**changes):
    fields = {
        "fingerprint": "f",
        "options": {},
        "inputs": {},
        "outputs": {},
        "versions": {},
        "seconds": 1.0,
        "facts": {},
    }
    return StageRecord(**{**fields, **changes})


def test_manifest_round_trip(tmp_path):
    manifest = Manifest.create(tmp_path, model="dinov2_s", tool_version="1")
    manifest.put("data", record(facts={"n": 3}))
    manifest.save()
    again = Manifest.read(tmp_path)
    assert again.model == "dinov2_s"
    assert again.facts("data") == {"n": 3}
    assert again.stage("score") is None
    with pytest.raises(ArtifactError, match="no finished stage 'score'"):
        again.facts("score")


def test_a_manifest_of_another_version_or_none_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="not a run of ampdeploy"):
        Manifest.read(tmp_path)
    (tmp_path / artifacts.MANIFEST).write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        Manifest.read(tmp_path)


def test_what_a_killed_process_left_is_cleared(tmp_path):
    """Files and scratch folders alike; `kill -9` runs no clean-up."""
    code = f"""
import os, pathlib
from ampdeploy.artifacts import atomic_path, scratch_folder
near = pathlib.Path({str(tmp_path)!r}) / "model.onnx"
with scratch_folder(near) as folder, atomic_path(near) as temporary:
    (folder / "graph.onnx").write_bytes(b"weights")
    temporary.write_bytes(b"half")
    os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code]).returncode == -9
    left = list(tmp_path.iterdir())
    assert len(left) == 2
    (tmp_path / "kept").mkdir()
    artifacts.remove_stale_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_two_builds_cannot_share_a_folder(tmp_path):
    with (
        run_lock(tmp_path),
        pytest.raises(AmpDeployError, match="another ampdeploy"),
        run_lock(tmp_path),
    ):
        pass
    with run_lock(tmp_path):  # and it is free again afterwards
        pass


def test_hash_does_not_depend_on_key_order():
    assert artifacts.sha256_json({"a": 1, "b": [2]}) == artifacts.sha256_json({"b": [2], "a": 1})
    assert artifacts.sha256_json({"a": 1}) != artifacts.sha256_json({"a": 2})
