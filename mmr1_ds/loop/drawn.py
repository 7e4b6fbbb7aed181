"""What a step has drawn so far, and which of its groups teach (dynamic sampling)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.records import GroupRewards, LearningGroup, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts


class Drawn:
    """What a step has drawn on this rank; groups by their place among all that the step drew, over all ranks."""

    def __init__(self) -> None:
        self.teaching: dict[int, LearningGroup] = {}
        self.others: dict[int, LearningGroup] = {}  # the first few, without their prompts: many may come
        self.rewards: list[GroupRewards] = []  # of all groups, probes included
        self.failures: list[RewardCounts] = []

    def add(
        self,
        places: Sequence[int],
        groups: Sequence[LearningGroup],
        probes: Sequence[ScoredGroup],
        failures: RewardCounts,
        most_others: int,
        algorithm: AlgorithmConfig,
    ) -> None:
        for place, group in zip(places, groups, strict=True):
            if not algorithm.online_filtering or teaches(group.scored, algorithm):
                self.teaching[place] = group
            elif len(self.others) < most_others:
                self.others[place] = _without_prompt(group)
        self.rewards += [group.scored.rewards for group in groups] + [probe.rewards for probe in probes]
        self.failures.append(failures)


def _without_prompt(group: LearningGroup) -> LearningGroup:
    prompt = dataclasses.replace(group.scored.group.prompt, images=(), token_ids=())
    rollout = dataclasses.replace(group.scored.group, prompt=prompt)
    return dataclasses.replace(group, scored=dataclasses.replace(group.scored, group=rollout))


def teaches(scored: ScoredGroup, algorithm: AlgorithmConfig) -> bool:
    """Whether online filtering keeps a group: its rewards differ, and its mean lies inside the user's bounds.

    Rewards are compared, not their variance with a threshold: equal ones give exactly no gradient, others do. Both
    the rewards that train and those under `filter_key` must differ; unknown ones (NaN, or no such key because every
    reward of the group failed) are left out.
    """
    rewards = _by_key(scored)
    values = rewards.get(algorithm.filter_key, np.empty(0))
    values = values[~np.isnan(values)]
    if len(values) == 0 or (values == values[0]).all() or (rewards["overall"] == rewards["overall"][0]).all():
        return False
    mean = float(values.mean(dtype=np.float64))
    low, high = algorithm.filter_low, algorithm.filter_high
    return (low is None or mean > low) and (high is None or mean < high)


def _by_key(scored: ScoredGroup) -> dict[str, np.ndarray]:
    return {"overall": scored.rewards.overall, "accuracy": scored.rewards.accuracy, **scored.rewards.parts}
