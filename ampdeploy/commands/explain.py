"""`ampdeploy explain`: why it is, or is not, faster."""

from __future__ import annotations

from pathlib import Path

import click

from ampdeploy.commands import common
from ampdeploy.errors import ArtifactError, ConfigError


@click.command("explain")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--baseline", type=common.FILE, help="Artifact that PATH, a file, is compared with.")
@click.option("--batch", type=int, default=1, show_default=True, help="Images per call.")
@click.option("--threads", type=int, help="CPU threads of the runtime. Default: its own choice.")
@click.option("--runs", type=int, default=30, show_default=True, help="Profiled calls of each.")
@common.as_json
@common.verbosity
def command(
    path: Path, baseline: Path | None, batch: int, threads: int | None, runs: int, json_: bool
) -> None:
    """Predicted against measured speed-up, per block and kind of operator, and the reasons.

    PATH is a run directory, or a pruned .onnx file or engine with --baseline.
    """
    target, dense, slim = _find_pair(path, baseline)
    from ampdeploy.explain.run import explain_pair
    from ampdeploy.report.codec import to_plain

    result = explain_pair(target, dense, slim, batch=batch, threads=threads, runs=runs)
    if json_:
        common.print_json(to_plain(result))
        return
    from rich.console import Console

    from ampdeploy.explain.terminal import explanation_view

    Console().print(explanation_view(result))


def _find_pair(path: Path, baseline: Path | None) -> tuple[str, Path, Path]:
    """Target, baseline and pruned artifact.

    Raises:
        ConfigError: A run with --baseline, or a file without.
        ArtifactError: A file is missing, or the run's are not of its present model.
    """
    from ampdeploy.targets.base import target_for

    if path.is_dir():
        if baseline is not None:
            raise ConfigError(
                f"{path} is a run directory, which has its own baseline; leave --baseline out, or "
                "give the pruned file instead of the folder."
            )
        return _of_run(path)
    for file in (path, baseline):
        if file is not None and not file.is_file():
            raise ArtifactError(f"there is no file {file}. Check the path, or build it first.")
    if baseline is None:
        raise ConfigError(f"explain compares two models: give {path} and --baseline BASELINE.")
    targets = [target_for(file).name for file in (path, baseline)]
    if targets[0] != targets[1]:
        raise ConfigError(
            f"{path.name} runs on {targets[0]} and {baseline.name} on {targets[1]}; compare two "
            "files of one kind."
        )
    return targets[0], baseline, path


def _of_run(run: Path) -> tuple[str, Path, Path]:
    from ampdeploy import artifacts
    from ampdeploy.pipeline import require_current, rerun_config
    from ampdeploy.stages.common import runnable_artifacts

    config = rerun_config(run)
    dense, slim = (run / name for name in runnable_artifacts(config, config.target))
    stage = "export" if slim.name == artifacts.MODEL_ONNX else "engine"
    if slim.suffix == ".plan" and not slim.is_file():
        raise ArtifactError(
            f"{run} holds no {slim.name}: its engine is built elsewhere, or not yet. Explain its "
            f"graphs instead: ampdeploy explain {run / artifacts.MODEL_ONNX} --baseline "
            f"{run / artifacts.BASELINE_ONNX}"
        )
    require_current(config, stage, f"ampdeploy {stage} {run}")
    return config.target, dense, slim
