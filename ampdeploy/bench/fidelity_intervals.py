"""95% intervals of fidelity: what other images of the same kind would give. numpy only.

Which images were drawn is what varies, as in the differences in accuracy. The image is the unit:
patches of one image are no independent draws. Of each number in the way that held in simulations,
with skewed cosines and with images that differ from each other much more than their patches do
(`tests/bench/test_fidelity_intervals.py` repeats some of them):

- `of_mean`, of the mean cosines: percentile bootstrap over images.
- `of_percentile`, of the 1st percentile over images: order statistics, which take nothing for
  granted of the distribution. Their lower end needs 368 images.
- `of_clustered_percentile`, of the 1st percentile over patches: order statistics again, of as many
  draws as the patches are worth together.
- `of_neighbours`, of the share of neighbours that both models agree on: from how much halves of
  the images differ.

The smallest cosine gets none. It is an extreme, for which the bootstrap does not work (Efron and
Tibshirani 1993, An Introduction to the Bootstrap, section 7.4): a resample is never below it,
though other images may well be.

Array legend: N images, P patches per image.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from ampdeploy.bench.intervals import Z
from ampdeploy.report.result import Interval

SHARE = 0.01  # the 1st percentile
MIN_IMAGES = 20  # from here on, intervals of a skewed mean hold 87 to 95 times of 100
RESAMPLES = 2000
DRAWS_AT_ONCE = 1 << 20  # bounds memory
SPLITS = 20  # into halves; with more, the interval is the same
MOST_OF_A_HALF = 2000  # images; bounds time, as neighbours take the square of it

_TAIL = 0.025  # on each side


def of_mean(values: np.ndarray, *, seed: int = 0) -> Interval:
    """Mean over images, with a percentile bootstrap over them (Efron and Tibshirani 1993, ch. 13).

    Args:
        values: (N,) of each image, e.g. its cosine or the mean cosine of its patches.
        seed: Of the resampling.
    """
    n = len(values)
    value = float(values.mean(dtype=np.float64))
    if n < MIN_IMAGES:
        return _none(value, n, MIN_IMAGES)
    rng = np.random.default_rng(seed)
    step = max(1, DRAWS_AT_ONCE // n)
    means = [
        values[rng.integers(0, n, size=(min(step, RESAMPLES - start), n))].mean(axis=1)
        for start in range(0, RESAMPLES, step)
    ]
    low, high = np.percentile(np.concatenate(means), [100 * _TAIL, 100 * (1 - _TAIL)])
    return _around(value, float(low), float(high))


def of_percentile(values: np.ndarray) -> Interval:
    """1st percentile over images, between two of the values themselves.

    How many of N images are below the true percentile is binomial whatever the distribution is,
    which says between which ranks it lies (David and Nagaraja 2003, Order Statistics, section
    7.1). The interval holds at least 95 times of 100. With 0.99^N above 2.5%, all images may be
    above the percentile, and nothing bounds it from below.

    Args:
        values: (N,) of each image.
    """
    n = len(values)
    value = float(np.percentile(values, 100 * SHARE))
    return _between_ranks(value, values, n, f"{n} images; about {draws_for_low_end()}")


def of_clustered_percentile(values: np.ndarray) -> Interval:
    """1st percentile over the patches of all images.

    The order statistics of `of_percentile`, for as many independent draws as there would have to
    be for the share below the percentile to vary as it does between images (Woodruff 1952, JASA
    47, 635-646, for quantiles; Korn and Graubard 1998, Survey Methodology 24, 193-201, for the
    effective number of draws behind a small share). The image with the most patches there counts
    twice: one more like it may be among the images that were not drawn, and without it, too much
    is promised where few images have all the low patches.

    Thousands of patches lie below the percentile, so that a bootstrap over images seems to do, and
    does not: with 180 images that differ as much as their patches, or more, its intervals hold
    89 times of 100, with 50 images 72 to 79 times, and nearly all misses are below the lower end,
    on which gates decide. These hold 95 to 99 times of 100 from 180 images on and 90 to 99 times
    from 50 on, and have no lower end where the low patches are a few images' own.

    Args:
        values: (N, P) cosines.
    """
    n, patches = values.shape
    value = float(np.percentile(values, 100 * SHARE))
    if n < MIN_IMAGES:
        return _none(value, n, MIN_IMAGES)
    below = np.count_nonzero(values <= value, axis=1) / patches
    # Of equal cosines more than 1% can be there; what they are worth is the same.
    below *= SHARE / below.mean()
    variance = (np.sum(below**2) + below.max() ** 2) / n**2 - SHARE**2 / n
    draws = min(int(SHARE * (1 - SHARE) / variance), values.size)
    needed = math.ceil(n * draws_for_low_end() / draws)
    return _between_ranks(
        value,
        values,
        draws,
        f"{n} images, whose patches are worth {draws} independent ones; about {needed} images",
    )


def of_neighbours(
    value: float,
    agreement: Callable[[np.ndarray], float],
    *,
    images: int,
    k: int,
    seed: int = 0,
) -> Interval:
    """Share of each image's k nearest neighbours that both models agree on.

    Another draw of images also changes who there is to be a neighbour, so that resampling what
    each image agrees on takes too much as given: such intervals held 65 to 89 times of 100. Two
    halves of the images are two draws, and how much they differ says how much a draw varies
    (subsampling: Politis and Romano 1994, Annals of Statistics 22, 2031-2050). The interval is
    Wilson's (1927) of the number of independent comparisons that vary as much, so that it stays
    in [0, 1] and is not empty where all agree. It held 87 to 98 times of 100.

    Args:
        value: Of all images.
        agreement: Positions of images (n,) -> the share among these images alone.
        images: N, how many there are.
        k: Neighbours.
        seed: Of the splits.
    """
    needed = max(MIN_IMAGES, 2 * (2 * k + 1))  # in a half of 2k, chance agrees on half
    if images < needed:
        return _none(value, images, needed)
    half = min(images // 2, MOST_OF_A_HALF)
    rng = np.random.default_rng(seed)
    squares = []
    for _ in range(SPLITS):
        order = rng.permutation(images)
        squares.append((agreement(order[:half]) - agreement(order[half : 2 * half])) ** 2 / 2)
    variance = float(np.mean(squares)) * half / images
    # One more image each that agrees and does not, or all that agree would vary by nothing.
    share = (value * images + 1) / (images + 2)
    comparisons = images * k
    draws = share * (1 - share) / max(variance, share * (1 - share) / comparisons)
    return _around(value, *_wilson(value, draws))


def _wilson(share: float, draws: float) -> tuple[float, float]:
    """Ends of Wilson's score interval."""
    square = Z**2 / draws
    middle = (share + square / 2) / (1 + square)
    reach = math.sqrt(square * share * (1 - share) + square**2 / 4) / (1 + square)
    return max(0.0, middle - reach), min(1.0, middle + reach)


def draws_for_low_end() -> int:
    """Independent draws from which on one of them bounds the 1st percentile from below."""
    return math.ceil(math.log(_TAIL) / math.log1p(-SHARE))


def ranks_around(draws: int) -> tuple[int, int]:
    """Ranks, from 1, between which the 1st percentile lies 95 times of 100 or more.

    The lower one is 0 where even the smallest draw may be above it.

    Args:
        draws: Independent ones, at least 1.
    """
    mean = draws * SHARE
    most = min(draws, int(mean + 10 * math.sqrt(mean)) + 10)
    log_odds = math.log(SHARE) - math.log1p(-SHARE)
    log_chance = draws * math.log1p(-SHARE)
    chances = []  # of exactly so many draws below the percentile
    for count in range(most + 1):
        chances.append(math.exp(log_chance))
        if count < draws:
            log_chance += math.log((draws - count) / (count + 1)) + log_odds
    at_most = np.cumsum(chances)
    low = int(np.count_nonzero(at_most <= _TAIL))
    high = int(np.argmax(at_most >= 1 - _TAIL)) + 1
    return low, high


def _between_ranks(value: float, values: np.ndarray, draws: int, why: str) -> Interval:
    """The values at the ranks of so many draws; `why` goes before the words on the lower end."""
    total = values.size
    low, high = (math.ceil(rank / draws * total) for rank in ranks_around(draws))
    places = [min(max(rank, 1), total) - 1 for rank in (low, high)]
    lower, upper = np.partition(values, places, axis=None)[places]
    # The value lies between two ranks, with very few images above the upper one.
    found = _around(value, float(lower), float(upper))
    if low >= 1:
        return found
    why = f"{why} would give the lower end"
    return Interval(value=value, ci95_low=None, ci95_high=found.ci95_high, why={"ci95_low": why})


def _around(value: float, low: float, high: float) -> Interval:
    return Interval(value=value, ci95_low=min(value, low), ci95_high=max(value, high))


def _none(value: float, images: int, needed: int) -> Interval:
    why = f"{images} images; an interval needs {needed}"
    return Interval(
        value=value, ci95_low=None, ci95_high=None, why={"ci95_low": why, "ci95_high": why}
    )
