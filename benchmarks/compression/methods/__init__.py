"""Every method of the comparison, in the order of the tables: peers first, ours last."""

from __future__ import annotations

from ampdeploy.errors import UnknownNameError
from ampdeploy.models.registry import close_matches
from benchmarks.compression.bench import Method
from benchmarks.compression.methods import ablation, amp, ours, torchpruning, variance, weights

COMPARISON = (
    weights.RANDOM,
    weights.MAGNITUDE,
    *torchpruning.METHODS,
    weights.DGMR,
    amp.UNIFORM,
    amp.PUBLISHED,
    amp.MEAN_SHIFT,
    variance.VBP,
    variance.VBP_GLOBAL,
    variance.OB2C,
    ours.OURS_FOLD,
    ours.OURS,
)

# What can be asked for together by one name.
SUITES = {"comparison": COMPARISON, "ablation": ablation.METHODS}

METHODS: dict[str, Method] = {
    method.name: method for suite in (COMPARISON, ablation.METHODS) for method in suite
}

OURS = ours.OURS.name


def choose(names: list[str]) -> list[Method]:
    """The methods and suites called `names`, in the order of `METHODS`.

    Raises:
        UnknownNameError: There is no such method.
    """
    known = [*SUITES, *METHODS]
    wanted = set()
    for name in names:
        if name not in known:
            raise UnknownNameError(
                f"unknown method {name!r}.{close_matches(name, known)} Known: {', '.join(known)}."
            )
        wanted |= {method.name for method in SUITES.get(name, ())} or {name}
    return [method for name, method in METHODS.items() if name in wanted]
