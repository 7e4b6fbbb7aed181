"""The records of the kernels. Shape letters: G groups, B responses of all groups, K = max_order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

Array = Any  # a numpy array, or a torch tensor on the device of the input


@dataclass(frozen=True)
class NgramCounts:
    """The counts of a backend, from which everything else follows; both int64, column n - 1 for n-grams."""

    matches: np.ndarray  # (B, K) sum over the response's n-grams of min(own count, largest count in another response)
    distinct: np.ndarray  # (G, K) different n-grams of the group


@dataclass(frozen=True)
class GroupStatistics:
    """The statistics of G groups, all float64, of the kind and on the device of the input.

    `outcome_variance` is NaN where `pass_rate` is: in groups without a single known accuracy.
    """

    reward_mean: Array  # (G,)
    reward_variance: Array  # (G,) population variance; exactly 0 if and only if the group's rewards are all equal
    pass_rate: Array  # (G,) in [0, 1], mean of the known accuracies
    outcome_variance: Array  # (G,) P (1 - P) of the pass rate P, in [0, 0.25]
    self_bleu: Array  # (G,) in [0, 1], orders 1..max_order weighted equally; 1 = all the same
    self_bleu_by_order: Array  # (G, max_order) in [0, 1], column n - 1: n-grams alone
    distinct: Array  # (G, max_order) in [0, 1], column n - 1: different n-grams over all n-grams
    advantages: Array  # (B,) rewards standardised within the group; exactly 0 in constant groups
