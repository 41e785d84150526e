"""What `eval` and `bench` compare: the two models of a run, or any two artifacts. Not a verb."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ampdeploy import artifacts
from ampdeploy.commands.common import FILE, FOLDER, stack
from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.optional import require_build_host

if TYPE_CHECKING:
    from ampdeploy.config import BuildConfig
    from ampdeploy.models.spec import ModelSpec

files_options = stack(
    click.argument("artifact", type=FILE, required=False),
    click.option("--baseline", type=FILE, help="Artifact that ARTIFACT is compared with."),
    click.option("--run", type=FOLDER, help="A run directory, instead of two artifacts."),
    click.option("--target", help="Runtime. Default: the run's, or by the file's suffix."),
)
pair_options = stack(
    files_options,
    click.option("--images", type=FOLDER, required=True, help="Folder of images."),
)


@dataclass(frozen=True, kw_only=True)
class PairFiles:
    """Two artifacts, and what runs them."""

    baseline: Path
    pruned: Path
    target: str


@dataclass(frozen=True, kw_only=True)
class Pair(PairFiles):
    """Two artifacts of one model."""

    spec: ModelSpec


def find_pair(
    verb: str, artifact: Path | None, baseline: Path | None, run: Path | None, target: str | None
) -> Pair:
    """Work out which two files to compare, on what, and how their images are prepared.

    Raises:
        ConfigError: Neither a run nor two artifacts, or both.
        ArtifactError: A file is missing, or the two are of different models.
    """
    require_build_host(f"ampdeploy {verb}")
    from ampdeploy.evaluate import spec_of

    files = find_files(verb, artifact, baseline, run, target)
    spec, other = spec_of(files.pruned), spec_of(files.baseline)
    if (spec.name, spec.image_size) != (other.name, other.image_size):
        raise ArtifactError(
            f"{files.pruned.name} is {spec.name} at {spec.image_size} px, but "
            f"{files.baseline.name} is {other.name} at {other.image_size} px. Compare a model with "
            "its own baseline."
        )
    return Pair(baseline=files.baseline, pruned=files.pruned, target=files.target, spec=spec)


def find_files(
    verb: str, artifact: Path | None, baseline: Path | None, run: Path | None, target: str | None
) -> PairFiles:
    """Work out which two files to compare, and on what. For a device too: needs no torch.

    Raises:
        ConfigError: Neither a run nor two artifacts, or both.
        ArtifactError: A file is missing.
    """
    from ampdeploy.targets.base import get_target, target_for

    if (run is None) == (artifact is None and baseline is None):
        raise ConfigError(f"{verb} takes --run RUN, or ARTIFACT with --baseline BASELINE.")
    if run is not None:
        from ampdeploy.pipeline import require_current, rerun_config
        from ampdeploy.stages.common import runnable_artifacts

        config = rerun_config(run)
        chosen = get_target(target or config.target)
        names = runnable_artifacts(config, chosen.name)
        stage, then = _made_by(config, names[0], run)
        require_current(config, stage, then)
        baseline, artifact = (run / name for name in names)
    elif artifact is None or baseline is None:
        raise ConfigError(f"{verb} compares two models: give ARTIFACT and --baseline BASELINE.")
    else:
        chosen = get_target(target) if target else target_for(artifact)
    for path in (artifact, baseline):
        if not path.is_file():
            raise ArtifactError(f"there is no file {path}. Check the path, or build it first.")
    return PairFiles(baseline=baseline, pruned=artifact, target=chosen.name)


def _made_by(config: BuildConfig, artifact: str, run: Path) -> tuple[str, str]:
    """The stage that writes an artifact, and the command that runs it.

    Raises:
        ArtifactError: This run makes no such artifact.
    """
    if artifact == artifacts.BASELINE_ONNX:
        return "export", f"ampdeploy export {run}"
    if artifact != artifacts.BASELINE_PLAN:
        return ("distill" if config.distill.epochs else "slim"), f"ampdeploy export {run}"
    if not config.builds_engine or config.engine.when == "deferred":
        raise ArtifactError(
            f"{run} is a build for target {config.target} without an engine. Name another "
            "--target, or build it with --target trt or trt-rtx."
        )
    return "engine", f"ampdeploy engine {run}"
