"""Estimators of the advantage, from rewards to a number for each token.

Plain numpy in float64. What is not `known` (a reward that failed) is in no statistic and has an arbitrary advantage.
Shape letters: G groups, N responses a group, B = G * N responses, T tokens of all of them,
end to end, V critic's values. Where an estimator looks beyond its groups, at the whole batch, it asks `ranks` for the
sums over all ranks, so that the number of ranks changes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

_EPSILON = 1e-6  # added to a group's std, as in verl (TRL adds 1e-4)


class Totals(Protocol):
    """Sums and maxima over ranks, as `Ranks` has them. Collective."""

    def sum(self, values: Mapping[str, float], stage: str) -> dict[str, float]: ...

    def max(self, values: Mapping[str, float], stage: str) -> dict[str, float]: ...


def grpo(rewards_GN: np.ndarray, known_GN: np.ndarray | None = None) -> np.ndarray:
    """Standardise within each group (GRPO, arXiv 2402.03300, section 4.1.2), (G, N).

    Equals the scoring kernel's for the same rewards. Exactly 0 for constant groups, where rounding / epsilon would
    leak a gradient.
    """
    if known_GN is None or known_GN.all():
        std_G1 = rewards_GN.std(axis=1, ddof=1, keepdims=True)
        return dr_grpo(rewards_GN) / (std_G1 + _EPSILON)
    centred_GN = dr_grpo(rewards_GN, known_GN)
    num_known_G1 = known_GN.sum(axis=1, keepdims=True)
    std_G1 = np.sqrt((centred_GN**2).sum(axis=1, keepdims=True) / np.maximum(num_known_G1 - 1, 1))
    return centred_GN / (std_G1 + _EPSILON)


def dr_grpo(rewards_GN: np.ndarray, known_GN: np.ndarray | None = None) -> np.ndarray:
    """Subtract the group's mean, and leave the scale (Dr. GRPO, arXiv 2503.20783, section 3.2), (G, N)."""
    if known_GN is not None and not known_GN.all():
        sums_G1 = rewards_GN.sum(axis=1, keepdims=True, where=known_GN)
        means_G1 = sums_G1 / np.maximum(known_GN.sum(axis=1, keepdims=True), 1)
        first_G1 = np.take_along_axis(rewards_GN, known_GN.argmax(axis=1)[:, None], axis=1)
        differs_G1 = ((rewards_GN != first_G1) & known_GN).any(axis=1, keepdims=True)
        return np.where(differs_G1 & known_GN, rewards_GN - means_G1, 0.0)
    differs_G1 = (rewards_GN != rewards_GN[:, :1]).any(axis=1, keepdims=True)
    return np.where(differs_G1, rewards_GN - rewards_GN.mean(axis=1, keepdims=True), 0.0)


def rloo(rewards_GN: np.ndarray, known_GN: np.ndarray | None = None) -> np.ndarray:
    """Subtract the mean of the group's others (RLOO, arXiv 2402.14740, eq. 7), (G, N)."""
    num_responses = rewards_GN.shape[1]
    if known_GN is None or known_GN.all():
        return dr_grpo(rewards_GN) * (num_responses / (num_responses - 1))
    num_known_G1 = known_GN.sum(axis=1, keepdims=True)
    return dr_grpo(rewards_GN, known_GN) * (num_known_G1 / np.maximum(num_known_G1 - 1, 1))


def grpo_passk(rewards_GN: np.ndarray, known_GN: np.ndarray | None = None) -> np.ndarray:
    """The best response's lead on the second best, over the group's std; 0 for the others (arXiv 2503.19595), (G, N).

    verl's grpo_passk. Exactly 0 for all where two share the best reward.
    """
    known_GN = np.ones(rewards_GN.shape, dtype=bool) if known_GN is None else known_GN
    ranked_GN = np.sort(np.where(known_GN, rewards_GN, -np.inf), axis=1)
    has_second_G = np.isfinite(ranked_GN[:, -2])
    leads_G = np.subtract(ranked_GN[:, -1], ranked_GN[:, -2], out=np.zeros(len(ranked_GN)), where=has_second_G)
    centred_GN = dr_grpo(rewards_GN, known_GN)
    variance_G = (centred_GN**2).sum(axis=1, where=known_GN) / np.maximum(known_GN.sum(axis=1) - 1, 1)
    is_best_GN = np.arange(rewards_GN.shape[1]) == np.where(known_GN, rewards_GN, -np.inf).argmax(axis=1)[:, None]
    return np.where(is_best_GN, (leads_G / (np.sqrt(variance_G) + _EPSILON))[:, None], 0.0)


def gdpo(
    rewards_KGN: np.ndarray, weights_K: Sequence[float], ranks: Totals, known_GN: np.ndarray | None = None
) -> np.ndarray:
    """Standardise each of K rewards within each group, sum them by their weights, and standardise the sums over the
    responses of the batch (GDPO, arXiv 2601.05242, section 3), (G, N). Collective.

    Summed first, as grpo has it, different combinations of rewards come out as the same advantage. A reward that does
    not apply to a response, NaN there, is in no statistic and adds nothing, as in TRL.
    """
    sums_GN = np.zeros(rewards_KGN.shape[1:])
    for weight, rewards_GN in zip(weights_K, rewards_KGN, strict=True):
        applies_GN = ~np.isnan(rewards_GN) if known_GN is None else known_GN & ~np.isnan(rewards_GN)
        sums_GN += weight * grpo(np.where(applies_GN, rewards_GN, 0.0), applies_GN)
    known_B = None if known_GN is None else known_GN.reshape(-1)
    return standardise(sums_GN.reshape(-1), ranks, known_B).reshape(sums_GN.shape)


def reinforce_plus_plus_baseline(
    rewards_GN: np.ndarray, lengths_B: np.ndarray, ranks: Totals, known_GN: np.ndarray | None = None
) -> np.ndarray:
    """Subtract the group's mean, then standardise over the tokens of the batch (arXiv 2501.03262v3, eq. 6), (T,)."""
    known_T = None if known_GN is None else np.repeat(known_GN.reshape(-1), lengths_B)
    return standardise(np.repeat(dr_grpo(rewards_GN, known_GN).reshape(-1), lengths_B), ranks, known_T)


def reinforce_plus_plus(
    token_rewards_T: np.ndarray,
    lengths_B: np.ndarray,
    gamma: float,
    ranks: Totals,
    known_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Discounted rewards to come, standardised over the tokens of the batch (REINFORCE++, arXiv 2501.03262), (T,).

    Returns: advantages and returns.
    """
    returns_T = discounted_sums(token_rewards_T, lengths_B, gamma)
    return standardise(returns_T, ranks, known_T), returns_T


def remax(token_rewards_T: np.ndarray, lengths_B: np.ndarray, baselines_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rewards to come, less the reward of the prompt's greedy response (ReMax, arXiv 2310.10505, eq. 6), (T,).

    Returns: advantages and returns.
    """
    returns_T = discounted_sums(token_rewards_T, lengths_B, 1.0)
    return returns_T - np.repeat(baselines_B, lengths_B), returns_T


def gae(
    token_rewards_T: np.ndarray,
    values_T: np.ndarray,
    lengths_B: np.ndarray,
    gamma: float,
    lam: float,
    ranks: Totals,
    known_T: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16), standardised over the tokens of the batch, (T,).

    Args: values_T: the critic's, of the state before each token; after the last token the value is 0.
    Returns: advantages, and returns (before standardising), the critic's targets.
    """
    is_last_T = _is_last(lengths_B)
    next_values_T = np.where(is_last_T, 0.0, np.append(values_T[1:], 0.0))
    errors_T = token_rewards_T + gamma * next_values_T - values_T
    advantages_T = discounted_sums(errors_T, lengths_B, gamma * lam)
    return standardise(advantages_T, ranks, known_T), advantages_T + values_T


def token_rewards(rewards_B: np.ndarray, lengths_B: np.ndarray, penalties_T: np.ndarray) -> np.ndarray:
    """Each response's reward at its last token, less the penalty at every token, (T,)."""
    rewards_T = -penalties_T.astype(np.float64)
    rewards_T[_is_last(lengths_B)] += rewards_B[lengths_B > 0]
    return rewards_T


def standardise(values_T: np.ndarray, ranks: Totals, known_T: np.ndarray | None = None) -> np.ndarray:
    """Shift and scale to mean 0 and variance 1 over the tokens of all ranks, as verl's masked_whiten. Collective.

    Returns exactly 0 where all values are equal: their rounding would come out as large as any advantage.
    """
    values_T = values_T.astype(np.float64)
    if known_T is not None and not known_T.all():
        found_T = np.zeros_like(values_T)
        found_T[known_T] = standardise(values_T[known_T], ranks)
        return found_T
    own = {"sum": float(values_T.sum()), "count": float(len(values_T))}
    totals = ranks.sum(own, "mean of the returns")
    bounds = {"most": float(values_T.max(initial=-np.inf)), "least": float((-values_T).max(initial=-np.inf))}
    bounds = ranks.max(bounds, "range of the returns")
    if totals["count"] < 2 or bounds["most"] == -bounds["least"]:
        return np.zeros_like(values_T)
    centred_T = values_T - totals["sum"] / totals["count"]
    squares = ranks.sum({"squares": float((centred_T**2).sum())}, "variance of the returns")["squares"]
    return centred_T / np.sqrt(squares / (totals["count"] - 1) + 1e-8)


def discounted_sums(values_T: np.ndarray, lengths_B: np.ndarray, discount: float) -> np.ndarray:
    """Sum, at each token, its value and those that follow in its response, each discounted once more, (T,)."""
    longest = int(lengths_B.max(initial=0))
    inside_BL = np.arange(longest) < lengths_B[:, None]
    table_BL = np.zeros((len(lengths_B), longest))
    table_BL[inside_BL] = values_T
    for column in range(longest - 2, -1, -1):  # past a response's end all is 0
        table_BL[:, column] += discount * table_BL[:, column + 1]
    return table_BL[inside_BL]


def _is_last(lengths_B: np.ndarray) -> np.ndarray:
    """Whether each token is the last of its response, (T,) bool."""
    last_T = np.zeros(int(lengths_B.sum()), dtype=bool)
    last_T[np.cumsum(lengths_B)[lengths_B > 0] - 1] = True
    return last_T
