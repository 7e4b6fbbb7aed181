"""Summaries of many values: order statistics and a histogram."""

from __future__ import annotations

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
    """Count whole numbers >= 1 by tenths of `limit`, and in one more bin beyond it. Empty ends are left out."""
    tenths = np.minimum((values - 1) * NUM_BINS // limit, NUM_BINS)
    counts = np.bincount(tenths, minlength=NUM_BINS + 1)
    edges = [-(-place * limit // NUM_BINS) + 1 for place in range(NUM_BINS + 1)]
    edges.append(max(int(values.max()), limit) + 1)
    filled = np.flatnonzero(counts)
    return [
        Bin(edges[place], edges[place + 1] - 1, int(counts[place]))
        for place in range(filled[0], filled[-1] + 1)
        if edges[place] < edges[place + 1]
    ]
