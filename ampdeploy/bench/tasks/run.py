"""All tasks that were asked for, of features that are there already."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ampdeploy.bench.tasks.difference import paired_difference
from ampdeploy.bench.tasks.evidence import BASELINE, PRUNED, Evidence, Outcome, TaskSkippedError
from ampdeploy.bench.tasks.knn import dinov2_knn, snapvit_knn
from ampdeploy.bench.tasks.probe import check_probe, linear_probe
from ampdeploy.bench.tasks.retrieval import retrieval
from ampdeploy.bench.tasks.supervised import Head, supervised
from ampdeploy.progress import log
from ampdeploy.report.codec import to_plain

# By the names of `config.TASKS`; supervised needs a head as well.
_TASKS: dict[str, Callable[[Evidence], dict[str, Outcome]]] = {
    "knn": dinov2_knn,
    "snapvit": snapvit_knn,
    "probe": linear_probe,
    "retrieval": retrieval,
}


def check_tasks(names: Sequence[str]) -> None:
    """Raise before anything is computed if a task lacks a package.

    Raises:
        MissingDependencyError: scikit-learn is not here, and the probe was asked for.
    """
    if "probe" in names:
        check_probe()


def run_tasks(
    names: Sequence[str], evidence: Evidence, *, head: Head | None = None
) -> dict[str, Any]:
    """Every metric of the tasks `names`, for both models and as a paired difference.

    Args:
        names: Of `config.TASKS`.
        evidence: Features and labels.
        head: For ``supervised``.

    Returns:
        Plain data: accuracy (role -> metric -> mean score), accuracy_difference (metric ->
        interval) and tasks (metric -> `report.result.Task`), None with a `why` where no task gave
        any; and tasks_left_out (task -> why these images cannot show it).

    Raises:
        ArtifactError: The head does not fit the models or the images.
        MissingDependencyError: As `check_tasks`.
        VerificationError: A feature is not finite.
    """
    outcomes: dict[str, Outcome] = {}
    left_out: dict[str, str] = {}
    for name in names:
        try:
            if name == "supervised":
                assert head is not None  # `EvaluateConfig` refuses the task without a head
                outcomes |= supervised(evidence, head)
            else:
                outcomes |= _TASKS[name](evidence)
        except TaskSkippedError as error:
            left_out[name] = str(error)
            log.warning("        task %s is left out: %s", name, error)
    if not outcomes:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in left_out.items())
        return {
            **dict.fromkeys(("accuracy", "accuracy_difference", "tasks")),
            "tasks_left_out": left_out,
            "why": {"accuracy": reasons or "no task was asked for"},
        }
    return {
        "accuracy": {
            role: {
                metric: float(np.mean(outcome.scores[role])) for metric, outcome in outcomes.items()
            }
            for role in (BASELINE, PRUNED)
        },
        "accuracy_difference": {
            metric: to_plain(paired_difference(outcome.scores[BASELINE], outcome.scores[PRUNED]))
            for metric, outcome in outcomes.items()
        },
        "tasks": {metric: to_plain(outcome.task) for metric, outcome in outcomes.items()},
        "tasks_left_out": left_out,
        "why": {},
    }
