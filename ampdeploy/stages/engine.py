"""Type the graphs to FP16, and build engines from them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, EngineConfig, to_json
from ampdeploy.progress import log
from ampdeploy.stages.common import engine_sources, queries_of, student_artifact

if TYPE_CHECKING:
    from torch import Tensor

    from ampdeploy.models.vision import VisionModel
    from ampdeploy.precision.compare import Reference
    from ampdeploy.run import Run

# Images whose ranges decide what FP16 can hold.
RANGE_IMAGES = 32
# Images that judge the typed graph, at most, and what all their block outputs may take.
JUDGE_IMAGES = (2, 16)
REFERENCE_BYTES = 2 << 30

ROLES = {
    "baseline": (artifacts.BASELINE_ONNX, artifacts.BASELINE_FP16_ONNX),
    "pruned": (artifacts.MODEL_ONNX, artifacts.MODEL_FP16_ONNX),
}


def type_graphs(run: Run) -> dict[str, Any]:
    """Both graphs in FP16, each seen to agree with PyTorch, or refused."""
    from ampdeploy.checkpoint import load_model
    from ampdeploy.data.folder import ImageSet
    from ampdeploy.data.loading import load_all
    from ampdeploy.export.write import write_graph
    from ampdeploy.precision.ranges import measure_ranges
    from ampdeploy.precision.repair import to_plain, type_graph

    config = run.config.precision
    calib = ImageSet.from_json(run.facts("data")["calib"]).first(RANGE_IMAGES)
    checkpoints = {"baseline": artifacts.BASELINE, "pruned": student_artifact(run.config)}
    facts: dict[str, Any] = {}
    for role, (source, typed_name) in ROLES.items():
        model = load_model(run.path(checkpoints[role])).eval()
        judging = load_all(queries_of(run).first(_judging(model)), model.spec)
        reference = _reference(model, judging)
        pixels = load_all(calib, model.spec).numpy()
        del model  # one copy of the weights at a time: they can be 17 GB
        path = run.path(source)
        ranges = measure_ranges(path, pixels)
        typed = type_graph(path, ranges, reference, config)
        size, external = write_graph(typed.model, run.path(typed_name))
        facts[role] = {
            "artifact": typed_name,
            "file_bytes": size,
            "external_data": external,
            "range_images": len(pixels),
            "judged_images": len(judging),
            **to_plain(typed, ranges, config),
        }
    artifacts.write_json(run.path(artifacts.PRECISION), facts)
    return {}


def _judging(model: VisionModel) -> int:
    """How many images judge: as many as fit into memory with every block's output."""
    import torch

    size = model.spec.image_size
    with torch.inference_mode():
        tokens = model.stem(torch.zeros(1, 3, size, size)).tokens
    each = tokens.nbytes * (len(model.blocks) + 2)
    fewest, most = JUDGE_IMAGES
    return max(fewest, min(most, REFERENCE_BYTES // each))


def _reference(model: VisionModel, images: Tensor) -> Reference:
    from ampdeploy.export.reference import block_references
    from ampdeploy.precision.compare import Reference

    blocks, outputs = block_references(model, images)
    return Reference(images=images.numpy(), blocks=blocks, outputs=outputs)


def engine_options(config: BuildConfig) -> dict[str, Any]:
    """An engine belongs to the TensorRT and the GPU that built it."""
    from ampdeploy.device.flavour import find_flavour
    from ampdeploy.device.platform import device_facts

    here = device_facts()
    flavour = find_flavour(config.target, needed_by=f"target {config.target}")
    return {
        "target": config.target,
        "tensorrt": flavour.version,
        "gpu": [here.gpu, here.compute_capability, here.driver],
        "precision": config.precision.precision,
        **to_json(config.engine),
    }


def build_engines(run: Run) -> dict[str, Any]:
    """An engine of each graph, with its manifest; known bugs avoided or the build refused."""
    from ampdeploy.device.build_engine import build_engine

    config = run.config
    spec = run.facts("load")["spec"]
    verdicts = (
        artifacts.read_json(run.path(artifacts.PRECISION))
        if config.precision.precision == "fp16"
        else artifacts.read_json(run.path(artifacts.EXPORT))
    )
    plans = {"baseline": artifacts.BASELINE_PLAN, "pruned": artifacts.ENGINE_PLAN}
    notes: list[str] = []
    for role, source in zip(plans, engine_sources(config), strict=True):
        engine, found = avoid_known_bugs(config, run.path(source))
        notes += [note for note in found if note not in notes]
        build_engine(
            run.path(source),
            run.path(plans[role]),
            target=config.target,
            config=engine,
            model=config.model.name,
            image_size=spec["image_size"],
            precision=config.precision.precision,
            verdict=_verdict(verdicts[role]),
            timing_cache=run.folder,
        )
    for note in notes:
        log.warning("%s", note)
    return {"known_bugs": notes}


def avoid_known_bugs(config: BuildConfig, onnx: Any) -> tuple[EngineConfig, list[str]]:
    """The engine's config with the workarounds that this TensorRT and GPU need.

    Raises:
        VerificationError: The engine would be wrong and nothing is known to avoid it.
    """
    from ampdeploy.device.flavour import find_flavour
    from ampdeploy.device.graph_patterns import graph_patterns
    from ampdeploy.device.platform import device_facts
    from ampdeploy.device.radar import apply_workarounds, find_bugs

    flavour = find_flavour(config.target, needed_by=f"target {config.target}")
    bugs = find_bugs(
        tensorrt_version=flavour.version,
        target=config.target,
        compute_capability=device_facts().compute_capability,
        patterns=graph_patterns(onnx),
    )
    return apply_workarounds(config.engine, bugs)


def _verdict(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a graph's verification that travels with the engine."""
    if "judgement" in facts:
        kept = ("precision", "bar", "islands", "judged_images")
        return {**{key: facts[key] for key in kept}, "outputs": facts["judgement"]["outputs"]}
    return {"precision": "fp32", "verified": facts["verified"]}
