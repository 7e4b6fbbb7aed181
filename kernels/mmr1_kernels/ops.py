"""The public op: checks its input once, then hands it to the backend."""

from __future__ import annotations

import numpy as np

from mmr1_kernels import reference
from mmr1_kernels.checks import check_max_order, check_outcomes, check_packing
from mmr1_kernels.records import GroupStatistics


def group_statistics(
    token_ids: np.ndarray,
    offsets: np.ndarray,
    rewards: np.ndarray,
    accuracies: np.ndarray,
    group_size: int,
    max_order: int = 3,
) -> GroupStatistics:
    """Rewards, advantages and diversity of G groups of `group_size` consecutive responses, in one pass.

    Self-BLEU equals NLTK's `sentence_bleu` with `method1` smoothing of each response against all others of its
    group, averaged; advantages equal verl's GRPO (unbiased standard deviation, 1e-6 added to it).

    Edge cases, defined:
      - an empty response scores self-BLEU 0, as in NLTK, but a group of empty responses only scores 1: nothing
        differs, and 0 would reward silence as the most diverse answer of all;
      - a response of fewer than n tokens has n-gram precision 0.1 (method1's smoothing of 0/1), as in NLTK;
      - a group of one has no others to resemble: self-BLEU 0, advantage 0. Diversity scores of it mean nothing;
      - a group without an n-gram has distinct-n 0;
      - no groups at all (B = 0) gives arrays of length 0.

    Args:
        token_ids: (total,) int32, not negative: response tokens only, no prompt, padding or end-of-sequence.
        offsets: (B + 1,) int64; response b is token_ids[offsets[b]:offsets[b + 1]].
        rewards: (B,) float32, finite.
        accuracies: (B,) float32 in [0, 1]; NaN = unknown, left out of the pass rate.
        group_size: N, responses a group.
        max_order: longest n-gram.
    Raises: TypeError, ValueError naming the argument and the value.
    """
    num_responses = check_packing(token_ids, offsets, group_size)
    check_outcomes(rewards, accuracies, num_responses)
    check_max_order(max_order)
    return reference.group_statistics(token_ids, offsets, rewards, accuracies, int(group_size), int(max_order))
