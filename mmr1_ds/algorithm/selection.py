"""Which tokens of an optimiser step train: the k-th largest of numbers that are spread over ranks, exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

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
    return _kth_largest(values_T, num_values - math.ceil(round((1 - share) * (num_values - 1), 6)), ranks)


def _kth_largest(values_T: np.ndarray, wanted: float, ranks: Totals) -> float:
    """The largest number with `wanted` of the ranks' values at or above it. Collective."""
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


def highest_covariances(
    logprobs: Sequence[np.ndarray], advantages: Sequence[np.ndarray], share: float, ranks: Totals
) -> list[np.ndarray]:
    """The `share` of the tokens whose log-probability and advantage vary together most. Collective.

    The covariance of a token is (log p - mean log p) (A - mean A), the means over the tokens of all ranks (arXiv
    2505.22617, eq. 10): where it is high, training makes the policy surer of what it is sure of already.
    Args: one array (T,) a response each. Returns: bool in the same form.
    """
    nothing = np.zeros(0)
    columns = {
        "logprobs": np.concatenate([nothing, *logprobs]).astype(np.float64),
        "advantages": np.concatenate([nothing, *advantages]).astype(np.float64),
    }
    own = {name: float(values_T.sum()) for name, values_T in columns.items()}
    totals = ranks.sum(own | {"count": float(len(columns["logprobs"]))}, "means for covariances")
    first_T, second_T = (values_T - totals[name] / max(1.0, totals["count"]) for name, values_T in columns.items())
    covariances_T = (first_T * second_T).astype(np.float32)
    return _cut(covariances_T >= top_bound(covariances_T, share, ranks), logprobs)


def _cut(chosen_T: np.ndarray, logprobs: Sequence[np.ndarray]) -> list[np.ndarray]:
    return np.split(chosen_T, np.cumsum([len(values) for values in logprobs])[:-1]) if len(logprobs) else []


def _ordered(bits: np.ndarray) -> np.ndarray:
    """Bits of float32 as int32 that compare as the numbers do, and back: those of negative numbers turn round."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)
