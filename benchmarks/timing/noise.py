"""How the time of a call varies on a real machine: a model with five parts, fitted to samples.

The logarithm of a call's time is a constant, plus

- ``jitter``: normal, independent from call to call;
- ``drift``: what the machine does to all calls for a while (clocks, neighbours), a first-order
  autoregression;
- ``bursts``: stretches of calls, of geometric length, that are slower by a constant;
- ``outliers``: single calls that are slower by an exponentially distributed amount;
- ``own``: drift that each model has to itself (its place in memory and caches), which no
  interleaving takes out of a ratio;
- ``load``: normal, what opening a file anew does to all its calls until it is closed.

Fitting (`fit`): the calls in the order in which they ran, a running median over 9 of them, and
the residual. Jitter is 1.4826 times the median absolute residual. Outliers are residuals above
five times that; their share and mean size. Bursts are stretches of three calls or more at which
the running median is over 15% above the median of all; their share, mean length and mean height.
Drift is what is left of the running median: its variance and its correlation over 10 calls. Own
drift is the standard deviation, less what the other parts explain of it, of the log ratio of the
two models' medians over stretches of 10 pairs. Load is the standard deviation of the loads' log
ratios, less what stretches of 10 pairs within them explain, of one model (a ratio has two).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

MIN_PAIRS = 200
RUNNING = 9  # calls under the running median
OUTLIER = 5.0  # times the jitter
BURST = 0.15  # above the median, relative
MIN_BURST = 3  # calls
MIN_STRETCHES = 3  # of a load, whose spread is looked at
STEP = 10  # calls or pairs over which correlation is read


@dataclass(frozen=True, kw_only=True)
class Noise:
    """Sizes are of the logarithm: 0.01 is one percent."""

    jitter: float = 0.0
    drift: float = 0.0
    """Standard deviation."""
    drift_calls: float = 1.0
    """Calls after which the correlation has fallen to 1 / e."""
    burst: float = 0.0
    """Height."""
    burst_calls: float = 1.0
    """Mean length."""
    burst_share: float = 0.0
    """Of all calls."""
    outlier: float = 0.0
    """Mean size."""
    outlier_share: float = 0.0
    own: float = 0.0
    """Standard deviation of each model's own drift."""
    own_calls: float = 1.0
    """As `drift_calls`, in calls of that model."""
    load: float = 0.0
    """Standard deviation, of each model."""

    def only(self, *parts: str) -> Noise:
        """The same with `jitter` and these parts, and without the others."""
        kept = {"jitter", *(f"{part}{end}" for part in parts for end in ("", "_calls", "_share"))}
        return Noise(**{n: v for n, v in dataclasses.asdict(self).items() if n in kept})


def draw(
    noise: Noise, pairs: int, loads: int, ratio: float, rng: np.random.Generator
) -> list[np.ndarray]:
    """Times of interleaved calls of a model, and of one that takes `ratio` as long.

    Returns:
        Per load (pairs / loads, 2).
    """
    calls = _draw_calls(noise, pairs, ratio, rng)
    found = np.array_split(calls, loads)
    return [load * np.exp(rng.normal(0, noise.load, 2)) for load in found]


def _draw_calls(noise: Noise, pairs: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    calls = 2 * pairs
    logs = rng.normal(0, noise.jitter, calls)
    logs += noise.drift * _autoregression(calls, noise.drift_calls, rng)
    logs += noise.burst * _stretches(calls, noise.burst_share, noise.burst_calls, rng)
    hit = rng.random(calls) < noise.outlier_share
    logs[hit] += rng.exponential(noise.outlier, int(hit.sum()))
    by_pair = logs.reshape(pairs, 2)
    by_pair[1::2] = by_pair[1::2, ::-1].copy()  # every second pair runs the other model first
    for model in range(2):
        by_pair[:, model] += noise.own * _autoregression(pairs, noise.own_calls, rng)
    return np.exp(by_pair) * (1.0, ratio)


def _autoregression(n: int, calls: float, rng: np.random.Generator) -> np.ndarray:
    """Unit variance, correlation falling to 1 / e after `calls` steps; stationary."""
    phi = float(np.exp(-1 / calls))
    shocks = rng.normal(0, np.sqrt(1 - phi * phi), n)
    values = np.empty(n)
    now = rng.normal()
    for i, shock in enumerate(shocks):
        now = phi * now + shock
        values[i] = now
    return values


def _stretches(n: int, share: float, mean_calls: float, rng: np.random.Generator) -> np.ndarray:
    """1 inside bursts, 0 outside."""
    state = np.zeros(n)
    if share <= 0:
        return state
    between = mean_calls * (1 - share) / share
    at, inside = 0, rng.random() < share
    while at < n:
        length = int(rng.geometric(1 / max(1.0, mean_calls if inside else between)))
        state[at : at + length] = inside
        at, inside = at + length, not inside
    return state


def fit(loads_ms: list[np.ndarray]) -> Noise:
    """Parameters of samples of two copies of one model, interleaved as `measure_load` does.

    Args:
        loads_ms: Per load (n, 2), in the order in which they ran; `MIN_PAIRS` at least together.
    """
    pairs_ms = np.concatenate(loads_ms)
    if min(len(load) for load in loads_ms) < MIN_STRETCHES * STEP:
        raise ValueError(f"a load has fewer than {MIN_STRETCHES * STEP} pairs; record for longer")
    if len(pairs_ms) < MIN_PAIRS:
        raise ValueError(f"{len(pairs_ms)} pairs of calls are too few to fit; record {MIN_PAIRS}")
    # Each load begins with the other model.
    in_order = np.concatenate(
        [_in_order(load, first=index % 2) for index, load in enumerate(loads_ms)]
    )
    logs = np.log(in_order.ravel())
    logs -= np.median(logs)
    running = np.median(
        np.lib.stride_tricks.sliding_window_view(np.pad(logs, RUNNING // 2, "edge"), RUNNING),
        axis=1,
    )
    residual = logs - running
    jitter = 1.4826 * float(np.median(np.abs(residual)))
    outlier = residual > OUTLIER * jitter
    burst_calls, inside = _long_stretches(running > np.log1p(BURST))
    calm = running[~inside]
    drift_var = max(0.0, float(np.var(calm)) - jitter**2 * np.pi / 2 / RUNNING)
    return Noise(
        jitter=jitter,
        drift=float(np.sqrt(drift_var)),
        drift_calls=_correlation_calls(calm),
        burst=float(running[inside].mean()) if inside.any() else 0.0,
        burst_calls=burst_calls,
        burst_share=float(inside.mean()),
        outlier=float(residual[outlier].mean()) if outlier.any() else 0.0,
        outlier_share=float(outlier.mean()),
        **_own(pairs_ms, jitter),
        load=_load(loads_ms),
    )


def _in_order(load_ms: np.ndarray, *, first: int) -> np.ndarray:
    swapped = load_ms.copy()
    swapped[1 - first :: 2] = swapped[1 - first :: 2, ::-1].copy()
    return swapped


def _load(loads_ms: list[np.ndarray]) -> float:
    logs = [float(np.log(np.divide(*np.median(load, axis=0)))) for load in loads_ms]
    inside = []
    for load in loads_ms:
        stretches = np.log(load[: len(load) // STEP * STEP]).reshape(-1, STEP, 2)
        medians = np.median(stretches, axis=1)
        inside.append(np.var(medians[:, 0] - medians[:, 1], ddof=1) / len(medians))
    return float(np.sqrt(max(0.0, np.var(logs, ddof=1) - np.mean(inside)) / 2))


def _long_stretches(above: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean length of the stretches of `MIN_BURST` or more, and where they are."""
    inside = np.zeros(len(above), bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], above.astype(int), [0]])))
    lengths = []
    for start, end in edges.reshape(-1, 2):
        if end - start >= MIN_BURST:
            inside[start:end] = True
            lengths.append(end - start)
    return float(np.mean(lengths)) if lengths else 1.0, inside


def _correlation_calls(values: np.ndarray) -> float:
    ends = values[: len(values) // STEP * STEP : STEP]
    correlation = float(np.corrcoef(ends[:-1], ends[1:])[0, 1])
    return float(STEP / -np.log(min(max(correlation, 0.01), 0.99)))


def _own(pairs_ms: np.ndarray, jitter: float) -> dict[str, float]:
    blocks = np.log(pairs_ms[: len(pairs_ms) // STEP * STEP]).reshape(-1, STEP, 2)
    medians = np.median(blocks, axis=1)
    ratio = medians[:, 1] - medians[:, 0]
    spread = 1.4826 * float(np.median(np.abs(ratio - np.median(ratio))))
    # Two medians of `STEP` calls with jitter alone differ by this much.
    explained = jitter**2 * np.pi / 2 / STEP * 2
    own = np.sqrt(max(0.0, spread**2 - explained) / 2)
    return {"own": float(own), "own_calls": float(STEP)}
