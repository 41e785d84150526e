"""Physical removal of hidden neurons: rows of fc_in, columns of fc_out. No masks, no zeros."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ampdeploy.errors import ArtifactError
from ampdeploy.models.build import with_sites
from ampdeploy.models.spec import MlpSite
from ampdeploy.models.vision import VisionModel


def gather(
    linear: nn.Linear, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> nn.Linear:
    """A new linear with some rows (outputs) and columns (inputs) of `linear`; None: all."""
    weight = linear.weight.detach()
    bias = linear.bias.detach() if linear.bias is not None else None
    if rows is not None:
        weight = weight[rows]
        bias = bias[rows] if bias is not None else None
    if columns is not None:
        weight = weight[:, columns]
    result: nn.Linear = nn.utils.skip_init(
        nn.Linear,
        weight.shape[1],
        weight.shape[0],
        bias=bias is not None,
        device=weight.device,
        dtype=weight.dtype,
    )
    with torch.no_grad():
        result.weight.copy_(weight)
        if bias is not None:
            result.bias.copy_(bias)
    return result.train(linear.training)


def slim_linears(backbone: nn.Module, site: MlpSite, kept: Tensor) -> dict[str, nn.Linear]:
    """The linears of `site` with only the `kept` neurons, by path; `backbone` is not changed.

    Args:
        backbone: Module that `site` points into.
        site: The MLP, with its present width.
        kept: Sorted indices of the neurons that stay, int64, within [0, site.hidden).
    """
    kept = kept.to(next(backbone.parameters()).device)
    # A packed gate holds the rows of neuron j at j and at hidden + j.
    rows = torch.cat([kept, kept + site.hidden]) if site.packed else kept
    linears = {path: gather(_linear(backbone, path), rows=rows) for path in site.fc_in}
    linears[site.fc_out] = gather(_linear(backbone, site.fc_out), columns=kept)
    return linears


def site_linears(backbone: nn.Module, site: MlpSite) -> dict[str, nn.Linear]:
    """The linears of `site` as they stand, by path."""
    return {path: _linear(backbone, path) for path in (*site.fc_in, site.fc_out)}


def put_linears(backbone: nn.Module, linears: dict[str, nn.Linear]) -> None:
    """Set each linear at its path."""
    for path, linear in linears.items():
        parent, _, attribute = path.rpartition(".")
        setattr(backbone.get_submodule(parent), attribute, linear)


@contextmanager
def restored(model: VisionModel) -> Iterator[None]:
    """Put every MLP of `model`, and its spec, back as they were when this was entered."""
    spec = model.spec
    linears = [site_linears(model.backbone, site) for site in spec.sites]
    try:
        yield
    finally:
        for block in linears:
            put_linears(model.backbone, block)
        model.spec = spec


def _linear(backbone: nn.Module, path: str) -> nn.Linear:
    module = backbone.get_submodule(path)
    assert isinstance(module, nn.Linear)  # models/sites.py made the path
    return module


def slim(model: VisionModel, kept: Sequence[Tensor]) -> VisionModel:
    """Remove every hidden neuron that is not kept, in place.

    Args:
        model: Changed in place; its spec gets the new widths.
        kept: Per block, sorted unique indices of the neurons that stay.

    Returns:
        `model`, now a plain smaller module.

    Raises:
        ArtifactError: The indices do not fit the model.
    """
    check_indices(model, kept)
    for site, indices in zip(model.spec.sites, kept, strict=True):
        put_linears(model.backbone, slim_linears(model.backbone, site, indices))
    model.spec = with_sites(model.spec, [len(indices) for indices in kept])
    return model


def check_indices(model: VisionModel, kept: Sequence[Tensor]) -> None:
    """Make sure that `kept` can be applied to `model`, before anything is changed.

    Raises:
        ArtifactError: The indices do not fit the model.
    """
    sites = model.spec.sites
    if len(kept) != len(sites):
        raise ArtifactError(
            f"indices for {len(kept)} blocks cannot be applied to {model.spec.name}, which has "
            f"{len(sites)}. The widths belong to another model."
        )
    for site, indices in zip(sites, kept, strict=True):
        _check_indices(site, indices)


def _check_indices(site: MlpSite, kept: Tensor) -> None:
    if kept.ndim != 1 or len(kept) == 0:
        raise ArtifactError(f"{site.name}: at least one of {site.hidden} neurons must be kept.")
    if int(kept[0]) < 0 or int(kept[-1]) >= site.hidden or not bool((kept.diff() > 0).all()):
        raise ArtifactError(
            f"{site.name}: kept indices must be sorted, unique and within 0..{site.hidden - 1}; "
            f"seen {int(kept.min())}..{int(kept.max())}. The widths belong to another model."
        )


def top_neurons(scores: Tensor, width: int) -> Tensor:
    """Sorted indices of the `width` highest scores; ties go to the lower index."""
    order = torch.argsort(scores, descending=True, stable=True)
    return order[:width].sort().values
