"""Everything that can fail cheaply, before anything expensive starts."""

from __future__ import annotations

from ampdeploy.config import BuildConfig
from ampdeploy.stages import inputs


def preflight(config: BuildConfig) -> None:
    """Everything that can fail cheaply, before anything expensive starts.

    Raises:
        AmpDeployError: The model, the target or a folder is not usable here.
    """
    from ampdeploy.models.build import build_model
    from ampdeploy.models.device import resolve_device
    from ampdeploy.prune.budget import plan_budget
    from ampdeploy.targets.base import get_target

    inputs.load_options(config)
    inputs.data_options(config)
    resolve_device(config.prune.device)
    if config.distill.epochs:
        resolve_device(config.distill.device)
    get_target(config.target).check()
    if config.prune.search == "divergence":
        # Knows on meta tensors whether the budget can be met, before weights are fetched.
        model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
        plan_budget(model, config.prune, multiple=config.width_multiple)
