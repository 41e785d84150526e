"""ampdeploy: prune, distil, export and prove vision transformers for NVIDIA devices.

Importing this package imports nothing heavy; names below load what they need when first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from ampdeploy.checkpoint import load_model as load_slim
    from ampdeploy.config import (
        BenchConfig,
        BuildConfig,
        DataConfig,
        DistillConfig,
        EngineConfig,
        ExportConfig,
        ModelConfig,
        PrecisionConfig,
        PruneConfig,
    )
    from ampdeploy.errors import AmpDeployError
    from ampdeploy.inference import open_model
    from ampdeploy.pipeline import build

# Public name -> (module, name there). PEP 562 keeps `import ampdeploy` free of torch.
_LAZY = {
    "AmpDeployError": ("ampdeploy.errors", "AmpDeployError"),
    "BenchConfig": ("ampdeploy.config", "BenchConfig"),
    "BuildConfig": ("ampdeploy.config", "BuildConfig"),
    "DataConfig": ("ampdeploy.config", "DataConfig"),
    "DistillConfig": ("ampdeploy.config", "DistillConfig"),
    "EngineConfig": ("ampdeploy.config", "EngineConfig"),
    "ExportConfig": ("ampdeploy.config", "ExportConfig"),
    "ModelConfig": ("ampdeploy.config", "ModelConfig"),
    "PrecisionConfig": ("ampdeploy.config", "PrecisionConfig"),
    "PruneConfig": ("ampdeploy.config", "PruneConfig"),
    "build": ("ampdeploy.pipeline", "build"),
    "load_slim": ("ampdeploy.checkpoint", "load_model"),
    "open_model": ("ampdeploy.inference", "open_model"),
}

__all__ = [
    "AmpDeployError",
    "BenchConfig",
    "BuildConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "ExportConfig",
    "ModelConfig",
    "PrecisionConfig",
    "PruneConfig",
    "__version__",
    "build",
    "load_slim",
    "open_model",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'ampdeploy' has no attribute {name!r}")
    import importlib

    module, attribute = _LAZY[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted(__all__)
