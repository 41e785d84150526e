"""Dense against pruned, and FP16 against FP32, on one GPU, in less than ten minutes, no network.

    python -m benchmarks.gpu.run --out benchmarks/results/gpu_h200.json

Published architectures (DINOv2 S, B, L, g at 224 px) with seeded random weights; pruned is the
same with every MLP narrowed to a parameter budget, on a grid of 64. A row is one model, batch and
way of running; it holds dense and pruned timed turn and turn about, the ratio of their medians with
a bootstrap 95% interval, memory, and how the features agree with PyTorch's float32 (TF32 off) on
the same real images. Ways, and what their clocks measure, are in `benchmarks/gpu/plan.py` and
`ways.py`; one way is timed end to end as well. Times of different rows were not interleaved.

For small models (`--typed`) the typed FP16 graph of `ampdeploy.precision` is made too. It runs on
whatever runtime is here, and node by node on PyTorch's kernels, which also tells how close the
emulated FP16 of the tool is to the GPU's, per block. What is not here (ONNX Runtime's CUDA
provider, TensorRT) is in the result with the reason, and so is what TensorRT for RTX says.

torch.compile compiles the blocks and its result is captured as a CUDA graph. Its mode is
``default``, in which matrix products stay with cuBLAS: with ``max-autotune-no-cudagraphs`` it
times kernels for every shape, too long for all of these; ask for it with `--compile-mode` and fewer
models. Compilation comes last and has minutes of its own.

Stopped, or out of `--minutes`, the same command continues: finished rows are kept in the state
folder, and the result, which is written again after every row, holds all of them. Rows of other
versions or another driver are measured again, and so are those of engines that were built for other
`--batches`. A row that fails is kept with its error, and the command ends with exit code 1;
`--retry-failed` tries it again. `--device cpu` exists to test the script: what needs a GPU (events,
graphs, compiled kernels, memory, ONNX Runtime's CUDA provider, running an engine) no test reaches.
Nothing in the result names the machine's folders.
"""

from __future__ import annotations

import argparse
import logging
import sys
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch

from ampdeploy.artifacts import (
    prepare_folder,
    remove_stale_temporaries,
    run_lock,
    sha256_json,
    write_json,
)
from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import make_batches
from ampdeploy.data.folder import scan_folder
from ampdeploy.errors import AmpDeployError
from ampdeploy.models.build import build_model, timm_source
from ampdeploy.models.device import resolve_device
from ampdeploy.models.weights import weights_identity
from ampdeploy.progress import log, set_up_logging
from benchmarks.compression.state import Rows
from benchmarks.gpu import card, plan
from benchmarks.gpu.clock import measure_pair
from benchmarks.gpu.graphs import Graphs
from benchmarks.gpu.numerics import judge
from benchmarks.gpu.options import parse
from benchmarks.gpu.pairs import ROLES, Pair, build_pair, float32_mode
from benchmarks.gpu.runtimes import TrtWay, probe_rtx
from benchmarks.gpu.table import summary_lines
from benchmarks.gpu.ways import CUDA, END_TO_END_CLOCK, Opened, Way, release

ERROR_CHARACTERS = 2000  # of a failed row's message that are kept
PAIR = "-pair"  # ends the names of the rows that describe a model


class Benchmark:
    """The rows, what they share, and the result so far."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Find out what is here and what is done.

        Raises:
            AmpDeployError: A model, way, device or folder that there is not.
        """
        self.options = options
        self.device = resolve_device(options.device)
        self.budget = plan.Budget(options.minutes, options.compile_minutes)
        ways = plan.all_ways(options.batches, options.compile_mode)
        chosen = plan.choose_ways(ways, self.device.type, options.ways)
        self.absent = {way.name: why for way in chosen for why in [way.absent()] if why}
        here = [way for way in chosen if way.name not in self.absent]
        self.jobs = plan.plan_jobs(options.models, options.typed, here, options.batches)
        self.labels = {way.name: way.label for way in chosen}
        self.rows = Rows(options.state)
        self.facts = self._facts()
        self.host = host_facts()
        # Of every row, and `host` in the result speaks for all of them.
        self.identity = sha256_json(
            [self.facts[key] for key in ("config", "images", "software")]
            + [self.host[key] for key in ("packages", "gpus")]
        )
        # Way -> identity of its rows. One engine serves all batches, tuned for the middle one.
        self.engines = {
            way.name: sha256_json([self.identity, way.identity])
            for way in ways
            if isinstance(way, TrtWay)
        }
        self.pair: Pair | None = None
        self.graphs: Graphs | None = None
        self.missing: dict[str, str] = {}
        self.states: list[dict[str, Any]] = []

    def _facts(self) -> dict[str, Any]:
        options = self.options
        for model in options.models:
            timm_source(model)  # a mistyped name is no failed row
        sets = {
            part: scan_folder(options.images / part, limit=options.count, seed=0, minimum=2)
            for part in ("train", "val")
        }
        weights = None
        if options.weights is not None:
            spec = build_model(options.models[0], device="meta").spec
            weights = weights_identity(options.weights, spec)
        return {
            "config": {
                "image_size": options.image_size,
                "params_cut": options.params_cut,
                "width_multiple": options.width_multiple,
                "seed": options.seed,
                "weights": weights or "random, seeded",
                "seconds": options.seconds,
                "min_runs": options.min_runs,
                "compile_mode": options.compile_mode,
            },
            "images": {
                part: {"images": len(found), "sha256": found.sha256} for part, found in sets.items()
            },
            "software": card.software_facts(self.device),
        }

    def run(self) -> None:
        """Every job that is not done and that there is time for; the result after each."""
        self._note_state("before")
        for job in self.jobs:
            row = self.rows.find(job.row, self._identity(job))
            if row is not None and not (self.options.retry_failed and "error" in row):
                continue
            refusal = self.budget.refuses(job)
            if refusal is not None:
                self.missing[job.row] = refusal
                continue
            self._do(job)
            self.write()
        self._note_state("after")
        self.write()

    def _identity(self, job: plan.Job) -> str:
        """What must be the same for a finished row of `job` to count."""
        return self.engines.get(job.name, self.identity)

    def _do(self, job: plan.Job) -> None:
        started = time.monotonic()
        head = {"model": job.model, "way": job.name, "batch": job.batch}
        try:
            row = {**head, **self._measure(job)}
        except Exception as error:  # whatever a runtime throws: the rest goes on
            text = f"{type(error).__name__}: {error}"[:ERROR_CHARACTERS]
            log.warning("%s: %s", job.row, text.splitlines()[0])
            row = {**head, "error": text}
        seconds = time.monotonic() - started
        self.rows.put(job.row, self._identity(job), {**row, "row_seconds": seconds})
        self.budget.spent(job, seconds)
        if "ratio" in row:
            log.info("%s", summary_lines([row])[-1])
        self._check_alive(job)

    def _measure(self, job: plan.Job) -> dict[str, Any]:
        if job.name == plan.RTX_PROBE:
            batch = min(self.options.batches)
            return {"steps": probe_rtx(lambda: self._load(job.model), batch)}
        pair, graphs = self._load(job.model)
        if job.name == plan.EMULATION:
            return {role: graphs.compare_emulation(role) for role in ROLES}
        assert job.way is not None
        assert job.batch is not None
        with float32_mode(tf32=job.way.tf32):
            return self._measure_way(pair, graphs, job.way, job.batch)

    def _load(self, model: str) -> tuple[Pair, Graphs]:
        """The pair of `model`; the one before it is freed first."""
        if self.pair is None or self.graphs is None or self.pair.name != model:
            self.pair = self.graphs = None
            release(self.device)
            options = self.options
            self.pair = build_pair(
                model,
                image_size=options.image_size,
                params_cut=options.params_cut,
                width_multiple=options.width_multiple,
                seed=options.seed,
                device=self.device,
                images=options.images,
                count=options.count,
                weights=options.weights,
            )
            name = plan.file_name(model)
            folder = options.state / "graphs" / f"{name}-{self.identity[:12]}"
            self.graphs = Graphs(self.pair, folder)
            self.rows.put(f"{name}{PAIR}", self.identity, self.pair.facts())
            self._note_state(f"with {model} loaded")
        return self.pair, self.graphs

    def _measure_way(self, pair: Pair, graphs: Graphs, way: Way, batch: int) -> dict[str, Any]:
        options = self.options
        rng = np.random.default_rng(options.seed)
        buffers = make_batches(pair.images, batch, rng)
        way.begin()
        with ExitStack() as stack:
            opened: dict[str, Opened] = {
                role: stack.enter_context(way.open(pair, role, buffers, graphs)) for role in ROLES
            }
            limits = {
                "buffers": len(buffers),
                "seconds": options.seconds,
                "min_runs": options.min_runs,
                "rng": rng,
            }
            dense, pruned = (opened[role] for role in ROLES)
            row = measure_pair(dense.time, pruned.time, clock=dense.clock, **limits)
            if self.device.type == CUDA:
                row["gpu_state"] = card.card_state()  # right after the timed calls
            if way.name == plan.END_TO_END[self.device.type]:
                row["end_to_end"] = measure_pair(
                    _host_timer(dense, buffers),
                    _host_timer(pruned, buffers),
                    clock=END_TO_END_CLOCK,
                    **limits,
                )
            row["prepare_s"] = {role: opened[role].prepare_s for role in ROLES}
            row["memory"] = {role: opened[role].memory for role in ROLES}
            row["numerics"] = {
                role: judge(opened[role], pair.images, pair.references[role], batch)
                for role in ROLES
            }
        release(self.device)
        return row

    def _check_alive(self, job: plan.Job) -> None:
        """Stop when CUDA does: after some errors every later call of the process fails too."""
        try:
            release(self.device)
        except Exception as error:
            self.write()
            raise AmpDeployError(
                f"CUDA is of no use to this process after {job.row}: {error}. That row is kept as "
                "failed; run the same command again for the rest."
            ) from error

    def _note_state(self, when: str) -> None:
        if self.device.type == CUDA:
            self.states.append({"when": when, "state": card.card_state()})

    def write(self) -> None:
        """The result as far as it is: every row that the state folder has."""
        models, rows = self.finished()
        write_json(
            self.options.out,
            {
                "benchmark": "gpu",
                **self.facts,
                "models": list(models.values()),
                "ways": self.labels,
                "absent": self.absent,
                "host": self.host,
                "gpu_states": self.states,
                "rows": list(rows.values()),
                "missing": self.missing,
            },
        )

    def finished(self) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]]]:
        """Models and rows by name: in the order of the plan, then those of earlier calls."""
        planned = [f"{plan.file_name(model)}{PAIR}" for model in self.options.models]
        planned += [job.row for job in self.jobs]
        stored = sorted(path.stem for path in (self.options.state / "rows").glob("*.json"))
        names = [*planned, *(name for name in stored if name not in planned)]
        found = {
            name: row
            for name in names
            for identity in (self.identity, *self.engines.values())
            for row in [self.rows.find(name, identity)]
            if row is not None
        }
        return (
            {name: row for name, row in found.items() if name.endswith(PAIR)},
            {name: row for name, row in found.items() if not name.endswith(PAIR)},
        )


def _host_timer(opened: Opened, buffers: list[np.ndarray]) -> Any:
    def timed(buffer: int) -> float:
        start = time.perf_counter_ns()
        opened.features(buffers[buffer])
        return (time.perf_counter_ns() - start) / 1e6

    return timed


def main(arguments: list[str] | None = None) -> None:
    """Measure what there is time for, and write the result."""
    options = parse(arguments, description=__doc__ or "")
    set_up_logging(logging.INFO)
    try:
        prepare_folder(options.out.parent)
        prepare_folder(options.state)
        # Not for the whole process: whoever calls this may train afterwards.
        with torch.no_grad(), run_lock(options.state):
            remove_stale_temporaries(options.state / "rows")
            benchmark = Benchmark(options)
            benchmark.run()
        _, rows = benchmark.finished()
        for line in summary_lines(list(rows.values())):
            log.info("%s", line)
        for name, why in {**benchmark.absent, **benchmark.missing}.items():
            log.info("not measured: %s: %s", name, why)
        failed = [name for name, row in rows.items() if "error" in row]
        if failed:
            raise AmpDeployError(
                f"{len(failed)} rows failed: {', '.join(failed)}. Their errors are in the result; "
                "--retry-failed tries them again."
            )
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
