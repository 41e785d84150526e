"""A small but complete build that the tests share: tiny ViT, real images, real ONNX Runtime."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.conftest import CALIB_DATA, TINY

CALIB_PER_CLASS = 10
EVAL_PER_CLASS = 3
CLASSES = 4

# Small enough for seconds, large enough for every stage to do real work.
OPTIONS = [
    "--calib-images", "16", "--micro-batch", "5", "--bench-batches", "1,2",
    "--bench-seconds", "1", "--energy-seconds", "0", "--threads", "1",
]  # fmt: skip
CUT = 0.2
DIVERGENCE = ("--params-cut", str(CUT))
AMP = ("--search", "amp", "--batch", "8", "--entropy-threshold", "0.002")


def copy_images(folder: Path) -> tuple[Path, Path]:
    """A few of the shipped images: (calibration folder, evaluation folder)."""
    for split, count in (("train", CALIB_PER_CLASS), ("val", EVAL_PER_CLASS)):
        for source in sorted((CALIB_DATA / split).iterdir())[:CLASSES]:
            target = folder / split / source.name
            target.mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                shutil.copy(image, target)
    # MIN_EVAL_IMAGES asks for a few more than 4 classes x 3.
    source = sorted((CALIB_DATA / "val").iterdir())[CLASSES]
    target = folder / "val" / source.name
    target.mkdir()
    for image in sorted(source.iterdir())[:5]:
        shutil.copy(image, target)
    return folder / "train", folder


def tiny_weights(path: Path, model: str = TINY) -> Path:
    """Random weights of a tiny ViT as a timm checkpoint."""
    import torch
    from safetensors.torch import save_file

    from ampdeploy.models.build import build_model

    torch.manual_seed(0)
    backbone = build_model(model).backbone
    with torch.no_grad():
        # As new, biases are all 0 and MLPs contribute next to nothing.
        for parameter in backbone.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    save_file(backbone.state_dict(), path)
    return path


def arguments(folder: Path, out: Path, *more: str, search: Sequence[str] = DIVERGENCE) -> list[str]:
    """`ampdeploy build` on images and weights in `folder`, which are made if need be."""
    if not (folder / "train").exists():
        copy_images(folder)
        tiny_weights(folder / "tiny.safetensors")
    return [
        "build", "--model", TINY, "--weights", str(folder / "tiny.safetensors"),
        "--calib", str(folder / "train"), "--eval", str(folder), "--out", str(out),
        *OPTIONS, *search, *more,
    ]  # fmt: skip


def prune_arguments(folder: Path, out: Path, *, search: Sequence[str] = DIVERGENCE) -> list[str]:
    """`ampdeploy prune` with the options of `arguments` that it has."""
    command = ["prune", *arguments(folder, out, search=search)[1:]]
    for option in ("--bench-batches", "--bench-seconds", "--energy-seconds", "--threads"):
        position = command.index(option)
        del command[position : position + 2]
    return command


def start(command: list[str]) -> subprocess.Popen[str]:
    """`ampdeploy` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "ampdeploy", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
