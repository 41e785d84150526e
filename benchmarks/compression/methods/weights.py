"""Methods that see no image: random neurons, weight magnitude, and DGMR's Gram-Schmidt."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ampdeploy.models.spec import MlpSite
from ampdeploy.models.vision import VisionModel
from ampdeploy.prune.budget import Budget
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.widths import uniform, uniform_widths

# A direction whose squared length is below this share of the longest original one is rounding.
EXHAUSTED = 1e-6


def incoming(model: VisionModel, site: MlpSite) -> Tensor:
    """The weights (H, rows * C) that lead into each hidden neuron; a gate's next to the value's."""
    rows: list[Tensor] = []
    for path in site.fc_in:
        weight = _weight(model, path)
        rows += weight.split(site.hidden) if site.packed else [weight]
    return torch.cat(rows, dim=1)


def outgoing(model: VisionModel, site: MlpSite) -> Tensor:
    """The weights (H, C) that lead out of each hidden neuron."""
    return _weight(model, site.fc_out).T


def _weight(model: VisionModel, path: str) -> Tensor:
    linear = model.backbone.get_submodule(path)
    assert isinstance(linear, nn.Linear)
    return linear.weight.detach()


def magnitude_scores(model: VisionModel) -> list[Tensor]:
    """Per block (H,): L2 norm of the incoming weights times that of the outgoing ones.

    The product is what scaling one linear up and the other down leaves as it is.
    """
    return [
        incoming(model, site).norm(dim=1) * outgoing(model, site).norm(dim=1)
        for site in model.spec.sites
    ]


def gram_schmidt(vectors: Tensor) -> Tensor:
    """Order the rows of (H, D): each time the longest after those before are projected out.

    DGMR (arXiv 2506.08591, section 3): the neuron with the largest L2 norm is chosen, its
    direction is removed from all others, and so on. After D choices nothing is left to compare:
    the neurons still free then start over with their original weights, which is this
    benchmark's reading of the paper for widths above D.

    Returns:
        (H,) int64: a permutation; the first k are what is chosen for width k.
    """
    original = vectors.double()
    residual = original.clone()
    floor = float(original.square().sum(dim=1).max()) * EXHAUSTED
    free = torch.ones(len(original), dtype=torch.bool, device=original.device)
    order: list[int] = []
    fresh = True
    while len(order) < len(original):
        lengths = residual.square().sum(dim=1).masked_fill(~free, -1.0)
        best = int(lengths.argmax())
        if float(lengths[best]) <= floor and not fresh:
            residual, fresh = original.clone(), True
            continue
        order.append(best)
        free[best], fresh = False, False
        length = residual[best].norm()
        if length > 0:
            direction = residual[best] / length
            residual.addr_(residual @ direction, direction, alpha=-1)
    return torch.tensor(order, dtype=torch.int64)


def _orders(bench: Bench) -> list[Tensor]:
    return [gram_schmidt(incoming(bench.dense, site)) for site in bench.dense.spec.sites]


ORDERS = Part(name="Gram-Schmidt orders", make=_orders)


def _random(bench: Bench, budget: Budget) -> Pruned:
    generator = torch.Generator().manual_seed(bench.seed)
    scores = [torch.rand(site.hidden, generator=generator) for site in bench.dense.spec.sites]
    return Pruned(model=bench.slim(uniform(scores, budget)))


def _magnitude(bench: Bench, budget: Budget) -> Pruned:
    return Pruned(model=bench.slim(uniform(magnitude_scores(bench.dense), budget)))


def _dgmr(bench: Bench, budget: Budget) -> Pruned:
    orders: list[Tensor] = bench.get(ORDERS)
    kept = [
        order[:width].sort().values
        for order, width in zip(orders, uniform_widths(budget), strict=True)
    ]
    return Pruned(model=bench.slim(kept))


RANDOM = Method(name="random", label="random neurons", prune=_random)
MAGNITUDE = Method(name="magnitude", label="weight magnitude", prune=_magnitude, seeded=False)
DGMR = Method(name="dgmr", label="DGMR Gram-Schmidt", prune=_dgmr, parts=(ORDERS,), seeded=False)
