"""Summaries of many values: order statistics, histograms, counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

NUM_BINS = 10
SHOWN = 3  # examples of anything


@dataclass(frozen=True)
class Spread:
    """Order statistics by the nearest rank: each is one of the values."""

    minimum: float
    median: float
    p90: float  # 90 % of the values are not above it
    p99: float
    maximum: float


@dataclass(frozen=True)
class Bin:
    """A bin of the whole numbers from `low` to `high`, both included."""

    low: int
    high: int
    count: int


def spread(values: np.ndarray) -> Spread | None:
    """Return the order statistics of any number of values; None for no values."""
    if len(values) == 0:
        return None
    found = np.quantile(values, [0.0, 0.5, 0.9, 0.99, 1.0], method="inverted_cdf")
    return Spread(*(value.item() for value in found))


def histogram(values: np.ndarray, limit: int) -> list[Bin]:
    """Count whole numbers in about NUM_BINS equal bins up to `limit`, and in one more beyond it."""
    inside, beyond = values[values <= limit], values[values > limit]
    bins = []
    if len(inside):
        width = _round_width((int(inside.max()) - int(inside.min()) + 1) / NUM_BINS)
        first = int(inside.min()) // width * width
        counts = np.bincount((inside - first) // width)
        for place, count in enumerate(counts.tolist()):
            low = first + place * width
            bins.append(Bin(low, min(low + width - 1, limit), count))
    if len(beyond):
        bins.append(Bin(limit + 1, int(beyond.max()), len(beyond)))
    return bins


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50 ... that is not below `least`."""
    power = 10 ** max(0, math.floor(math.log10(least)))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least)
