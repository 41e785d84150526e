"""Import zones, proven in fresh processes with the other packages blocked."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ampdeploy.cli import VERBS
from tests.conftest import REPOSITORY
from tests.targets.onnx_samples import images, write_linear_model

HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxscript", "onnxruntime", "safetensors", "PIL")

BLOCKER = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError("No module named " + repr(name), name=name)
sys.meta_path.insert(0, Blocker())
"""


def run(code, *, blocked=HEAVY):
    source = BLOCKER.format(blocked=set(blocked)) + code
    return subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)


def modules_of(*folders):
    for folder in folders:
        path = REPOSITORY / "ampdeploy" / folder
        for file in sorted(path.rglob("*.py") if path.is_dir() else [path]):
            parts = file.relative_to(REPOSITORY).with_suffix("").parts
            yield ".".join(p for p in parts if p != "__init__")


def test_core_and_device_side_import_without_torch_or_onnx():
    names = [
        "ampdeploy", "ampdeploy.cli", "ampdeploy.config", "ampdeploy.artifacts",
        "ampdeploy.errors", "ampdeploy.optional", "ampdeploy.progress", "ampdeploy.pipeline",
        "ampdeploy.run", "ampdeploy.models.registry", "ampdeploy.models.spec",
        *modules_of("commands", "stages", "report", "bench"),
        *(n for n in modules_of("targets") if not n.endswith(".torch")),
        "ampdeploy.export.session", "ampdeploy.export.verify",
    ]  # fmt: skip
    done = run(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("arguments", [["--help"], *[[verb, "--help"] for verb in VERBS]])
def test_help_needs_nothing_heavy(arguments):
    code = f"from ampdeploy.cli import main; sys.exit(main({arguments!r}))"
    done = run(code, blocked=(*HEAVY, "numpy", "psutil") if arguments == ["--help"] else HEAVY)
    assert done.returncode == 0, done.stderr
    assert "Usage: ampdeploy" in done.stdout


def test_option_parsing_never_names_a_heavy_module_at_the_top_level():
    for file in (REPOSITORY / "ampdeploy" / "commands").glob("*.py"):
        for node in ast.parse(file.read_text()).body:
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names.append(node.module)
            assert not {name.split(".")[0] for name in names} & {*HEAVY, "numpy"}, file


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        (["build", "--model", "dinov2_s", "--calib", "."], "torch"),
        (["prune", "--model", "dinov2_s", "--calib", "."], "torch"),
        (["build", "--model", "dinov2_s", "--calib", ".", "--dry-run"], "torch"),
        (["inspect", "--model", "dinov2_s"], "torch"),
        (["eval", "a.onnx", "--baseline", "b.onnx", "--images", "."], "torch"),
        (["bench", "a.onnx", "--baseline", "b.onnx", "--images", "."], "torch"),
    ],
)
def test_a_plain_install_says_which_extra_a_verb_needs(arguments, missing, tmp_path):
    code = f"""
import os; os.chdir({str(tmp_path)!r})
from ampdeploy.cli import main; sys.exit(main({arguments!r}))"""
    done = run(code)
    assert done.returncode == 4, done.stderr
    assert missing in done.stderr
    assert "pip install '.[cpu]' in a checkout of ampdeploy" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_bench_with_prepared_images_needs_the_runtime_alone(tmp_path):
    write_linear_model(tmp_path / "m.onnx")
    np.savez(tmp_path / "goldens.npz", images=images(4))
    files = [str(tmp_path / "m.onnx"), "--baseline", str(tmp_path / "m.onnx")]
    arguments = [
        "bench", *files, "--inputs", str(tmp_path / "goldens.npz"), "--batches", "1",
        "--min-runs", "2", "--seconds", "0.1", "--throughput-seconds", "0.1", "--json",
    ]  # fmt: skip
    code = f"from ampdeploy.cli import main; sys.exit(main({arguments!r}))"
    done = run(code, blocked=[name for name in HEAVY if name != "onnxruntime"])
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["latency"]["1"]["baseline"]["n"] >= 2
    done = run(code)
    assert done.returncode == 4, done.stderr
    assert "onnxruntime" in done.stderr


def test_models_and_doctor_work_on_a_plain_install():
    for verb in ("models", "doctor"):
        done = run(f"from ampdeploy.cli import main; sys.exit(main([{verb!r}, '--json']))")
        assert done.returncode == 0, done.stderr
        assert '"' in done.stdout


def test_a_broken_dependency_is_named_not_its_parent(tmp_path):
    package = tmp_path / "brokenpkg"
    package.mkdir()
    (package / "__init__.py").write_text("import surely_not_installed")
    (tmp_path / "noload.py").write_text("raise ImportError('libcudart.so.12: cannot open')")
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
from ampdeploy.optional import require
from ampdeploy.errors import MissingDependencyError
for name in ("brokenpkg", "noload", "tensorrt_rtx"):
    try: require(name, needed_by="a test")
    except MissingDependencyError as error: print(error)
"""
    lines = run(code, blocked=("tensorrt_rtx",)).stdout.splitlines()
    assert "'surely_not_installed'" in lines[0]
    assert "libcudart.so.12" in lines[1]
    assert "pip install '.[trt-rtx]' in a checkout" in lines[2]


def test_the_wheel_lists_every_package():
    # Read as text: tomllib is new in Python 3.11.
    section = (REPOSITORY / "pyproject.toml").read_text().split("packages = [")[1].split("]")[0]
    listed = set(ast.literal_eval(f"[{section}]"))
    folders = {
        ".".join(path.parent.relative_to(REPOSITORY).parts)
        for path in Path(REPOSITORY / "ampdeploy").rglob("__init__.py")
    }
    assert listed == folders | {"ampdeploy.calib_data"}
