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
    sizes_to_test,
)
from ampdeploy.config.distill import (
    DistillConfig,
)
from ampdeploy.config.evaluate import (
    DEFAULT_TASKS,
    HEAD_TASK,
    TASK_METRICS,
    TASKS,
    EvaluateConfig,
    task_of,
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
    "DEFAULT_TASKS",
    "ENGINE_TARGETS",
    "FOLDS",
    "HEAD_TASK",
    "HELD_OUT_IMAGES",
    "HELD_OUT_SHARE",
    "PORTABLE",
    "PRECISIONS",
    "REPAIRS",
    "SEARCHES",
    "TASKS",
    "TASK_METRICS",
    "BenchConfig",
    "BuildConfig",
    "DataConfig",
    "DistillConfig",
    "EngineConfig",
    "EvaluateConfig",
    "ExportConfig",
    "ModelConfig",
    "PrecisionConfig",
    "PruneConfig",
    "from_json",
    "sizes_to_test",
    "stored",
    "task_of",
    "to_json",
]
