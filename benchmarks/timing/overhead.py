"""What `Runner.run` adds to the runtime's bare call at batch 1.

    python -m benchmarks.timing.overhead --images calib_data/val \
        --out benchmarks/results/timing_overhead.json

For each model, one loaded model is called in two ways, turn and turn about, as `ampdeploy bench`
times two models:

- bare: what an application writes that knows its shapes. ONNX Runtime: ``session.run(names,
  {"images": batch})``, names and dictionary made beforehand. An engine (`--engine FILE` of
  TensorRT): copy to pinned memory, to the device, ``execute_async_v3``, back, wait;
- ``run``: the runner of the same session or engine, which checks its input and names the outputs;
- ``run_timed``: the same with the clocks of `ampdeploy bench` on.

The ratio, with its 95% interval, is theirs / bare. One load, so that no difference of two loads is
taken for overhead. Models: timm's smallest test ViT, whose call is so short that this is the
worst case, and DINOv2-S; random weights, on which speed does not depend.

The time that `run` adds is also given in microseconds: for ONNX Runtime of both ways with a session
that computes nothing, in a loop, because the difference of two calls of milliseconds says little
about it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.artifacts import write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.bench.latency import make_batches, time_pairs
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.evaluate import spec_of
from ampdeploy.export.onnx import export_onnx
from ampdeploy.export.session import open_session
from ampdeploy.models.build import build_model
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import Runner, get_target, target_for
from ampdeploy.targets.ort import OrtRunner, OrtTarget
from benchmarks.timing.bare import BareEngine
from benchmarks.timing.models import IMAGES, OPSET

MODELS = ("timm:test_vit", "dinov2_s")
LOOP = 20_000  # calls of nothing


class _Nothing:
    """A session that returns at once what the real one last returned."""

    def __init__(self, session: Any, batch: np.ndarray, names: list[str]) -> None:
        self._session = session
        self._values = session.run(names, {"images": batch})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)

    def run(self, names: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        values: list[np.ndarray] = self._values
        return values


def measure(
    name: str, images: Path, *, target: str, seconds: float, threads: int, folder: Path
) -> dict[str, Any]:
    """Overhead on one model in ONNX Runtime."""
    model = build_model(name).requires_grad_(False)
    path = folder / "model.onnx"
    export_onnx(model, path, opset=OPSET)
    pixels = load_all(scan_folder(images, limit=IMAGES, seed=0, minimum=2), model.spec).numpy()
    batches = make_batches(pixels, 1, np.random.default_rng(0))
    opened = get_target(target)
    assert isinstance(opened, OrtTarget)
    session = open_session(path, threads=threads, providers=opened.providers)
    runner = OrtRunner(session, name=path.name)
    names = list(runner.output_names)
    feeds = [{"images": batch} for batch in batches]
    found = compare(
        name, runner, lambda buffer: session.run(names, feeds[buffer]), batches, seconds=seconds
    )
    return {**found, "added_us": _added_us(session, batches[0], names)}


def measure_engine(plan: Path, images: Path, *, seconds: float) -> dict[str, Any]:
    """Overhead on one engine of TensorRT."""
    spec = spec_of(plan)
    pixels = load_all(scan_folder(images, limit=IMAGES, seed=0, minimum=2), spec).numpy()
    batches = make_batches(pixels, 1, np.random.default_rng(0))
    with target_for(plan).open(plan) as runner, BareEngine(plan) as bare:
        expected = runner.run(batches[0])
        for output, values in bare.run(batches[0]).items():
            np.testing.assert_allclose(values, expected[output], rtol=1e-2, atol=1e-2)
        return compare(
            plan.name, runner, lambda buffer: bare.run(batches[buffer]), batches, seconds=seconds
        )


def compare(
    name: str,
    runner: Runner,
    bare: Callable[[int], object],
    batches: list[np.ndarray],
    *,
    seconds: float,
) -> dict[str, Any]:
    """Both ways of `runner` against `bare`."""

    def timed(call: Callable[[int], object]) -> Callable[[int], float]:
        def milliseconds(buffer: int) -> float:
            start = time.perf_counter_ns()
            call(buffer)
            return (time.perf_counter_ns() - start) / 1e6

        return milliseconds

    ways = {
        "run": timed(lambda buffer: runner.run(batches[buffer])),
        "run_timed": lambda buffer: runner.run_timed(batches[buffer]).end_to_end_ms,
    }
    found: dict[str, Any] = {"model": name}
    for way, call in ways.items():
        times = time_pairs(
            timed(bare),
            call,
            clock="host: time.perf_counter_ns around one call",
            buffers=len(batches),
            min_runs=30,
            max_seconds=seconds,
            what=f"{name}, {way}",
            rng=np.random.default_rng(0),
        )
        found[way] = {
            "ratio": to_plain(times.ratio),
            "bare_p50_ms": times.baseline.p50,
            "p50_ms": times.pruned.p50,
            "pairs": times.timing.pairs,
        }
    return found


def _added_us(session: Any, batch: np.ndarray, names: list[str]) -> dict[str, float]:
    """Least of five loops: other work can only add."""
    nothing = _Nothing(session, batch, names)
    runner = OrtRunner(nothing, name="nothing")  # type: ignore[arg-type]
    feeds = {"images": batch}
    calls: dict[str, Callable[[], object]] = {
        "bare": lambda: nothing.run(names, feeds),
        "run": lambda: runner.run(batch),
        "run_timed": lambda: runner.run_timed(batch),
    }
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(5):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            for _ in range(LOOP // 5):
                call()
            best[name] = min(best[name], (time.perf_counter_ns() - start) / (LOOP // 5) / 1e3)
    return {name: best[name] - best["bare"] for name in ("run", "run_timed")}


def main() -> None:
    """Measure every model and write the result."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--target", default="ort", choices=("ort", "ort-cuda"), help="of --models")
    parser.add_argument("--engine", type=Path, help="an engine instead, with its engine.json")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed pairs per way")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    rows = []
    if options.engine:
        rows.append(measure_engine(options.engine, options.images, seconds=options.seconds))
    for name in () if options.engine else options.models.split(","):
        with tempfile.TemporaryDirectory() as folder:
            rows.append(
                measure(
                    name,
                    options.images,
                    target=options.target,
                    seconds=options.seconds,
                    threads=options.threads,
                    folder=Path(folder),
                )
            )
    for row in rows:
        for way in ("run", "run_timed"):
            ratio = row[way]["ratio"]
            print(
                f"{row['model']} {way}: {row[way]['bare_p50_ms']:.3f} -> {row[way]['p50_ms']:.3f} "
                f"ms, ratio {ratio['value']:.4f} [{ratio['ci95_low']:.4f}, "
                f"{ratio['ci95_high']:.4f}]"
            )
    result = {
        "host": host_facts(),
        "target": options.target if not options.engine else target_for(options.engine).name,
        "threads": options.threads,
        "models": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
