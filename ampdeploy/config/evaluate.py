"""What features are judged by, on labelled images."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ampdeploy.config.checks import as_paths, one_of
from ampdeploy.errors import ConfigError

# Task -> the metrics that it can give: the names that reports and gates use. Which of them it
# gives depends on the images.
TASK_METRICS = {
    "knn": ("knn_top1", "knn_k10_top1", "knn_k100_top1", "knn_k200_top1"),
    "snapvit": ("snapvit_knn_top1",),
    "probe": ("probe_top1", "frozen_probe_top1"),
    "retrieval": ("retrieval_recall1", "retrieval_map_r"),
    "supervised": ("supervised_top1", "supervised_top5"),
}
TASKS = tuple(TASK_METRICS)
DEFAULT_TASKS = ("knn", "retrieval", "probe")
HEAD_TASK = "supervised"


def task_of(metric: str) -> str | None:
    """The task that gives a metric; None: no task does."""
    return next((task for task, metrics in TASK_METRICS.items() if metric in metrics), None)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """Tasks, beside fidelity, which needs no labels and is always measured."""

    # None is only ever an argument: it becomes the default tasks, and supervised with a head.
    tasks: tuple[str, ...] = None  # type: ignore[assignment]
    """Of `TASKS`; none at all leaves fidelity."""
    head: Path | None = None
    """Classification head for the task supervised; see `ampdeploy.models.head_file`."""

    def __post_init__(self) -> None:
        as_paths(self, "head")
        if self.tasks is None:
            extra = (HEAD_TASK,) if self.head else ()
            object.__setattr__(self, "tasks", (*DEFAULT_TASKS, *extra))
        for name in self.tasks:
            one_of("task", name, TASKS)
        if len(set(self.tasks)) < len(self.tasks):
            raise ConfigError(f"tasks {', '.join(self.tasks)}: give each of them once.")
        if HEAD_TASK in self.tasks and self.head is None:
            raise ConfigError(
                f"task {HEAD_TASK} needs a classification head: give its file with --head. "
                "Without one, the task probe trains a head of its own."
            )
        if self.head is not None and HEAD_TASK not in self.tasks:
            raise ConfigError(
                f"--head is read by the task {HEAD_TASK} alone, which --tasks leaves out. Add it, "
                "or leave --head out."
            )
