"""Nearest neighbours by cosine, in chunks that bound memory. numpy only."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from ampdeploy.errors import VerificationError

# Similarities held at once: 128 MB of float32, whatever the bank's size.
SIMILARITIES_AT_ONCE = 1 << 25


def finite(features: np.ndarray) -> np.ndarray:
    """`features` themselves.

    Raises:
        VerificationError: A value is NaN or infinite.
    """
    bad = int(features.size - np.count_nonzero(np.isfinite(features)))
    if bad:
        raise VerificationError(
            f"{bad} of {features.size} feature values are NaN or infinite. The model overflows, "
            "or its weights are damaged; check it with `ampdeploy eval` in float32."
        )
    return features


def unit_rows(features: np.ndarray) -> np.ndarray:
    """Rows (N, C) of length 1, float32; a row of zeros stays one.

    Raises:
        VerificationError: A value is NaN or infinite.
    """
    features = finite(features)
    norms = np.sqrt(np.einsum("nc,nc->n", features, features, dtype=np.float64))[:, None]
    scaled = np.zeros(features.shape, np.float32)
    np.divide(features, norms, out=scaled, where=norms > 0, casting="same_kind")
    return scaled


def nearest_chunks(
    queries: np.ndarray, bank: np.ndarray | None, k: int
) -> Iterator[tuple[slice, np.ndarray, np.ndarray]]:
    """The `k` most similar bank rows of some queries at a time.

    Args:
        queries: (N, C)
        bank: (M, C), or None for the other queries, each query itself left out.
        k: At most M, or N - 1 without a bank.

    Yields:
        Rows of `queries`, their neighbours (n, k) as positions in the bank, most similar first and
        the lower position first among equals, and the cosines (n, k).

    Raises:
        VerificationError: A value is not finite.
    """
    unit = unit_rows(queries)
    unit_bank = unit if bank is None else unit_rows(bank)
    step = max(1, SIMILARITIES_AT_ONCE // max(1, len(unit_bank)))
    for start in range(0, len(unit), step):
        chunk = slice(start, min(start + step, len(unit)))
        similarity = unit[chunk] @ unit_bank.T
        if bank is None:
            rows = np.arange(len(similarity))
            similarity[rows, start + rows] = -np.inf
        near = np.sort(np.argpartition(-similarity, k - 1, axis=1)[:, :k], axis=1)
        cosines = np.take_along_axis(similarity, near, axis=1)
        order = np.argsort(-cosines, axis=1, kind="stable")
        yield (
            chunk,
            np.take_along_axis(near, order, axis=1),
            np.take_along_axis(cosines, order, axis=1),
        )


def nearest(queries: np.ndarray, bank: np.ndarray | None, k: int) -> tuple[np.ndarray, np.ndarray]:
    """`nearest_chunks` of all queries together: positions (N, k) and cosines (N, k)."""
    parts = [(near, cosines) for _, near, cosines in nearest_chunks(queries, bank, k)]
    return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])
