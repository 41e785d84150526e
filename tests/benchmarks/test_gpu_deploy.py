"""The commands of the GPU benchmark of the whole tool, and what is kept of what they say."""

from __future__ import annotations

import argparse

import pytest

from benchmarks.gpu.deploy import commands, run


def options(**changes):
    values = {
        "model": "dinov2_s", "weights": "w.safetensors", "energy": "trt", "params_cut": 0.3,
        "batches": "1,32", "seconds": 4.0,
    }  # fmt: skip
    return argparse.Namespace(**{**values, **changes})


def test_energy_is_measured_of_one_target_and_only_profiled_runtimes_are_explained(tmp_path):
    trt = commands(options(), "trt", tmp_path)
    assert [command[0] for command in trt] == ["build", "report", "gate", "explain"]
    assert "--energy-seconds" not in trt[0]
    torch = commands(options(), "torch-cuda", tmp_path)
    assert [command[0] for command in torch] == ["build", "report", "gate"]
    assert torch[0][torch[0].index("--energy-seconds") + 1] == "0"
    assert torch[0][torch[0].index("--weights") + 1] == "w.safetensors"
    assert "--weights" not in commands(options(weights=None), "ort", tmp_path)[0]


def test_what_a_command_said_is_kept_without_folders(tmp_path):
    missing = tmp_path / "report.json"
    row = run(["report", "--check", str(missing)], limit_s=120, hide=[f"{tmp_path}/"])
    assert row["exit_code"] == 1
    assert row["command"] == "ampdeploy report --check report.json"
    assert "report.json" in row["said"]
    assert str(tmp_path) not in row["said"]


@pytest.mark.parametrize("limit", [0.01])
def test_a_command_that_takes_too_long_has_no_exit_code(limit):
    row = run(["doctor"], limit_s=limit, hide=[])
    assert row["exit_code"] is None
    assert "stopped after" in row["said"]
