"""`ampdeploy engine`: build a run's engines here, or a bundle's on its device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ampdeploy import artifacts
from ampdeploy.commands import common
from ampdeploy.config import ENGINE_TARGETS
from ampdeploy.config.build import sizes_to_time
from ampdeploy.errors import ArtifactError, ConfigError

if TYPE_CHECKING:
    from ampdeploy.device.install.installation import Installation


@click.command("engine")
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--target", help="Bundle: what to build for. Default: what it was packed for.")
@click.option(
    "--out", type=common.FOLDER, help="Bundle: folder to install into. Default: <bundle>-engine."
)
@click.option(
    "--untested",
    is_flag=True,
    help="Bundle: install an engine even where no GPU can test it. One that fails never is.",
)
@click.option(
    "--no-compare", is_flag=True, help="Bundle: do not build and time the unpruned model."
)
@common.memory_limit
@common.as_json
@common.verbosity
def command(path: Path, json_: bool, memory_limit: str | None, **options: Any) -> None:
    """Build the engines of PATH: a run directory, or a bundle (folder or .tar) on its device.

    A bundle is checked, built, tested against its golden outputs, compared with the unpruned model
    and installed; or nothing is changed. An installation given as PATH is checked.
    """
    kind = _kind(path)
    if kind != "bundle":
        _refuse_options(path, kind, options)
    if kind == "installation":
        if memory_limit is not None:
            raise ConfigError(
                f"{path} is an installation: nothing is built. Leave --memory-limit out."
            )
        _check(path, json_)
        return
    limit = None
    if memory_limit is not None:
        limit = common.memory_size(memory_limit, "--memory-limit")
    if kind == "run":
        _build_run(path, json_, limit)
    else:
        _install(path, json_, memory_limit_bytes=limit, **options)


def _kind(path: Path) -> str:
    """``run``, ``installation`` or ``bundle``, by what is there."""
    from ampdeploy.device.bundle.contents import HEAD
    from ampdeploy.device.install.installation import INSTALL_JSON

    if not path.exists():
        raise ArtifactError(f"there is nothing at {path}. Give a run, a bundle or its .tar.")
    if path.is_file() or any((path / name).exists() for name in HEAD):
        return "bundle"
    if (path / artifacts.MANIFEST).is_file():
        return "run"
    if (path / INSTALL_JSON).is_file():
        return "installation"
    raise ArtifactError(
        f"{path} is no run ({artifacts.MANIFEST}), no bundle ({HEAD[0]}) and no installation "
        f"({INSTALL_JSON}). Give the --out of a build, or what `ampdeploy bundle` wrote."
    )


def _refuse_options(path: Path, kind: str, options: dict[str, Any]) -> None:
    given = [f"--{name.replace('_', '-')}" for name, value in sorted(options.items()) if value]
    if given:
        article = "an" if kind == "installation" else "a"
        raise ConfigError(
            f"{', '.join(given)} is for a bundle, and {path} is {article} {kind}. Leave it out."
        )


def _build_run(path: Path, json_: bool, memory_limit_bytes: int | None) -> None:
    from ampdeploy.pipeline import build, rerun_config

    config = rerun_config(path)
    if not config.builds_engine:
        raise ConfigError(
            f"{path} was built for target {config.target}, which has no engine: it runs the model "
            f"as it is. Build it again with --target {' or '.join(ENGINE_TARGETS)}."
        )
    # Deferred was the build; this asks for it now.
    engine = dataclasses.replace(config.engine, when="now")
    if memory_limit_bytes is not None:
        engine = dataclasses.replace(engine, memory_limit_bytes=memory_limit_bytes)
    # While the engine was deferred, other sizes could be asked for.
    sizes = sizes_to_time(config.bench.batch_sizes, config.target, engine)
    bench = dataclasses.replace(config.bench, batch_sizes=sizes)
    finished = build(dataclasses.replace(config, engine=engine, bench=bench), until="engine")
    plans = (artifacts.ENGINE_PLAN, artifacts.BASELINE_PLAN)
    facts = {name: artifacts.read_json(finished.path(name).with_suffix(".json")) for name in plans}
    if json_:
        common.print_json(facts)
        return
    for name, said in facts.items():
        click.echo(
            f"{finished.path(name)}: {said['plan_bytes'] / 1e6:.1f} MB, {said['target']} "
            f"{said['tensorrt_version']}, compute capability "
            f"{', '.join(said['compute_capabilities'])}"
        )


def _check(path: Path, json_: bool) -> None:
    from ampdeploy.device.install.installation import check_installation
    from ampdeploy.device.platform import device_facts

    _show(path, check_installation(path, device_facts(free_memory=False)), json_)


def _install(path: Path, json_: bool, *, no_compare: bool, **options: Any) -> None:
    from ampdeploy.device.install.bundle import InstallOptions, install_bundle

    out, installation = install_bundle(path, InstallOptions(compare=not no_compare, **options))
    _show(out, installation, json_)


def _show(folder: Path, installation: Installation, json_: bool) -> None:
    from ampdeploy.report.codec import to_plain

    if json_:
        common.print_json({"path": str(folder), "installation": to_plain(installation)})
        return
    runtime = ", ".join(f"{name} {version}" for name, version in installation.runtime.items())
    click.echo(
        f"{folder / installation.artifact}: {installation.model}, {installation.precision}, "
        f"{runtime}"
    )
    tested = installation.self_test
    if tested is None:
        click.echo(f"NOT TESTED: {installation.untested}")
    else:
        sizes = ", ".join(tested.batches)
        click.echo(
            f"tested on {tested.images} golden images at batch {sizes}: p1 cosine "
            f"{tested.worst:.6f}, bar {tested.min_cosine_p1:g}"
        )
        if tested.knn:
            click.echo(
                f"k-NN of {tested.knn.images} images: {tested.knn.agreement:.0%} as in float32, "
                f"{round(tested.knn.accuracy * tested.knn.images)} right (unpruned "
                f"{round(tested.knn.baseline_accuracy * tested.knn.images)})"
            )
    if installation.comparison is None:
        click.echo(f"not compared with the unpruned model: {installation.why_no_comparison}")
        return
    latency = installation.comparison["latency_ms"]
    ratio = latency["ratio"]
    interval = (
        ""
        if ratio["ci95_low"] is None
        else (f" [{ratio['ci95_low']:.3f}, {ratio['ci95_high']:.3f}]")
    )
    click.echo(
        f"batch {latency['batch_size']}: p50 {latency['baseline']['p50']:.2f} -> "
        f"{latency['pruned']['p50']:.2f} ms, ratio {ratio['value']:.3f}{interval}, n "
        f"{latency['baseline']['n']}"
    )
