"""Prompts into scored groups: generation and reward, as training, refresh and validation all need them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.records import Prompt, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rewards.scoring import RewardCounts, score_groups

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.rollout.base import RolloutEngine

# What a seed is for; each purpose draws from a stream of its own.
TRAINING, REFRESH, VALIDATION = 0, 1, 2


def response_seeds(seed: int, purpose: int, step: int, slots: Sequence[int] | np.ndarray) -> list[int]:
    """Sampling seed of each slot of a batch: a pure function, so that a resumed run samples the same responses."""
    return [int(np.random.SeedSequence((seed, purpose, step, int(slot))).generate_state(1)[0]) for slot in slots]


@dataclass
class StageClock:
    """Seconds by stage, summed over repeated entries."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


class Collector:
    """Samples responses to prompts and scores them."""

    def __init__(self, rollout: RolloutEngine, rewards: RewardPool, encoder: PromptEncoder) -> None:
        self._rollout, self._rewards, self._encoder = rollout, rewards, encoder

    def collect(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], settings: SamplingSettings, clock: StageClock
    ) -> tuple[list[ScoredGroup], RewardCounts]:
        """Groups of this rank's prompts, in their order, and the count of rewards that failed.

        Collective: all ranks, each with its own prompts (any number of them).
        """
        with clock("gen"):
            groups = self._rollout.generate(prompts, seeds, settings)
        with clock("reward"):
            return score_groups(self._rewards, groups, self._encoder.decode)
