"""Evaluate, bench and report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.stages.common import (
    bank_of,
    model_spec,
    queries_of,
    runnable_artifacts,
    student_artifact,
)

if TYPE_CHECKING:
    from ampdeploy.run import Run
    from ampdeploy.targets.base import Runner


def _open_pair(run: Run) -> tuple[Runner, Runner]:
    from ampdeploy.targets.base import get_target

    target = get_target(run.config.target)
    baseline, pruned = (run.path(name) for name in runnable_artifacts(run.config))
    threads = run.config.bench.threads
    return target.open(baseline, threads=threads), target.open(pruned, threads=threads)


def evaluate(run: Run) -> dict[str, Any]:
    """Fidelity and k-NN accuracy through the target itself, into `eval.json`."""
    from ampdeploy.evaluate import evaluate_pair

    queries = queries_of(run)
    baseline, pruned = _open_pair(run)
    with baseline, pruned:
        result = evaluate_pair(
            baseline,
            pruned,
            queries=queries,
            bank=bank_of(run),
            spec=model_spec(run.config),
        )
    artifacts.write_json(run.path(artifacts.EVAL), result)
    return {}


def bench_options(config: BuildConfig) -> dict[str, Any]:
    """The machine belongs to a measurement: on another one it is made again."""
    from ampdeploy.bench.host import machine_identity

    return {"target": config.target, "machine": machine_identity(), **to_json(config.bench)}


def bench(run: Run) -> dict[str, Any]:
    """Latency and memory of both models, into `bench.json`."""
    from ampdeploy.bench.latency import BUFFERS
    from ampdeploy.bench.run import measure_pair
    from ampdeploy.data.loading import load_all

    queries = queries_of(run)
    most = BUFFERS * max(run.config.bench.batch_sizes)
    few = queries.first(most)
    baseline, pruned = (run.path(name) for name in runnable_artifacts(run.config))
    result = measure_pair(
        run.config.target,
        baseline,
        pruned,
        load_all(few, model_spec(run.config)).numpy(),
        run.config.bench,
    )
    artifacts.write_json(run.path(artifacts.BENCH), result)
    return {}


def report(run: Run) -> dict[str, Any]:
    """`report.json` and its Markdown view."""
    from ampdeploy.checkpoint import load_model
    from ampdeploy.models.profile import profile_model
    from ampdeploy.report.assemble import assemble
    from ampdeploy.report.markdown import render_markdown

    config = run.config
    baseline, pruned = runnable_artifacts(config)
    checkpoints = {"baseline": artifacts.BASELINE, "pruned": student_artifact(config)}
    profiles = {
        role: dataclasses.asdict(profile_model(load_model(run.path(name))))
        for role, name in checkpoints.items()
    }
    records = {name: run.manifest.stage(name) for name in run.manifest.data["stages"]}
    if not config.distill.epochs:
        records.pop("distill", None)  # of an earlier build into this folder
    result = assemble(
        config,
        images=run.facts("data"),
        weights=run.facts("load")["weights"],
        widths=artifacts.read_json(run.path(artifacts.WIDTHS)),
        repair=artifacts.read_json(run.path(artifacts.REPAIR)),
        export=artifacts.read_json(run.path(artifacts.EXPORT)),
        evaluation=artifacts.read_json(run.path(artifacts.EVAL)),
        bench=artifacts.read_json(run.path(artifacts.BENCH)),
        profiles=profiles,
        files={"baseline": run.path(baseline), "pruned": run.path(pruned)},
        stages_seconds={
            name: record.seconds for name, record in records.items() if record and name != "report"
        },
    )
    result.write(run.path(artifacts.REPORT_JSON))
    artifacts.write_text(run.path(artifacts.REPORT_MD), render_markdown(result))
    return {}
