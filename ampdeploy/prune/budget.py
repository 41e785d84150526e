"""From what a user asks for (-40% parameters) to how many hidden neurons stay."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from torch import nn

from ampdeploy.config import PruneConfig
from ampdeploy.errors import ConfigError, UnsupportedModelError
from ampdeploy.models.profile import profile_model
from ampdeploy.models.spec import MlpSite
from ampdeploy.models.vision import VisionModel


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How many hidden neurons may stay, and between which widths each block may be."""

    neurons: float
    """In all blocks together; the widths' grid decides which whole number comes closest."""
    params: int
    """Parameters of the model with so many neurons, rounded to whole ones."""
    hidden: tuple[int, ...]
    """Dense width of each block."""
    multiple: int
    minimum: int

    def choices(self, block: int) -> list[int]:
        """The widths `block` may have, ascending: the grid from the minimum on, and the dense
        width, which may lie off the grid."""
        hidden = self.hidden[block]
        first = -(-self.minimum // self.multiple) * self.multiple
        return [*range(first, hidden, self.multiple), hidden]


def _neuron_params(model: VisionModel, site: MlpSite) -> int:
    """Parameters that go with one hidden neuron: its rows of fc_in, its column of fc_out."""
    rows = 2 if site.packed else 1
    total = 0
    for path in site.fc_in:
        linear = model.backbone.get_submodule(path)
        assert isinstance(linear, nn.Linear)
        total += rows * (linear.in_features + (linear.bias is not None))
    linear = model.backbone.get_submodule(site.fc_out)
    assert isinstance(linear, nn.Linear)
    return total + linear.out_features


def _neuron_weights(model: VisionModel, site: MlpSite) -> int:
    """As `_neuron_params`, without biases: what is multiplied once per token."""
    rows = 2 if site.packed else 1
    linears = [(rows, "in_features", path) for path in site.fc_in]
    linears.append((1, "out_features", site.fc_out))
    return sum(n * getattr(model.backbone.get_submodule(path), a) for n, a, path in linears)


def _new_biases(model: VisionModel, config: PruneConfig) -> int:
    """Parameters that the fold adds: a bias for every second linear that has none."""
    if config.fold == "none":
        return 0
    linears = [model.backbone.get_submodule(site.fc_out) for site in model.spec.sites]
    return sum(
        linear.out_features
        for linear in linears
        if isinstance(linear, nn.Linear) and linear.bias is None
    )


def plan_budget(model: VisionModel, config: PruneConfig, *, multiple: int) -> Budget:
    """Translate the budget of `config` for the dense `model`; nothing is computed with weights.

    Args:
        model: Dense, on any device, `meta` included.
        config: With one of `params_cut`, `flops_cut` and `mlp_keep`.
        multiple: Grid of the widths.

    Raises:
        ConfigError: More is asked for than the MLPs hold; the message has the largest figure.
        UnsupportedModelError: Neurons of different blocks cost differently.
    """
    sites = model.spec.sites
    hidden = tuple(site.hidden for site in sites)
    minimum = config.min_width if config.min_width is not None else multiple
    too_narrow = [site.name for site in sites if minimum > site.hidden]
    if too_narrow:
        raise ConfigError(
            f"minimum width {minimum} is above the {min(hidden)} neurons of {too_narrow[0]}. "
            "Lower --min-width or --width-multiple."
        )
    budget = Budget(neurons=0, params=0, hidden=hidden, multiple=multiple, minimum=minimum)
    least = sum(budget.choices(block)[0] for block in range(len(hidden)))
    costs = {_neuron_params(model, site) for site in sites}
    if len(costs) != 1:
        raise UnsupportedModelError(
            f"{model.spec.name}: a hidden neuron costs {min(costs)} to {max(costs)} parameters, "
            "depending on the block; a budget needs them alike. Use --search amp."
        )
    cost = costs.pop()
    kind, value = config.budget
    total = sum(hidden)
    profile = profile_model(model)
    added = 0.0  # by the repair, as a share of what is budgeted
    if kind == "mlp_keep":
        neurons, per_neuron = value * total, 1 / total
    elif kind == "params_cut":
        per_neuron = cost / profile.params
        added = _new_biases(model, config) / profile.params
        neurons = total - (value + added) / per_neuron
    else:
        per_neuron = 2 * profile.tokens * _neuron_weights(model, sites[0]) / profile.flops
        neurons = total - value / per_neuron
    # Half a grid step of slack: the grid is met to the nearest.
    if neurons < least - multiple / 2:
        option = "--" + kind.replace("_", "-")
        if kind == "mlp_keep":
            limit = f"the smallest possible is {math.ceil(1000 * least / total) / 1000}"
            why, ask = f"of {total} hidden neurons", "Keep more"
        else:
            most = (total - least) * per_neuron - added
            limit = f"the largest possible is {math.floor(1000 * most) / 1000}"
            share, what = profile.mlp_params / profile.params, "parameters"
            if kind == "flops_cut":
                share, what = profile.mlp_flops / profile.flops, "FLOPs"
            why, ask = f"{share:.1%} of the {what} are in MLPs", "Ask for less"
        raise ConfigError(
            f"{option} {value} cannot be met for {model.spec.name} at {profile.image_size} px: "
            f"{why}, every block keeps at least {minimum}; {limit}. {ask}, or lower --min-width "
            "and --width-multiple."
        )
    if neurons > total - multiple / 2:
        raise ConfigError(
            f"{'--' + kind.replace('_', '-')} {value} is less than half a grid step of {multiple} "
            f"neurons, so nothing would be removed from {model.spec.name}. Ask for more, or lower "
            "--width-multiple."
        )
    params = profile.params - round((total - neurons) * cost) + _new_biases(model, config)
    return dataclasses.replace(budget, neurons=neurons, params=params)
