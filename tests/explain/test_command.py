"""`ampdeploy explain` as a user calls it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest

from ampdeploy import artifacts
from ampdeploy.cli import main
from ampdeploy.explain.run import MIN_RUNS
from tests import runs
from tests.test_zones import HEAVY, modules_of, run

QUICK = ["--threads", "1", "--runs", str(MIN_RUNS), "--batch", "8", "-q"]


def test_two_files_as_tables_and_findings(pair_of, capsys):
    pair = pair_of("plain")
    assert main(["explain", str(pair.slim), "--baseline", str(pair.baseline), *QUICK]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "per kind of operator", "per block", "mlp fc1", "128 -> 50", "FusedMatMul 3",
        "Predicted: roofline", "turn and turn about", "- Attention is not fused",
    ):  # fmt: skip
        assert text in shown


def test_two_files_as_json(pair_of, capsys):
    pair = pair_of("plain")
    command = ["explain", str(pair.slim), "--baseline", str(pair.baseline), "--json", *QUICK]
    assert main(command) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["target"], data["batch"], data["threads"]) == ("ort", 8, 1)
    assert all(finding["numbers"] for finding in data["findings"])
    assert {cell["scope"] for cell in data["cells"]} == {"cell"}


@pytest.fixture(scope="module")
def exported_run(tmp_path_factory):
    """A finished tiny build."""
    folder = tmp_path_factory.mktemp("explained")
    assert main(runs.arguments(folder / "inputs", folder / "run", "-q")) == 0
    return folder / "run"


def test_a_run_directory(exported_run, capsys):
    capsys.readouterr()
    assert main(["explain", str(exported_run), "--json", *QUICK]) == 0
    data = json.loads(capsys.readouterr().out)
    widths = json.loads((exported_run / artifacts.WIDTHS).read_text())["blocks"]
    assert [w for _, _, w in data["widths"]] == [block["kept"] for block in widths]
    assert [w for _, w, _ in data["widths"]] == [block["hidden"] for block in widths]


def test_a_run_whose_graph_was_changed_is_refused(exported_run, tmp_path, capsys):
    copied = tmp_path / "run"
    shutil.copytree(exported_run, copied)
    with open(copied / artifacts.MODEL_ONNX, "ab") as file:
        file.write(b"\0")
    assert main(["explain", str(copied), *QUICK]) == 1
    assert "Run `ampdeploy export" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{run}", "--baseline", "{onnx}"], 2, "which has its own baseline"),
        (["{onnx}"], 2, "compares two models"),
        (["{onnx}", "--baseline", "nowhere.onnx"], 1, "there is no file nowhere.onnx"),
        (["nowhere.onnx", "--baseline", "{onnx}"], 1, "there is no file nowhere.onnx"),
        (["{onnx}", "--baseline", "{onnx}", "--runs", "19"], 2, "runs of 20 or more"),
        (["{onnx}", "--baseline", "{weights}"], 2, "compare two files of one kind"),
        (["{weights}", "--baseline", "{weights}"], 2, "the target is torch"),
        (["{folder}"], 1, "manifest.json"),
    ],
)
def test_wrong_input_is_refused(exported_run, tmp_path, capsys, arguments, code, message):
    places = {
        "run": exported_run,
        "onnx": exported_run / artifacts.MODEL_ONNX,
        "weights": exported_run / artifacts.SLIM,
        "folder": tmp_path,
    }
    assert main(["explain", *(argument.format(**places) for argument in arguments)]) == code
    assert message in capsys.readouterr().err


def test_a_damaged_file_is_refused(exported_run, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not onnx")
    baseline = str(exported_run / artifacts.BASELINE_ONNX)
    assert main(["explain", str(path), "--baseline", baseline, *QUICK]) == 1
    assert "cannot be opened as ONNX" in capsys.readouterr().err


def test_the_package_imports_without_torch_onnx_or_a_runtime():
    names = list(modules_of("explain"))
    assert len(names) > 10
    done = run(f"import importlib\nfor name in {names!r}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_a_device_without_onnx_is_told_what_to_install(pair_of):
    pair = pair_of("plain")
    arguments = ["explain", str(pair.slim), "--baseline", str(pair.baseline), "-q"]
    code = f"from ampdeploy.cli import main; sys.exit(main({arguments!r}))"
    done = run(code, blocked=[name for name in HEAVY if name != "onnxruntime"])
    assert done.returncode == 4, done.stderr
    assert "ampdeploy explain needs the package 'onnx'" in done.stderr


def test_profiling_leaves_no_files_behind(pair_of, tmp_path):
    pair = pair_of("plain")
    command = [sys.executable, "-m", "ampdeploy", "explain", str(pair.slim)]
    command += ["--baseline", str(pair.baseline), *QUICK]
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "TMPDIR": str(temporary)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    # ONNX Runtime itself may leave a file of its own (.ses).
    left = {path.name for path in tmp_path.rglob("*")} - {"tmp", ".ses"}
    assert left == set()
