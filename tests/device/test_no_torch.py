"""The device side as a device has it: an environment of its own, without torch, timm and onnx.

The project is installed into it as a user would, without extras, from a copy of the sources; the
bundle is packed by this environment and installed by that one.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ampdeploy.artifacts import sha256_file
from ampdeploy.device.bundle.contents import read_bundle
from ampdeploy.device.preprocess import read_preprocessing
from ampdeploy.precision.compare import agreement
from ampdeploy.targets.base import get_target
from tests.conftest import REPOSITORY

pytestmark = pytest.mark.slow

SOURCES = ("ampdeploy", "calib_data", "pyproject.toml", "README.md", "LICENSE")
# Of what a build host has, nothing must come along.
ABSENT = ("torch", "torchvision", "timm", "onnx", "onnxscript", "safetensors", "PIL")
OLDEST = "3.10"


def oldest_python() -> str:
    """Python 3.10 where it is here, which is what a Jetson has; else the one that runs this."""
    candidates = [shutil.which(f"python{OLDEST}")]
    pyenv = Path.home() / ".pyenv" / "versions"
    candidates += [str(path) for path in sorted(pyenv.glob(f"{OLDEST}.*/bin/python"))]
    for candidate in candidates:
        if candidate and run(candidate, "-c", "import venv, ensurepip", check=False) == 0:
            return candidate
    return sys.executable


def run(*command: str | Path, check: bool = True) -> int:
    """Run a command to its end, and show what it said if it failed."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done.returncode


@pytest.fixture(scope="module")
def venv(tmp_path_factory) -> Path:
    """Programs of an environment with ampdeploy and ONNX Runtime."""
    folder = tmp_path_factory.mktemp("device")
    sources = folder / "sources"
    sources.mkdir()
    ignored = shutil.ignore_patterns("__pycache__")
    for name in SOURCES:
        path = REPOSITORY / name
        copy = shutil.copy if path.is_file() else shutil.copytree
        copy(path, sources / name, **({} if path.is_file() else {"ignore": ignored}))
    run(oldest_python(), "-m", "venv", folder / "venv")
    programs = folder / "venv" / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", sources, "onnxruntime")
    return programs


def engine(venv: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """`ampdeploy engine` in the other environment, away from the checkout."""
    return subprocess.run(
        [str(venv / "ampdeploy"), "engine", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=venv,
    )


def test_none_of_a_build_hosts_packages_came_along(venv):
    code = f"""
import importlib.util, sys
import ampdeploy
print([name for name in {ABSENT!r} if importlib.util.find_spec(name)])
print(ampdeploy.__file__)
print(sys.version_info[:2])"""
    done = subprocess.run([venv / "python", "-c", code], capture_output=True, text=True, cwd=venv)
    absent, where, version = done.stdout.splitlines()
    assert absent == "[]"
    assert where.startswith(str(venv.parent))
    print(f"Python {version}")


def test_the_bundle_installs_with_onnx_runtime(venv, packed_tar, tmp_path):
    bundle, out = tmp_path / "tiny.tar", tmp_path / "tiny-engine"
    shutil.copy(packed_tar, bundle)
    done = engine(venv, bundle, "--target", "ort", "--json", "-q")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["installation"]
    assert said["self_test"]["batches"]["8"]["features"]["cosine_p1"] > 0.999
    assert said["comparison"]["latency_ms"]["ratio"]["value"] > 0
    assert said["self_test"]["knn"]["agreement"] >= 0.9
    assert said["files"]["model.fp16.onnx"]["sha256"] == sha256_file(out / "model.fp16.onnx")
    assert engine(venv, out).returncode == 0


APPLICATION = """
import sys
import numpy as np
import ampdeploy
with ampdeploy.open_model(sys.argv[1]) as model:
    found = model(sys.argv[3:])
    np.savez(sys.argv[2], **found)
"""


def test_an_application_runs_what_is_installed_there(venv, packed, calib_data, tmp_path):
    run(venv / "python", "-m", "pip", "install", "--quiet", "pillow")
    bundle, out = tmp_path / "bundle", tmp_path / "bundle-engine"
    shutil.copytree(packed, bundle)
    assert engine(venv, bundle, "--target", "ort", "--no-compare", "-q").returncode == 0
    pictures = sorted((calib_data / "val").rglob("*.jpg"))[:3]
    run(venv / "python", "-c", APPLICATION, out, tmp_path / "found.npz", *pictures)
    facts = read_bundle(packed).manifest
    prepare = read_preprocessing(facts.preprocessing, facts.image_size, where=packed)
    images = np.stack([prepare(picture) for picture in pictures])
    with get_target("ort").open(packed / facts.onnx) as runner:
        expected = runner.run(images)
    with np.load(tmp_path / "found.npz") as found:
        for name, values in expected.items():
            assert agreement(found[name], values).cosine_min > 0.999


def test_damage_is_found_there_as_well(venv, packed, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(packed, bundle)
    data = bytearray((bundle / "model.fp16.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (bundle / "model.fp16.onnx").write_bytes(data)
    done = engine(venv, bundle, "--target", "ort", "-q")
    assert done.returncode == 1
    assert "model.fp16.onnx: changed" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_is_missing_there_is_named(venv, deferred_run, packed):
    for arguments, missing in (
        (("engine", packed), "tensorrt"),
        (("engine", packed, "--target", "trt-rtx"), "tensorrt_rtx"),
        (("bundle", deferred_run), "torch"),
    ):
        done = subprocess.run([venv / "ampdeploy", *arguments], capture_output=True, text=True)
        assert done.returncode == 4, done.stderr
        assert missing in done.stderr
        assert "Traceback" not in done.stderr


def test_an_engine_is_built_there(venv, packed, tmp_path):
    run(venv / "python", "-m", "pip", "install", "--quiet", "tensorrt-rtx>=1.2")
    bundle, out = tmp_path / "bundle", tmp_path / "engine"
    shutil.copytree(packed, bundle)
    done = engine(
        venv, bundle, "--target", "trt-rtx", "--out", out, "--untested", "--no-compare", "--json"
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)["installation"]
    manifest = json.loads((out / "engine.json").read_text())
    assert manifest["plan_sha256"] == sha256_file(out / "engine.plan")
    assert manifest["precision"]["half_share"] > 0.9
    assert manifest["onnx_sha256"] == sha256_file(bundle / "model.fp16.onnx")
    assert said["runtime"] == {"trt-rtx": manifest["tensorrt_version"]}
