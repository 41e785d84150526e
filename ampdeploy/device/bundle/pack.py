"""From a finished run to a bundle. On the build host: it runs the float32 models for the goldens.

The golden outputs are those of `model.onnx` in ONNX Runtime, which the export has compared with
PyTorch on images of the same run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ampdeploy import artifacts
from ampdeploy.artifacts import explain_os_errors, run_lock
from ampdeploy.bench.accuracy import extract
from ampdeploy.config import ENGINE_TARGETS, BuildConfig
from ampdeploy.device.bundle import archive
from ampdeploy.device.bundle import contents as form
from ampdeploy.device.bundle.contents import Bundle
from ampdeploy.device.bundle.instructions import instructions
from ampdeploy.device.bundle.place import check_replaceable, is_tar, put, scratch
from ampdeploy.device.preprocess import FIELDS
from ampdeploy.device.radar.graph_patterns import graph_patterns
from ampdeploy.errors import ArtifactError, ConfigError
from ampdeploy.export.names import data_path
from ampdeploy.optional import require_build_host
from ampdeploy.progress import log

if TYPE_CHECKING:
    from ampdeploy.data.folder import ImageSet
    from ampdeploy.run import Run
    from ampdeploy.targets.base import Runner

GOLDEN_IMAGES = 16
BANK_IMAGES = 128

# What a bundle can be for. `torch` needs all that a device does without.
TARGETS = ("ort", "ort-cuda", *ENGINE_TARGETS)

_GOLDEN_BATCH = 4  # memory only


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What `pack_run` made."""

    path: Path
    """The folder or the ``.tar``."""
    bytes: int
    """Of all files."""
    sha256: str
    """Of its `bundle.json`, which says the same of every other file."""
    manifest: form.BundleManifest


def pack_run(run: Path, out: Path | None = None) -> Packed:
    """Pack a run for a device.

    Args:
        run: A run directory, built as far as the graphs that engines are built from.
        out: A folder, or a file whose name ends in ``.tar``; None: ``<run>-bundle`` next to it.
            A bundle that is there is replaced, once the new one is complete; nothing else is.

    Raises:
        ArtifactError: No run, or what is packed is missing or older than the rest.
        ConfigError: The run is for a target that no device runs.
        AmpDeployError: `out` is something else than a bundle, or cannot be written.
        MissingDependencyError: This is no build host.
    """
    from ampdeploy.pipeline import rerun_config
    from ampdeploy.run import Run

    require_build_host("ampdeploy bundle")
    config = rerun_config(run)
    if config.target not in TARGETS:
        raise ConfigError(
            f"{run} was built for target {config.target}, which devices do not run. Build it for "
            f"{', '.join(TARGETS)}."
        )
    out = out or bundle_path(run)
    check_replaceable(out)
    with run_lock(run), scratch(out) as folder:
        _check_current(config, run)
        opened = Run(config, artifacts.Manifest.read(run))
        sealed = _fill(opened, folder, link=is_tar(out), name=out.name)
        if is_tar(out):
            archive.write_tar(folder, out)
        else:
            put(folder, out)
    total = sum(facts.bytes for facts in sealed.manifest.files.values())
    return Packed(path=out, bytes=total, sha256=sealed.sha256, manifest=sealed.manifest)


def bundle_path(run: Path) -> Path:
    """Where the bundle of a run goes unless told otherwise."""
    return run.resolve().with_name(f"{run.resolve().name}-bundle")


def _check_current(config: BuildConfig, run: Path) -> None:
    """The graphs must be those of the run's present model."""
    from ampdeploy.pipeline import plan, require_current
    from ampdeploy.stages.common import engine_sources

    sources = {*engine_sources(config), artifacts.MODEL_ONNX, artifacts.BASELINE_ONNX}
    last = [stage.name for stage in plan(config) if sources.intersection(stage.writes)][-1]
    require_current(config, last, f"ampdeploy report {run} --update")


def _fill(run: Run, folder: Path, *, link: bool, name: str) -> Bundle:
    """Put everything into `folder` and seal it."""
    from ampdeploy.pipeline import require_current
    from ampdeploy.stages.common import engine_sources, model_spec

    config = run.config
    baseline_onnx, onnx = engine_sources(config)
    names = [onnx, baseline_onnx]
    names += [path.name for path in map(data_path, map(run.path, names)) if path.is_file()]
    typed = config.precision.precision == "fp16"
    verdict = artifacts.PRECISION if typed else artifacts.EXPORT
    names.append(verdict)
    try:
        require_current(config, "report", "", ignoring=artifacts.REPORT_VIEWS)
        names.append(artifacts.REPORT_JSON)
    except ArtifactError:
        log.info("the run has no report of its present model; the bundle goes without")
    for file in names:
        _place(run.path(file), folder / file, link=link)
    goldens, bank = _references(run)
    _save(folder / form.GOLDENS, goldens)
    if bank:
        _save(folder / form.BANK, bank)
    facts: dict[str, Any] = {
        "model": config.model.name,
        "image_size": goldens["images"].shape[-1],
        "preprocessing": {
            key: value for key, value in model_spec(config).to_json().items() if key in FIELDS
        },
        "target": config.target,
        "precision": config.precision.precision,
        "onnx": onnx,
        "baseline_onnx": baseline_onnx,
        "verdict": _verdicts(artifacts.read_json(run.path(verdict))),
        "patterns": tuple(sorted(graph_patterns(run.path(onnx)))),
        "engine": config.engine,
        "min_cosine_p1": config.precision.min_cosine_p1,
        "golden_images": len(goldens["images"]),
        "bank_images": len(bank["labels"]) if bank else 0,
    }
    known = _known_bugs(config, set(facts["patterns"]))
    artifacts.write_text(folder / form.README, instructions(name, facts, known))
    return form.seal(folder, **facts)


def _known_bugs(config: BuildConfig, patterns: set[str]) -> list[str]:
    """What the graphs may meet on whatever device the bundle goes to."""
    from ampdeploy.stages.engine import look_up_bugs

    if not config.builds_engine:
        return []
    elsewhere = dataclasses.replace(config.engine, when="deferred")
    return look_up_bugs(dataclasses.replace(config, engine=elsewhere), patterns)[1]


def _verdicts(facts: dict[str, Any]) -> dict[str, Any]:
    """The part of both graphs' verification that engines carry along; the whole is in the file."""
    kept = ("precision", "bar", "islands", "judged_images", "verified")
    return {
        role: {
            **{key: said[key] for key in kept if key in said},
            **({"outputs": said["judgement"]["outputs"]} if "judgement" in said else {}),
        }
        for role, said in facts.items()
    }


def _references(run: Run) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray] | None]:
    """Golden inputs and outputs, and the feature bank if there are labels, in float32."""
    from ampdeploy.data.loading import load_all
    from ampdeploy.stages.common import bank_of, model_spec, queries_of
    from ampdeploy.targets.base import FEATURES, get_target

    spec = model_spec(run.config)
    queries = queries_of(run)
    chosen, others = queries.first(GOLDEN_IMAGES), bank_of(run) or queries.after(GOLDEN_IMAGES)
    images = load_all(chosen, spec).numpy()
    target = get_target("ort")
    threads = run.config.bench.threads
    # One model at a time: they can be 17 GB each.
    with target.open(run.path(artifacts.MODEL_ONNX), threads=threads) as runner:
        outputs = _outputs(runner, images)
        pruned = _bank_features(runner, chosen, others, spec)
    with target.open(run.path(artifacts.BASELINE_ONNX), threads=threads) as runner:
        baseline_features = _outputs(runner, images)[FEATURES]
        baseline = _bank_features(runner, chosen, others, spec)
    goldens = {"images": images, **outputs, "baseline_features": baseline_features}
    if pruned is None or baseline is None:
        return goldens, None
    bank = others.first(BANK_IMAGES)
    classes = sorted({*chosen.classes, *bank.classes})
    return goldens, {
        "baseline": baseline,
        "pruned": pruned,
        "labels": _labels(bank, classes),
        "golden_labels": _labels(chosen, classes),
        "classes": np.array(classes),
    }


def _outputs(runner: Runner, images: np.ndarray) -> dict[str, np.ndarray]:
    starts = range(0, len(images), _GOLDEN_BATCH)
    parts = [runner.run(images[start : start + _GOLDEN_BATCH]) for start in starts]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _bank_features(
    runner: Runner, chosen: ImageSet, others: ImageSet, spec: Any
) -> np.ndarray | None:
    """Features (M, C) of the bank's images; None where images have no labels, or none are left."""
    from ampdeploy.evaluate import numpy_batches

    bank = others.first(BANK_IMAGES)
    if bank.labels is None or chosen.labels is None:
        return None
    return extract((runner,), numpy_batches(bank, spec, "feature bank"))[0]


def _labels(images: ImageSet, classes: list[str]) -> np.ndarray:
    index = {name: position for position, name in enumerate(classes)}
    return np.array([index[record.label or ""] for record in images.records], dtype=np.int32)


def _save(path: Path, arrays: dict[str, Any]) -> None:
    with explain_os_errors(path, needed=sum(array.nbytes for array in arrays.values())):
        np.savez(path, **arrays)


def _place(source: Path, target: Path, *, link: bool) -> None:
    """Copy a file; or link it, where the folder is only packed and thrown away."""
    with explain_os_errors(target, needed=source.stat().st_size if source.exists() else None):
        if link:
            # Another file system, or one without links: a copy does as well.
            with contextlib.suppress(OSError):
                os.link(source, target)
                return
        shutil.copyfile(source, target)
