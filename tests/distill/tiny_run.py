"""A small distillation that tests run in their own process and in a child they kill.

``python -m tests.distill.tiny_run IMAGES STATE`` distils with `CONFIG` and goes on until done.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from ampdeploy.config import DistillConfig
from ampdeploy.data.folder import scan_folder
from ampdeploy.distill.trainer import DistillResult, distill
from ampdeploy.models.build import build_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.slim import slim
from tests.conftest import TINY

IDENTITY = "tiny"
# 20 images in batches of 4: 5 steps an epoch, 20 in all. A state after every step, so that
# whoever stops the run has one to go on from.
IMAGES = 20
CONFIG = DistillConfig(
    epochs=4, batch_size=4, base_lr=0.05, warmup_epochs=1.0, checkpoint_seconds=0, device="cpu"
)
STEPS = 20


def make_pair() -> tuple[VisionModel, VisionModel]:
    """A tiny student with half of the hidden neurons, and the dense teacher it comes from."""
    torch.manual_seed(0)
    teacher = build_model(TINY)
    torch.manual_seed(0)
    student = build_model(TINY)
    slim(student, [torch.arange(site.hidden // 2) for site in student.spec.sites])
    return student, teacher


def run(
    images: Path,
    state: Path,
    config: DistillConfig = CONFIG,
    *,
    pair: tuple[VisionModel, VisionModel] | None = None,
    identity: str = IDENTITY,
    **options,
) -> tuple[VisionModel, DistillResult]:
    """Distil a fresh pair, or the one given; returns the student and the result."""
    student, teacher = pair or make_pair()
    found = scan_folder(images, limit=None, seed=0)
    result = distill(
        student, teacher, found, config, state_path=state, identity=identity, **options
    )
    return student, result


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(Path(sys.argv[1]), Path(sys.argv[2]))
