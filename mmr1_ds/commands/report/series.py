"""Arithmetic of curves: smoothing, mean and band over seeds."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

MOST_POINTS = 400  # of a curve: about one a pixel
_GRID_POINTS = 200
_FEWEST_TO_SMOOTH = 12


def smoothing_reach(num_values: int) -> int:
    """Return how many values on each side a moving average takes: a twentieth of a short curve, less of a long one.

    It is 0 for a curve that is too short to smooth.
    """
    return max(1, min(num_values // 20, 10 + num_values // 100)) if num_values >= _FEWEST_TO_SMOOTH else 0


def smoothed(values: np.ndarray, reach: int) -> np.ndarray:
    """Return the mean of the values at most `reach` places away, NaNs left out. Args: values: (S,). Returns: (S,)."""
    if not reach:
        return values
    known = np.isfinite(values)
    ones = np.ones(2 * reach + 1)
    middle = slice(reach, reach + len(values))
    sums = np.convolve(np.where(known, values, 0.0), ones)[middle]
    counts = np.convolve(known.astype(np.float64), ones)[middle]
    return np.where(known, sums / np.maximum(counts, 1), np.nan)


def band(
    curves: Sequence[tuple[np.ndarray, np.ndarray]],
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray] | None:
    """Return mean, least and largest value over seeds.

    Args: curves: (x, y) of each, (S,) each, x rising, without NaN.
    Returns: x, mean, low, high, (M,) each; where the seeds' x differ on a grid over the stretch that all of them
        have, by linear interpolation. None when there is no such stretch.
    """
    first = curves[0][0]
    if all(np.array_equal(x, first) for x, _ in curves):
        grid = first
    else:
        start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
        if start > end:
            return None
        grid = np.linspace(start, end, _GRID_POINTS)
    values = np.stack([np.interp(grid, x, y) for x, y in curves])
    return grid, values.mean(axis=0), values.min(axis=0), values.max(axis=0)


def evenly(count: int, most: int) -> list[int]:
    """Return at most `most` of 0 ... count - 1, evenly spread, the first and the last among them."""
    if count <= most:
        return list(range(count))
    return [round(position) for position in np.linspace(0, count - 1, most)]
