"""From counts and rewards to the statistics of a group, in numpy: what the backends `reference` and `cpu` share.

For response i of T_i tokens and order n, with m_n(i) its clipped matches (see `reference`):

    precision  p_n = m_n / max(1, T_i - n + 1),  a numerator 0 counts as 0.1 (NLTK's method1)
    brevity    b   = 1 if T_i > r else exp(1 - r / T_i),  r the closest other length, the shorter one of two
    BLEU       = b * exp(mean_n log p_n), and 0 where no token of i occurs in another response

Shape letters: G groups, B responses, K = max_order.
"""

from __future__ import annotations

import numpy as np

from mmr1_kernels.records import GroupStatistics, NgramCounts

STD_EPSILON = 1e-6  # verl's; TRL adds 1e-4
SMOOTHED_ZERO = 0.1  # NLTK's method1


def score_groups(
    counts: NgramCounts, offsets: np.ndarray, rewards: np.ndarray, accuracies: np.ndarray, group_offsets: np.ndarray
) -> GroupStatistics:
    """Compute every group's statistics. Args: as in `reference.count_ngrams` and `mmr1_kernels.group_statistics`."""
    starts_G, sizes_G = group_offsets[:-1], np.diff(group_offsets)
    group_of_B = np.repeat(np.arange(len(sizes_G)), sizes_G)

    def sum_of(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts_G, axis=0) if len(starts_G) else np.zeros((0, *values.shape[1:]))

    def mean_of(values: np.ndarray) -> np.ndarray:
        return sum_of(values) / sizes_G.reshape(-1, *[1] * (values.ndim - 1))

    rewards_B = rewards.astype(np.float64)
    reward_mean_G = mean_of(rewards_B)
    centred_B = rewards_B - reward_mean_G[group_of_B]
    squares_G = sum_of(np.square(centred_B))
    # By comparison, not by rounding: 0 if and only if all rewards of the group are equal.
    varies_G = sum_of((rewards != rewards[starts_G][group_of_B]).astype(np.int64)) > 0
    scale_G = np.sqrt(squares_G / np.maximum(sizes_G - 1, 1)) + STD_EPSILON

    known_B = ~np.isnan(accuracies)
    num_known_G = sum_of(known_B.astype(np.int64))
    num_right_G = sum_of(np.where(known_B, accuracies, 0.0).astype(np.float64))
    pass_rate_G = np.where(num_known_G > 0, num_right_G / np.maximum(num_known_G, 1), np.nan)

    lengths_B = np.diff(offsets)
    bleu_B, bleu_by_order_BK = _bleu(counts.matches, lengths_B, group_offsets)
    # A group of empty responses holds nothing that differs; NLTK's 0 would call it perfectly diverse.
    silent_G = (sum_of(lengths_B) == 0) & (sizes_G > 1)
    num_ngrams_GK = sum_of(np.maximum(lengths_B[:, None] - np.arange(counts.matches.shape[1]), 0))
    return GroupStatistics(
        reward_mean=reward_mean_G,
        reward_variance=np.where(varies_G, squares_G / sizes_G, 0.0),
        pass_rate=pass_rate_G,
        outcome_variance=pass_rate_G * (1.0 - pass_rate_G),
        self_bleu=np.where(silent_G, 1.0, mean_of(bleu_B)),
        self_bleu_by_order=np.where(silent_G[:, None], 1.0, mean_of(bleu_by_order_BK)),
        distinct=counts.distinct / np.maximum(num_ngrams_GK, 1),
        advantages=np.where(varies_G[group_of_B], centred_B / scale_G[group_of_B], 0.0),
    )


def _bleu(matches_BK: np.ndarray, lengths_B: np.ndarray, group_offsets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """BLEU of each response against the others of its group: (B,) over all orders, (B, K) for each order alone."""
    totals_BK = np.maximum(lengths_B[:, None] - np.arange(matches_BK.shape[1]), 1)
    precisions_BK = np.where(matches_BK > 0, matches_BK, SMOOTHED_ZERO) / totals_BK
    factor_B = np.where(matches_BK[:, 0] > 0, _brevity(lengths_B, group_offsets), 0.0)
    return factor_B * np.exp(np.log(precisions_BK).mean(axis=1)), factor_B[:, None] * precisions_BK


def _brevity(lengths_B: np.ndarray, group_offsets: np.ndarray) -> np.ndarray:
    """Brevity penalty against the closest other length of the group, (B,). A tie goes to the shorter, as in NLTK."""
    sizes_G = np.diff(group_offsets)
    group_of_B = np.repeat(np.arange(len(sizes_G)), sizes_G)
    order_B = np.lexsort((lengths_B, group_of_B))  # groups stay where they are, sorted inside
    sorted_B = lengths_B[order_B]
    # In sorted order the closest other length is a neighbour: only the shorter and the longer one compete.
    never = np.iinfo(np.int64).max
    to_shorter_B = np.diff(sorted_B, prepend=0)
    to_shorter_B[group_offsets[:-1]] = never
    to_longer_B = np.diff(sorted_B, append=0)
    to_longer_B[group_offsets[1:] - 1] = never
    closest_B = np.empty_like(sorted_B)
    closest_B[order_B] = np.where(to_longer_B < to_shorter_B, sorted_B + to_longer_B, sorted_B - to_shorter_B)
    alone_B = (sizes_G == 1)[group_of_B]  # no other: nothing matches, so the penalty does not matter
    closest_B = np.where(alone_B, lengths_B, closest_B)
    return np.where(lengths_B > closest_B, 1.0, np.exp(1.0 - closest_B / np.maximum(lengths_B, 1)))
