"""What a step has drawn so far, and which of its groups teach (dynamic sampling)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.errors import UserError
from mmr1_ds.loop.collector import Collector
from mmr1_ds.records import GroupRewards, RolloutGroup, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts


class Drawn:
    """What a step has drawn on this rank, by slot; the slots of a further draw follow those of the one before."""

    def __init__(self) -> None:
        self.teaching: dict[int, ScoredGroup] = {}
        self.others: dict[int, ScoredGroup] = {}  # the first few, without their prompts: many may come
        self.rewards: list[GroupRewards] = []  # of all groups but probes, which train nothing
        self.failures: list[RewardCounts] = []

    def add(
        self,
        slots: Sequence[int],
        groups: Sequence[ScoredGroup],
        failures: RewardCounts,
        most_others: int,
        algorithm: AlgorithmConfig,
    ) -> None:
        """Take in one draw. Args: slots: of the groups; most_others: groups kept of those that do not teach."""
        for slot, group in zip(slots, groups, strict=True):
            if not algorithm.online_filtering or teaches(group, algorithm):
                self.teaching[slot] = group
            elif len(self.others) < most_others:
                self.others[slot] = _without_prompt(group)
        self.rewards += [group.rewards for group in groups]
        self.failures.append(failures)


def _without_prompt(scored: ScoredGroup) -> ScoredGroup:
    prompt = dataclasses.replace(scored.group.prompt, images=(), videos=(), token_ids=())
    return dataclasses.replace(scored, group=dataclasses.replace(scored.group, prompt=prompt))


def teaches(scored: ScoredGroup, algorithm: AlgorithmConfig) -> bool:
    """Whether online filtering keeps a group: its rewards differ, and its mean lies inside the user's bounds.

    Rewards are compared, not their variance with a threshold: equal ones give exactly no gradient, others do. Both
    the rewards that train and those under `filter_key` must differ; unknown ones (NaN, or no such key because every
    reward of the group failed) are left out.
    """
    if algorithm.mask_truncated and not any(response.finished for response in scored.group.responses):
        return False
    rewards = _by_key(scored)
    values = rewards.get(algorithm.filter_key, np.empty(0))
    values = values[~np.isnan(values)]
    # An unknown reward is the mean of the known ones: it differs where those differ, and nowhere else.
    if len(values) == 0 or (values == values[0]).all() or (rewards["overall"] == rewards["overall"][0]).all():
        return False
    mean = float(values.mean(dtype=np.float64))
    low, high = algorithm.filter_low, algorithm.filter_high
    return (low is None or mean > low) and (high is None or mean < high)


class Stragglers:
    """Says when as many groups teach as are wanted, so that what is still sampled can be stopped.

    Groups are scored as they end, in few calls: when those that are not scored yet could be what is missing.
    """

    def __init__(self, collector: Collector, algorithm: AlgorithmConfig, num_training: int, wanted: int) -> None:
        """num_training: requests that train, which come first; wanted: groups that teach, of this rank."""
        self._collector, self._algorithm = collector, algorithm
        self._num_training, self._wanted = num_training, wanted
        self._teaches: dict[int, bool] = {}

    def __call__(self, groups: Mapping[int, RolloutGroup]) -> bool:
        """Whether the groups that are there suffice. Args: by position."""
        if sum(self._teaches.values()) >= self._wanted:  # asked again, by an engine that waits for other ranks
            return True
        new = {at: group for at, group in groups.items() if at < self._num_training and at not in self._teaches}
        if len(new) < max(1, self._wanted - sum(self._teaches.values())):
            return False
        scored = self._collector.score_early([*new.values()])
        self._teaches.update(zip(new, (teaches(item, self._algorithm) for item in scored), strict=True))
        return sum(self._teaches.values()) >= self._wanted


def check_filter_key(key: str, groups: Sequence[ScoredGroup], ranks: Ranks) -> None:
    """Check that some response's reward has `key`. Collective. Raises: UserError on every rank.

    A response whose reward failed has no parts, so no rank's groups alone say which keys there are.
    """
    own = {name for group in groups for name in _by_key(group)}
    known = set().union(*ranks.all_gather_objects(own, "keys of the rewards"))
    if key not in known:
        raise UserError(f"algorithm.filter_key={key} is not among the reward's keys: {', '.join(sorted(known))}")


def _by_key(scored: ScoredGroup) -> dict[str, np.ndarray]:
    return {"overall": scored.rewards.overall, "accuracy": scored.rewards.accuracy, **scored.rewards.parts}
