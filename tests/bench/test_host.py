"""Facts about this machine, and the parsing of tools that this machine may not have."""

from __future__ import annotations

import getpass
import json
import os
import platform

import numpy as np
import pytest

from ampdeploy.bench.host import host_facts, parse_l4t, parse_nvidia_smi


def test_facts_describe_this_machine_and_are_json():
    facts = json.loads(json.dumps(host_facts(), allow_nan=False))
    assert facts["python"] == platform.python_version()
    assert facts["packages"]["numpy"] == np.__version__
    assert facts["packages"]["tensorrt-rtx"] is None or facts["packages"]["tensorrt-rtx"]
    assert 1 <= facts["cores_usable"] <= facts["cores_logical"]
    assert facts["ram_bytes"] > 1 << 28
    assert facts["gpus"] is None or facts["gpus"][0]["name"]


def test_facts_name_neither_machine_nor_user_nor_folder():
    def strings(value):
        if isinstance(value, dict):
            return [s for item in value.values() for s in strings(item)]
        if isinstance(value, list):
            return [s for item in value for s in strings(item)]
        return [value] if isinstance(value, str) else []

    found = strings(host_facts())
    assert platform.node() not in found
    assert getpass.getuser() not in found
    assert not any(s.startswith(os.sep) for s in found)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "NVIDIA H200, 580.65.06, 143771",
            {"name": "NVIDIA H200", "driver": "580.65.06", "memory_bytes": 143771 << 20},
        ),
        (
            "Orin (nvgpu), 540.4.0, [N/A]",
            {"name": "Orin (nvgpu)", "driver": "540.4.0", "memory_bytes": None},
        ),
    ],
)
def test_nvidia_smi_lines(line, expected):
    assert parse_nvidia_smi(f"{line}\n{line}\n") == [expected, expected]


def test_l4t_release():
    line = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64"
    assert parse_l4t(line) == "36.4.3"
    assert parse_l4t(None) is None
    assert parse_l4t("something else") is None
