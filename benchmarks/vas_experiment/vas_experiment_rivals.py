"""The laboratory's rivals, trained with: each by its own rule, in the coordinator's place or the batch maker's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from functools import cached_property, partial
from itertools import combinations, count
from pathlib import Path
from typing import Any

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1] / "curriculum"))

from curriculum_lab_policies import Uniform
from curriculum_rival_draws import RivalDraws, rival_policy
from vas_experiment_recording import RecordingBatches, RecordingCoordinator
from vas_experiment_trials import RESPONSES

from mmr1_ds.loop.collector import TRAINING
from mmr1_ds.loop.drawn import Drawn
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import GroupRewards, SamplingSettings, ScoredGroup

PARTS_KEPT = 8  # steps; no rival waits longer for the rest of a group


class RecordingRival(RivalDraws, RecordingCoordinator):
    """Draws by a rival's rule."""


class LoopedBatches(RecordingBatches):
    """Batches of a rival that fills them by a loop of its own. On one rank; a run cannot be resumed."""

    rival: str  # of RIVALS; set before the first step

    def __init__(self, *arguments: Any) -> None:
        """Take what BatchMaker takes."""
        super().__init__(*arguments)
        self._whole: dict[int, list[ScoredGroup]] = {}  # of the step, by prompt
        self._parts: dict[int, list[tuple[int, ScoredGroup]]] = {}  # by prompt, with their steps

    @cached_property
    def _policy(self) -> Uniform:
        return rival_policy(self.rival, len(self._prompts), self._coordinator.num_steps, self._data)

    def _fill(self, step: int, settings: SamplingSettings, clock: StageClock) -> tuple[Drawn, dict[str, float]]:
        """Sample as the policy asks; a batch left short is filled with others, at first those that do not teach."""
        drawn, slots = Drawn(), count(self._batch_size)
        roll = partial(self._roll, step, settings, clock, drawn, slots)
        self._whole = {}
        prompts, num_right, _ = self._policy.batch(step, roll)
        chosen = zip(prompts.tolist(), num_right.tolist(), strict=True)
        drawn.teaching = dict(enumerate([self._take(prompt, right) for prompt, right in chosen]))
        self._policy.learn(prompts, num_right, roll)
        missing = self._batch_size - len(drawn.teaching) - len(drawn.others)
        if missing > 0:
            roll(np.arange(missing), RESPONSES)
            drawn.others |= zip(slots, [group for groups in self._whole.values() for group in groups], strict=False)
        self._parts = {
            prompt: [(since, part) for since, part in parts if step - since < PARTS_KEPT]
            for prompt, parts in self._parts.items()
        }
        return drawn, {}

    def _roll(
        self,
        step: int,
        settings: SamplingSettings,
        clock: StageClock,
        drawn: Drawn,
        slots: count[int],
        indices: np.ndarray,
        num_responses: Any,
    ) -> np.ndarray:
        """As the laboratory's Roll."""
        own = [next(slots) for _ in indices]
        requests = self._requests(self._prompts, indices, num_responses, TRAINING, step, own)
        groups, failures = self._collector.collect(requests, settings, clock)
        self._coordinator.observe(step, self._score_groups(groups))
        drawn.rewards += [group.rewards for group in groups]
        drawn.failures.append(failures)
        for slot, group in zip(own, groups, strict=True):
            index = group.group.prompt.index
            if num_responses < RESPONSES:
                self._parts.setdefault(index, []).append((step, group))
            elif right_of(group) in (0.0, RESPONSES):
                drawn.others[slot] = group
            else:
                self._whole.setdefault(index, []).append(group)
        return np.array([right_of(group) for group in groups], dtype=np.float64)

    def _take(self, prompt: int, num_right: float) -> ScoredGroup:
        """The group that the policy means: sampled at once, or in two parts, of which the later came last."""
        for group in self._whole.get(prompt, []):
            if right_of(group) == num_right:
                self._whole[prompt].remove(group)
                return group
        parts = self._parts[prompt]
        pairs = combinations(range(len(parts)), 2)
        whole = [pair for pair in pairs if self._are_group([parts[at][1] for at in pair], num_right)]
        first, later = min(whole, key=lambda pair: (pair[1], -pair[0]))
        joined = join(parts[first][1], parts[later][1])
        self._parts[prompt] = [part for at, part in enumerate(parts) if at not in (first, later)]
        return joined

    @staticmethod
    def _are_group(parts: Sequence[ScoredGroup], num_right: float) -> bool:
        size = sum(len(part.rewards.overall) for part in parts)
        return size == RESPONSES and sum(map(right_of, parts)) == num_right


def right_of(group: ScoredGroup) -> float:
    """How many responses are right."""
    return float(np.rint(group.rewards.accuracy.sum()))


def join(first: ScoredGroup, second: ScoredGroup) -> ScoredGroup:
    """One group of the responses of two, to one prompt; of the older policy, whose weights saw the fewer steps."""
    rewards = GroupRewards(
        *(
            np.concatenate([getattr(first.rewards, name), getattr(second.rewards, name)])
            for name in ("overall", "accuracy", "failed")
        ),
        parts={name: np.concatenate([part, second.rewards.parts[name]]) for name, part in first.rewards.parts.items()},
    )
    responses = first.group.responses + second.group.responses
    oldest = min(first.group.policy_version, second.group.policy_version)
    return ScoredGroup(dataclasses.replace(second.group, responses=responses, policy_version=oldest), rewards)
