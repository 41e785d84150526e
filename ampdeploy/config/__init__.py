"""Options of each stage: frozen, keyword-only, checked when made.

These are what the command line fills and what the Python API takes; `pipeline.py` hashes them.
"""

from ampdeploy.config.bench import (
    BenchConfig,
)
from ampdeploy.config.build import (
    BuildConfig,
    from_json,
    stored,
    to_json,
)
from ampdeploy.config.deploy import (
    ENGINE_TARGETS,
    PORTABLE,
    PRECISIONS,
    EngineConfig,
    ExportConfig,
    PrecisionConfig,
)
from ampdeploy.config.distill import (
    DistillConfig,
)
from ampdeploy.config.inputs import (
    DataConfig,
    ModelConfig,
)
from ampdeploy.config.prune import (
    BUDGETS,
    CRITERIA,
    DEFAULT_PARAMS_CUT,
    FOLDS,
    HELD_OUT_IMAGES,
    HELD_OUT_SHARE,
    REPAIRS,
    SEARCHES,
    PruneConfig,
)

__all__ = [
    "BUDGETS",
    "CRITERIA",
    "DEFAULT_PARAMS_CUT",
    "ENGINE_TARGETS",
    "FOLDS",
    "HELD_OUT_IMAGES",
    "HELD_OUT_SHARE",
    "PORTABLE",
    "PRECISIONS",
    "REPAIRS",
    "SEARCHES",
    "BenchConfig",
    "BuildConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "ExportConfig",
    "ModelConfig",
    "PrecisionConfig",
    "PruneConfig",
    "from_json",
    "stored",
    "to_json",
]
