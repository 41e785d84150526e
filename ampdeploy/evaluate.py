"""Judge a pruned model against its baseline on a set of images, through the target's own runtime.

Both models get the same preprocessed tensors, so preprocessing can never be the difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.bench.accuracy import (
    KNN_K,
    KNN_TEMPERATURE,
    compare,
    extract,
    knn_predict,
    paired_difference,
)
from ampdeploy.checkpoint import read_facts
from ampdeploy.data.folder import ImageSet
from ampdeploy.data.loading import iter_batches
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.errors import ArtifactError
from ampdeploy.models.build import build_model
from ampdeploy.models.spec import ModelSpec
from ampdeploy.optional import require
from ampdeploy.progress import track
from ampdeploy.report.codec import to_plain
from ampdeploy.report.result import Task
from ampdeploy.targets.base import ENGINE_SUFFIXES, Runner

# Memory against speed; the features do not depend on it beyond rounding.
EVAL_BATCH = 8

KNN_METRIC = "knn_top1"


def numpy_batches(images: ImageSet, spec: ModelSpec, what: str) -> Iterator[np.ndarray]:
    """Preprocessed batches (b, 3, S, S) in record order, with progress."""
    count = -(-len(images) // EVAL_BATCH)
    for batch in track(iter_batches(images, spec, EVAL_BATCH), what, count):
        yield batch.numpy()


def evaluate_pair(
    baseline: Runner,
    pruned: Runner,
    *,
    queries: ImageSet,
    bank: ImageSet | None,
    spec: ModelSpec,
) -> dict[str, Any]:
    """Fidelity of `pruned` to `baseline`, and k-NN accuracy of both where there are labels.

    Args:
        baseline: Open runner of the dense model.
        pruned: Open runner of the pruned model.
        queries: Images to judge on.
        bank: Labelled images that vote; None: the other queries (leave-one-out).
        spec: For preprocessing.

    Returns:
        Plain data: fidelity (the fields of `report.result.Fidelity`), accuracy (per role, metric
        -> value) and accuracy_difference (metric -> interval), both None with a `why` where the
        images have no labels.
    """
    compared = compare(baseline, pruned, numpy_batches(queries, spec, "eval"))
    result: dict[str, Any] = {
        "dataset": {"name": queries.root.name, "sha256": queries.sha256, "images": len(queries)},
        "fidelity": compared.result(),
        "accuracy": None,
        "accuracy_difference": None,
        "tasks": None,
        "why": {},
    }
    if not _labelled(queries) or (bank is not None and not _labelled(bank)):
        result["why"]["accuracy"] = "the images have no labels"
        return result
    names = sorted({*queries.classes, *(bank.classes if bank else [])})
    query_labels = _label_indices(queries, names)
    bank_labels = _label_indices(bank, names) if bank else None
    banks: tuple[np.ndarray | None, ...] = (None, None)
    if bank is not None:
        banks = extract((baseline, pruned), numpy_batches(bank, spec, "k-NN bank"))
    correct = {}
    for role, features, bank_features in zip(
        ("baseline", "pruned"), compared.features, banks, strict=True
    ):
        predicted = knn_predict(bank_features, bank_labels, features, query_labels)
        correct[role] = predicted == query_labels
    result["accuracy"] = {role: {KNN_METRIC: float(hits.mean())} for role, hits in correct.items()}
    difference = paired_difference(correct["baseline"], correct["pruned"])
    result["accuracy_difference"] = {KNN_METRIC: to_plain(difference)}
    task = Task(
        protocol=f"DINOv2's k-NN: k = {KNN_K}, temperature {KNN_TEMPERATURE:g}",
        images=len(queries),
        bank_images=len(bank) if bank else None,
        classes=len(names),
        chance=1 / len(names),
        why={} if bank else {"bank_images": "leave-one-out: the other images vote"},
    )
    result["tasks"] = {KNN_METRIC: to_plain(task)}
    return result


def _labelled(images: ImageSet) -> bool:
    return all(record.label is not None for record in images.records)


def _label_indices(images: ImageSet, names: list[str]) -> np.ndarray:
    index = {name: position for position, name in enumerate(names)}
    return np.array([index[record.label or ""] for record in images.records])


def spec_of(artifact: Path) -> ModelSpec:
    """How to preprocess images for an artifact that ampdeploy wrote.

    Raises:
        ArtifactError: The file does not say which model it is.
    """
    if artifact.suffix == ".safetensors":
        facts = read_facts(artifact)
        name, size = facts["model"], facts["image_size"]
    elif artifact.suffix in ENGINE_SUFFIXES:
        manifest = read_manifest(artifact)
        name, size = manifest.model, manifest.image_size
    else:
        name, size = _onnx_model(artifact)
    return build_model(name, image_size=size, device="meta").spec


def _onnx_model(artifact: Path) -> tuple[str, int]:
    onnx = require("onnx", needed_by=f"reading {artifact.name}")
    try:
        model = onnx.load(str(artifact), load_external_data=False)
    except FileNotFoundError as error:
        raise ArtifactError(f"{artifact} does not exist.") from error
    except Exception as error:
        raise ArtifactError(f"{artifact} cannot be read as ONNX: {error}") from error
    properties = {item.key: item.value for item in model.metadata_props}
    if model.producer_name != "ampdeploy" or "model" not in properties:
        raise ArtifactError(
            f"{artifact} was not exported by ampdeploy, so it does not say how its images are "
            "prepared. Export it with `ampdeploy export`."
        )
    return properties["model"], int(json.loads(properties["image_size"]))
