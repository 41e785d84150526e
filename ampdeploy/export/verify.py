"""Does the ONNX file compute what PyTorch computed? No torch here: the reference comes as arrays.

Array legend: N images, B batch, S image side, C features.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ampdeploy.errors import ArtifactError, DataError, VerificationError
from ampdeploy.export.names import IMAGES
from ampdeploy.export.session import image_input, open_session
from ampdeploy.progress import log, track

if TYPE_CHECKING:
    import onnxruntime


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One output at one batch size, over all images."""

    batch: int
    output: str
    max_abs_diff: float
    """Largest absolute difference of any element."""
    max_relative_diff: float
    """The same in units of the RMS of all elements of the reference."""
    min_cosine: float
    """Smallest cosine between corresponding vectors (last axis): per image, or per patch."""


def verify_onnx(
    path: Path,
    images: np.ndarray,
    reference: dict[str, np.ndarray],
    *,
    batches: tuple[int, ...],
    max_relative_diff: float,
    min_cosine: float,
) -> list[Comparison]:
    """Run `path` in ONNX Runtime on CPU at every batch size and compare every output.

    Every image is run at every batch size; the last batch is filled up from the first images.

    Args:
        path: The ``.onnx`` file.
        images: (N, 3, S, S), float32, normalised. Real images: black ones hide errors.
        reference: Output name -> what PyTorch computed for these images, (N, ...).
        batches: Batch sizes.
        max_relative_diff: Largest difference allowed in any element, in units of the RMS of the
            reference of that output: features of any scale are held to the same precision.
        min_cosine: Smallest cosine allowed between corresponding vectors.

    Returns:
        One `Comparison` per batch size and output.

    Raises:
        ArtifactError: The file cannot be opened, or its inputs or outputs are other ones.
        DataError: There are no images, or the reference is not for them.
        VerificationError: It computes something else; every mismatch is listed.
    """
    _check_reference(images, reference)
    session = open_session(path)
    _check_size(session, path, images)
    _check_outputs(session, path, reference)

    failures: list[str] = []
    comparisons: list[Comparison] = []
    for batch in track(batches, f"verify {path.name}", len(batches)):
        try:
            outputs = _run(session, images, list(reference), batch)
        except Exception as error:  # onnxruntime raises its own kinds, without a common base
            failures.append(f"batch {batch}: ONNX Runtime cannot run it: {error}")
            continue
        for name, expected in reference.items():
            found = outputs[name]
            fault = _unusable(found, expected)
            if fault:
                failures.append(f"batch {batch}, {name}: {fault}")
                continue
            comparison = _compare(batch, name, found, expected)
            comparisons.append(comparison)
            failures += _mismatches(comparison, max_relative_diff, min_cosine)
    if failures:
        _raise(path, failures, comparisons)
    worst = max(comparison.max_relative_diff for comparison in comparisons)
    log.info(
        "verified %s on %d images: largest difference %.1e of the RMS",
        path.name,
        len(images),
        worst,
    )
    return comparisons


def _check_reference(images: np.ndarray, reference: dict[str, np.ndarray]) -> None:
    if images.ndim != 4 or images.dtype != np.float32 or not len(images):
        raise DataError(
            f"cannot verify with images of shape {images.shape} and type {images.dtype}. Give at "
            "least one, as float32 (N, 3, S, S)."
        )
    if not reference:
        raise DataError("cannot verify without reference outputs: there is nothing to compare.")
    for name, expected in reference.items():
        if len(expected) != len(images):
            raise DataError(
                f"the reference {name!r} is for {len(expected)} images, but there are "
                f"{len(images)}. Compute it on the same images."
            )
        bad = int((~np.isfinite(expected)).sum())
        if bad:
            raise DataError(
                f"the reference {name!r} has {bad} of {expected.size} values that are not finite: "
                "the PyTorch model itself is broken. Check its weights and the images."
            )


def _check_size(session: onnxruntime.InferenceSession, path: Path, images: np.ndarray) -> None:
    size = image_input(session, str(path)).size
    if images.shape[1:] != (3, size, size):
        raise ArtifactError(
            f"{path} takes images of {[3, size, size]} (channels, height, width), but these are "
            f"{list(images.shape[1:])}. Prepare the images at the size the model was exported for."
        )


def _check_outputs(
    session: onnxruntime.InferenceSession, path: Path, reference: dict[str, np.ndarray]
) -> None:
    outputs = sorted(value.name for value in session.get_outputs())
    if outputs != sorted(reference):
        raise ArtifactError(
            f"{path} has the outputs {', '.join(outputs)}, but the model has "
            f"{', '.join(sorted(reference))}. It is the export of another model; export it again."
        )


def _run(
    session: onnxruntime.InferenceSession, images: np.ndarray, names: list[str], batch: int
) -> dict[str, np.ndarray]:
    """All images through the session in batches of exactly `batch`."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for start in range(0, len(images), batch):
        chosen = images[np.arange(start, start + batch) % len(images)]
        for name, output in zip(names, session.run(names, {IMAGES: chosen}), strict=True):
            parts[name].append(output[: len(images) - start])
    return {name: np.concatenate(outputs) for name, outputs in parts.items()}


def _unusable(found: np.ndarray, expected: np.ndarray) -> str | None:
    """Why the numbers cannot even be compared."""
    if found.shape != expected.shape:
        return f"its shape is {found.shape}, expected {expected.shape}"
    bad = int((~np.isfinite(found)).sum())
    return f"{bad} of {found.size} values are not finite" if bad else None


def _compare(batch: int, name: str, found: np.ndarray, expected: np.ndarray) -> Comparison:
    a, b = found.astype(np.float64), expected.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    # Zero against zero is equal, zero against anything else shows as cosine 0.
    equal = (a == b).all(axis=-1)
    cosine = np.where(equal, 1.0, (a * b).sum(axis=-1) / np.where(norms == 0, 1.0, norms))
    largest = float(np.abs(a - b).max())
    rms = float(np.sqrt(np.square(b).mean()))
    return Comparison(
        batch=batch,
        output=name,
        max_abs_diff=largest,
        # Against a reference of zeros, only zeros are right.
        max_relative_diff=largest / rms if rms else (np.inf if largest else 0.0),
        min_cosine=float(min(cosine.min(), 1.0)),
    )


def _mismatches(
    comparison: Comparison, max_relative_diff: float, min_cosine: float
) -> Iterator[str]:
    where = f"batch {comparison.batch}, {comparison.output}"
    if comparison.max_relative_diff > max_relative_diff:
        yield (
            f"{where}: largest difference {comparison.max_relative_diff:.3g} of the RMS "
            f"({comparison.max_abs_diff:.3g} absolute), allowed {max_relative_diff:g}"
        )
    if comparison.min_cosine < min_cosine:
        yield f"{where}: smallest cosine {comparison.min_cosine:.6f}, allowed {min_cosine:g}"


def _raise(path: Path, failures: list[str], comparisons: list[Comparison]) -> None:
    listed = "".join(f"\n  - {failure}" for failure in failures)
    worst: dict[str, float] = {}
    for comparison in comparisons:
        known = worst.get(comparison.output, 0.0)
        worst[comparison.output] = max(known, comparison.max_relative_diff)
    largest = ", ".join(f"{name} {value:.3g}" for name, value in worst.items()) or "none computed"
    raise VerificationError(
        f"{path} does not compute what PyTorch computes (largest difference per output, "
        f"in units of its RMS: {largest}):{listed}\nExport it again from the same checkpoint. If "
        "every cosine is as it should be and the largest differences are just above what is "
        "allowed, allow a little more with `ampdeploy export RUN --max-relative-diff X`."
    )
