"""The mean pairwise Levenshtein distance of the responses of a group."""

from __future__ import annotations

from itertools import combinations, pairwise

import numpy as np

from mmr1_kernels.checks import check_packing, check_tokens


def mean_edit_distance(
    token_ids: np.ndarray, offsets: np.ndarray, group_size: int | None, *, group_offsets: np.ndarray | None = None
) -> np.ndarray:
    """Return the Levenshtein distance over the longer response's length, averaged over all pairs of each group.

    Two empty responses are at distance 0. A group of one has no pair, and gets 0. The cost is
    O(N^2 T^2 / 64) a group.

    Args: as in `group_statistics`, numpy arrays only.
    Returns: (G,) float64 in [0, 1]; higher = more diverse.
    Raises: TypeError, ValueError naming the argument and the value; ImportError without rapidfuzz.
    """
    arrays = {"token_ids": token_ids, "offsets": offsets, "group_offsets": group_offsets}
    for name, array in arrays.items():
        if array is not None and not isinstance(array, np.ndarray):
            kind = type(array).__name__
            raise TypeError(f"{name} must be a numpy array, the only kind mean_edit_distance takes, got {kind}")
    check_tokens(token_ids)
    group_offsets = check_packing(len(token_ids), offsets, group_size, group_offsets)
    from rapidfuzz.distance import Levenshtein  # only this metric needs it

    distances_G = np.zeros(len(group_offsets) - 1)
    for group, (first, last) in enumerate(pairwise(group_offsets)):
        responses = [token_ids[offsets[b] : offsets[b + 1]].tolist() for b in range(first, last)]
        pairs = [Levenshtein.normalized_distance(left, right) for left, right in combinations(responses, 2)]
        if pairs:
            distances_G[group] = sum(pairs) / len(pairs)
    return distances_G
