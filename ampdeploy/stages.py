"""What each stage of the pipeline does: read artifacts, make one or two library calls, write.

The list of stages and everything about resuming is in `pipeline.py`; the work itself is in the
packages. Heavy imports stay inside the functions, so that planning a build costs nothing.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ampdeploy import artifacts
from ampdeploy.config import BuildConfig, to_json
from ampdeploy.errors import DataError
from ampdeploy.progress import log

if TYPE_CHECKING:
    from ampdeploy.data.folder import ImageSet
    from ampdeploy.models.spec import ModelSpec
    from ampdeploy.models.vision import VisionModel
    from ampdeploy.pipeline import Run
    from ampdeploy.targets.base import Runner

# Without --eval, this many images that calibration did not draw are kept for judging.
HELD_OUT_IMAGES = 256
# Fewer than this say nothing about a 1st percentile.
MIN_EVAL_IMAGES = 16


# ---------------------------------------------------------------- which artifacts


def student_artifact(config: BuildConfig) -> str:
    """The checkpoint of the pruned model: distilled if it was, else as slimmed."""
    return artifacts.DISTILLED if config.distill.epochs else artifacts.SLIM


def runnable_artifacts(config: BuildConfig) -> tuple[str, str]:
    """What the build's target runs: (baseline, pruned)."""
    return runnable_artifacts_for(config, config.target)


def runnable_artifacts_for(config: BuildConfig, target: str) -> tuple[str, str]:
    """What `target` runs of this build: (baseline, pruned)."""
    if target == "torch":
        return artifacts.BASELINE, student_artifact(config)
    return artifacts.BASELINE_ONNX, artifacts.MODEL_ONNX


def resolve_paths(config: BuildConfig) -> BuildConfig:
    """`config` with absolute paths, so that a run can be continued from any folder."""
    data = dataclasses.replace(
        config.data,
        calib=config.data.calib.resolve(),
        eval=config.data.eval.resolve() if config.data.eval else None,
    )
    images = config.distill.images
    distill = dataclasses.replace(config.distill, images=images.resolve() if images else None)
    model = config.model
    if model.weights and not model.weights.startswith("wheel:"):
        model = dataclasses.replace(model, weights=str(Path(model.weights).resolve()))
    return dataclasses.replace(config, data=data, distill=distill, model=model)


def preflight(config: BuildConfig) -> None:
    """Everything that can fail cheaply, before anything expensive starts.

    Raises:
        AmpDeployError: The model, the target or a folder is not usable here.
    """
    from ampdeploy.models.device import resolve_device
    from ampdeploy.targets.base import get_target

    _spec(config)
    resolve_device(config.prune.device)
    if config.distill.epochs:
        resolve_device(config.distill.device)
    get_target(config.target).check()


def _spec(config: BuildConfig) -> ModelSpec:
    from ampdeploy.models.build import build_model

    model = build_model(config.model.name, image_size=config.model.image_size, device="meta")
    return model.spec


# ---------------------------------------------------------------- data


def data_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.data.folder import folder_signature

    folders = [config.data.calib, config.data.eval]
    signatures = [folder_signature(folder) for folder in folders if folder]
    return {
        **to_json(config.data),
        "batch_size": config.prune.batch_size,
        "signatures": signatures,
    }


def data(run: Run) -> dict[str, Any]:
    """Choose the images; the manifest keeps every file's name and hash."""
    from ampdeploy.data.folder import scan_eval, scan_folder

    config = run.config.data
    spare = 0 if config.eval else HELD_OUT_IMAGES
    found = scan_folder(
        config.calib,
        limit=config.calib_images + spare,
        seed=config.seed,
        minimum=run.config.prune.batch_size,
    )
    calib = found.first(config.calib_images)
    bank = None
    if config.eval:
        evaluation = scan_eval(config.eval, limit=config.eval_images, seed=config.seed)
        queries, bank = evaluation.queries, evaluation.bank
    else:
        queries = found.after(config.calib_images)
    unseen = queries.without(calib)
    queries, shared = unseen, len(queries) - len(unseen)
    if shared:
        log.warning("%d evaluation images are calibration images too; left out", shared)
    if len(queries) < MIN_EVAL_IMAGES:
        raise DataError(
            f"{len(queries)} images are left to judge the result on; at least {MIN_EVAL_IMAGES} "
            "that calibration does not use are needed. Give another folder with --eval, or lower "
            "--calib-images."
        )
    log.info("        %d calibration images, %d to judge on", len(calib), len(queries))
    return {
        "calib": calib.to_json(),
        "queries": queries.to_json(),
        "bank": bank.to_json() if bank else None,
        "shared_with_calibration": shared,
    }


def _images(run: Run, which: str) -> ImageSet | None:
    from ampdeploy.data.folder import ImageSet

    stored = run.facts("data")[which]
    return ImageSet.from_json(stored) if stored else None


def _calibration(run: Run) -> ImageSet:
    """The calibration images, a whole number of criterion batches."""
    images = _images(run, "calib")
    assert images is not None
    whole = len(images) - len(images) % run.config.prune.batch_size
    if whole < len(images):
        log.info(
            "        the last %d images do not fill a batch of %d and are left out",
            len(images) - whole,
            run.config.prune.batch_size,
        )
    return images.first(whole)


# ---------------------------------------------------------------- load


def load_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.models.weights import weights_identity

    return {
        "name": config.model.name,
        "image_size": config.model.image_size,
        "weights": weights_identity(config.model.weights, _spec(config)),
    }


def load(run: Run) -> dict[str, Any]:
    """Weights into the model; the unpruned model becomes `baseline.safetensors`."""
    from ampdeploy.models.build import build_model
    from ampdeploy.models.checkpoint import save_model
    from ampdeploy.models.weights import load_weights

    config = run.config.model
    model = build_model(config.name, image_size=config.image_size)
    provenance = dataclasses.asdict(load_weights(model, config.weights))
    save_model(model, run.path(artifacts.BASELINE))
    run.manifest.data["weights"] = provenance
    return {"weights": provenance, "spec": model.spec.to_json()}


def _checkpoint(run: Run, artifact: str) -> VisionModel:
    from ampdeploy.models.checkpoint import load_model
    from ampdeploy.models.device import resolve_device

    return load_model(run.path(artifact)).to(resolve_device(run.config.prune.device))


# ---------------------------------------------------------------- score, search, slim


def score_options(config: BuildConfig) -> dict[str, Any]:
    prune = config.prune
    return {
        "criterion": prune.criterion,
        "inv_temperature": prune.inv_temperature,
        "batch_size": prune.batch_size,
        "micro_batch_size": prune.micro_batch_size,
        "device": prune.device,
    }


def score(run: Run) -> dict[str, Any]:
    """Importance of every hidden neuron, into `scores.safetensors`."""
    from ampdeploy.data.loading import iter_batches
    from ampdeploy.models.checkpoint import write_safetensors
    from ampdeploy.prune.score import importance

    config = run.config.prune
    model = _checkpoint(run, artifacts.BASELINE)
    images = _calibration(run)
    scores = importance(
        model,
        iter_batches(images, model.spec, config.batch_size),
        config,
        total=len(images) // config.batch_size,
    )
    tensors = {site.name: s for site, s in zip(model.spec.sites, scores, strict=True)}
    metadata = {
        "criterion": config.criterion,
        "inv_temperature": str(config.inv_temperature),
        "images": str(len(images)),
        "batch_size": str(config.batch_size),
        "seed": str(run.config.data.seed),
    }
    write_safetensors(run.path(artifacts.SCORES), tensors, metadata)
    return {"images": len(images)}


def search(run: Run) -> dict[str, Any]:
    """Every block's width and everything that was tried, into `widths.json`."""
    from safetensors.torch import load_file

    from ampdeploy.data.loading import iter_batches
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.search import search as search_widths

    config = run.config.prune
    model = _checkpoint(run, artifacts.BASELINE)
    sites = model.spec.sites
    dense_params = count_params(model)
    stored = load_file(run.path(artifacts.SCORES))
    images = _calibration(run)
    result = search_widths(
        model,
        iter_batches(images, model.spec, config.micro_batch_size),
        [stored[site.name] for site in sites],
        config,
        images=len(images),
    )
    widths = [len(kept) for kept in result.kept]
    params = count_params(model)
    artifacts.write_json(
        run.path(artifacts.WIDTHS),
        {
            "schema_version": artifacts.SCHEMA_VERSION,
            "model": model.spec.name,
            "blocks": [
                {
                    "block": site.block,
                    "name": site.name,
                    "hidden": site.hidden,
                    "kept": width,
                    "indices": kept.tolist(),
                }
                for site, width, kept in zip(sites, widths, result.kept, strict=True)
            ],
            "totals": {
                "hidden": sum(site.hidden for site in sites),
                "kept": sum(widths),
                "params_dense": dense_params,
                "params": params,
            },
            "search": {
                "method": "amp",
                **to_json(config),
                "images": result.images,
                "dense_value": result.dense_value,
                "final_value": result.final_value,
                "block_forwards_per_image": result.block_forwards_per_image,
                "candidates": [dataclasses.asdict(c) for c in result.candidates],
            },
        },
    )
    log.info(
        "        kept %d of %d hidden neurons; %.1f%% fewer parameters",
        sum(widths),
        sum(site.hidden for site in sites),
        100 * (1 - params / dense_params),
    )
    return {"widths": widths, "block_forwards_per_image": result.block_forwards_per_image}


def slim(run: Run) -> dict[str, Any]:
    """The physically smaller model, into `slim.safetensors`."""
    import torch

    from ampdeploy.models.checkpoint import load_model, save_model
    from ampdeploy.models.profile import count_params
    from ampdeploy.prune.slim import slim as slim_model

    model = load_model(run.path(artifacts.BASELINE))
    blocks = artifacts.read_json(run.path(artifacts.WIDTHS))["blocks"]
    kept = [torch.tensor(block["indices"], dtype=torch.int64) for block in blocks]
    slim_model(model, kept)
    save_model(model, run.path(artifacts.SLIM), kept=kept)
    return {"params": count_params(model)}


# ---------------------------------------------------------------- distill


def distill_options(config: BuildConfig) -> dict[str, Any]:
    from ampdeploy.data.folder import folder_signature

    folder = config.distill.images or config.data.calib
    return {**to_json(config.distill), "signature": folder_signature(folder)}


def distill(run: Run) -> dict[str, Any]:
    """Train the slim model against the original, into `distilled.safetensors`."""
    import torch

    from ampdeploy.data.folder import scan_folder
    from ampdeploy.distill.trainer import distill as train
    from ampdeploy.models.checkpoint import kept_indices, load_model, save_model

    config = run.config.distill
    images = scan_folder(
        config.images or run.config.data.calib,
        limit=None,
        seed=config.seed,
        minimum=config.batch_size,
    )
    queries = _images(run, "queries")
    assert queries is not None
    unseen = images.without(queries)
    if len(unseen) < len(images):
        log.info(
            "        %d images are kept for judging and not trained on", len(images) - len(unseen)
        )
    student = load_model(run.path(artifacts.SLIM))
    state = run.path(artifacts.DISTILL_STATE)
    identity = artifacts.sha256_json(
        {
            "options": to_json(config),
            "images": unseen.sha256,
            "baseline": run.sha256(artifacts.BASELINE),
            "slim": run.sha256(artifacts.SLIM),
        }
    )
    result = train(
        student,
        load_model(run.path(artifacts.BASELINE)),
        unseen,
        config,
        state_path=state,
        identity=identity,
    )
    kept = kept_indices(run.path(artifacts.SLIM))
    save_model(
        student,
        run.path(artifacts.DISTILLED),
        kept=[torch.tensor(indices) for indices in kept] if kept else None,
    )
    facts = dataclasses.asdict(result)
    artifacts.write_json(run.path(artifacts.DISTILL), facts)
    state.unlink(missing_ok=True)
    return {name: value for name, value in facts.items() if name != "history"}


# ---------------------------------------------------------------- export


def export(run: Run) -> dict[str, Any]:
    """Both models as ONNX, each checked as a graph and against PyTorch on real images."""
    from ampdeploy.data.loading import load_all
    from ampdeploy.export.graph import check_graph, count_norms
    from ampdeploy.export.onnx import export_onnx, reference_outputs
    from ampdeploy.export.verify import verify_onnx
    from ampdeploy.models.checkpoint import load_model

    config = run.config.export
    queries = _images(run, "queries")
    assert queries is not None
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
            max_abs_diff=config.max_abs_diff,
            min_cosine=config.min_cosine,
        )
        facts[role] = {
            **dataclasses.asdict(exported),
            "artifact": onnx_name,
            "verified_images": len(images),
            "verified": [dataclasses.asdict(c) for c in comparisons],
        }
        log.info(
            "        %-8s %.1f MB, largest difference to PyTorch %.1e",
            role,
            path.stat().st_size / 1e6,
            max(c.max_abs_diff for c in comparisons),
        )
    artifacts.write_json(run.path(artifacts.EXPORT), facts)
    return {}


# ---------------------------------------------------------------- eval, bench, report


def _open_pair(run: Run) -> tuple[Runner, Runner]:
    from ampdeploy.targets.base import get_target

    target = get_target(run.config.target)
    baseline, pruned = (run.path(name) for name in runnable_artifacts(run.config))
    threads = run.config.bench.threads
    return target.open(baseline, threads=threads), target.open(pruned, threads=threads)


def evaluate(run: Run) -> dict[str, Any]:
    """Fidelity and k-NN accuracy through the target itself, into `eval.json`."""
    from ampdeploy.evaluate import evaluate_pair

    queries = _images(run, "queries")
    assert queries is not None
    baseline, pruned = _open_pair(run)
    with baseline, pruned:
        result = evaluate_pair(
            baseline, pruned, queries=queries, bank=_images(run, "bank"), spec=_spec(run.config)
        )
    artifacts.write_json(run.path(artifacts.EVAL), result)
    return {}


def bench(run: Run) -> dict[str, Any]:
    """Latency and memory of both models, into `bench.json`."""
    from ampdeploy.bench.latency import BUFFERS
    from ampdeploy.bench.run import measure_pair
    from ampdeploy.data.loading import load_all

    queries = _images(run, "queries")
    assert queries is not None
    most = BUFFERS * max(run.config.bench.batch_sizes)
    few = queries.first(most)
    baseline, pruned = (run.path(name) for name in runnable_artifacts(run.config))
    result = measure_pair(
        run.config.target,
        baseline,
        pruned,
        load_all(few, _spec(run.config)).numpy(),
        run.config.bench,
    )
    artifacts.write_json(run.path(artifacts.BENCH), result)
    return {}


def report(run: Run) -> dict[str, Any]:
    """`report.json` and its Markdown view."""
    from ampdeploy.models.checkpoint import load_model
    from ampdeploy.models.profile import profile_model
    from ampdeploy.report.assemble import assemble
    from ampdeploy.report.markdown import render_markdown

    config = run.config
    baseline, pruned = runnable_artifacts(config)
    checkpoints = {"baseline": artifacts.BASELINE, "pruned": student_artifact(config)}
    profiles = {
        role: dataclasses.asdict(profile_model(load_model(run.path(name))))
        for role, name in checkpoints.items()
    }
    records = {name: run.manifest.stage(name) for name in run.manifest.data["stages"]}
    result = assemble(
        config,
        images=run.facts("data"),
        weights=run.facts("load")["weights"],
        widths=artifacts.read_json(run.path(artifacts.WIDTHS)),
        export=artifacts.read_json(run.path(artifacts.EXPORT)),
        evaluation=artifacts.read_json(run.path(artifacts.EVAL)),
        bench=artifacts.read_json(run.path(artifacts.BENCH)),
        profiles=profiles,
        files={"baseline": run.path(baseline), "pruned": run.path(pruned)},
        stages_seconds={
            name: record.seconds for name, record in records.items() if record and name != "report"
        },
    )
    result.write(run.path(artifacts.REPORT_JSON))
    artifacts.write_text(run.path(artifacts.REPORT_MD), render_markdown(result))
    return {}
