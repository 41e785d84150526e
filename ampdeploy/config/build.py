"""All options of one build, and the same as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ampdeploy.config.bench import BenchConfig
from ampdeploy.config.checks import as_paths, one_of
from ampdeploy.config.deploy import ENGINE_TARGETS, EngineConfig, ExportConfig, PrecisionConfig
from ampdeploy.config.distill import DistillConfig
from ampdeploy.config.evaluate import EvaluateConfig
from ampdeploy.config.inputs import DataConfig, ModelConfig
from ampdeploy.config.prune import PruneConfig
from ampdeploy.errors import ConfigError


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
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    # None is only ever an argument: it becomes the default, at the batch sizes that are taken.
    bench: BenchConfig = None  # type: ignore[assignment]
    out: Path | None = None
    """Run directory; None: runs/<model>-<target>."""
    resume: bool = True

    def __post_init__(self) -> None:
        from ampdeploy.targets.base import target_names

        if self.prune is None:
            object.__setattr__(self, "prune", PruneConfig.for_model(self.model.name))
        if self.distill is None:
            object.__setattr__(self, "distill", DistillConfig.for_model(self.model.name))
        as_paths(self, "out")
        one_of("target", self.target, target_names())
        if self.precision is None:
            asked = "fp16" if self.target in ENGINE_TARGETS else "fp32"
            object.__setattr__(self, "precision", PrecisionConfig(precision=asked))
        if self.precision.precision == "fp16" and self.target not in ENGINE_TARGETS:
            raise ConfigError(
                f"--precision fp16 is for {' and '.join(ENGINE_TARGETS)}: target {self.target} "
                "would compute in FP32 all the same. Choose another --target, or leave it out."
            )
        if not self.builds_engine:
            _refuse_engine_options(self.target, self.engine)
        if self.bench is None:
            sizes = sizes_to_time(BenchConfig.batch_sizes, self.target, self.engine)
            object.__setattr__(self, "bench", BenchConfig(batch_sizes=sizes))
        # A deferred engine is not timed here.
        if self.builds_engine and self.engine.when == "now":
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


def sizes_to_time(asked: tuple[int, ...], target: str, engine: EngineConfig) -> tuple[int, ...]:
    """Those of the batch sizes `asked` that what is built for `target` takes.

    Returns:
        Of an engine, those in its profile, or its usual size where none is; else all.
    """
    if target not in ENGINE_TARGETS:
        return asked
    fewest, usual, most = engine.batch
    return tuple(n for n in asked if fewest <= n <= most) or (usual,)


# Field of `EngineConfig` -> its option, and what is said of the engine that there is not.
_ENGINE_OPTIONS = {
    "when": ("--engine", "that could be deferred"),
    "memory_limit_bytes": ("--memory-limit", "whose memory could be limited"),
    "batch": ("--engine-batch", "whose batch could be chosen"),
    "portable": ("--portable", "that could be portable"),
    "strip_weights": ("--strip-weights", "whose weights could be left out"),
    "compute_capabilities": ("--compute-capability", "for chosen GPUs"),
}


def _refuse_engine_options(target: str, engine: EngineConfig) -> None:
    """Whoever asks for something of an engine expects one.

    Raises:
        ConfigError: `engine` is not the default, and `target` builds none.
    """
    default = EngineConfig()
    given = [name for name in _ENGINE_OPTIONS if getattr(engine, name) != getattr(default, name)]
    if given:
        options = ", ".join(_ENGINE_OPTIONS[name][0] for name in given)
        raise ConfigError(
            f"target {target} builds no engine {_ENGINE_OPTIONS[given[0]][1]}. Leave {options} "
            f"out, or choose --target {' or '.join(ENGINE_TARGETS)}."
        )


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


_PATHS = {"calib", "eval", "head", "images", "out"}
_PARTS: dict[str, type] = {
    "model": ModelConfig,
    "data": DataConfig,
    "prune": PruneConfig,
    "distill": DistillConfig,
    "export": ExportConfig,
    "bench": BenchConfig,
    "precision": PrecisionConfig,
    "engine": EngineConfig,
    "evaluate": EvaluateConfig,
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
