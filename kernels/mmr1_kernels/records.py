"""The record the kernels return. Shape letters: G groups, N responses a group, B = G * N responses."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class GroupStatistics:
    """What one pass over the responses of G groups found. All float64.

    `outcome_variance` is NaN where `pass_rate` is: in groups without a single known accuracy.
    """

    reward_mean: np.ndarray  # (G,)
    reward_variance: np.ndarray  # (G,) population variance; exactly 0 if and only if the group's rewards are all equal
    pass_rate: np.ndarray  # (G,) in [0, 1], mean of the known accuracies
    outcome_variance: np.ndarray  # (G,) P (1 - P) of the pass rate P, in [0, 0.25]
    self_bleu: np.ndarray  # (G,) in [0, 1], orders 1..max_order weighted equally; 1 = all the same
    self_bleu_by_order: np.ndarray  # (G, max_order) in [0, 1], column n - 1: n-grams alone
    distinct: np.ndarray  # (G, max_order) in [0, 1], column n - 1: different n-grams over all n-grams
    advantages: np.ndarray  # (B,) rewards standardised within the group; exactly 0 in constant groups
