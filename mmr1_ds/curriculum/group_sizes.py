"""How many responses each prompt of a batch gets, from what is believed of its pass rate p.

A group of n responses teaches nothing unless it has right and wrong ones, and then is worth p(1-p), as in the scores
that prompts are drawn by. What it is expected to be worth under the belief z ~ N(m, V) about the logit of p is

    G(n) = E[p (1 - p) (1 - p^n - (1 - p)^n)],    G(n + 1) - G(n) = E[p (1 - p) (p^n (1 - p) + (1 - p)^n p)]

The difference falls with n for every p, hence under any belief: so the sizes of largest total worth, n_min to n_max
each and with a given sum, are found by giving the responses beyond n_min one by one to whom the next is worth most.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmr1_ds.curriculum.utilities import NODE_WEIGHTS, NODES, logistic


@dataclass(frozen=True)
class SizeRange:
    """The group sizes that may be chosen: `worker.rollout.n_min` to `n_max`."""

    smallest: int
    largest: int


def group_sizes(mean: np.ndarray, variance: np.ndarray, num_responses: int, sizes: SizeRange) -> np.ndarray:
    """The responses that each group of a batch gets, (B,) int64; their mean is `num_responses`.

    Args: mean, variance: (B,), beliefs about the logits of the prompts' pass rates; one drawn twice has two groups.
    """
    extra = len(mean) * (num_responses - sizes.smallest)
    return allocate(gains(mean, variance, sizes), extra) + sizes.smallest


def gains(mean: np.ndarray, variance: np.ndarray, sizes: SizeRange) -> np.ndarray:
    """What each further response is worth, (B, n_max - n_min) float64: column k of the one after n_min + k."""
    z = mean.astype(np.float64)[:, None] + np.sqrt(variance.astype(np.float64))[:, None] * NODES
    right, wrong = logistic(z), logistic(-z)
    # p^n and (1-p)^n, each already times the weight, p(1-p), and the other answer's probability.
    value = NODE_WEIGHTS * right * wrong
    all_right, all_wrong = value * wrong * right**sizes.smallest, value * right * wrong**sizes.smallest
    found = np.empty((len(mean), sizes.largest - sizes.smallest))
    for k in range(found.shape[1]):
        found[:, k] = (all_right + all_wrong).sum(axis=1)
        all_right, all_wrong = all_right * right, all_wrong * wrong
    return found


def allocate(gains_BK: np.ndarray, count: int) -> np.ndarray:
    """Take the `count` largest gains, each row's from the left. Returns: how many of each row, (B,) int64.

    Args: gains_BK: no row rises. Of equal ones the leftmost column comes first, and of these the first row.
    """
    num_rows = len(gains_BK)
    assert 0 <= count <= gains_BK.size, (count, gains_BK.shape)
    # Rounding must not put a response before the one that it follows.
    falling = np.minimum.accumulate(gains_BK, axis=1)
    best = np.argsort(-falling.T.reshape(-1), kind="stable")[:count]
    return np.bincount(best % num_rows, minlength=num_rows)
