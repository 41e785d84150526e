"""One tiny run and its bundle, for all tests of the device side."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from ampdeploy.cli import main
from ampdeploy.device.bundle import contents as form
from tests import runs
from tests.device.bundles import reseal, swap_goldens


@pytest.fixture(scope="session")
def deferred_run(tmp_path_factory) -> Path:
    """A finished FP16 build whose engine is left to the device. Do not change it."""
    folder = tmp_path_factory.mktemp("deferred")
    out = folder / "tiny"
    more = ("-q", "--target", "trt", "--engine", "deferred")
    assert main(runs.arguments(folder / "inputs", out, *more)) == 0
    return out


@pytest.fixture(scope="session")
def packed(deferred_run) -> Path:
    """Its bundle, a folder. Do not change it."""
    assert main(["bundle", str(deferred_run), "-q"]) == 0
    return deferred_run.with_name("tiny-bundle")


@pytest.fixture(scope="session")
def packed_tar(deferred_run, tmp_path_factory) -> Path:
    """Its bundle, a tar. Do not change it."""
    out = tmp_path_factory.mktemp("packed") / "tiny.tar"
    assert main(["bundle", str(deferred_run), "--out", str(out), "-q"]) == 0
    return out


@pytest.fixture
def bundle(packed, tmp_path) -> Path:
    """A copy of the bundle, to do anything with."""
    return Path(shutil.copytree(packed, tmp_path / "device" / "bundle"))


@pytest.fixture
def small(bundle):
    """The bundle with four golden images, for tests that run it often."""
    arrays = form.read_bundle(bundle).arrays(form.GOLDENS)
    np.savez(bundle / form.GOLDENS, **{name: value[:4] for name, value in arrays.items()})
    bank = form.read_bundle(bundle).arrays(form.BANK)
    np.savez(bundle / form.BANK, **{**bank, "golden_labels": bank["golden_labels"][:4]})
    reseal(bundle, golden_images=4)
    return bundle


@pytest.fixture
def other(small, tmp_path):
    """A bundle of another build: its own graph is the unpruned one."""
    folder = tmp_path / "device" / "other"
    shutil.copytree(small, folder)
    shutil.copy(folder / "baseline.fp16.onnx", folder / "model.fp16.onnx")
    swap_goldens(folder)
    return folder
