"""Advantages from rewards. Shape letters: G groups, N responses a group."""

from __future__ import annotations

import numpy as np


def group_advantages(rewards_GN: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """Standardise rewards within each group (GRPO, arXiv 2402.03300, section 4.1.2).

    The standard deviation is the unbiased one, as verl and TRL compute it; eps is verl's.

    Args: rewards_GN: (G, N) float.
    Returns: (G, N) float32; exactly 0 for constant groups, where rounding / eps would leak a gradient.
    """
    rewards_GN = np.asarray(rewards_GN, dtype=np.float64)
    if rewards_GN.shape[1] < 2:
        raise ValueError(f"group_advantages needs at least 2 responses a group, got {rewards_GN.shape[1]}")
    centred = rewards_GN - rewards_GN.mean(axis=1, keepdims=True)
    scaled = centred / (rewards_GN.std(axis=1, ddof=1, keepdims=True) + eps)
    constant = (rewards_GN == rewards_GN[:, :1]).all(axis=1, keepdims=True)
    return np.where(constant, 0.0, scaled).astype(np.float32)
