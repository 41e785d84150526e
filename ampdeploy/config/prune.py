"""How neurons are chosen, how many, and what makes up for them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ampdeploy.config.checks import as_floats, one_of, positive
from ampdeploy.errors import ConfigError
from ampdeploy.models.registry import recipe_of

CRITERIA = ("entropy", "cross-entropy")
SEARCHES = ("divergence", "amp")
FOLDS = ("least-squares", "mean-shift", "none")
# What is done for the neurons that are gone, each with the fold it begins with.
REPAIRS = {
    "refit": "least-squares",
    "fold": "least-squares",
    "mean-shift": "mean-shift",
    "none": "none",
}
BUDGETS = ("params_cut", "flops_cut", "mlp_keep")
# What `build` removes where no budget is given, as a share of all parameters.
DEFAULT_PARAMS_CUT = 0.3
# Of the calibration images, the share that only measures blocks, and again as many that only
# verify the result; and the limits of that number.
HELD_OUT_SHARE = 1 / 8
HELD_OUT_IMAGES = (4, 32)


@dataclass(frozen=True, kw_only=True)
class PruneConfig:
    """How neurons are chosen, how many, and what makes up for them.

    ``search="divergence"`` meets a budget with the least loss of cosine (`prune/search.py`).
    ``search="amp"`` is the published threshold search (AMP, arXiv 2603.08100, sections 3.2 and
    3.3); `criterion`, `threshold`, `batch_size` and `steps` belong to it alone. Its defaults are
    those of DINOv2; `for_model` knows the other families'.
    """

    search: str = "divergence"
    params_cut: float | None = None
    """Share of the model's parameters to remove. One of the three budgets, or none:
    `DEFAULT_PARAMS_CUT`."""
    flops_cut: float | None = None
    """Share of the model's FLOPs, at its image size, to remove."""
    mlp_keep: float | None = None
    """Share of all hidden MLP neurons to keep."""
    width_multiple: int | None = None
    """Widths are multiples of this; None: what suits the target."""
    min_width: int | None = None
    """No block gets narrower; None: `width_multiple`."""
    repair: str | None = None
    """``refit``: least-squares fold, then the sequential re-fit where it pays. ``fold``: the
    least-squares fold alone. ``mean-shift``: biases only. ``none``: as published. None: ``refit``
    for the divergence search, ``none`` for AMP's. Neurons are ranked for the fold whatever is
    chosen here."""
    criterion: str = "entropy"
    inv_temperature: float = 20.0
    """1 / tau of the similarity softmax: AMP's criterion, and the KL that is reported."""
    batch_size: int = 64
    """B of the criterion: how many images are compared with each other. E is at most log B."""
    micro_batch_size: int = 8
    """Images per forward pass. Memory only; the result does not depend on it beyond rounding."""
    threshold: float = 5e-3
    """dE: how much the criterion may rise per block."""
    steps: int = 6
    """Binary search steps, so that widths fall on a grid of hidden / 2**steps."""
    device: str = "auto"
    """``auto``: CUDA if there is one, else CPU."""

    def __post_init__(self) -> None:
        as_floats(self, *BUDGETS, "inv_temperature", "threshold")
        one_of("search", self.search, SEARCHES)
        one_of("criterion", self.criterion, CRITERIA)
        if self.repair is None:
            object.__setattr__(self, "repair", "none" if self.search == "amp" else "refit")
        one_of("repair", str(self.repair), tuple(REPAIRS))
        positive(self, "inv_temperature", "batch_size", "micro_batch_size", "steps")
        for name in ("width_multiple", "min_width"):
            if getattr(self, name) is not None:
                positive(self, name)
        self._check_budget()
        if self.batch_size < 2:
            raise ConfigError(
                f"the criterion compares the images of one batch with each other; batch size "
                f"{self.batch_size} leaves nothing to compare. Use 2 or more."
            )
        if not 0 <= self.threshold < math.inf:
            raise ConfigError(
                f"threshold is {self.threshold}; the criterion may rise by 0 or more per block."
            )

    def _check_budget(self) -> None:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        options = ["--" + name.replace("_", "-") for name in given]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(options)} are both budgets. Give one of them.")
        if given and self.search == "amp":
            raise ConfigError(
                f"{options[0]} asks for a size, which AMP's threshold search cannot meet: how "
                "small the model gets follows from --entropy-threshold. Leave out --search amp."
            )
        for name in ("width_multiple", "min_width"):
            if self.search == "amp" and getattr(self, name) is not None:
                raise ConfigError(
                    f"--{name.replace('_', '-')} shapes a budget, which AMP's threshold search "
                    "does not have: its grid is hidden / 2**steps. Leave out one of the two."
                )
        for name, option in zip(given, options, strict=True):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise ConfigError(
                    f"{option} is {value:g}; it is a share between 0 and 1, like 0.4."
                )

    @property
    def budget(self) -> tuple[str, float]:
        """Which budget is meant, and its value."""
        for name in BUDGETS:
            value = getattr(self, name)
            if value is not None:
                return name, value
        return "params_cut", DEFAULT_PARAMS_CUT

    @property
    def fold(self) -> str:
        """The fold that `repair` begins with."""
        return REPAIRS[str(self.repair)]

    @property
    def needs_moments(self) -> bool:
        """Whether anything looks at how hidden neurons go together."""
        return self.search == "divergence" or self.fold != "none"

    @property
    def fewest_images(self) -> int:
        """Calibration images that cannot be done without."""
        return max(
            4 * HELD_OUT_IMAGES[0] if self.needs_moments else 0,
            self.batch_size if self.search == "amp" else 0,
        )

    @classmethod
    def for_model(cls, name: str, **options: Any) -> PruneConfig:
        """What AMP publishes for the model `name`, but for the `options` given."""
        recipe = recipe_of(name)
        published = {
            "inv_temperature": recipe.inv_temperature,
            "threshold": recipe.threshold,
        }
        return cls(**{**published, **options})
