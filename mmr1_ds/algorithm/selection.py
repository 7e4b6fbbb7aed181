"""Which tokens of an optimiser step train: the k-th largest of numbers that are spread over ranks, exactly."""

from __future__ import annotations

import math

import numpy as np

from mmr1_ds.algorithm.advantages import Totals

_LOWEST, _HIGHEST = -(2**31), 2**31 - 1


def top_bound(values_T: np.ndarray, share: float, ranks: Totals) -> float:
    """The least of the largest `share` of the values of all ranks: those at or above it are chosen. Collective.

    The values at or above the (1 - share) quantile, as TRL's top_entropy_quantile has it, which takes the quantile of a
    micro-batch; here it is of whatever the ranks hold together, whoever holds what.
    Args: values_T: this rank's, (T,) float32, finite.
    """
    num_values = ranks.sum({"count": float(len(values_T))}, "count tokens to choose from")["count"]
    if num_values == 0:
        return -math.inf
    wanted = num_values - math.ceil(round((1 - share) * (num_values - 1), 6))
    keys_T = _ordered(np.ascontiguousarray(values_T, dtype=np.float32).view(np.int32)).astype(np.int64)
    low, high = _LOWEST, _HIGHEST  # the bound's key is the largest with `wanted` values at or above it
    while low < high:
        middle = (low + high + 1) // 2
        own = {"count": float((keys_T >= middle).sum())}
        if ranks.sum(own, "count chosen tokens")["count"] >= wanted:
            low = middle
        else:
            high = middle - 1
    return float(_ordered(np.array([low], dtype=np.int32)).view(np.float32)[0])


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 as int32 that compare as the numbers do, and back: those of negative numbers turn round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
