"""Judge a pruned model against its baseline on a set of images, through the target's own runtime.

Both models get the same preprocessed tensors, so preprocessing can never be the difference.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.bench.accuracy import FidelityAccumulator, compare, extract
from ampdeploy.bench.tasks import (
    ROLES,
    SORTED,
    Evidence,
    Head,
    check_head,
    check_tasks,
    reads_patches,
    run_tasks,
)
from ampdeploy.checkpoint import read_facts
from ampdeploy.config import HEAD_TASK, EvaluateConfig
from ampdeploy.data.folder import ImageSet, class_folders
from ampdeploy.data.loading import iter_batches
from ampdeploy.device.engine.manifest import read_manifest
from ampdeploy.errors import ArtifactError
from ampdeploy.models.build import build_model
from ampdeploy.models.head_file import read_head
from ampdeploy.models.spec import ModelSpec
from ampdeploy.optional import require
from ampdeploy.progress import log, track
from ampdeploy.targets.base import ENGINE_SUFFIXES, Runner

# Memory against speed; the features do not depend on it beyond rounding.
EVAL_BATCH = 8


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
    options: EvaluateConfig | None = None,
) -> dict[str, Any]:
    """Fidelity of `pruned` to `baseline`, and the accuracy of both where there are labels.

    Every image is decoded and preprocessed once, and both models are given that one array,
    whatever runs them.

    Args:
        baseline: Open runner of the dense model.
        pruned: Open runner of the pruned model.
        queries: Images to judge on.
        bank: Labelled images to judge with: neighbours, a probe's training; None: the other
            queries.
        spec: For preprocessing.
        options: Which tasks, and their head; None: the default tasks.

    Returns:
        Plain data: fidelity (the fields of `report.result.Fidelity`); accuracy (per role, metric
        -> value), accuracy_difference (metric -> interval) and tasks (metric -> the fields of
        `report.result.Task`), None with a `why` where no task gave any; and tasks_left_out (task
        that was asked for -> why it gave none).

    Raises:
        ArtifactError: The head cannot be read, or does not fit the models or the images.
        MissingDependencyError: A task's package is not here.
        DataError: Images changed since the scan, or there are none.
        VerificationError: The models do not fit each other, or a feature is not finite.
    """
    options = options or EvaluateConfig()
    result: dict[str, Any] = {
        "dataset": _dataset(queries),
        "bank": _dataset(bank) if bank else None,
        "fidelity": None,
        "accuracy": None,
        "accuracy_difference": None,
        "tasks": None,
        "tasks_left_out": {},
        "why": {},
    }
    why_not = _why_no_tasks(queries, bank, options)
    # What can go wrong without running a model goes wrong before it runs.
    head = read_head(options.head) if options.head else None
    if why_not is None:
        check_tasks(options.tasks)
        names = _class_names(queries, bank)
        if head is not None:
            head = _name_rows(head, queries, bank)
            has_patches = spec.has_patch_features
            check_head(head, names, feature_dim=spec.feature_dim, has_patches=has_patches)
    compared = compare(baseline, pruned, numpy_batches(queries, spec, "eval"))
    result["fidelity"] = compared.result()
    if why_not is not None:
        result["why"]["accuracy"] = why_not
        result["tasks_left_out"] = dict.fromkeys(options.tasks, why_not)
        if head is not None:
            log.warning("        the head %s is not used: %s", head.name, why_not)
        return result
    banks = None
    if bank is not None and set(options.tasks) != {HEAD_TASK}:
        features = extract((baseline, pruned), numpy_batches(bank, spec, "bank"))
        banks = dict(zip(ROLES, features, strict=True))
    evidence = Evidence(
        queries=dict(zip(ROLES, compared.features, strict=True)),
        query_labels=_label_indices(queries, names),
        bank=banks,
        bank_labels=_label_indices(bank, names) if bank and banks else None,
        classes=tuple(names),
        patch_means=_patch_means(compared, head, spec),
    )
    return result | run_tasks(options.tasks, evidence, head=head)


def _why_no_tasks(queries: ImageSet, bank: ImageSet | None, options: EvaluateConfig) -> str | None:
    if not _labelled(queries) or (bank is not None and not _labelled(bank)):
        return "the images have no labels"
    return None if options.tasks else "no task was asked for"


def _dataset(images: ImageSet) -> dict[str, Any]:
    return {"name": images.root.name, "sha256": images.sha256, "images": len(images)}


def _class_names(queries: ImageSet, bank: ImageSet | None) -> list[str]:
    return sorted({*queries.classes, *(bank.classes if bank else [])})


def _name_rows(head: Head, queries: ImageSet, bank: ImageSet | None) -> Head:
    """A head that names no classes gets those of the folders, in which it may have been trained.

    All folders, not the classes that occur: a sample of ImageNet has few of its 1,000.
    """
    folders = sorted({*class_folders(queries.root), *(class_folders(bank.root) if bank else [])})
    if head.classes is not None or len(folders) != len(head.weight):
        return head
    return dataclasses.replace(head, classes=tuple(folders), order=SORTED)


def _patch_means(
    compared: FidelityAccumulator, head: Head | None, spec: ModelSpec
) -> dict[str, np.ndarray] | None:
    if head is None or not reads_patches(head, spec.feature_dim) or not compared.patch_means:
        return None
    return dict(zip(ROLES, compared.patch_means, strict=True))


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
