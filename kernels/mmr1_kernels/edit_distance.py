"""Mean pairwise Levenshtein distance of the responses of a group."""

from __future__ import annotations

from itertools import combinations

import numpy as np

from mmr1_kernels.checks import check_packing


def mean_edit_distance(token_ids: np.ndarray, offsets: np.ndarray, group_size: int) -> np.ndarray:
    """Levenshtein distance over the longer response's length, averaged over all pairs of each group.

    Two empty responses are at distance 0. A group of one has no pair: 0. Cost O(N^2 T^2 / 64) a group.

    Args: as in `group_statistics`.
    Returns: (G,) float64 in [0, 1]; higher = more diverse.
    Raises: TypeError, ValueError naming the argument and the value; ImportError without rapidfuzz.
    """
    num_responses = check_packing(token_ids, offsets, group_size)
    from rapidfuzz.distance import Levenshtein  # only this metric needs it

    distances_G = np.zeros(num_responses // group_size)
    for group in range(len(distances_G)):
        first = group * group_size
        responses = [token_ids[offsets[b] : offsets[b + 1]].tolist() for b in range(first, first + group_size)]
        pairs = [Levenshtein.normalized_distance(left, right) for left, right in combinations(responses, 2)]
        if pairs:
            distances_G[group] = sum(pairs) / len(pairs)
    return distances_G
