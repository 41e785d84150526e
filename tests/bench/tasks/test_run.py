"""All tasks together, and what becomes of one that cannot be done."""

from __future__ import annotations

import json

import pytest

from ampdeploy.bench.tasks import run_tasks
from ampdeploy.report.codec import from_plain
from ampdeploy.report.result import Interval, Task
from tests.bench.tasks.samples import clusters, evidence


def test_every_metric_has_values_an_interval_and_its_facts():
    bank, bank_labels = clusters(10, noise=0.8)
    queries, labels = clusters(12, noise=0.8, seed=1)
    worse, _ = clusters(12, noise=1.2, seed=2)
    result = json.loads(
        json.dumps(
            run_tasks(
                ("knn", "snapvit", "probe", "retrieval"),
                evidence(queries, labels, pruned=worse, bank=bank, bank_labels=bank_labels),
            )
        )
    )
    metrics = [
        "knn_top1", "knn_k10_top1", "snapvit_knn_top1", "probe_top1", "frozen_probe_top1",
        "retrieval_recall1", "retrieval_map_r",
    ]  # fmt: skip
    assert list(result["tasks"]) == metrics
    assert result["why"] == {}
    for metric in metrics:
        dense, slim = (result["accuracy"][role][metric] for role in ("baseline", "pruned"))
        change = from_plain(Interval, result["accuracy_difference"][metric], where=metric)
        assert change.value == pytest.approx(slim - dense)
        assert change.ci95_low <= change.value <= change.ci95_high
        assert change.ci95_low < change.ci95_high
        task = from_plain(Task, result["tasks"][metric], where=metric)
        assert (task.images, task.bank_images, task.classes) == (36, 30, 3)


def test_a_task_that_cannot_be_done_is_said_and_the_others_are_done(caplog):
    result = run_tasks(("knn", "retrieval"), evidence(*clusters(1)))
    assert list(result["tasks"]) == ["knn_top1"]
    assert "more images a class" in result["why"]["retrieval"]
    assert "task retrieval is left out" in caplog.text
