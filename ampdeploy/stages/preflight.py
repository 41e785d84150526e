"""Everything that can fail cheaply, before anything expensive starts."""

from __future__ import annotations

from dataclasses import dataclass

from ampdeploy.config import BuildConfig
from ampdeploy.errors import MissingDependencyError
from ampdeploy.optional import install_line
from ampdeploy.stages import inputs


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What is known about the result before anything runs."""

    params_dense: int
    params: int | None
    """After pruning, within half a grid step; None: AMP's search finds its own size."""
    multiple: int
    """Grid of the widths."""


def preflight(config: BuildConfig) -> Expected:
    """Everything that can fail cheaply, before anything expensive starts.

    Raises:
        AmpDeployError: The model, the target or a folder is not usable here.
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
    else:
        get_target(config.target).check()
    # Knows on meta tensors whether the budget can be met, before weights are fetched.
    model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
    expected = None
    if config.prune.search == "divergence":
        expected = plan_budget(model, config.prune, multiple=config.width_multiple).params
    return Expected(
        params_dense=count_params(model), params=expected, multiple=config.width_multiple
    )


def check_engine_host(config: BuildConfig) -> None:
    """Whether this machine can build the engine, or need not.

    Raises:
        MissingDependencyError: It cannot; names the three ways on.
        ConfigError: Options of the engine that this TensorRT does not take.
    """
    from ampdeploy.device.builder_options import check_can_build
    from ampdeploy.device.flavour import find_flavour
    from ampdeploy.device.platform import device_facts

    if config.engine.when == "deferred":
        return
    try:
        flavour = find_flavour(config.target, needed_by=f"target {config.target}")
        check_can_build(flavour, config.engine, device_facts())
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
