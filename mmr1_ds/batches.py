"""The batch of a step: draw prompts, roll out, score, let the curriculum observe; again until enough of it teaches."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.collect import PROBE, TRAINING, Collector, RequestMaker, StageClock
from mmr1_ds.config import AlgorithmConfig, RunConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import score_batch
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.distributed import Ranks, batch_slots
from mmr1_ds.errors import UserError
from mmr1_ds.metrics import reward_metrics
from mmr1_ds.records import SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LearningGroup:
    """A scored group with its advantages."""

    scored: ScoredGroup
    advantages: np.ndarray  # (N,) float64


@dataclass(frozen=True)
class Batch:
    """This rank's part of what a step trains on."""

    groups: list[LearningGroup]
    metrics: dict[str, float]  # reward/*, and online_filtering/* with it; of all ranks


class BatchMaker:
    """Makes the batch of each step.

    With `algorithm.online_filtering` (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2) it draws until a batch
    of groups that teach has come together; see `teaches`.
    """

    def __init__(
        self,
        config: RunConfig,
        ranks: Ranks,
        encoder: PromptEncoder,
        data: PromptDataset,
        coordinator: Coordinator,
        collector: Collector,
    ) -> None:
        self._config, self._ranks, self._encoder, self._data = config, ranks, encoder, data
        self._coordinator, self._collector = coordinator, collector
        self._requests = RequestMaker(config.worker.rollout.seed)
        self._batch_size = config.data.rollout_batch_size
        self._slots = batch_slots(self._batch_size, config.worker.actor.global_batch_size, ranks.rank, ranks.size)
        tries = config.trainer.max_try_make_batch
        self._max_tries = 1 if not config.algorithm.online_filtering else tries if tries > 0 else None

    def make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        """The batch of `step`. Collective."""
        groups: list[LearningGroup] = []
        places: list[int] = []  # of each group among all that the step drew, over all ranks
        failures: list[RewardCounts] = []
        num_tries = num_teaching = 0
        while num_tries == 0 or (num_teaching < self._batch_size and num_tries != self._max_tries):
            places += (num_tries * self._batch_size + self._slots).tolist()
            drawn, counts = self._roll(step, num_tries, settings, clock)
            groups += drawn
            failures.append(counts)
            num_tries += 1
            if self._config.algorithm.online_filtering:
                num_teaching = self._count_teaching(groups)
        with clock("curriculum"):
            self._coordinator.finish_step(step)
        metrics = reward_metrics([group.scored for group in groups], failures, self._ranks)
        if self._config.algorithm.online_filtering:
            if num_teaching < self._batch_size:
                logger.warning(
                    "step %d: %d of %d groups teach after %d tries (trainer.max_try_make_batch); the batch is filled "
                    "with groups that do not", step, num_teaching, self._batch_size, num_tries,
                )  # fmt: skip
            metrics["online_filtering/num_tries"] = num_tries
            metrics["online_filtering/kept_fraction"] = num_teaching / (num_tries * self._batch_size)
            groups = self._choose(groups, places)
        return Batch(groups, metrics)

    def _roll(
        self, step: int, attempt: int, settings: SamplingSettings, clock: StageClock
    ) -> tuple[list[LearningGroup], RewardCounts]:
        """Draw and roll out once; probes ride along with the first draw, so that they fill the engine's tail."""
        coordinator, ranks = self._coordinator, self._ranks
        num_responses = self._config.worker.rollout.n
        with clock("draw"):
            indices = coordinator.next_batch(step)
            probes = coordinator.next_probes(step) if attempt == 0 else indices[:0]
            probes = probes[ranks.rank :: ranks.size]
            slots = attempt * self._batch_size + self._slots
            requests = self._requests(self._data, indices[self._slots], num_responses, TRAINING, step, slots)
            requests += self._requests(self._data, probes, coordinator.num_probe_responses, PROBE, step, probes)
        scored, counts = self._collector.collect(requests, settings, clock)
        with clock("curriculum"):
            batch = score_batch(scored, self._encoder.eos_token_ids, self._config.data.curriculum_metrics)
            coordinator.observe(step, batch.statistics)
        learning = [LearningGroup(group, row) for group, row in zip(scored, batch.advantages, strict=True)]
        return learning[: len(self._slots)], counts

    def _count_teaching(self, groups: Sequence[LearningGroup]) -> int:
        own = sum(teaches(group.scored, self._config.algorithm) for group in groups)
        return int(self._ranks.sum({"teaching": own}, "count groups that teach")["teaching"])

    def _choose(self, groups: Sequence[LearningGroup], places: Sequence[int]) -> list[LearningGroup]:
        """This rank's share of the first groups that teach, filled up with the first of the others. Collective.

        In the order they were drawn, whichever rank sampled them: the batch is the same on any number of ranks.
        """
        flags = [
            (place, not teaches(group.scored, self._config.algorithm))
            for place, group in zip(places, groups, strict=True)
        ]
        everyone = [flag for part in self._ranks.all_gather_objects(flags, "choose groups") for flag in part]
        chosen = [place for place, _ in sorted(everyone, key=lambda flag: (flag[1], flag[0]))[: self._batch_size]]
        wanted = [chosen[slot] for slot in self._slots]
        own = dict(zip(places, groups, strict=True))
        # Prompts stay behind, for their images: the receiver has the same data set.
        leaving = {
            place: (own[place].scored.group.prompt.index, _without_prompt(own[place]))
            for place in chosen
            if place in own and place not in wanted
        }
        arrived = {}
        for part in self._ranks.all_gather_objects(leaving, "exchange groups"):
            arrived.update(part)
        return [own[place] if place in own else self._with_prompt(*arrived[place]) for place in wanted]

    def _with_prompt(self, index: int, group: LearningGroup) -> LearningGroup:
        rollout = dataclasses.replace(group.scored.group, prompt=self._data[index])
        return dataclasses.replace(group, scored=dataclasses.replace(group.scored, group=rollout))


def _without_prompt(group: LearningGroup) -> LearningGroup:
    prompt = dataclasses.replace(group.scored.group.prompt, images=(), token_ids=())
    rollout = dataclasses.replace(group.scored.group, prompt=prompt)
    return dataclasses.replace(group, scored=dataclasses.replace(group.scored, group=rollout))


def teaches(scored: ScoredGroup, algorithm: AlgorithmConfig) -> bool:
    """Whether online filtering keeps a group: its rewards differ, and its mean lies inside the user's bounds.

    Rewards are compared, not their variance with a threshold: equal ones give exactly no gradient, others do. Both
    the rewards that train and those under `filter_key` must differ; unknown ones (NaN) are left out.
    Raises: UserError for a `filter_key` that the reward does not return.
    """
    rewards = {"overall": scored.rewards.overall, "accuracy": scored.rewards.accuracy, **scored.rewards.parts}
    if algorithm.filter_key not in rewards:
        raise UserError(
            f"algorithm.filter_key={algorithm.filter_key} is not among the reward's keys: {', '.join(sorted(rewards))}"
        )
    values = rewards[algorithm.filter_key]
    values = values[~np.isnan(values)]
    if len(values) == 0 or (values == values[0]).all() or (rewards["overall"] == rewards["overall"][0]).all():
        return False
    mean = float(values.mean(dtype=np.float64))
    low, high = algorithm.filter_low, algorithm.filter_high
    return (low is None or mean > low) and (high is None or mean < high)
