"""Backend `reference`: plain, exact numpy. Shape letters: G groups, N responses a group, B = G * N, T tokens.

The mathematics. For response i of a group and order n, with c_i(g) the count of n-gram g in it:

    precision  p_n = sum_g min(c_i(g), max_{j != i} c_j(g)) / max(1, T_i - n + 1),  a numerator 0 counts as 0.1
    brevity    b   = 1 if T_i > r else exp(1 - r / T_i),  r the closest other length, the shorter one of two
    BLEU       = b * exp(mean_n log p_n), and 0 where no token of i occurs in another response

The largest count among the others needs only the two largest counts of g in the group: it is the second if i itself
holds the first (two holders of the same largest count make the second equal to it), else the first. So the work is
O(N T) a group, not O(N^2 T).

An n-gram is named by the pair (name of its first n - 1 tokens, last token), which always fits 64 bits: names are
positions in a sorted list, so below 2^31, and tokens are int32. Nothing is hashed, so nothing collides.
"""

from __future__ import annotations

import numpy as np

from mmr1_kernels.records import GroupStatistics

_STD_EPSILON = 1e-6  # verl's; TRL adds 1e-4
_SMOOTHED_ZERO = 0.1  # NLTK's method1


def group_statistics(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    accuracies: np.ndarray,
    group_size: int,
    max_order: int,
) -> GroupStatistics:
    """See `mmr1_kernels.group_statistics`; expects checked input."""
    rewards_GN = rewards.astype(np.float64).reshape(-1, group_size)
    reward_variance_G, advantages_GN = _standardise(rewards_GN)
    pass_rate_G = _mean_of_known(accuracies.astype(np.float64).reshape(-1, group_size))
    lengths_B = np.diff(offsets)
    matches_BK, distinct_GK = _count_ngrams(token_ids, lengths_B, group_size, max_order)
    bleu_GN, bleu_by_order_GNK = _bleu(matches_BK, lengths_B, group_size)
    return GroupStatistics(
        reward_mean=rewards_GN.mean(axis=1),
        reward_variance=reward_variance_G,
        pass_rate=pass_rate_G,
        outcome_variance=pass_rate_G * (1.0 - pass_rate_G),
        self_bleu=bleu_GN.mean(axis=1),
        self_bleu_by_order=bleu_by_order_GNK.mean(axis=1),
        distinct=distinct_GK,
        advantages=advantages_GN.reshape(-1),
    )


def _standardise(rewards_GN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Population variance (G,) and advantages (G, N); both exactly 0 in constant groups, by comparison."""
    centred_GN = rewards_GN - rewards_GN.mean(axis=1, keepdims=True)
    squares_G = np.square(centred_GN).sum(axis=1)
    varies_G = (rewards_GN != rewards_GN[:, :1]).any(axis=1)
    group_size = rewards_GN.shape[1]
    std_G = np.sqrt(squares_G / max(1, group_size - 1))
    advantages_GN = np.where(varies_G[:, None], centred_GN / (std_G + _STD_EPSILON)[:, None], 0.0)
    return np.where(varies_G, squares_G / group_size, 0.0), advantages_GN


def _mean_of_known(values_GN: np.ndarray) -> np.ndarray:
    """Mean over the second axis without NaN, (G,); NaN where nothing is known."""
    known_GN = ~np.isnan(values_GN)
    num_known_G = known_GN.sum(axis=1)
    total_G = np.where(known_GN, values_GN, 0.0).sum(axis=1)
    return np.where(num_known_G > 0, total_G / np.maximum(num_known_G, 1), np.nan)


def _count_ngrams(
    token_ids: np.ndarray, lengths_B: np.ndarray, group_size: int, max_order: int
) -> tuple[np.ndarray, np.ndarray]:
    """Clipped matches (B, K) int64 of each response with its group, and distinct-n (G, K), for n = 1..K."""
    num_responses = len(lengths_B)
    num_groups = num_responses // group_size
    response_of = np.repeat(np.arange(num_responses), lengths_B)  # (total,)
    left_in_response = np.cumsum(lengths_B)[response_of] - np.arange(len(token_ids))  # tokens from here to its end
    starts = np.arange(len(token_ids))
    names = response_of // group_size  # of the empty n-gram: the group, so that groups never share a name
    matches_BK = np.zeros((num_responses, max_order), dtype=np.int64)
    distinct_GK = np.zeros((num_groups, max_order))
    for order in range(1, max_order + 1):
        fits = left_in_response[starts] >= order
        starts, names = starts[fits], names[fits]
        pairs = (names << 32) | token_ids[starts + order - 1].astype(np.int64)
        first_seen, names = np.unique(pairs, return_index=True, return_inverse=True)[1:]
        responses = response_of[starts]
        matches_BK[:, order - 1] = _clipped_matches(names, responses, num_responses)
        num_different_G = np.bincount(responses[first_seen] // group_size, minlength=num_groups)
        num_all_G = np.bincount(responses // group_size, minlength=num_groups)
        distinct_GK[:, order - 1] = num_different_G / np.maximum(num_all_G, 1)
    return matches_BK, distinct_GK


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


def _bleu(matches_BK: np.ndarray, lengths_B: np.ndarray, group_size: int) -> tuple[np.ndarray, np.ndarray]:
    """BLEU of each response against the others: (G, N) over all orders, and (G, N, K) for each order alone."""
    max_order = matches_BK.shape[1]
    totals_BK = np.maximum(lengths_B[:, None] - np.arange(max_order), 1)
    precisions_BK = np.where(matches_BK > 0, matches_BK, _SMOOTHED_ZERO) / totals_BK
    brevity_B = _brevity(lengths_B.reshape(-1, group_size)).reshape(-1)
    factor_B = np.where(matches_BK[:, 0] > 0, brevity_B, 0.0)
    bleu_GN = (factor_B * np.exp(np.log(precisions_BK).mean(axis=1))).reshape(-1, group_size)
    by_order_GNK = (factor_B[:, None] * precisions_BK).reshape(-1, group_size, max_order)
    # A group of empty responses holds nothing that differs; NLTK's 0 would call it perfectly diverse.
    silent_G = (lengths_B.reshape(-1, group_size) == 0).all(axis=1) & (group_size > 1)
    return np.where(silent_G[:, None], 1.0, bleu_GN), np.where(silent_G[:, None, None], 1.0, by_order_GNK)


def _brevity(lengths_GN: np.ndarray) -> np.ndarray:
    """Brevity penalty against the closest other length, (G, N). A tie goes to the shorter, as in NLTK."""
    num_groups, group_size = lengths_GN.shape
    if group_size == 1:
        return np.ones((num_groups, 1))  # no reference; without one nothing matches either
    order_GN = np.argsort(lengths_GN, axis=1)
    sorted_GN = np.take_along_axis(lengths_GN, order_GN, axis=1)
    # In sorted order the closest other length is a neighbour: only the shorter and the longer one compete.
    shorter_GN = np.roll(sorted_GN, 1, axis=1)
    longer_GN = np.roll(sorted_GN, -1, axis=1)
    shorter_GN[:, 0] = longer_GN[:, 0]
    longer_GN[:, -1] = shorter_GN[:, -1]
    closest_sorted_GN = np.where(longer_GN - sorted_GN < sorted_GN - shorter_GN, longer_GN, shorter_GN)
    closest_GN = np.empty_like(closest_sorted_GN)
    np.put_along_axis(closest_GN, order_GN, closest_sorted_GN, axis=1)
    return np.where(lengths_GN > closest_GN, 1.0, np.exp(1.0 - closest_GN / np.maximum(lengths_GN, 1)))
