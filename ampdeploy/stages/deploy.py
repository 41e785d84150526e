"""Write what a runtime loads, and check it."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.stages.common import (
    queries_of,
    student_artifact,
)

if TYPE_CHECKING:
    from ampdeploy.run import Run


def export(run: Run) -> dict[str, Any]:
    """Both models as ONNX, each checked as a graph and against PyTorch on real images."""
    from ampdeploy.checkpoint import load_model
    from ampdeploy.data.loading import load_all
    from ampdeploy.export.graph import check_graph, count_norms
    from ampdeploy.export.onnx import export_onnx, reference_outputs
    from ampdeploy.export.verify import verify_onnx

    config = run.config.export
    queries = queries_of(run)
    few = queries.first(max(config.verify_batches))
    facts: dict[str, Any] = {}
    pairs = {
        "baseline": (artifacts.BASELINE, artifacts.BASELINE_ONNX),
        "pruned": (student_artifact(run.config), artifacts.MODEL_ONNX),
    }
    for role, (checkpoint, onnx_name) in pairs.items():
        model = load_model(run.path(checkpoint))
        path = run.path(onnx_name)
        exported = export_onnx(model, path, opset=config.opset)
        check_graph(path, norms=count_norms(model))
        images = load_all(few, model.spec)
        comparisons = verify_onnx(
            path,
            images.numpy(),
            reference_outputs(model, images),
            batches=config.verify_batches,
            max_relative_diff=config.max_relative_diff,
            min_cosine=config.min_cosine,
        )
        del model  # one model at a time: they can be 17 GB each
        facts[role] = {
            **dataclasses.asdict(exported),
            "artifact": onnx_name,
            "verified_images": len(images),
            "verified": [dataclasses.asdict(c) for c in comparisons],
        }
    artifacts.write_json(run.path(artifacts.EXPORT), facts)
    return {}
