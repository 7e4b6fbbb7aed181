"""Beliefs about one prompt's pass rate: Gaussian in its logit z, updated by counts of right responses."""

from __future__ import annotations

import numpy as np

from mmr1_ds.curriculum.utilities import NODE_WEIGHTS, NODES, logistic

_NEWTON_STEPS = 12


def posterior(
    mean: np.ndarray, variance: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Moments of z ~ N(mean, variance) after `num_right` of `num_responses` were right, and how likely that was.

    Gauss-Hermite quadrature around the posterior's mode, so it holds for any number of responses.

    Args: (K,) float64 each; num_right may be fractional.
    Returns: mean, variance and log E[p^right (1 - p)^wrong], (K,) float64 each.
    """
    mode = mean.copy()
    for _ in range(_NEWTON_STEPS):  # the log posterior is concave; limited, since Newton overshoots from a flat tail
        pass_rate = logistic(mode)
        slope = num_right - num_responses * pass_rate - (mode - mean) / variance
        mode += np.clip(slope / _curvature(pass_rate, variance, num_responses), -1.5, 1.5)
    deviation = 1.0 / np.sqrt(_curvature(logistic(mode), variance, num_responses))
    z = mode[:, None] + deviation[:, None] * NODES
    logarithm = (
        num_right[:, None] * z
        - num_responses[:, None] * np.logaddexp(0.0, z)
        - (z - mean[:, None]) ** 2 / (2.0 * variance[:, None])
        + NODES**2 / 2.0
    )
    largest = logarithm.max(axis=1)
    omega = np.exp(logarithm - largest[:, None]) * NODE_WEIGHTS
    total = omega.sum(axis=1)
    omega /= total[:, None]
    new_mean = (omega * z).sum(axis=1)
    new_variance = (omega * (z - new_mean[:, None]) ** 2).sum(axis=1)
    return new_mean, new_variance, largest + np.log(total * deviation / np.sqrt(variance))


def _curvature(pass_rate: np.ndarray, variance: np.ndarray, num_responses: np.ndarray) -> np.ndarray:
    return num_responses * pass_rate * (1.0 - pass_rate) + 1.0 / variance


def pooled(
    indices: np.ndarray, num_right: np.ndarray, num_responses: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct prompts, ascending, with the sums of their groups; what is unknown (NaN) or empty is left out.

    Args: (K,) each; num_responses may be one number for all.
    Returns: (U,) int64, (U,) float64, (U,) float64.
    """
    indices, right = np.asarray(indices, dtype=np.int64), np.asarray(num_right, dtype=np.float64)
    total = np.broadcast_to(np.asarray(num_responses, dtype=np.float64), right.shape)
    known = ~np.isnan(right) & (total > 0.0)
    distinct, inverse = np.unique(indices[known], return_inverse=True)
    size = len(distinct)
    return distinct, np.bincount(inverse, right[known], size), np.bincount(inverse, total[known], size)
