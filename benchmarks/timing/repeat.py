"""Is the interval of a latency ratio honest? Real runs of real models, many times over.

    python -m benchmarks.timing.repeat --images calib_data/val --state STATE_FOLDER \
        --out benchmarks/results/timing_repeated.json

A ViT-Ti/16 at 112 px with random weights (`--model`, `--image-size`) is exported twice: as
published, and with MLPs that narrow that the published one does 5% more FLOPs. One run times two
files as `ampdeploy bench` does: opened anew for each load, the pairs spread over the loads. Only
it is shorter by default (`--seconds` of timed pairs, on one thread). Runs alternate between

- ``same``: two copies of the light model: the interval should contain 1.0 in about 95 of 100 runs
  (so in 90 to 99 of them, 19 times out of 20);
- ``heavier``: the light model against the one with 5% more work: the interval should lie above
  1.0. What that work costs in time need not be 5%: the median ratio of all runs is given, and
  whether each interval contains it.

``single_load`` is what the block bootstrap over all calls says of the same samples: what it would
be without a look at how the loads differ.

`--minutes` bounds a session; the same command then continues, because finished runs are kept in
the state folder. Nothing in the result names the machine's folders. 100 runs of each take about
a quarter of an hour with the default of 2 s on a machine with nothing else to do; other work on it
makes the intervals wider, not fewer. The default settings of `ampdeploy bench` on a model that
people use are ``--model dinov2_s --image-size 224 --seconds 20 --threads 2 --runs 10``.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.artifacts import prepare_folder, read_json, sha256_json, write_json
from ampdeploy.bench.host import host_facts, machine_identity
from ampdeploy.bench.intervals import ratio_of_medians, ratio_over_loads
from ampdeploy.bench.latency import join_clocks
from ampdeploy.bench.run import measure_loads
from ampdeploy.config import BenchConfig
from ampdeploy.targets.base import get_target
from benchmarks.timing.models import Twins, make_twins

SAME, HEAVIER = "same", "heavier"
KINDS = (SAME, HEAVIER)
MODEL, IMAGE_SIZE = "timm:vit_tiny_patch16_224", 112
INTERVAL = ("ci95_low", "value", "ci95_high")


def one_run(twins: Twins, kind: str, target: str, config: BenchConfig) -> dict[str, Any]:
    """Time both files: what the ratio and its interval are made from."""
    other = twins.light if kind == SAME else twins.heavy
    loads = measure_loads(get_target(target), (twins.light, other), twins.images, (1,), config)["1"]
    found = join_clocks(loads).end_to_end
    pooled = np.concatenate([load.samples_ms[:, :, 0] for load in loads])
    single = ratio_of_medians(pooled[:, 0], pooled[:, 1])
    return {
        "kind": kind,
        "single_load": [single.ci95_low, single.ci95_high],
        "load_ratios": [
            float(np.divide(*np.median(load.samples_ms[:, ::-1, 0], axis=0))) for load in loads
        ],
        "pairs": found.timing.pairs,
        "p50_ms": [found.baseline.p50, found.pruned.p50],
        "p90_ms": [found.baseline.p90, found.pruned.p90],
        "warmup_stable": found.timing.warmup_stable,
    }


def with_interval(row: dict[str, Any]) -> dict[str, Any]:
    """A run with its ratio and interval as `ampdeploy bench` makes them now: they follow from the
    loads' ratios, so runs of an earlier method are none of another."""
    loads = [np.array([[1.0, ratio]]) for ratio in row["load_ratios"]]
    found = ratio_over_loads(loads)
    return {**row, **{name: getattr(found, name) for name in INTERVAL}}


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What the finished runs say, per kind; of `with_interval`."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        low, value, high = (
            np.array([row[name] for row in rows if row["kind"] == kind]) for name in INTERVAL
        )
        if not len(value):
            continue
        middle = float(np.median(value))
        single = np.array([row["single_load"] for row in rows if row["kind"] == kind])
        truth = 1.0 if kind == SAME else middle
        found[kind] = {
            "runs": len(value),
            "median_ratio": middle,
            "contains_1": int(np.sum((low <= 1.0) & (high >= 1.0))),
            "contains_median_ratio": int(np.sum((low <= middle) & (high >= middle))),
            "above_1": int(np.sum(low > 1.0)),
            "below_1": int(np.sum(high < 1.0)),
            "median_width": float(np.median(high - low)),
            "single_load": {
                "contains_1": int(np.sum((single[:, 0] <= 1.0) & (single[:, 1] >= 1.0))),
                "above_1": int(np.sum(single[:, 0] > 1.0)),
                "median_width": float(np.median(single[:, 1] - single[:, 0])),
            },
            "rms_error": float(np.sqrt(np.mean((value - truth) ** 2))),
            "unsettled_warm_ups": sum(
                not row["warmup_stable"] for row in rows if row["kind"] == kind
            ),
        }
    return found


def main() -> int:
    """Run what is missing, as long as there is time, and write what there is."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n")[0])
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--image-size", type=int, default=IMAGE_SIZE)
    parser.add_argument("--target", default="ort", help="what runs .onnx files")
    parser.add_argument("--runs", type=int, default=100, help="of each kind")
    parser.add_argument("--seconds", type=float, default=2.0, help="of timed pairs in a run")
    parser.add_argument("--loads", type=int, default=BenchConfig.loads)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="stop after this long")
    parser.add_argument("--state", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    started = time.monotonic()
    settings = {
        "model": options.model,
        "image_size": options.image_size,
        "target": options.target,
        "seconds": options.seconds,
        "loads": options.loads,
        "threads": options.threads,
        "machine": machine_identity(),
    }
    folder = options.state / sha256_json(settings)[:16]
    prepare_folder(folder)
    twins = make_twins(
        options.model, folder, options.images, image_size=options.image_size, more=0.05
    )
    config = BenchConfig(
        batch_sizes=(1,),
        max_seconds=options.seconds,
        loads=options.loads,
        threads=options.threads,
    )
    kept = folder / "runs.json"
    rows: list[dict[str, Any]] = read_json(kept) if kept.is_file() else []
    while len(rows) < len(KINDS) * options.runs:
        if options.minutes and time.monotonic() - started > 60 * options.minutes:
            print(f"out of time after {len(rows)} runs; the same command continues")
            break
        kind = KINDS[len(rows) % len(KINDS)]
        rows.append(one_run(twins, kind, options.target, config))
        write_json(kept, rows)
        low, value, high = (with_interval(rows[-1])[name] for name in INTERVAL)
        print(f"{len(rows):4d} {kind:8s} {value:.4f} [{low:.4f}, {high:.4f}]", flush=True)
    rows = [with_interval(row) for row in rows]
    result = {
        "host": host_facts(),
        "settings": {name: value for name, value in settings.items() if name != "machine"},
        "flops_ratio": twins.flops_ratio,
        "summary": summary(rows),
        "runs": rows,
    }
    write_json(options.out, result)
    print(json.dumps(result["summary"], indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
