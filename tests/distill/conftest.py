"""Generated training images, and one torch thread so that sums have one order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from tests.distill.tiny_run import IMAGES


# As wide as the fixtures that train, which would otherwise run before it.
@pytest.fixture(autouse=True, scope="package")
def one_thread():
    """The child process of the resume test runs with one thread; so must what it is held to."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="package")
def train_folder(tmp_path_factory):
    """Images of smooth random colours, different from each other."""
    folder = tmp_path_factory.mktemp("train")
    random = np.random.default_rng(0)
    for index in range(IMAGES):
        coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
        coarse.resize((176, 176), Image.Resampling.BICUBIC).save(folder / f"{index:02d}.png")
    return folder
