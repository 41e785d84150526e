"""Everything that can fail cheaply, before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ampdeploy.config import BuildConfig
from ampdeploy.errors import ConfigError, MissingDependencyError
from ampdeploy.optional import install_line
from ampdeploy.stages import inputs
from ampdeploy.stages.engine import look_up_bugs
from ampdeploy.stages.judging import find_judge, this_machine

if TYPE_CHECKING:
    from ampdeploy.models.vision import VisionModel


# "The volume must be less than 2^31 elements": ITensor::setDimensions in NvInfer.h.
MAX_ELEMENTS = 2**31


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known about the result before anything runs."""

    params_dense: int
    params: int | None
    """After pruning, within half a grid step; None: AMP's search finds its own size."""
    multiple: int
    """Grid of the widths."""
    judged_on: str
    """The target that will judge the result here."""
    why_no_engine: str | None
    """Why that is not the target that is built for; None: it is."""
    known_bugs: tuple[str, ...]
    """What is changed, or to be watched, because of known bugs of TensorRT; a sentence each."""
    missing: str | None
    """What this machine lacks for it, and the ways on; None: nothing."""


def preflight(config: BuildConfig, *, until: str = "report") -> Expected:
    """Everything that can fail cheaply, before anything expensive starts.

    Args:
        config: Of the build.
        until: The last stage that is to run.

    Raises:
        AmpDeployError: The model, the target or a folder is not usable here.
        MissingDependencyError: This machine lacks something.
        VerificationError: A known bug of this TensorRT would make the engine wrong.
    """
    expected = look_ahead(config, until=until)
    if expected.missing is not None:
        raise MissingDependencyError(expected.missing)
    return expected


def look_ahead(config: BuildConfig, *, until: str = "report") -> Expected:
    """As `preflight`, and what this machine lacks is no error: a plan can be shown all the same.

    Raises:
        AmpDeployError: As there.
        VerificationError: As there.
    """
    from ampdeploy.models.build import build_model
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.budget import plan_budget

    inputs.load_options(config)
    inputs.data_options(config)
    missing = None
    try:
        _check_host(config, until)
    except MissingDependencyError as error:
        missing = str(error)
    if packs_bundle(config, until):
        from ampdeploy.device.bundle.pack import bundle_path, check_replaceable

        check_replaceable(bundle_path(config.folder))
    judge = find_judge(config)
    # Knows on meta tensors whether the budget can be met, before weights are fetched.
    model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
    notes: list[str] = []
    if config.builds_engine:
        _check_largest_batch(config, model.spec.image_size)
        if missing is None and (config.engine.when == "deferred" or _runs_engine(config, until)):
            notes = look_up_bugs(config, expected_patterns(model, config))[1]
    expected = None
    if config.prune.search == "divergence":
        expected = plan_budget(model, config.prune, multiple=config.width_multiple).params
    return Expected(
        params_dense=count_params(model),
        params=expected,
        multiple=config.width_multiple,
        judged_on=judge.target,
        why_no_engine=judge.why_no_engine,
        known_bugs=tuple(notes),
        missing=missing,
    )


def _runs_engine(config: BuildConfig, until: str) -> bool:
    """Whether the stage that builds engines is among those that are to run."""
    from ampdeploy.stages.plan import plan

    names = [stage.name for stage in plan(config)]
    return "engine" in names[: names.index(until) + 1 if until in names else None]


def _check_host(config: BuildConfig, until: str) -> None:
    """Whether this machine has what the stages up to `until` need.

    Raises:
        MissingDependencyError: It has not.
        ConfigError: A device or options that do not exist or exclude each other.
    """
    from ampdeploy.models.device import resolve_device
    from ampdeploy.targets.base import get_target

    resolve_device(config.prune.device)
    if config.distill.epochs:
        resolve_device(config.distill.device)
    if config.builds_engine:
        check_engine_host(config, until)
        if config.engine.when == "now" and not _runs_engine(config, until):
            return
    # With all that it takes to run, such as cuda-python: an engine can be built without that.
    get_target(find_judge(config).target).check()


def _check_largest_batch(config: BuildConfig, image_size: int) -> None:
    """Refuse a profile that TensorRT would refuse, or be killed over, hours later.

    Raises:
        ConfigError: The largest batch is too large, and which would not be.
    """
    from ampdeploy.export.onnx import MAX_BATCH

    batch = config.engine.batch
    most = min(MAX_BATCH, (MAX_ELEMENTS - 1) // (3 * image_size**2))
    if batch[2] > most:
        raise ConfigError(
            f"--engine-batch {','.join(map(str, batch))}: the largest batch is {batch[2]}, and at "
            f"{image_size} px no engine takes more than {most}: a tensor of TensorRT has fewer "
            "than 2^31 elements. Engines are mostly built for 1 to 64."
        )


def packs_bundle(config: BuildConfig, until: str) -> bool:
    """Whether a build as far as `until` ends in a bundle."""
    return config.builds_engine and config.engine.when == "deferred" and until == "report"


def check_engine_host(config: BuildConfig, until: str) -> None:
    """Whether this machine can build the engine, or need not.

    Args:
        config: Of the build.
        until: The last stage that is to run.

    Raises:
        MissingDependencyError: It cannot; names the three ways on.
        ConfigError: Options of the engine that exclude each other, or this TensorRT or machine.
    """
    from ampdeploy.device.engine.flavour import find_flavour
    from ampdeploy.device.engine.options import check_can_build, check_options

    check_options(config.target, config.engine)
    if config.engine.when == "deferred" or not _runs_engine(config, until):
        return
    # A run's graphs are there, mostly; a bundle takes no more.
    pack = f"ampdeploy bundle {config.folder}"
    try:
        flavour = find_flavour(config.target, needed_by=f"target {config.target}")
    except MissingDependencyError as error:
        if config.target == "trt-rtx":
            raise
        line = install_line("tensorrt")
        way = (
            f"{pack}   the device builds the engine from this bundle"
            if until == "engine"
            else "ampdeploy build --engine deferred   everything else is built here, and the "
            "engine on the device from the bundle"
        )
        raise MissingDependencyError(
            f"{str(error).removesuffix(f' Run: {line}')}\nThree ways on:\n"
            f"  {way}\n"
            "  ampdeploy build --target trt-rtx   TensorRT for RTX builds engines for RTX GPUs "
            "without one\n"
            f"  {line}"
        ) from error
    try:
        check_can_build(flavour, config.engine, this_machine())
    except MissingDependencyError as error:
        if until != "engine":
            raise
        raise MissingDependencyError(f"{error} This run can be packed now: {pack}") from error


def expected_patterns(model: VisionModel, config: BuildConfig) -> set[str]:
    """The patterns of `ampdeploy.device.radar.graph_patterns` that the graph of `model` will have.

    Args:
        model: Without weights.
        config: Of the build: precision.
    """
    blocks = list(model.backbone.blocks)
    patterns = {"transformer", "dynamic-batch"}
    if getattr(model.backbone, "rope", None) is not None:
        patterns.add("rope")
    split_gate = any(len(site.fc_in) > 1 for site in model.spec.sites)
    if split_gate or any(getattr(block.attn, "qkv", None) is None for block in blocks):
        patterns.add("shared-input-gemms")
    if config.precision.precision == "fp16":
        patterns.add("fp16-attention")
    return patterns
