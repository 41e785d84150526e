"""Fixtures of the model tests."""

from __future__ import annotations

import pytest

from tests.conftest import DINOV2_S_WHEEL


@pytest.fixture(scope="session")
def dinov2_s_native():
    """Real DINOv2-S at 518 pixels, the size of its stored position grid, and its provenance."""
    from ampdeploy.models.build import build_model
    from ampdeploy.models.weights import load_weights

    model = build_model("dinov2_s", image_size=518)
    return model, load_weights(model, DINOV2_S_WHEEL)
