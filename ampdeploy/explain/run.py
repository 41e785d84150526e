"""One call: profile both models, predict, compare, probe, find."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np

from ampdeploy.bench.host import host_facts
from ampdeploy.bench.intervals import MIN_FOR_INTERVAL
from ampdeploy.errors import ConfigError
from ampdeploy.explain.compare import ROOFLINE, WORK_RATIO, make_cells, sum_cells
from ampdeploy.explain.evidence import Evidence, next_multiple
from ampdeploy.explain.findings import find_all
from ampdeploy.explain.interleave import ratio, spread
from ampdeploy.explain.profiled import ProfiledModel
from ampdeploy.explain.result import (
    MLP_ELEMENTWISE,
    ActivationProbe,
    Explanation,
    Machine,
    WidthProbe,
)
from ampdeploy.optional import require
from ampdeploy.progress import log
from ampdeploy.targets.base import ENGINE_SUFFIXES, get_target

MIN_RUNS = MIN_FOR_INTERVAL
LARGE_BATCH = 8  # what a smaller batch is compared with
LARGE_BATCH_RUNS = 10
MAX_WIDTH_PROBES = 6
NOT_ON_GPU = "timed on the CPU through ONNX Runtime only, which says nothing about a GPU"


def explain_pair(
    target: str,
    baseline: Path,
    pruned: Path,
    *,
    batch: int = 1,
    threads: int | None = None,
    runs: int = 30,
) -> Explanation:
    """Find out why `pruned` is, or is not, as much faster than `baseline` as predicted.

    Args:
        target: What runs them: ``ort``, ``trt`` or ``trt-rtx``.
        baseline: The dense model's .onnx file or engine.
        pruned: The pruned model's.
        batch: Images per call.
        threads: CPU threads; None: the runtime's choice.
        runs: Profiled calls of each, and as many without the profiler.

    Raises:
        ConfigError: A number out of range, or a target whose profiler is not read.
        ArtifactError: A file is missing, damaged, or of another model.
        MissingDependencyError: The runtime, or its device, is not here.
    """
    if batch < 1 or runs < MIN_RUNS or (threads is not None and threads < 1):
        raise ConfigError(
            f"--batch {batch}, --runs {runs}, --threads {threads}: give batch and threads of 1 or "
            f"more, and runs of {MIN_RUNS} or more: with fewer there is no interval to trust."
        )
    opened = get_target(target)
    if baseline.suffix in ENGINE_SUFFIXES:
        from ampdeploy.explain import engine_profile

        clock, model = engine_profile.CLOCK, WORK_RATIO
        dense, slim = engine_profile.profile_pair(
            opened, baseline, pruned, batch=batch, threads=threads, runs=runs
        )
        machine, width_probes, activation, other = None, None, None, None
    elif target == "ort":
        require("onnx", needed_by="ampdeploy explain")
        from ampdeploy.explain import ort_profile

        clock, model = ort_profile.CLOCK, ROOFLINE
        log.info("profiling %d calls of each model at batch %d", runs, batch)
        dense, slim = ort_profile.profile_pair(
            baseline, pruned, batch=batch, threads=threads, runs=runs
        )
        log.info("timing probes")
        machine, width_probes, activation = _probe(
            dense, slim, opened.width_multiple, threads=threads
        )
        other = None
        if batch < LARGE_BATCH and ort_profile.is_dynamic(baseline, pruned):
            other = _other_batch(baseline, pruned, threads)
    else:
        raise ConfigError(
            f"explain reads the profilers of ort, trt and trt-rtx, and the target is {target}. "
            "Give it the two .onnx files: ampdeploy explain model.onnx --baseline baseline.onnx"
        )
    return _assemble(
        target,
        (baseline, pruned),
        (dense, slim),
        batch=batch,
        threads=threads,
        runs=runs,
        clock=clock,
        model=model,
        machine=machine,
        width_probes=width_probes,
        activation=activation,
        other=other,
        width_multiple=opened.width_multiple,
    )


def _probe(
    dense: ProfiledModel, slim: ProfiledModel, multiple: int, *, threads: int | None
) -> tuple[Machine | None, tuple[WidthProbe, ...] | None, ActivationProbe | None]:
    from ampdeploy.explain import probes

    if not (dense.widths and slim.widths):
        log.warning("no MLP was recognised in these graphs; predictions are by work alone")
        return None, None, None
    machine = probes.measure_machine(dense.tokens, max(dense.widths.values()), threads=threads)

    def probe(width: int, other: int, blocks: list[int]) -> WidthProbe:
        return probes.probe_width(
            width,
            other,
            blocks,
            tokens=slim.tokens,
            token_width=slim.token_width,
            threads=threads,
        )

    common = Counter(slim.widths.values())
    off = [width for width, _ in common.most_common() if width % multiple]
    if len(off) > MAX_WIDTH_PROBES:
        log.warning("%d widths are off a tile; timing the first %d", len(off), MAX_WIDTH_PROBES)
    measured = [
        probe(
            width,
            next_multiple(width, multiple),
            [block for block, w in slim.widths.items() if w == width],
        )
        for width in off[:MAX_WIDTH_PROBES]
    ]
    usual = common.most_common(1)[0][0]
    if not off and usual > 1:
        # Nothing to improve: what a tile is worth here is measured all the same.
        measured = [probe(usual - 1, usual, [])]
    erf = any(o.op_type == "Erf" and o.place.kind == MLP_ELEMENTWISE for o in slim.operators)
    activation = probes.probe_gelu(slim.tokens, usual, threads=threads) if erf else None
    return machine, tuple(measured), activation


def _other_batch(baseline: Path, pruned: Path, threads: int | None) -> tuple[int, float, float]:
    from ampdeploy.explain.ort_profile import latency_pair

    log.info("timing batch %d for comparison", LARGE_BATCH)
    samples_ms = latency_pair(
        baseline, pruned, batch=LARGE_BATCH, threads=threads, runs=LARGE_BATCH_RUNS
    )
    dense_ms, slim_ms = np.median(samples_ms, axis=0)
    return LARGE_BATCH, float(dense_ms), float(slim_ms)


def _assemble(
    target: str,
    files: tuple[Path, Path],
    models: tuple[ProfiledModel, ProfiledModel],
    *,
    batch: int,
    threads: int | None,
    runs: int,
    clock: str,
    model: str,
    machine: Machine | None,
    width_probes: tuple[WidthProbe, ...] | None,
    activation: ActivationProbe | None,
    other: tuple[int, float, float] | None,
    width_multiple: int,
) -> Explanation:
    dense, slim = models
    cells = make_cells(dense, slim, machine)
    kinds, blocks, (total,) = (
        sum_cells(dense, slim, cells, scope=scope) for scope in ("kind", "block", "all")
    )
    latency_ms = np.stack([dense.latency_ms, slim.latency_ms], axis=1)
    latency = ratio(latency_ms)
    evidence = Evidence(
        baseline=dense,
        pruned=slim,
        batch=batch,
        width_multiple=width_multiple,
        total=total,
        cells=cells,
        latency=latency,
        machine=machine,
        width_probes=width_probes,
        activation_probe=activation,
        other_batch=other,
    )
    dense_ms, slim_ms = np.median(latency_ms, axis=0)
    missing = {
        "threads": (threads, "the runtime's own choice"),
        "machine": (machine, NOT_ON_GPU if target != "ort" else "no MLP was recognised"),
        "width_probes": (width_probes, NOT_ON_GPU if target != "ort" else "no MLP was recognised"),
        "activation_probe": (activation, "no GELU runs as several operators, or not on the CPU"),
    }
    return Explanation(
        target=target,
        baseline_file=files[0].name,
        pruned_file=files[1].name,
        batch=batch,
        threads=threads,
        runs=runs,
        model=model if machine is not None else WORK_RATIO,
        clock=clock,
        machine=machine,
        latency_baseline_ms=float(dense_ms),
        latency_pruned_ms=float(slim_ms),
        latency=latency,
        latency_spread=spread(latency_ms),
        total=total,
        kinds=kinds,
        blocks=blocks,
        cells=cells,
        widths=tuple((b, dense.widths.get(b, w), w) for b, w in sorted(slim.widths.items())),
        fused={"baseline": dense.fused, "pruned": slim.fused},
        width_probes=width_probes,
        activation_probe=activation,
        findings=find_all(evidence),
        host=host_facts(),
        why={name: why for name, (value, why) in missing.items() if value is None},
    )
