"""How a batch is shared out over the ranks."""

from __future__ import annotations

import numpy as np

from mmr1_ds.records import LearningGroup


def batch_slots(batch_size: int, mini_batch_size: int, rank: int, size: int) -> np.ndarray:
    """Positions of a batch that are this rank's, mini-batch by mini-batch.

    Every mini-batch is split over the ranks on its own, so that an optimiser step sees the same prompts on any
    number of ranks. Returns: int64, batch_size / size of them.
    """
    share = mini_batch_size // size
    starts = np.arange(0, batch_size, mini_batch_size) + rank * share
    return (starts[:, None] + np.arange(share)).reshape(-1)


def _num_tokens(group: LearningGroup) -> int:
    """Of all its sequences, prompts included."""
    rollout = group.scored.group
    prompt = rollout.prompt.num_tokens or len(rollout.prompt.token_ids)
    return sum(prompt + len(response.token_ids) for response in rollout.responses)
