"""Measuring and reporting import on a device without the build host's packages."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = ("torch", "torchvision", "timm", "onnx", "onnxscript", "PIL", "safetensors")

MODULES = [
    "ampdeploy.bench.accuracy",
    "ampdeploy.bench.host",
    "ampdeploy.bench.latency",
    "ampdeploy.bench.memory",
    "ampdeploy.bench.memory_worker",
    "ampdeploy.report.codec",
    "ampdeploy.report.compare",
    "ampdeploy.report.html",
    "ampdeploy.report.markdown",
    "ampdeploy.report.result",
    "ampdeploy.report.rows",
    "ampdeploy.report.schema",
    "ampdeploy.report.terminal",
    "ampdeploy.report.verdict",
    "ampdeploy.targets.base",
    "ampdeploy.targets.ort",
    "ampdeploy.targets.torch",
]

SCRIPT = """
import importlib, sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for name in sys.argv[2].split(","):
    importlib.import_module(name)
"""


def _import_with_blocked(modules: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, ",".join(BLOCKED), ",".join(modules)],
        capture_output=True,
        text=True,
    )


def test_device_side_imports_without_the_build_hosts_packages():
    done = _import_with_blocked(MODULES)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", BLOCKED[:2])
def test_the_block_works(name):
    assert "ModuleNotFoundError" in _import_with_blocked([name]).stderr
