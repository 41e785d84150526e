"""Everything that can fail cheaply, before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ampdeploy.config import BuildConfig
from ampdeploy.errors import MissingDependencyError
from ampdeploy.optional import install_line
from ampdeploy.stages import inputs
from ampdeploy.stages.engine import look_up_bugs
from ampdeploy.stages.judging import find_judge, this_machine

if TYPE_CHECKING:
    from ampdeploy.models.vision import VisionModel


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


def preflight(config: BuildConfig, *, until: str = "report") -> Expected:
    """Everything that can fail cheaply, before anything expensive starts.

    Args:
        config: Of the build.
        until: The last stage that is to run.

    Raises:
        AmpDeployError: The model, the target or a folder is not usable here.
        VerificationError: A known bug of this TensorRT would make the engine wrong.
    """
    from ampdeploy.models.build import build_model
    from ampdeploy.models.device import resolve_device
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.budget import plan_budget
    from ampdeploy.targets.base import get_target

    inputs.load_options(config)
    inputs.data_options(config)
    resolve_device(config.prune.device)
    if config.distill.epochs:
        resolve_device(config.distill.device)
    if config.builds_engine:
        check_engine_host(config)
    if packs_bundle(config, until):
        from ampdeploy.device.bundle.pack import bundle_path, check_replaceable

        check_replaceable(bundle_path(config.folder))
    judge = find_judge(config)
    # With all that it takes to run, such as cuda-python: an engine can be built without that.
    get_target(judge.target).check()
    # Knows on meta tensors whether the budget can be met, before weights are fetched.
    model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
    notes = (
        look_up_bugs(config, expected_patterns(model, config))[1] if config.builds_engine else ()
    )
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
    )


def packs_bundle(config: BuildConfig, until: str) -> bool:
    """Whether a build as far as `until` ends in a bundle."""
    return config.builds_engine and config.engine.when == "deferred" and until == "report"


def check_engine_host(config: BuildConfig) -> None:
    """Whether this machine can build the engine, or need not.

    Raises:
        MissingDependencyError: It cannot; names the three ways on.
        ConfigError: Options of the engine that exclude each other, or this TensorRT or machine.
    """
    from ampdeploy.device.engine.flavour import find_flavour
    from ampdeploy.device.engine.options import check_can_build, check_options

    check_options(config.target, config.engine)
    if config.engine.when == "deferred":
        return
    try:
        flavour = find_flavour(config.target, needed_by=f"target {config.target}")
        check_can_build(flavour, config.engine, this_machine())
    except MissingDependencyError as error:
        if config.target == "trt-rtx":
            raise
        raise MissingDependencyError(
            f"{error}\nThree ways on:\n"
            "  --engine deferred   build everything else here, and the engine on the device from "
            "the bundle (`ampdeploy bundle`)\n"
            "  --target trt-rtx    TensorRT for RTX builds engines for RTX GPUs without one\n"
            f"  {install_line('tensorrt')}"
        ) from error


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
