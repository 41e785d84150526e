"""What features are good for, on labelled images: one module per task.

Every task gives a score in [0, 1] for each image and each model, so that one function turns any of
them into a paired difference with an interval. Features are computed once; no task runs a model.
"""

from ampdeploy.bench.tasks.evidence import ROLES, Evidence, Outcome, TaskSkippedError
from ampdeploy.bench.tasks.run import check_tasks, run_tasks
from ampdeploy.bench.tasks.supervised import SORTED, Head, check_head, reads_patches

__all__ = [
    "ROLES",
    "SORTED",
    "Evidence",
    "Head",
    "Outcome",
    "TaskSkippedError",
    "check_head",
    "check_tasks",
    "reads_patches",
    "run_tasks",
]
