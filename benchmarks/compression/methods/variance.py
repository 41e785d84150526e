"""Methods of second moments: variance as the score, with mean-shift or least squares as repair.

VBP (arXiv 2507.12988) ranks neurons by the variance of their activation and moves the mean of
those that go into the next bias. DVBP+OB2C ranks all blocks together and re-fits the second
linear by least squares; here without the denoising of its statistics. Both see every token alike,
so the moments are the plain ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from ampdeploy.prune.budget import Budget
from ampdeploy.prune.compensate import fold
from ampdeploy.prune.moments import BlockMoments, collect
from benchmarks.compression.bench import Bench, Method, Part, Pruned
from benchmarks.compression.widths import ranked, uniform

Choice = Callable[[Sequence[Tensor], Budget], list[Tensor]]


def _moments(bench: Bench) -> list[BlockMoments]:
    return collect(
        bench.dense,
        bench.micro_batches(),
        count=len(bench.images),
        sensitivity=False,
        seed=bench.seed,
    )


MOMENTS = Part(name="plain moments", make=_moments)


def _prune(choose: Choice, repair: str) -> Callable[[Bench, Budget], Pruned]:
    def prune(bench: Bench, budget: Budget) -> Pruned:
        moments: list[BlockMoments] = bench.get(MOMENTS)
        kept = choose([block.covariance.diagonal().cpu() for block in moments], budget)
        return Pruned(model=fold(bench.copy(), kept, moments, method=repair))

    return prune


VBP = Method(
    name="vbp",
    label="variance + mean-shift, uniform (VBP)",
    prune=_prune(uniform, "mean-shift"),
    parts=(MOMENTS,),
)
VBP_GLOBAL = Method(
    name="vbp-global",
    label="variance + mean-shift, global (VBP)",
    prune=_prune(ranked, "mean-shift"),
    parts=(MOMENTS,),
)
OB2C = Method(
    name="dvbp-ob2c",
    label="variance + least squares, global (DVBP+OB2C)",
    prune=_prune(ranked, "least-squares"),
    parts=(MOMENTS,),
)
