"""Does what was built compute what it should, and is it faster than the baseline?

Real images go through the target's own runner, at every batch size that the engine was tuned for:
some TensorRT releases compute one of them wrong. The reference is float32: a bundle's golden
outputs, or, where the model was pruned, its float32 graph. numpy only.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ampdeploy.bench.accuracy import FidelityAccumulator
from ampdeploy.bench.latency import BASELINE, PRUNED, measure_interleaved
from ampdeploy.bench.tasks.knn import knn_predict
from ampdeploy.config import sizes_to_test
from ampdeploy.device.bundle.contents import BANK, GOLDENS, Bundle
from ampdeploy.device.engine.manifest import EngineManifest, read_manifest, write_manifest
from ampdeploy.errors import ArtifactError, VerificationError
from ampdeploy.export.names import FEATURES, PATCH_FEATURES
from ampdeploy.precision.compare import Agreement, agreement
from ampdeploy.progress import log
from ampdeploy.report.codec import to_plain
from ampdeploy.targets.base import Runner, get_target

# Of the reference; memory only.
_REFERENCE_BATCH = 4
# Enough for an interval; the bench verb measures at leisure.
COMPARE_MIN_RUNS = 20
COMPARE_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True)
class Goldens:
    """Array legend: N images, C feature width, P patches."""

    images: np.ndarray
    """(N, 3, S, S) float32, preprocessed."""
    outputs: dict[str, np.ndarray]
    """What the float32 model makes of them: features (N, C), patch_features (N, P, C)."""
    baseline_features: np.ndarray
    """(N, C) of the unpruned float32 model."""


@dataclass(frozen=True, kw_only=True)
class KnnCheck:
    """The golden images classified by their neighbours in the bundle's float32 feature bank."""

    images: int
    bank_images: int
    agreement: float
    """Share of the images that get the label which the float32 features give them."""
    accuracy: float
    """Share that get their own label."""
    float32_accuracy: float
    baseline_accuracy: float
    """Of the unpruned model, float32."""


@dataclass(frozen=True, kw_only=True)
class SelfTest:
    """What the self-test found."""

    images: int
    min_cosine_p1: float
    """The bar."""
    batches: dict[str, dict[str, Agreement]]
    """Batch size -> output -> agreement with the golden one."""
    knn: KnnCheck | None
    why_no_knn: str | None

    @property
    def worst(self) -> float:
        """Lowest p1 cosine of all outputs at all batch sizes."""
        return min(seen.cosine_p1 for found in self.batches.values() for seen in found.values())


def read_goldens(bundle: Bundle) -> Goldens:
    """The golden inputs and outputs.

    Raises:
        ArtifactError: They are not what the manifest says, or not finite.
    """
    arrays = bundle.arrays(GOLDENS)
    count, size = bundle.manifest.golden_images, bundle.manifest.image_size
    images = arrays.get("images")
    outputs = {name: arrays[name] for name in (FEATURES, PATCH_FEATURES) if name in arrays}
    rows = [*outputs.values(), *([arrays[key] for key in ("baseline_features",) if key in arrays])]
    good = (
        images is not None
        and images.shape == (count, 3, size, size)
        and FEATURES in outputs
        and "baseline_features" in arrays
        and all(len(value) == count for value in rows)
        and all(a.dtype == np.float32 and np.isfinite(a).all() for a in (images, *rows))
    )
    if not good:
        seen = ", ".join(f"{k} {v.dtype} {v.shape}" for k, v in arrays.items())
        raise ArtifactError(
            f"{bundle.path(GOLDENS)} holds {seen}; expected {count} finite float32 images of "
            f"{size} px with their features. Pack the bundle again with `ampdeploy bundle`."
        )
    assert images is not None
    return Goldens(images=images, outputs=outputs, baseline_features=arrays["baseline_features"])


def run_batched(
    runner: Runner, images: np.ndarray, batch: int, *, names: Iterable[str] | None = None
) -> dict[str, np.ndarray]:
    """Run all images in batches of exactly `batch`; the last is filled up with the first images.

    Args:
        runner: Open.
        images: (N, 3, S, S).
        batch: Images per call.
        names: Outputs to keep; None: all.

    Returns:
        Output -> (N, ...).
    """
    count = len(images)
    kept = tuple(names) if names is not None else runner.output_names
    parts: dict[str, list[np.ndarray]] = {name: [] for name in kept}
    for start in range(0, count, batch):
        chosen = np.arange(start, start + batch) % count
        found = runner.run(np.ascontiguousarray(images[chosen]))
        for name in kept:
            parts[name].append(found[name][: count - start])
    return {name: np.concatenate(values) for name, values in parts.items()}


def self_test(runner: Runner, bundle: Bundle, goldens: Goldens, batches: Iterable[int]) -> SelfTest:
    """Compare what `runner` computes with the golden outputs.

    Args:
        runner: What was built, opened by its target.
        bundle: Has the bar and the feature bank.
        goldens: Of the bundle.
        batches: Batch sizes to test.

    Raises:
        VerificationError: Outputs are missing, not finite, or below the bar; says by how much.
    """
    bar = bundle.manifest.min_cosine_p1
    found, features = _compare(runner, goldens.images, goldens.outputs, batches, bar)
    knn, why = None, "the bundle has no labelled feature bank"
    if bundle.manifest.bank_images:
        knn, why = _check_knn(bundle, goldens, features), ""
    return SelfTest(
        images=len(goldens.images),
        min_cosine_p1=bar,
        batches=found,
        knn=knn,
        why_no_knn=why or None,
    )


def prove_engine(plan: Path, onnx: Path, images: np.ndarray, *, bar: float) -> EngineManifest:
    """Test an engine where it was built, and keep the result in its manifest.

    Run here: with engines of stand-ins of NVIDIA's modules, not on a GPU.

    Args:
        plan: The engine, its manifest beside it; this GPU runs it.
        onnx: The same model in float32, verified: ONNX Runtime makes the reference of it.
        images: (N, 3, S, S) float32, preprocessed.
        bar: Least p1 cosine to the reference.

    Returns:
        The manifest with the result: ``verdict``, ``engine``.

    Raises:
        VerificationError: The engine misses the bar at a batch of its profile, or values are not
            finite.
    """
    manifest = read_manifest(plan)
    profile = manifest.profiles[0]
    batches = sizes_to_test((profile.min[0], profile.opt[0], profile.max[0]))
    # One after the other: each can take all the memory there is.
    with get_target("ort").open(onnx) as runner:
        expected = run_batched(runner, images, _REFERENCE_BATCH)
    with get_target(manifest.target).open(plan) as runner:
        found, _ = _compare(runner, images, expected, batches, bar)
    tested = {
        "images": len(images),
        "bar_cosine_p1": bar,
        "reference": f"{onnx.name} in ONNX Runtime, float32",
        "batches": to_plain(found),
    }
    manifest = dataclasses.replace(manifest, verdict={**manifest.verdict, "engine": tested})
    write_manifest(plan, manifest)
    log.info(
        "        %s agrees with %s: p1 cosine %.6f on %d images at batch %s, bar %g",
        plan.name,
        onnx.name,
        min(seen.cosine_p1 for outputs in found.values() for seen in outputs.values()),
        len(images),
        ", ".join(found),
        bar,
    )
    return manifest


def _compare(
    runner: Runner,
    images: np.ndarray,
    expected: Mapping[str, np.ndarray],
    batches: Iterable[int],
    bar: float,
) -> tuple[dict[str, dict[str, Agreement]], np.ndarray]:
    """Batch size -> output -> agreement with `expected`; and the features at the last size.

    Raises:
        VerificationError: Outputs are missing, not finite, or below the bar; says by how much.
    """
    _check_outputs(runner, images, expected)
    found: dict[str, dict[str, Agreement]] = {}
    computed: dict[str, np.ndarray] = {}
    for batch in sorted(set(batches)):
        computed = run_batched(runner, images, batch)
        found[str(batch)] = {
            name: agreement(computed[name], values) for name, values in expected.items()
        }
    failed = [
        f"batch {batch}, {name}: {seen} (least {seen.cosine_min:.6f})"
        for batch, outputs in found.items()
        for name, seen in outputs.items()
        if not seen.passes(bar)
    ]
    if failed:
        listed = "\n".join(f"  - {line}" for line in failed)
        raise VerificationError(
            f"{runner.name} does not compute what the model computes. On {len(images)} images the "
            f"p1 cosine to the float32 outputs must be {bar:g} or more, and is not:\n{listed}"
        )
    return found, computed[FEATURES]


def _check_outputs(runner: Runner, images: np.ndarray, expected: Mapping[str, np.ndarray]) -> None:
    size = images.shape[-1]
    if set(runner.output_names) != set(expected) or runner.image_size != size:
        raise VerificationError(
            f"{runner.name} takes images of {runner.image_size} px and computes "
            f"{', '.join(runner.output_names)}; it is compared with outputs of images of {size} "
            f"px, {', '.join(expected)}. They are not of one model. Build it again; a bundle, pack "
            "again."
        )


def _check_knn(bundle: Bundle, goldens: Goldens, features: np.ndarray) -> KnnCheck:
    bank = bundle.arrays(BANK)
    try:
        labels, own = bank["labels"], bank["golden_labels"]
        predicted = {
            name: knn_predict(bank[role], labels, queries, own)
            for name, role, queries in (
                ("here", "pruned", features),
                ("float32", "pruned", goldens.outputs[FEATURES]),
                ("baseline", "baseline", goldens.baseline_features),
            )
        }
    except KeyError as error:
        raise ArtifactError(f"{bundle.path(BANK)} has no {error}. Pack the bundle again.") from None
    return KnnCheck(
        images=len(own),
        bank_images=len(labels),
        agreement=float((predicted["here"] == predicted["float32"]).mean()),
        accuracy=float((predicted["here"] == own).mean()),
        float32_accuracy=float((predicted["float32"] == own).mean()),
        baseline_accuracy=float((predicted["baseline"] == own).mean()),
    )


def compare_with_baseline(
    baseline: Runner, pruned: Runner, bundle: Bundle, goldens: Goldens, batch: int
) -> tuple[dict[str, Any], list[str]]:
    """Fidelity to the unpruned model and latency against it, both through this target.

    Args:
        baseline: The unpruned model, opened.
        pruned: What is to be installed, opened.
        bundle: Has the bar.
        goldens: Images to compare on.
        batch: Images per call.

    Returns:
        Plain data for `install.json`, and what to warn of.

    Raises:
        VerificationError: The baseline computes NaN, or other outputs.
    """
    _check_outputs(baseline, goldens.images, goldens.outputs)
    ours, theirs = (run_batched(runner, goldens.images, batch) for runner in (pruned, baseline))
    right = agreement(theirs[FEATURES], goldens.baseline_features)
    if right.not_finite:
        raise VerificationError(
            f"{baseline.name}, the unpruned model to compare with, does not work on this target: "
            f"{right}. The pruned one passed its test; to install it without the comparison, add "
            "--no-compare."
        )
    shown = FidelityAccumulator()
    shown.add(theirs, ours)
    notes = []
    if not right.passes(bundle.manifest.min_cosine_p1):
        notes.append(
            f"the baseline does not compute its own float32 features on this target ({right}); "
            "it is not installed, but the comparison with it says little"
        )
    latency = measure_interleaved(
        {BASELINE: baseline, PRUNED: pruned},
        goldens.images,
        batch_size=batch,
        min_runs=COMPARE_MIN_RUNS,
        max_seconds=COMPARE_SECONDS,
    )
    low, high = latency.ratio.ci95_low, latency.ratio.ci95_high
    log.info(
        "baseline %.2f ms, pruned %.2f ms at batch %d: ratio %.3f%s",
        latency.baseline.p50,
        latency.pruned.p50,
        batch,
        latency.ratio.value,
        "" if low is None or high is None else f" [{low:.3f}, {high:.3f}]",
    )
    return {
        "fidelity_to_baseline": shown.result(),
        "baseline_agreement": dataclasses.asdict(right),
        "latency_ms": {"batch_size": batch, **to_plain(latency)},
    }, notes
