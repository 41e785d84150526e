"""Evaluate, bench and report."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.errors import ConfigError
from ampdeploy.progress import log
from ampdeploy.report.codec import from_plain, to_plain
from ampdeploy.report.result import SCHEMA_VERSION
from ampdeploy.run import MACHINE
from ampdeploy.stages.common import (
    bank_of,
    model_spec,
    queries_of,
    runnable_artifacts,
    shipped_artifacts,
    student_artifact,
)
from ampdeploy.stages.judging import find_judge, machine_options

if TYPE_CHECKING:
    from ampdeploy.bench.result import BenchResult
    from ampdeploy.run import Run
    from ampdeploy.targets.base import Runner


def _open_pair(run: Run, judged_on: str) -> tuple[Runner, Runner]:
    from ampdeploy.targets.base import get_target

    target = get_target(judged_on)
    baseline, pruned = (run.path(name) for name in runnable_artifacts(run.config, judged_on))
    threads = run.config.bench.threads
    return target.open(baseline, threads=threads), target.open(pruned, threads=threads)


def eval_options(config: BuildConfig) -> dict[str, Any]:
    """Where the engine does not run, other files are judged, and again where it does.

    Raises:
        ConfigError: There is no such head file.
    """
    head = config.evaluate.head
    if head is not None and not head.is_file():
        raise ConfigError(f"there is no head file {head}. Check --head.")
    return {
        "target": config.target,
        # What another version of the report held is measured anew, for this one's report.
        "schema": SCHEMA_VERSION,
        "tasks": list(config.evaluate.tasks),
        # By content: the same head elsewhere judges the same.
        "head": None if head is None else artifacts.sha256_file(head),
        MACHINE: machine_options(config),
    }


def evaluate(run: Run) -> dict[str, Any]:
    """Fidelity, and accuracy in every task, through the target itself where this machine can run
    it, into `eval.json`."""
    from ampdeploy.evaluate import evaluate_pair

    judge = find_judge(run.config)
    if judge.why_no_engine is not None:
        log.info("        judged with %s in float32, not with the engines", judge.target)
    baseline, pruned = _open_pair(run, judge.target)
    with baseline, pruned:
        result = evaluate_pair(
            baseline,
            pruned,
            queries=queries_of(run),
            bank=bank_of(run),
            spec=model_spec(run.config),
            options=run.config.evaluate,
        )
    result["target"] = judge.target
    artifacts.write_json(run.path(artifacts.EVAL), result)
    return {}


def bench_options(config: BuildConfig) -> dict[str, Any]:
    """The machine belongs to a measurement: on another one, or with another meter, it is made
    again."""
    from ampdeploy.bench.host import machine_identity

    return {
        "target": config.target,
        "schema": SCHEMA_VERSION,
        MACHINE: {**machine_identity(), **machine_options(config), **_meters(config)},
        **to_json(config.bench),
    }


def _meters(config: BuildConfig) -> dict[str, Any]:
    """Where energy would be read, or why nowhere; nothing where it will not be measured."""
    from ampdeploy.bench.sensors.survey import survey_meter

    if config.bench.energy_seconds == 0 or find_judge(config).why_no_engine is not None:
        return {}
    # PyTorch takes the GPU where there is one.
    device = {"ort": ("cpu",), "torch": ("cpu", "cuda")}.get(config.target, ("cuda",))
    found = {name: survey_meter(name) for name in device}
    return {"meters": {name: {"source": s, "why": why} for name, (s, why) in found.items()}}


def bench(run: Run) -> dict[str, Any]:
    """Latency and memory of both models, into `bench.json`."""
    from ampdeploy.bench.host import host_facts
    from ampdeploy.bench.latency import BUFFERS
    from ampdeploy.bench.result import nothing_measured
    from ampdeploy.bench.run import measure_pair
    from ampdeploy.data.loading import load_all

    config = run.config
    unmeasured = find_judge(config).why_no_engine
    if unmeasured is not None:
        log.warning("latency and memory are not measured: %s", run.once(unmeasured))
        _write_bench(run, nothing_measured(host_facts(), unmeasured))
        return {}
    few = queries_of(run).first(BUFFERS * max(config.bench.batch_sizes))
    baseline, pruned = (run.path(name) for name in runnable_artifacts(config, config.target))
    images = load_all(few, model_spec(config)).numpy()
    result = measure_pair(config.target, baseline, pruned, images, config.bench)
    _write_bench(run, result)
    return {}


def _write_bench(run: Run, result: BenchResult) -> None:
    artifacts.write_json(run.path(artifacts.BENCH), to_plain(result))


def report(run: Run) -> dict[str, Any]:
    """`report.json` and its views."""
    from ampdeploy.bench.result import BenchResult
    from ampdeploy.checkpoint import load_model
    from ampdeploy.models.profile import profile_model
    from ampdeploy.report.assemble import assemble
    from ampdeploy.report.html import render_html
    from ampdeploy.report.markdown import render_markdown

    config = run.config
    baseline, pruned = shipped_artifacts(config)
    checkpoints = {"baseline": artifacts.BASELINE, "pruned": student_artifact(config)}
    profiles = {
        role: dataclasses.asdict(profile_model(load_model(run.path(name))))
        for role, name in checkpoints.items()
    }
    measured = artifacts.read_json(run.path(artifacts.BENCH))
    records = {name: run.manifest.stage(name) for name in run.manifest.data["stages"]}
    result = assemble(
        config,
        images=run.facts("data"),
        weights=run.facts("load")["weights"],
        widths=artifacts.read_json(run.path(artifacts.WIDTHS)),
        repair=artifacts.read_json(run.path(artifacts.REPAIR)),
        export=artifacts.read_json(run.path(artifacts.EXPORT)),
        evaluation=artifacts.read_json(run.path(artifacts.EVAL)),
        bench=from_plain(BenchResult, measured, where=artifacts.BENCH),
        profiles=profiles,
        precision=_read_if(run, artifacts.PRECISION, config.precision.precision == "fp16"),
        engines={
            role: _read_if(run, name, config.builds_engine and config.engine.when == "now")
            for role, name in (
                ("baseline", artifacts.BASELINE_ENGINE_JSON),
                ("pruned", artifacts.ENGINE_JSON),
            )
        },
        files={"baseline": run.path(baseline), "pruned": run.path(pruned)},
        stages_seconds={
            name: record.seconds for name, record in records.items() if record and name != "report"
        },
    )
    result.write(run.path(artifacts.REPORT_JSON))
    artifacts.write_text(run.path(artifacts.REPORT_MD), render_markdown(result))
    artifacts.write_text(run.path(artifacts.REPORT_HTML), render_html(result))
    return {}


def _read_if(run: Run, name: str, wanted: bool) -> Any:
    return artifacts.read_json(run.path(name)) if wanted else None
