"""Running what was deployed, in an application: pictures in, features out. No torch.

with ampdeploy.open_model("dev-bundle-engine") as model:
    features = model(["a.jpg", "b.jpg"])["features"]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ampdeploy.closing import Closing
from ampdeploy.device.preprocess import Preprocessing, preprocessing_of, read_preprocessing
from ampdeploy.errors import ArtifactError, DataError
from ampdeploy.targets.base import ENGINE_SUFFIXES, Runner, get_target, target_for

if TYPE_CHECKING:
    pass


class Model(Closing):
    """A deployed model, open. A context manager: what it holds of a GPU is freed at the end."""

    def __init__(self, runner: Runner, preprocess: Preprocessing) -> None:
        """Take over an open runner."""
        self.runner = runner
        """For arrays that are prepared already, and to measure: `Runner.run`."""
        self.preprocess = preprocess

    def __call__(self, pictures: Sequence[Path | str | np.ndarray | Any]) -> dict[str, np.ndarray]:
        """Features of pictures, however many.

        Args:
            pictures: Files, Pillow images, or arrays (H, W, 3) of uint8, RGB.

        Returns:
            "features" (N, C) and, where the model has them, "patch_features" (N, P, C), float32.

        Raises:
            DataError: No pictures, or one that is none.
        """
        if isinstance(pictures, str | Path) or not len(pictures):
            raise DataError("give a list of at least one picture.")
        return self.runner.run_all(np.stack([self.preprocess(picture) for picture in pictures]))

    def close(self) -> None:
        """Free the model. Closing twice is allowed."""
        self.runner.close()


def open_model(path: Path | str, *, target: str | None = None, threads: int | None = None) -> Model:
    """Open what `ampdeploy build` made or `ampdeploy engine` installed.

    Args:
        path: The folder of an installation, an engine (``engine.json`` beside it) or an ONNX file.
        target: What runs it; None: what it was installed or built for, `ort` for an ONNX file.
        threads: CPU threads of the runtime; None: its default.

    Raises:
        ArtifactError: There is no such file, it is damaged, or it is for another machine.
        MissingDependencyError: What runs it is not installed here, or there is no GPU for it.
    """
    path = Path(path)
    if path.is_dir():
        from ampdeploy.device.install.installation import read_installation

        found = read_installation(path)
        facts, size = found.preprocessing, found.image_size
        file, runs = path / found.artifact, get_target(target or found.target)
    else:
        file = path
        if not file.is_file():
            raise ArtifactError(f"there is no file {file}. Check the path, or build it first.")
        runs = get_target(target) if target else target_for(file)
        facts, size = _stated(file)
    preprocess = read_preprocessing(facts, size, where=path)
    return Model(runs.open(file, threads=threads), preprocess)


def _stated(file: Path) -> tuple[dict[str, Any], int]:
    if file.suffix in ENGINE_SUFFIXES:
        from ampdeploy.device.engine.manifest import read_manifest

        manifest = read_manifest(file)
        return manifest.preprocessing, manifest.image_size
    if file.suffix == ".safetensors":
        raise ArtifactError(
            f"{file} is a PyTorch checkpoint: load it with ampdeploy.load_slim, or open the ONNX "
            "file or engine that was made of it."
        )
    from ampdeploy.device.engine.onnx_types import metadata

    return preprocessing_of(file), int(metadata(file).get("image_size", 0))
