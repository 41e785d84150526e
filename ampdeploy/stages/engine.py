"""Type the graphs to FP16, and build engines from them."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, EngineConfig, to_json
from ampdeploy.device.engine.manifest import manifest_path
from ampdeploy.errors import VerificationError
from ampdeploy.progress import log
from ampdeploy.run import MACHINE
from ampdeploy.stages.common import engine_sources, model_spec, queries_of, student_artifact
from ampdeploy.stages.judging import find_judge, machine_options, this_machine

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
# Images that test a built engine.
TEST_IMAGES = 16

ROLES = {
    "baseline": (artifacts.BASELINE_ONNX, artifacts.BASELINE_FP16_ONNX),
    "pruned": (artifacts.MODEL_ONNX, artifacts.MODEL_FP16_ONNX),
}
PLANS = {"baseline": artifacts.BASELINE_PLAN, "pruned": artifacts.ENGINE_PLAN}


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
    """An engine belongs to the TensorRT and the GPU that built it, and is tested if it runs."""
    from ampdeploy.device.engine.flavour import find_flavour

    here = this_machine()
    flavour = find_flavour(config.target, needed_by=f"target {config.target}")
    return {
        "target": config.target,
        "tensorrt": flavour.version,
        "precision": config.precision.precision,
        "min_cosine_p1": config.precision.min_cosine_p1,
        MACHINE: {
            "gpu": [here.gpu, here.compute_capability, here.driver],
            **machine_options(config),
        },
        **to_json(config.engine),
    }


def build_engines(run: Run) -> dict[str, Any]:
    """An engine of each graph, with its manifest, tested where it runs; known bugs avoided.

    Raises:
        VerificationError: A known bug that nothing avoids, or an engine that does not compute what
            its model computes.
    """
    config = run.config
    sources = dict(zip(PLANS, engine_sources(config), strict=True))
    # Both graphs, before the first build: the two engines are compared, so they are built alike.
    engine, notes = avoid_known_bugs(config, map(run.path, sources.values()))
    why_untested = find_judge(config).why_no_engine
    try:
        for role, source in sources.items():
            _build_one(run, role, run.path(source), engine)
        if why_untested is None:
            _test_engines(run)
    except BaseException:
        # Whatever it was, Ctrl-C or a GPU without memory: an engine that was to be tested and was
        # not must not lie there as if it had been.
        for plan in PLANS.values():
            for path in (run.path(plan), manifest_path(run.path(plan))):
                path.unlink(missing_ok=True)
        raise
    if why_untested is not None:
        log.warning("the engines are not tested: %s", run.once(why_untested))
    for note in notes:
        log.warning("%s", note)
    return {"known_bugs": notes}


def _build_one(run: Run, role: str, source: Path, engine: EngineConfig) -> None:
    from ampdeploy.device.engine.build import build_engine

    config = run.config
    typed = config.precision.precision == "fp16"
    verdicts = artifacts.read_json(run.path(artifacts.PRECISION if typed else artifacts.EXPORT))
    untested = find_judge(config).why_no_engine or "the build was interrupted before the test"
    build_engine(
        source,
        run.path(PLANS[role]),
        target=config.target,
        config=engine,
        model=config.model.name,
        image_size=run.facts("load")["spec"]["image_size"],
        precision=config.precision.precision,
        verdict={**_verdict(verdicts[role]), "engine": {"untested": untested}},
        timing_cache=run.folder,
    )


def _test_engines(run: Run) -> None:
    """Both engines on real images against the float32 graphs, which PyTorch has verified.

    Comparing the two engines with each other, as the evaluation does, would not find what one
    TensorRT gets wrong in both.
    """
    from ampdeploy.data.loading import load_all
    from ampdeploy.device.self_test import prove_engine

    images = load_all(queries_of(run).first(TEST_IMAGES), model_spec(run.config)).numpy()
    bar = run.config.precision.min_cosine_p1
    try:
        for role, plan in PLANS.items():
            prove_engine(run.path(plan), run.path(ROLES[role][0]), images, bar=bar)
    except VerificationError as error:
        raise VerificationError(
            f"{error}\nNo engine is kept. `ampdeploy doctor` lists known bugs of this machine's "
            "TensorRT; --precision fp32 avoids those of FP16."
        ) from error


def avoid_known_bugs(config: BuildConfig, graphs: Iterable[Path]) -> tuple[EngineConfig, list[str]]:
    """The engine's config with the workarounds that this TensorRT and GPU need for any of `graphs`.

    Raises:
        VerificationError: The engine would be wrong and nothing is known to avoid it.
    """
    from ampdeploy.device.radar.graph_patterns import graph_patterns

    return look_up_bugs(config, set().union(*map(graph_patterns, graphs)))


def look_up_bugs(config: BuildConfig, patterns: set[str]) -> tuple[EngineConfig, list[str]]:
    """As `avoid_known_bugs`, of graphs with these patterns; a deferred engine is built elsewhere.

    Raises:
        VerificationError: As there.
    """
    from ampdeploy.device.engine.flavour import find_flavour
    from ampdeploy.device.radar.bugs import apply_workarounds, find_bugs

    version = capability = None
    if config.engine.when == "now":
        version = find_flavour(config.target, needed_by=f"target {config.target}").version
        capability = this_machine().compute_capability
    bugs = find_bugs(
        tensorrt_version=version,
        target=config.target,
        compute_capability=capability,
        patterns=patterns,
    )
    return apply_workarounds(config.engine, bugs)


def _verdict(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of a graph's verification that travels with the engine."""
    if "judgement" in facts:
        kept = ("precision", "bar", "islands", "judged_images")
        return {**{key: facts[key] for key in kept}, "outputs": facts["judgement"]["outputs"]}
    return {"precision": "fp32", "verified": facts["verified"]}
