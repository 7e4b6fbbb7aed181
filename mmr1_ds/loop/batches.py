"""The batch of a step: draw prompts, generate, score, let the curriculum observe; again until enough of it teaches."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig, DataConfig, RolloutConfig
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.data.dataset import PromptDataset
from mmr1_ds.errors import UserError
from mmr1_ds.loop.collector import BASELINE, PROBE, TRAINING, Collector, Prompts, RequestMaker
from mmr1_ds.loop.drawn import Drawn, Stragglers, check_filter_key
from mmr1_ds.loop.in_flight import InFlight, read_in_flight, write_in_flight
from mmr1_ds.loop.metrics import reward_metrics
from mmr1_ds.loop.shared_queue import SharedQueue, unread
from mmr1_ds.loop.sharing import dealt, sampled_slots, share_out, waits_for_room, work_of
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.scoring import RewardCounts
from mmr1_ds.rollout.base import Enough, ServersGone

logger = logging.getLogger(__name__)

PARTIAL_STATE = "partial.json"  # in a checkpoint whose begun responses `partial_batches` continues


@dataclass(frozen=True)
class Batch:
    """This rank's part of what a step trains on."""

    groups: list[ScoredGroup]
    baselines: list[float] | None  # remax: the reward of the greedy response to each group's prompt
    prompts: np.ndarray  # (B,) int64, indices of the whole batch, every rank's, in the order drawn
    metrics: dict[str, float]  # reward/*, global_seqlen/*, and online_filtering/* with it; of all ranks


class BatchMaker:
    """Makes the batch of each step.

    With `algorithm.online_filtering` (dynamic sampling, DAPO, arXiv 2503.14476, section 3.2) it draws until a batch
    of groups that teach has come together; see `teaches`.
    """

    def __init__(
        self,
        data: DataConfig,
        algorithm: AlgorithmConfig,
        rollout: RolloutConfig,
        mini_batch_size: int,
        max_tries: int,
        ranks: Ranks,
        score: Callable[[Sequence[ScoredGroup]], list[PromptStatistics]],
        prompts: PromptDataset,
        coordinator: Coordinator,
        collector: Collector,
        queue: SharedQueue | None = None,
    ) -> None:
        """
        Args:
            mini_batch_size: prompts an optimiser step.
            score: what the curriculum observes of scored groups.
            max_tries: draws a batch with online filtering; 0 or less = until it is full.
            queue: from which the ranks take the requests of all; None = each samples its own.
        """
        self._data, self._algorithm, self._rollout = data, algorithm, rollout
        self._batch_size, self._mini_batch_size = data.rollout_batch_size, mini_batch_size
        self._ranks, self._score_groups, self._prompts = ranks, score, prompts
        self._coordinator, self._collector, self._shared_queue = coordinator, collector, queue
        self._requests = RequestMaker(rollout.seed)
        self._in_flight: dict[int, InFlight] = {}  # first draws of this step and of those begun ahead, by step
        self._draws_at_once = algorithm.filter_oversample if algorithm.online_filtering else 1
        self._stops_stragglers = self._draws_at_once > 1 and algorithm.filter_stop
        num_responses = self._draws_at_once * self._batch_size * rollout.n
        self._responses_wait = not self._stops_stragglers and waits_for_room(num_responses, rollout, ranks.size)
        self._max_tries = 1 if not algorithm.online_filtering else max_tries if max_tries > 0 else None

    def make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        """Make the batch of `step`. Collective.

        Raises: UserError, on every rank, for an unknown `filter_key`; ServersGone and SamplingAbandoned, after which a
        checkpoint has nothing of this step observed.
        """
        before, begun = self._coordinator.position(), dict(self._in_flight)
        try:
            return self._make(step, settings, clock)
        except (ServersGone, SamplingAbandoned):
            if self._samples_after_observing:
                self._coordinator.go_back(before)
                self._in_flight = begun
            raise

    @property
    def _samples_after_observing(self) -> bool:
        """Whether a step may be cut off when the curriculum has observed a part of it."""
        return self._algorithm.online_filtering or self._algorithm.adv_estimator == "remax"

    def _make(self, step: int, settings: SamplingSettings, clock: StageClock) -> Batch:
        drawn, figures = self._fill(step, settings, clock)
        groups, prompts, seqlen = share_out(drawn, self._batch_size, self._mini_batch_size, self._prompts, self._ranks)
        metrics = reward_metrics(drawn.rewards, drawn.failures, self._ranks) | seqlen | figures
        baselines = None
        if self._algorithm.adv_estimator == "remax":
            baselines = self._baselines(step, groups, settings, clock)
            own = {"baseline": sum(baselines), "groups": float(len(baselines))}
            totals = self._ranks.sum(own, "mean of the baselines")
            metrics["reward/baseline"] = totals["baseline"] / totals["groups"]
        with clock("curriculum"):  # behind all sampling: a step that is cut off has taught the curriculum nothing
            self._coordinator.finish_step(step, prompts)
        return Batch(groups, baselines, prompts, metrics)

    def _fill(self, step: int, settings: SamplingSettings, clock: StageClock) -> tuple[Drawn, dict[str, float]]:
        """Draw once, or until enough groups teach. Collective. Returns: what this rank has of it, and metrics."""
        filtering = self._algorithm.online_filtering
        drawn = Drawn()
        num_tries = num_teaching = num_draws = num_stopped = 0
        while num_tries == 0 or (num_teaching < self._batch_size and num_tries != self._max_tries):
            if num_tries > 0:
                logger.info("step %d: %d of %d groups teach, drawing again", step, num_teaching, self._batch_size)
            begun = self._drawn_or_begun(step, num_draws, settings, clock)
            in_flight = self._wait(begun, settings, clock, self._batch_size - num_teaching)
            there = [(at, group) for at, group in sorted(in_flight.groups.items()) if group is not None]
            slots = [in_flight.slots[at] for at, _ in there if at < len(in_flight.slots)]
            num_stopped += len(in_flight.slots) - len(slots)
            groups, failures = self._score(step, [group for _, group in there], len(slots), clock)
            self._in_flight.pop(step, None)
            if filtering and num_tries == 0:
                check_filter_key(self._algorithm.filter_key, groups, self._ranks)
            drawn.add(slots, groups, failures, self._batch_size, self._algorithm)
            num_tries += 1
            num_draws = max(begun.slots) // self._batch_size + 1  # those of a resumed step may have been others
            if filtering:
                own = {"teaching": float(len(drawn.teaching)), "stopped": float(num_stopped)}
                totals = self._ranks.sum(own, "count groups that teach")
                num_teaching = int(totals["teaching"])
        if not filtering:
            return drawn, {}
        if num_teaching < self._batch_size:
            logger.warning(
                "step %d: %d of %d groups teach after %d tries (trainer.max_try_make_batch); the batch is filled "
                "with groups that do not", step, num_teaching, self._batch_size, num_tries,
            )  # fmt: skip
        return drawn, {
            "online_filtering/num_tries": num_tries,
            **({"online_filtering/num_stopped": totals["stopped"]} if self._stops_stragglers else {}),
            "online_filtering/teaching_fraction": num_teaching / (num_draws * self._batch_size),
        }

    def begin_ahead(self, step: int, settings: SamplingSettings) -> None:
        """Begin the steps after `step` that `worker.rollout.max_staleness_steps` lets the servers sample by now.

        Steps behind a refresh are left out: their draws follow from what it finds. Collective.
        """
        last = min(step + self._rollout.max_staleness_steps, self._coordinator.num_steps)
        for later in range(step + 1, last + 1):
            if self._coordinator.refresh_due(later):
                break
            if later not in self._in_flight:
                self._in_flight[later] = self._begin(later, 0, settings)

    def finish_ahead(self) -> None:
        """Wait for all that was begun, so that a checkpoint can keep it. Collective."""
        for _, in_flight in sorted(self._in_flight.items()):
            self._collector.wait(in_flight)

    def save(self, folder: Path) -> None:
        """Keep what was begun in an existing folder. Not a collective."""
        if self._in_flight:
            write_in_flight(folder, self._ranks.rank, [batch for _, batch in sorted(self._in_flight.items())])

    def load(self, folder: Path, settings: SamplingSettings) -> None:
        """Resume what `save` kept, also on another number of ranks. Not a collective.

        Raises: UserError, on every rank, for groups of different sizes where the run has one.
        """
        if (folder / PARTIAL_STATE).is_file():
            logger.warning("responses that worker.rollout.partial had cut are left: this run samples whole ones")
            return
        ranks, batch_size = self._ranks, self._batch_size

        def own_slots(requests: Mapping[int, RolloutRequest]) -> set[int]:
            sizes = {slot: request.num_responses for slot, request in requests.items()}
            expected = {slot: request.expected_tokens for slot, request in requests.items()}
            if self._rollout.n_min is None and len({*sizes.values()}) > 1:
                raise UserError(
                    f"{folder} holds groups of {min(sizes.values())} to {max(sizes.values())} responses that were "
                    "being sampled; keep worker.rollout.n_min and n_max until a later checkpoint"
                )
            own: set[int] = set()
            for start in range(0, max(sizes, default=-1) + 1, batch_size):
                slots = range(start, start + batch_size)
                of_draw = np.array([sizes.get(slot, self._rollout.n) for slot in slots])
                work = work_of(of_draw, np.array([expected.get(slot, 0) for slot in slots]), self._responses_wait)
                places = sampled_slots(work, self._mini_batch_size, ranks.rank, ranks.size)
                own |= {*(start + places).tolist()}
            return own

        for batch in read_in_flight(folder, self._prompts.__getitem__, own_slots, ranks.rank, ranks.size):
            self._ask(batch, settings)
            self._in_flight[batch.step] = batch

    def _begin(self, step: int, first_draw: int, settings: SamplingSettings) -> InFlight:
        """Draw, and ask for the responses; probes ride along with a step's first draws, to fill the engine's tail.

        With `algorithm.filter_oversample` several draws are sampled together, as one after the other would be.
        """
        requests: list[RolloutRequest] = []
        slots: list[int] = []
        for draw in range(first_draw, first_draw + self._draws_at_once):
            indices, sizes, tokens = self._coordinator.next_groups(step)
            if self._stops_stragglers:  # with the longest first, it would take longer until enough groups have ended
                tokens = np.zeros_like(tokens)
            work = work_of(sizes, tokens, self._responses_wait)
            places = sampled_slots(work, self._mini_batch_size, self._ranks.rank, self._ranks.size)
            own = draw * self._batch_size + places
            indices, sizes, tokens = indices[places], sizes[places], tokens[places]
            requests += self._requests(self._unread, indices, sizes, TRAINING, step, own, tokens)
            slots += own.tolist()
        if first_draw == 0:
            requests += self._probes(step)
        in_flight = InFlight(step, requests, slots)
        self._ask(in_flight, settings)
        return in_flight

    def _ask(self, in_flight: InFlight, settings: SamplingSettings) -> None:
        """Ask for the responses, unless the ranks take the requests when they sample. Not a collective."""
        if self._shared_queue is None:
            self._collector.begin(in_flight, settings)

    @property
    def _unread(self) -> Prompts:
        """The prompts for requests; those of a queue are read where they are taken."""
        return unread(self._prompts, self._shared_queue)

    def _probes(self, step: int) -> list[RolloutRequest]:
        """This rank's requests for the probes of `step`. Collective."""
        coordinator, ranks = self._coordinator, self._ranks
        indices, tokens = coordinator.next_probes(step)
        own = dealt(tokens, self._responses_wait, ranks.rank, ranks.size)
        if self._stops_stragglers:
            tokens = np.zeros_like(tokens)
        count, indices = coordinator.num_probe_responses, indices[own]
        return self._requests(self._unread, indices, count, PROBE, step, indices, tokens[own])

    def _drawn_or_begun(self, step: int, first_draw: int, settings: SamplingSettings, clock: StageClock) -> InFlight:
        """Draw, unless the draw was begun ahead. Collective. Returns: what every rank has its share of."""
        with clock("draw"):
            in_flight = self._in_flight.get(step) if first_draw == 0 else None
            in_flight = in_flight or self._begin(step, first_draw, settings)
            if first_draw == 0:
                self._in_flight[step] = in_flight  # a run that stops here resumes with it
        return in_flight

    def _wait(self, in_flight: InFlight, settings: SamplingSettings, clock: StageClock, missing: int) -> InFlight:
        """Wait for the responses. Collective. Returns: those of this rank.

        With `algorithm.filter_stop` each rank stops what it still samples when its share of the missing groups teaches.
        """
        with clock("gen"):
            if self._shared_queue is not None:
                return self._collector.share(in_flight, self._shared_queue, settings)
            enough: Enough = self._collector.score_beside
            can_stop = self._rollout.engine == "server" or self._rollout.tensor_parallel_size == 1
            if self._stops_stragglers and can_stop and self._collector.scores_groups_alone:
                share = math.ceil(missing / self._ranks.size)
                enough = Stragglers(self._collector, self._algorithm, len(in_flight.slots), share)
            self._collector.wait(in_flight, enough)
        return in_flight

    def _score(
        self, step: int, groups: Sequence[RolloutGroup], num_training: int, clock: StageClock
    ) -> tuple[list[ScoredGroup], RewardCounts]:
        """Score groups, and let the curriculum observe them; those after the first `num_training` are probes.

        Collective. Returns: the training groups, and the rewards that failed, those of probes among them.
        """
        scored, failures = self._collector.score(groups, clock)
        with clock("curriculum"):
            found = self._score_groups(scored)
            of_probes = [dataclasses.replace(prompt, is_probe=True) for prompt in found[num_training:]]
            self._coordinator.observe(step, found[:num_training] + of_probes)
        return scored[:num_training], failures

    def _baselines(
        self, step: int, groups: Sequence[ScoredGroup], settings: SamplingSettings, clock: StageClock
    ) -> list[float]:
        """Sample one greedy response to the prompt of each group. Returns: their rewards. Collective."""
        indices = [item.group.prompt.index for item in groups]
        requests = self._requests(self._unread, indices, 1, BASELINE, step, indices)
        greedy = dataclasses.replace(settings, temperature=0.0, top_p=1.0, top_k=-1, min_p=0.0)
        scored, _ = self._collector.collect(requests, greedy, clock, shared=self._shared_queue)
        found = []
        for item, answer in zip(groups, scored, strict=True):
            # A reward that failed says nothing of the prompt: 0 would count all its responses as better than greedy.
            unknown = bool(answer.rewards.failed[0])
            rewards = item.rewards.overall if unknown else answer.rewards.overall
            found.append(float(rewards.mean(dtype=np.float64)))
        return found
