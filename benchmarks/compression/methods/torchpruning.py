"""Torch-Pruning from PyPI (https://github.com/VainF/Torch-Pruning, arXiv 2301.12900).

Its own importances, ranking and pruner, with their defaults; restricted to the hidden neurons of
the MLPs, as everything here. Gradients are those of the same entropy that AMP's score uses,
accumulated over the calibration batches. What it kept is then taken from the dense model.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ampdeploy.errors import UnsupportedModelError, VerificationError
from ampdeploy.models.vision import VisionModel
from ampdeploy.optional import require
from ampdeploy.prune.budget import Budget
from ampdeploy.prune.criterion import CRITERIA
from ampdeploy.prune.slim import slim
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.widths import uniform_widths


def _gradients(bench: Bench) -> dict[str, Tensor]:
    """Gradient of the criterion with respect to every weight of the MLPs, by name, summed over
    the batches.

    The criterion couples all images of a batch: its gradient with respect to the features comes
    from a pass without activations, and is sent back in micro-batches.
    """
    config = bench.config
    model = bench.copy()
    model.requires_grad_(False)
    for site in model.spec.sites:
        model.backbone.get_submodule(site.name).requires_grad_(True)
    for batch in bench.images.split(config.batch_size):
        micro = [images.to(bench.device) for images in batch.split(config.micro_batch_size)]
        with torch.no_grad():
            features = torch.cat([model(images).features for images in micro])
        features.requires_grad_()
        CRITERIA[config.criterion](features, config.inv_temperature).backward()
        assert features.grad is not None
        for images, gradient in zip(
            micro, features.grad.split(config.micro_batch_size), strict=True
        ):
            model(images).features.backward(gradient)
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


GRADIENTS = Part(name="weight gradients", make=_gradients)


def _pruned_by_library(
    model: VisionModel, importance: Any, budget: Budget, *, globally: bool
) -> list[Tensor]:
    """Let Torch-Pruning prune `model` in place.

    Returns:
        Per block, sorted indices of the neurons that it kept.

    Raises:
        UnsupportedModelError: Gate and value lie in one linear, which it cannot follow.
        VerificationError: It removed something else than whole hidden neurons.
    """
    if any(site.packed for site in model.spec.sites):
        raise UnsupportedModelError(
            f"Torch-Pruning takes the two halves of {model.spec.sites[0].fc_in[0]} of "
            f"{model.spec.name} for one layer and fails on it. Leave out its rows with --methods."
        )
    tp = require("torch_pruning", needed_by="the Torch-Pruning rows")
    backbone, sites = model.backbone, model.spec.sites
    roots = [backbone.get_submodule(path) for site in sites for path in site.fc_in]
    widths = uniform_widths(budget)
    # The share that leaves exactly this many; the half guards the library's rounding down.
    share = 1 - (sum(widths) + 0.5) / sum(budget.hidden)
    ratios = {
        backbone.get_submodule(path): 1 - (width + 0.5) / site.hidden
        for site, width in zip(sites, widths, strict=True)
        for path in site.fc_in
    }
    size = model.spec.image_size
    ignored = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module not in roots
    ]
    example = torch.zeros(1, 3, size, size, device=next(model.parameters()).device)
    with warnings.catch_warnings():
        # It says how it would prune position embeddings and the like; those groups are ignored.
        warnings.filterwarnings("ignore", message="Unwrapped parameters detected")
        pruner = tp.pruner.BasePruner(
            model,
            example,
            importance=importance,
            global_pruning=globally,
            pruning_ratio=share,
            pruning_ratio_dict=None if globally else ratios,
            ignored_layers=ignored,
            output_transform=lambda output: output.features.sum(),
        )
        pruner.step()
    removed: dict[str, set[int]] = {}
    for name, is_output, indices in pruner.pruning_history():
        if not is_output:
            raise VerificationError(f"Torch-Pruning removed inputs of {name}, not neurons.")
        removed.setdefault(name.removeprefix("backbone."), set()).update(indices)
    kept = []
    for site in sites:
        gone = set().union(*(removed.pop(path, set()) for path in site.fc_in))
        kept.append(torch.tensor([j for j in range(site.hidden) if j not in gone]))
    if removed:
        raise VerificationError(f"Torch-Pruning also pruned {', '.join(removed)}.")
    return kept


def _check_same(ours: VisionModel, theirs: VisionModel) -> None:
    """What was taken from the dense model must be what the library made, to the bit.

    Raises:
        VerificationError: It is not.
    """
    expected = theirs.state_dict()
    for name, tensor in ours.state_dict().items():
        if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name]):
            raise VerificationError(
                f"{name} of the model that Torch-Pruning made is {tuple(expected[name].shape)} "
                f"and differs from the dense model's rows that it kept, {tuple(tensor.shape)}."
            )


def _prune(importance_name: str, *, globally: bool) -> Callable[[Bench, Budget], Pruned]:
    def prune(bench: Bench, budget: Budget) -> Pruned:
        tp = require("torch_pruning", needed_by="the Torch-Pruning rows")
        model = bench.copy().requires_grad_(True)
        if importance_name == "GroupTaylorImportance":
            gradients = bench.get(GRADIENTS)
            for name, parameter in model.named_parameters():
                parameter.grad = gradients[name].clone() if name in gradients else None
        importance = getattr(tp.importance, importance_name)()
        kept = _pruned_by_library(model, importance, budget, globally=globally)
        result = slim(bench.copy(), kept)
        _check_same(result, model)
        return Pruned(model=result)

    return prune


TAYLOR = "GroupTaylorImportance"
MAGNITUDE = "GroupMagnitudeImportance"

METHODS = (
    Method(
        name="tp-magnitude",
        label="Torch-Pruning magnitude, uniform",
        prune=_prune(MAGNITUDE, globally=False),
        seeded=False,
    ),
    Method(
        name="tp-magnitude-global",
        label="Torch-Pruning magnitude, global",
        prune=_prune(MAGNITUDE, globally=True),
        seeded=False,
    ),
    Method(
        name="tp-taylor",
        label="Torch-Pruning Taylor, uniform",
        prune=_prune(TAYLOR, globally=False),
        parts=(GRADIENTS,),
    ),
    Method(
        name="tp-taylor-global",
        label="Torch-Pruning Taylor, global",
        prune=_prune(TAYLOR, globally=True),
        parts=(GRADIENTS,),
    ),
)
