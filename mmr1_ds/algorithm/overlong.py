"""The soft penalty of responses that come near their limit (DAPO, arXiv 2503.14476, eq. 13)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np

from mmr1_ds.records import ScoredGroup


@dataclass(frozen=True)
class OverlongPenalty:
    """What a response loses by its length, whatever its reward: nothing up to limit - buffer, `factor` at the limit."""

    limit: int  # tokens of a response
    buffer: int  # tokens before the limit over which the penalty grows
    factor: float

    def of_lengths(self, lengths_N: np.ndarray) -> np.ndarray:
        """The penalties, (N,) float64, from -factor to 0."""
        return -self.factor * np.clip((lengths_N - (self.limit - self.buffer)) / self.buffer, 0.0, 1.0)

    def __call__(self, scored: ScoredGroup) -> ScoredGroup:
        """The group with the penalty in its rewards, and as their part `overlong`.

        A response whose reward failed keeps its 0, an unscored one takes the mean of the others, as before.
        """
        lengths_N = np.array([len(response.token_ids) for response in scored.group.responses])
        rewards = scored.rewards
        penalties_N = np.where(rewards.failed, 0.0, self.of_lengths(lengths_N)).astype(np.float32)
        overall_N = rewards.overall + penalties_N
        unscored_N = np.isnan(rewards.accuracy)
        if unscored_N.any() and not unscored_N.all():
            overall_N[unscored_N] = overall_N[~unscored_N].mean(dtype=np.float64)
        parts = {**rewards.parts, "overlong": np.where(unscored_N, np.float32(np.nan), penalties_N)}
        return dataclasses.replace(scored, rewards=dataclasses.replace(rewards, overall=overall_N, parts=parts))
