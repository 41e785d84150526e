"""A budget is met by the model that comes out, for every kind of model; an impossible one is not
begun."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from timm.layers import Mlp
from torch import nn

from ampdeploy.config import PruneConfig
from ampdeploy.errors import ConfigError, UnsupportedModelError
from ampdeploy.models.build import build_model, wrap_backbone
from ampdeploy.models.profile import profile_model
from ampdeploy.prune.allocate import allocate
from ampdeploy.prune.budget import plan_budget
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.moments import collect
from ampdeploy.prune.slim import slim
from tests.mlp_kinds import BACKBONES, CFG, SIZE, make


def random_kept(widths, hidden, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randperm(dense, generator=generator)[:width].sort().values
        for dense, width in zip(hidden, widths, strict=True)
    ]


def random_widths(budget, seed=0):
    """Widths of random curves, so that blocks differ."""
    generator = np.random.default_rng(seed)
    curves = [
        np.append(np.cumsum(generator.exponential(size=width))[::-1], 0) for width in budget.hidden
    ]
    return allocate(curves, budget)


def share(config, dense, slim_):
    """What was asked for, as it came out."""
    kind, _ = config.budget
    if kind == "params_cut":
        return 1 - slim_.params / dense.params
    if kind == "flops_cut":
        return 1 - slim_.flops / dense.flops
    return sum(b.hidden for b in slim_.blocks) / sum(b.hidden for b in dense.blocks)


def share_of_step(config, dense, model, neurons):
    """What `neurons` hidden neurons are of the whole, counted on the model."""
    site = model.spec.sites[0]
    part = dense.blocks[0]
    kind, _ = config.budget
    if kind == "params_cut":
        bias = model.backbone.get_submodule(site.fc_out).bias
        return neurons * (part.mlp_params - (0 if bias is None else len(bias))) / (
            site.hidden * dense.params
        )  # fmt: skip
    if kind == "flops_cut":
        return neurons * part.mlp_flops / (site.hidden * dense.flops)
    return neurons / sum(s.hidden for s in model.spec.sites)


@pytest.mark.parametrize("value", [0.1, 0.27])
@pytest.mark.parametrize("kind", ["params_cut", "flops_cut", "mlp_keep"])
@pytest.mark.parametrize("model_kind", BACKBONES)
def test_the_slim_model_meets_the_budget(model_kind, kind, value):
    model = make(model_kind)
    if kind == "mlp_keep":
        value = 1 - value
    config = PruneConfig(**{kind: value}, repair="none")
    dense = profile_model(model)
    budget = plan_budget(model, config, multiple=8)
    widths = random_widths(budget)
    assert len(set(widths)) > 1
    step = share_of_step(config, dense, model, 8)
    slim(model, random_kept(widths, budget.hidden))
    assert share(config, dense, profile_model(model)) == pytest.approx(value, abs=step / 2 + 1e-9)


@pytest.mark.parametrize("model_kind", ["swiglu_no_bias", "plain"])
def test_biases_that_the_fold_adds_are_paid_for(model_kind):
    """A bias per block is one neuron of this narrow model, so it has to be counted."""
    model = make(model_kind)
    images = torch.randn(4, 3, SIZE, SIZE)
    dense = profile_model(model)
    moments = collect(model, [images], count=4, sensitivity=False)
    for cut in np.linspace(0.1, 0.4, 7):
        config = PruneConfig(params_cut=float(cut), repair="fold")
        budget = plan_budget(model, config, multiple=1)
        widths = random_widths(budget)
        assert max(widths) < 128  # so that every block gets its bias
        candidate = make(model_kind)
        fold(candidate, random_kept(widths, budget.hidden), moments, method="mean-shift")
        found = share(config, dense, profile_model(candidate))
        step = share_of_step(config, dense, model, 1)
        assert found == pytest.approx(cut, abs=step / 2 + 1e-9)


@pytest.mark.parametrize("minimum", [1, 8, 20, 40])
def test_no_block_gets_narrower_than_the_minimum(minimum):
    model = make("plain")
    config = PruneConfig(mlp_keep=0.35, min_width=minimum)
    budget = plan_budget(model, config, multiple=8)
    first = -(-minimum // 8) * 8
    assert all(budget.choices(block)[0] == first for block in range(3))
    curves = [np.zeros(129), np.zeros(129), np.linspace(1, 0, 129)]  # the first two are free
    widths = allocate(curves, budget)
    assert min(widths) == first
    assert sum(widths) == pytest.approx(0.35 * 384, abs=4)


def test_the_minimum_is_the_multiple_where_none_is_given():
    budget = plan_budget(make("plain"), PruneConfig(mlp_keep=0.5), multiple=32)
    assert budget.minimum == 32
    assert budget.choices(0) == [32, 64, 96, 128]


def test_a_dense_width_off_the_grid_may_stay():
    budget = plan_budget(make("eva_packed_gate"), PruneConfig(mlp_keep=0.5), multiple=16)
    assert budget.choices(0) == [16, 32, 48, 64, 80, 88]


@pytest.mark.parametrize("multiple", [1, 16])
@pytest.mark.parametrize("kind", ["params_cut", "flops_cut", "mlp_keep"])
@pytest.mark.parametrize("model_kind", BACKBONES)
def test_impossible_budgets_name_the_figure_that_is_possible(model_kind, kind, multiple):
    model = make(model_kind)
    keeping = kind == "mlp_keep"
    impossible = 0.001 if keeping else 0.98
    with pytest.raises(ConfigError) as caught:
        plan_budget(model, PruneConfig(**{kind: impossible}), multiple=multiple)
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert f"--{kind.replace('_', '-')} {impossible} cannot be met" in message
    found = re.search(r"the (largest|smallest) possible is ([\d.]+);? ?", message)
    assert found is not None, message
    assert (found[1] == "smallest") == keeping
    limit = float(found[2].rstrip("."))
    budget = plan_budget(model, PruneConfig(**{kind: limit}), multiple=multiple)
    dense = profile_model(model)
    widths = random_widths(budget)
    least = sum(budget.choices(block)[0] for block in range(3))
    # The figure is rounded to three digits towards what is possible, and no further.
    config = PruneConfig(**{kind: limit})
    neurons_of_digit = 0.001 / share_of_step(config, dense, model, 1)
    assert least <= sum(widths) <= least + neurons_of_digit + multiple / 2
    # Half a grid step and a digit further it is refused.
    more = (-1 if keeping else 1) * (share_of_step(config, dense, model, multiple / 2) + 0.0011)
    with pytest.raises(ConfigError, match="cannot be met"):
        plan_budget(model, PruneConfig(**{kind: limit + more}), multiple=multiple)


@pytest.mark.parametrize("options", [{"min_width": 129}, {"width_multiple": 192}])
def test_widths_above_the_dense_one_are_refused(options):
    config = PruneConfig(mlp_keep=0.5, **options)
    with pytest.raises(ConfigError, match=r"above the 128 neurons of blocks\.0\.mlp.*--min-width"):
        plan_budget(make("plain"), config, multiple=config.width_multiple or 16)


def test_blocks_whose_neurons_cost_differently_are_refused():
    model = make("plain")
    mlp = Mlp(32, 128)
    mlp.fc1 = nn.Linear(32, 128, bias=False)
    model.backbone.blocks[1].mlp = mlp
    mixed = wrap_backbone(model.backbone, name="test:mixed", timm_name="test", cfg=CFG)
    with pytest.raises(UnsupportedModelError, match=r"64 to 65 parameters.*--search amp"):
        plan_budget(mixed, PruneConfig(params_cut=0.2), multiple=8)


@pytest.mark.parametrize(
    ("name", "size", "options", "multiple"),
    [
        ("dinov2_s", 224, {"params_cut": 0.4}, 16),
        ("dinov2_s", 518, {"flops_cut": 0.2}, 64),
        ("dinov2_g", 224, {"params_cut": 0.4}, 64),
        ("dinov2_g", 224, {"flops_cut": 0.3}, 128),
        ("openclip_g", 224, {"mlp_keep": 0.5}, 64),
        ("timm:aimv2_large_patch14_224", 224, {"params_cut": 0.5}, 16),
    ],
)
def test_real_architectures_on_meta_tensors(name, size, options, multiple):
    model = build_model(name, image_size=size, device="meta")
    config = PruneConfig(**options, repair="none")
    dense = profile_model(model)
    budget = plan_budget(model, config, multiple=multiple)
    widths = random_widths(budget)
    assert all(
        width % multiple == 0 or width == h for width, h in zip(widths, budget.hidden, strict=True)
    )
    step = share_of_step(config, dense, model, multiple)
    slim(model, [torch.arange(width) for width in widths])
    found = share(config, dense, profile_model(model))
    assert found == pytest.approx(next(iter(options.values())), abs=step / 2 + 1e-9)


@pytest.mark.parametrize("options", [{"params_cut": 1e-5}, {"mlp_keep": 0.9999}])
def test_a_budget_that_would_remove_nothing_is_refused(options):
    with pytest.raises(ConfigError, match="less than half a grid step of 16 neurons"):
        plan_budget(make("plain"), PruneConfig(**options), multiple=16)
