"""The batch of a step: draw prompts, roll out, score, let the curriculum observe; again until enough of it teaches."""

from __future__ import annotations

import copy
import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import RunConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import score_batch
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.engine.micro_batches import balance
from mmr1_ds.errors import UserError
from mmr1_ds.loop.collector import BASELINE, PROBE, TRAINING, Collector, RequestMaker
from mmr1_ds.loop.drawn import Drawn, _by_key, _without_prompt
from mmr1_ds.loop.in_flight import Sampling, read_samplings, write_samplings
from mmr1_ds.loop.metrics import reward_metrics
from mmr1_ds.loop.sharing import _num_tokens, batch_slots
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import LearningGroup, RolloutGroup, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts
from mmr1_ds.rollout.base import ServersGone

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder

logger = logging.getLogger(__name__)

PARTIAL_STATE = "partial.json"  # in a checkpoint whose begun responses go on by `partial_batches`


@dataclass(frozen=True)
class Batch:
    """This rank's part of what a step trains on."""

    groups: list[LearningGroup]
    prompts: np.ndarray  # (B,) int64, positions in the data set of the whole batch, every rank's, in the order drawn
    metrics: dict[str, float]  # reward/*, global_seqlen/*, and online_filtering/* with it; of all ranks


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
        self._mini_batch_size = config.worker.actor.global_batch_size
        self._slots = batch_slots(self._batch_size, self._mini_batch_size, ranks.rank, ranks.size)
        self._sampling: dict[int, Sampling] = {}  # first draws of this step and of those begun ahead, by step
        tries = config.trainer.max_try_make_batch
        self._max_tries = 1 if not config.algorithm.online_filtering else tries if tries > 0 else None

    def make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        """The batch of `step`. Collective.

        Raises: UserError, on every rank, for an unknown `filter_key`; ServersGone and SamplingAbandoned, after which a
        checkpoint has nothing of this step observed.
        """
        before, begun = self._copy_of_curriculum(), dict(self._sampling)
        try:
            return self._make(step, settings, clock)
        except (ServersGone, SamplingAbandoned):
            if self._samples_after_observing:
                self._coordinator.load_state_dict(before)
                self._sampling = begun
            raise

    @property
    def _samples_after_observing(self) -> bool:
        """Whether a step may be cut off when the curriculum has observed a part of it."""
        return self._config.algorithm.online_filtering or self._config.algorithm.adv_estimator == "remax"

    def _copy_of_curriculum(self) -> dict[str, Any] | None:
        if not self._samples_after_observing or self._ranks.rank > 0:
            return None
        return copy.deepcopy(self._coordinator.state_dict())

    def _make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        drawn, figures = self._fill(step, settings, clock)
        chosen, trained, seqlen = self._choose(drawn)
        with clock("curriculum"):
            self._coordinator.finish_step(step, trained)
        metrics = reward_metrics(drawn.rewards, drawn.failures, self._ranks) | seqlen | figures
        if self._config.algorithm.adv_estimator == "remax":
            chosen = self._with_baselines(step, chosen, settings, clock)
            metrics |= self._mean_baseline(chosen)
        return Batch(chosen, trained, metrics)

    def _fill(self, step: int, settings: SamplingSettings, clock: StageClock) -> tuple[Drawn, dict[str, float]]:
        """Draw once, or until enough groups teach. Collective. Returns: what this rank has of it, and metrics."""
        filtering = self._config.algorithm.online_filtering
        drawn = Drawn()
        num_tries = num_teaching = 0
        while num_tries == 0 or (num_teaching < self._batch_size and num_tries != self._max_tries):
            if num_tries > 0:
                logger.info("step %d: %d of %d groups teach, drawing again", step, num_teaching, self._batch_size)
            places = num_tries * self._batch_size + self._slots
            groups, probes, failures = self._roll(step, num_tries, settings, clock)
            if filtering and num_tries == 0:
                self._check_filter_key(groups)
            drawn.add(places.tolist(), groups, probes, failures, self._batch_size, self._config.algorithm)
            num_tries += 1
            if filtering:
                own = {"teaching": len(drawn.teaching)}
                num_teaching = int(self._ranks.sum(own, "count groups that teach")["teaching"])
        if not filtering:
            return drawn, {}
        if num_teaching < self._batch_size:
            logger.warning(
                "step %d: %d of %d groups teach after %d tries (trainer.max_try_make_batch); the batch is filled "
                "with groups that do not", step, num_teaching, self._batch_size, num_tries,
            )  # fmt: skip
        return drawn, {
            "online_filtering/num_tries": num_tries,
            "online_filtering/teaching_fraction": num_teaching / (num_tries * self._batch_size),
        }

    def begin_ahead(self, step: int, settings: SamplingSettings) -> None:
        """Begin the steps after `step` that `worker.rollout.max_staleness_steps` lets the servers sample by now.

        Not those behind a refresh, whose draws follow from what it finds. Collective.
        """
        last = min(step + self._config.worker.rollout.max_staleness_steps, self._coordinator.num_steps)
        for later in range(step + 1, last + 1):
            if self._coordinator.refresh_due(later):
                break
            if later not in self._sampling:
                self._sampling[later] = self._begin(later, 0, settings)

    def finish_ahead(self) -> None:
        """Wait for all that was begun, so that a checkpoint can keep it. Collective."""
        for _, sampling in sorted(self._sampling.items()):
            self._collector.wait(sampling)

    def save(self, folder: Path) -> None:
        """Keep what was begun in an existing folder. Not a collective."""
        if self._sampling:
            write_samplings(folder, self._ranks.rank, [item for _, item in sorted(self._sampling.items())])

    def load(self, folder: Path, settings: SamplingSettings) -> None:
        """Go on with what `save` kept, also on another number of ranks. Not a collective."""
        if (folder / PARTIAL_STATE).is_file():
            logger.warning("responses that worker.rollout.partial had cut are left: this run samples whole ones")
            return
        ranks, own = self._ranks, set(self._slots.tolist())
        for item in read_samplings(folder, self._data.__getitem__, own.__contains__, ranks.rank, ranks.size):
            self._collector.begin(item, settings)
            self._sampling[item.step] = item

    def _begin(self, step: int, attempt: int, settings: SamplingSettings) -> Sampling:
        """Draw, and ask for the responses; probes ride along with the first draw, to fill the engine's tail."""
        coordinator, ranks = self._coordinator, self._ranks
        num_responses = self._config.worker.rollout.n
        indices = coordinator.next_batch(step)
        probes = coordinator.next_probes(step) if attempt == 0 else indices[:0]
        probes = probes[ranks.rank :: ranks.size]
        places = attempt * self._batch_size + self._slots
        requests = self._requests(self._data, indices[self._slots], num_responses, TRAINING, step, places)
        requests += self._requests(self._data, probes, coordinator.num_probe_responses, PROBE, step, probes)
        sampling = Sampling(step, requests, places.tolist())
        self._collector.begin(sampling, settings)
        return sampling

    def _roll(
        self, step: int, attempt: int, settings: SamplingSettings, clock: StageClock
    ) -> tuple[list[LearningGroup], list[ScoredGroup], RewardCounts]:
        """Draw and roll out once."""
        with clock("draw"):
            sampling = self._sampling.get(step) if attempt == 0 else None
            sampling = sampling or self._begin(step, attempt, settings)
            if attempt == 0:
                self._sampling[step] = sampling  # a run that stops here goes on with it
        with clock("gen"):
            self._collector.wait(sampling)
        groups = [group for _, group in sorted(sampling.groups.items()) if group is not None]
        found = self._score(step, groups, len(self._slots), clock)
        self._sampling.pop(step, None)
        return found

    def _score(
        self, step: int, groups: Sequence[RolloutGroup], num_training: int, clock: StageClock
    ) -> tuple[list[LearningGroup], list[ScoredGroup], RewardCounts]:
        """Reward groups, and let the curriculum observe them; those after the first `num_training` are probes."""
        scored, failures = self._collector.score(groups, clock)
        with clock("curriculum"):
            batch = score_batch(scored, self._encoder.eos_token_ids, self._config.data.curriculum_metrics)
            of_probes = [dataclasses.replace(found, is_probe=True) for found in batch.statistics[num_training:]]
            self._coordinator.observe(step, batch.statistics[:num_training] + of_probes)
        learning = [LearningGroup(group, row) for group, row in zip(scored, batch.advantages, strict=True)]
        return learning[:num_training], scored[num_training:], failures

    def _with_baselines(
        self, step: int, groups: Sequence[LearningGroup], settings: SamplingSettings, clock: StageClock
    ) -> list[LearningGroup]:
        """The groups with the reward of one greedy response to each prompt. Collective."""
        indices = [item.scored.group.prompt.index for item in groups]
        requests = self._requests(self._data, indices, 1, BASELINE, step, indices)
        greedy = dataclasses.replace(settings, temperature=0.0, top_p=1.0, top_k=-1)
        scored, _ = self._collector.collect(requests, greedy, clock)
        found = []
        for item, answer in zip(groups, scored, strict=True):
            # A reward that failed says nothing of the prompt: 0 would count all its responses as better than greedy.
            unknown = bool(answer.rewards.failed[0])
            rewards = item.scored.rewards.overall if unknown else answer.rewards.overall
            found.append(dataclasses.replace(item, baseline=float(rewards.mean(dtype=np.float64))))
        return found

    def _mean_baseline(self, groups: Sequence[LearningGroup]) -> dict[str, float]:
        own = {"baseline": sum(item.baseline or 0.0 for item in groups), "groups": float(len(groups))}
        totals = self._ranks.sum(own, "mean of the baselines")
        return {"reward/baseline": totals["baseline"] / totals["groups"]}

    def _check_filter_key(self, groups: Sequence[LearningGroup]) -> None:
        """A response whose reward failed has no parts, so no rank's groups alone say which keys there are."""
        key = self._config.algorithm.filter_key
        own = {name for group in groups for name in _by_key(group.scored)}
        known = set().union(*self._ranks.all_gather_objects(own, "keys of the rewards"))
        if key not in known:
            raise UserError(f"algorithm.filter_key={key} is not among the reward's keys: {', '.join(sorted(known))}")

    def _choose(self, drawn: Drawn) -> tuple[list[LearningGroup], np.ndarray, dict[str, float]]:
        """This rank's share of the first groups that teach, filled up with the first of the others. Collective.

        In the order they were drawn, whichever rank sampled them: the batch is the same on any number of ranks.
        Returns: the groups, the prompts of the whole batch, (B,) int64, and metrics.
        """
        own = drawn.teaching | drawn.others
        flags = [
            (place not in drawn.teaching, place, group.scored.group.prompt.index, _num_tokens(group))
            for place, group in own.items()
        ]
        everyone = [flag for part in self._ranks.all_gather_objects(flags, "choose groups") for flag in part]
        everyone.sort()
        chosen = everyone[: self._batch_size]
        trained = np.array([index for _, _, index, _ in chosen], dtype=np.int64)
        takers, metrics = self._balanced([tokens for *_, tokens in chosen])
        # Prompts stay behind, for their images: the receiver has the same data set.
        leaving: list[dict[int, LearningGroup]] = [{} for _ in range(self._ranks.size)]
        for (_, place, *_), taker in zip(chosen, takers, strict=True):
            if place in own and taker != self._ranks.rank:
                leaving[taker][place] = _without_prompt(own[place])
        arrived = {}
        for part in self._ranks.exchange_objects(leaving, "exchange groups"):
            arrived.update(part)
        wanted = [place for (_, place, *_), taker in zip(chosen, takers, strict=True) if taker == self._ranks.rank]
        return [self._with_prompt(own.get(place) or arrived[place]) for place in wanted], trained, metrics

    def _balanced(self, tokens: Sequence[int]) -> tuple[list[int], dict[str, float]]:
        """The rank that trains on each group of the batch, by the groups' tokens, and how even that is.

        Groups change places inside their optimiser step alone, so that every step learns from the same prompts.
        """
        size, share = self._ranks.size, self._mini_batch_size // self._ranks.size
        takers = np.empty(len(tokens), dtype=np.int64)
        for start in range(0, len(tokens), self._mini_batch_size):
            order = balance(tokens[start : start + self._mini_batch_size], size)
            takers[start + np.array(order)] = np.arange(self._mini_batch_size) // share
        before = np.arange(len(tokens)) % self._mini_batch_size // share
        totals, balanced = (np.bincount(ranks, tokens, minlength=size) for ranks in (before, takers))
        return takers.tolist(), {
            "global_seqlen/mean": float(totals.mean()),
            "global_seqlen/min": float(totals.min()),
            "global_seqlen/max": float(totals.max()),
            "global_seqlen/minmax_diff": float(np.ptp(totals)),
            "global_seqlen/balanced_min": float(balanced.min()),
            "global_seqlen/balanced_max": float(balanced.max()),
        }

    def _with_prompt(self, group: LearningGroup) -> LearningGroup:
        rollout = group.scored.group
        if rollout.prompt.token_ids:
            return group
        rollout = dataclasses.replace(rollout, prompt=self._data[rollout.prompt.index])
        return dataclasses.replace(group, scored=dataclasses.replace(group.scored, group=rollout))
