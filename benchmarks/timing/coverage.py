"""Is the interval of a latency ratio honest? Simulated runs on noise fitted to this machine.

    python -m benchmarks.timing.coverage --model runs/demo/baseline.onnx \
        --images calib_data/val --out benchmarks/results/timing_coverage.json

First two copies of the model are timed in turns, as `ampdeploy bench` times two models, opened
anew for each of `--loads`, and the noise of the machine is fitted to the calls
(`benchmarks/timing/noise.py` says how). Then runs are simulated, thousands of them, with equal
models and with one that is 5% slower:

- ``coverage``: share of the runs with equal models whose 95% interval contains 1.0;
- ``told_apart``: share of those with a model 5% slower whose interval lies above 1.0;
- ``width``: median of the interval's width over the ratio.

All are given for the interval in use, ``over_loads``
(`ampdeploy.bench.intervals.ratio_over_loads`: Student's t over the log ratios of six loads,
the order of opening taken out), and
for two that were tried: ``bootstrap``, circular blocks of successive pairs over all calls, and
``batch_means``, Student's t over ten stretches of all calls. Kinds of noise: the fitted jitter
alone, with one more part each, all parts, and all parts with disturbances three times as long; on
top of all, ``memory``, a drift of 1% that each model has to itself, and loads that each make a
model 1% faster or slower. 30 pairs is the least that `bench` makes, 190 what 20 s hold of DINOv2-S
at batch 1 on two cores.

Nothing in the result names the machine's folders. Two minutes to record, ten and more to simulate
on a core; `--samples` keeps the recorded calls, and reads them if they are there.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.artifacts import write_json
from ampdeploy.bench.host import host_facts
from ampdeploy.bench.intervals import ratio_of_medians, ratio_over_loads, student_t
from ampdeploy.bench.run import measure_loads
from ampdeploy.config import BenchConfig
from ampdeploy.data.folder import scan_folder
from ampdeploy.data.loading import load_all
from ampdeploy.evaluate import spec_of
from ampdeploy.report.result import Interval
from ampdeploy.targets.base import get_target
from benchmarks.timing.noise import MIN_PAIRS, Noise, draw, fit

SLOWER = 1.05
LOADS = BenchConfig.loads
SETTINGS = ((30, 1000), (190, 1000), (2000, 100))  # pairs, simulated runs of each kind
STRETCHES = 10  # of batch means
STRETCH_PAIRS = 5  # at least: medians of fewer calls spread in another way than those of many

Bounds = tuple[float, float]


def over_loads(loads_ms: list[np.ndarray], rng: np.random.Generator) -> Bounds:
    """The interval in use."""
    return _bounds(ratio_over_loads(loads_ms))


def bootstrap(loads_ms: list[np.ndarray], rng: np.random.Generator) -> Bounds:
    """Circular blocks over all calls, as if they were of one load."""
    dense, slim = np.concatenate(loads_ms).T
    return _bounds(ratio_of_medians(dense, slim, rng=rng))


def _bounds(found: Interval) -> Bounds:
    assert found.ci95_low is not None
    assert found.ci95_high is not None
    return found.ci95_low, found.ci95_high


def batch_means(loads_ms: list[np.ndarray], rng: np.random.Generator) -> Bounds:
    """Student's t over the log ratios of stretches of the run, around that of the whole run."""
    samples_ms = np.concatenate(loads_ms)
    n = min(STRETCHES, len(samples_ms) // STRETCH_PAIRS)
    medians = [np.median(part, axis=0) for part in np.array_split(samples_ms, n)]
    logs = np.log([slim / dense for dense, slim in medians])
    dense, slim = np.median(samples_ms, axis=0)
    value = float(slim / dense)
    spread = float(np.sqrt(np.sum((logs - np.log(value)) ** 2) / (n - 1)))
    reach = float(np.exp(student_t(n - 1) * spread / np.sqrt(n)))
    return value / reach, value * reach


METHODS: dict[str, Callable[[list[np.ndarray], np.random.Generator], Bounds]] = {
    "over_loads": over_loads,
    "bootstrap": bootstrap,
    "batch_means": batch_means,
}


def kinds(fitted: Noise) -> dict[str, Noise]:
    """Noise to simulate, by name."""
    shared = fitted.only("drift", "burst", "outlier", "load")
    longer = dataclasses.replace(
        shared, drift_calls=3 * fitted.drift_calls, burst_calls=3 * fitted.burst_calls
    )
    return {
        "jitter": fitted.only(),
        "drift": fitted.only("drift"),
        "bursts": fitted.only("burst"),
        "outliers": fitted.only("outlier"),
        "all": shared,
        "all, three times as long": longer,
        "all and memory": dataclasses.replace(shared, own=0.01, own_calls=10.0),
        "all, and loads of 1%": dataclasses.replace(shared, load=0.01),
    }


def simulate(noise: Noise, pairs: int, runs: int, method: str) -> dict[str, Any]:
    """Coverage, sensitivity and width of one method on one kind of noise."""
    inside, apart, widths = 0, 0, []
    for seed in range(runs):
        rng = np.random.default_rng((seed, pairs))
        low, high = METHODS[method](draw(noise, pairs, LOADS, 1.0, rng), rng)
        inside += low <= 1.0 <= high
        widths.append(high - low)
        low, _ = METHODS[method](draw(noise, pairs, LOADS, SLOWER, rng), rng)
        apart += low > 1.0
    return {
        "runs": runs,
        "coverage": inside / runs,
        "told_apart": apart / runs,
        "width": float(np.median(widths)),
    }


def record(
    model: Path, images: Path, *, seconds: float, loads: int, threads: int | None
) -> list[np.ndarray]:
    """Calls of two copies of `model` as `ampdeploy bench` makes them: per load (n, 2) in ms."""
    chosen = scan_folder(images, limit=8, seed=0, minimum=2)
    pixels = load_all(chosen, spec_of(model)).numpy()
    config = BenchConfig(
        batch_sizes=(1,), min_runs=MIN_PAIRS, max_seconds=seconds, loads=loads, threads=threads
    )
    found = measure_loads(get_target("ort"), (model, model), pixels, (1,), config)["1"]
    return [load.samples_ms[:, :, 0] for load in found]


def main() -> None:
    """Record, fit, simulate, write."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="an exported .onnx file")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=60.0, help="of recording")
    parser.add_argument("--loads", type=int, default=12, help="of the recording")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--samples", type=Path, help=".npz file of recorded calls, read or written")
    parser.add_argument("--runs-share", type=float, default=1.0, help="of the simulated runs")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.samples and options.samples.is_file():
        with np.load(options.samples) as kept:
            loads = [kept[name] for name in kept.files]
    else:
        loads = record(
            options.model,
            options.images,
            seconds=options.seconds,
            loads=options.loads,
            threads=options.threads,
        )
        if options.samples:
            np.savez(options.samples, *loads)
    samples = np.concatenate(loads)
    fitted = fit(loads)
    rows = []
    for pairs, runs in SETTINGS:
        for kind, noise in kinds(fitted).items():
            row: dict[str, Any] = {"pairs": pairs, "noise": kind}
            for method in METHODS:
                count = max(1, round(options.runs_share * runs))
                row[method] = simulate(noise, pairs, count, method)
            rows.append(row)
            print(
                f"{pairs:5d} pairs, {kind:25s}",
                *(
                    f"{name}: coverage {found['coverage']:.3f}, 5% told apart "
                    f"{found['told_apart']:.3f}, width {found['width']:.3f};"
                    for name, found in row.items()
                    if isinstance(found, dict)
                ),
                flush=True,
            )
    result = {
        "host": host_facts(),
        "recorded": {
            "model": options.model.name,
            "threads": options.threads,
            "loads": len(loads),
            "pairs": len(samples),
            "load_ratios": [float(np.divide(*np.median(load[:, ::-1], axis=0))) for load in loads],
            "p50_ms": np.median(samples, axis=0).tolist(),
            "p90_ms": np.percentile(samples, 90, axis=0).tolist(),
            "max_ms": samples.max(axis=0).tolist(),
        },
        "fitted": dataclasses.asdict(fitted),
        "slower": SLOWER,
        "loads": LOADS,
        "rows": rows,
    }
    write_json(options.out, result)


if __name__ == "__main__":
    main()
