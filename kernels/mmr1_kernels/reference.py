"""The backend `reference`: plain, exact numpy. Shape letters: G groups, B responses, T tokens of one, K = max_order.

The mathematics. For response i of a group and order n, with c_i(g) the count of n-gram g in it:

    matches  m_n(i) = sum_g min(c_i(g), max_{j != i} c_j(g))     clipped by the best of all other responses

The largest count among the others needs only the two largest counts of g in the group: it is the second if i itself
holds the first (two holders of the same largest count make the second equal to it), else the first. So the work is
O(N T) a group, not O(N^2 T).

An n-gram is named by the pair (name of its first n - 1 tokens, last token), which always fits 64 bits: names are
positions in a sorted list, so below 2^31, and tokens are int32. Nothing is hashed, so nothing collides.
"""

from __future__ import annotations

import numpy as np

from mmr1_kernels.records import NgramCounts


def count_ngrams(token_ids: np.ndarray, offsets: np.ndarray, group_offsets: np.ndarray, max_order: int) -> NgramCounts:
    """Count matches of each response with its group, and different n-grams of each group, of checked input.

    Args: token_ids: (total,) int32; offsets: (B + 1,) int64, in tokens; group_offsets: (G + 1,) int64, in responses.
    """
    lengths_B = np.diff(offsets)
    num_responses, num_groups = len(lengths_B), len(group_offsets) - 1
    group_of = np.repeat(np.arange(num_groups), np.diff(group_offsets))  # (B,)
    response_of = np.repeat(np.arange(num_responses), lengths_B)  # (total,)
    left_in_response = offsets[1:][response_of] - np.arange(len(token_ids))  # tokens from here to its end
    starts = np.arange(len(token_ids))
    names = group_of[response_of]  # of the empty n-gram: the group, so that groups never share a name
    matches_BK = np.zeros((num_responses, max_order), dtype=np.int64)
    distinct_GK = np.zeros((num_groups, max_order), dtype=np.int64)
    for order in range(1, max_order + 1):
        fits = left_in_response[starts] >= order
        starts, names = starts[fits], names[fits]
        pairs = (names << 32) | token_ids[starts + order - 1].astype(np.int64)
        first_seen, names = np.unique(pairs, return_index=True, return_inverse=True)[1:]
        responses = response_of[starts]
        matches_BK[:, order - 1] = _clipped_matches(names, responses, num_responses)
        distinct_GK[:, order - 1] = np.bincount(group_of[responses[first_seen]], minlength=num_groups)
    return NgramCounts(matches_BK, distinct_GK)


def _clipped_matches(names: np.ndarray, responses: np.ndarray, num_responses: int) -> np.ndarray:
    """Per response, sum over its n-grams of min(own count, largest count in another response), (B,) int64.

    Args: names, responses: (number of n-grams,) int64, the n-gram at each position and the response it stands in.
    """
    if len(names) == 0:
        return np.zeros(num_responses, dtype=np.int64)
    cells, counts = np.unique(names * num_responses + responses, return_counts=True)  # sorted by n-gram
    name_of, response_of = np.divmod(cells, num_responses)
    first_cell = np.flatnonzero(np.diff(name_of, prepend=-1))  # of each n-gram; names have no gaps
    largest = np.maximum.reduceat(counts, first_cell)[name_of]
    holds_largest = counts == largest
    num_holders = np.add.reduceat(holds_largest.astype(np.int64), first_cell)[name_of]
    below_largest = np.maximum.reduceat(np.where(holds_largest, 0, counts), first_cell)[name_of]
    second = np.where(num_holders > 1, largest, below_largest)
    best_of_others = np.where(holds_largest, second, largest)
    matched = np.minimum(counts, best_of_others)
    return np.bincount(response_of, weights=matched, minlength=num_responses).astype(np.int64)
