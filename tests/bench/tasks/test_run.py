"""All tasks together, and what becomes of one that cannot be done."""

from __future__ import annotations

import json

import numpy as np
import pytest

from ampdeploy.bench.tasks import Head, run_tasks
from ampdeploy.config import TASK_METRICS, TASKS, task_of
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
    assert (result["why"], result["tasks_left_out"]) == ({}, {})
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
    assert result["tasks_left_out"].keys() == {"retrieval"}
    assert "more images a class" in result["tasks_left_out"]["retrieval"]
    assert result["why"] == {}
    assert "task retrieval is left out" in caplog.text


def test_where_no_task_can_be_done_all_of_them_are_said():
    result = run_tasks(("retrieval",), evidence(*clusters(1)))
    assert result["accuracy"] is None
    assert result["tasks_left_out"].keys() == {"retrieval"}
    assert result["why"]["accuracy"].startswith("retrieval: no image has another one")
    nothing = run_tasks((), evidence(*clusters(1)))
    assert nothing["tasks_left_out"] == {}
    assert nothing["why"] == {"accuracy": "no task was asked for"}


def test_the_names_of_tasks_and_metrics_are_known_in_one_place():
    """What a metric's task is decides what a gate says when the task was left out."""
    bank, labels = clusters(250)  # enough for every k
    head = Head(name="x", sha256="0" * 64, weight=np.eye(6, 8), bias=np.zeros(6), classes=None)
    queries, query_labels = clusters(2, classes=6, seed=1)
    for task in TASKS:
        of_task = evidence(queries, query_labels, bank=bank, bank_labels=labels)
        given = run_tasks((task,), of_task, head=head)["tasks"]
        assert set(given) == set(TASK_METRICS[task])
        assert {task_of(metric) for metric in given} == {task}
    every = [metric for metrics in TASK_METRICS.values() for metric in metrics]
    assert len(set(every)) == len(every)
    assert not set(every) & set(TASKS)  # so that a name says which of both it is
    assert task_of("knn") is None
    assert task_of("knn_top2") is None
