"""From requests to scored groups: generation and reward, as training, refresh and validation all need them."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np

from mmr1_ds.algorithm.overlong import OverlongPenalty
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.errors import UserError
from mmr1_ds.loop.in_flight import InFlight
from mmr1_ds.loop.shared_queue import SharedQueue
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Prompt, RolloutGroup, RolloutRequest, SamplingSettings, ScoredGroup
from mmr1_ds.rewards.pool import RewardPool
from mmr1_ds.rewards.scoring import FAILED, RESPONSES, UNSCORED, RewardCounts, score_groups
from mmr1_ds.rollout.base import generate, ignore, never

if TYPE_CHECKING:
    from mmr1_ds.data.encoding import PromptEncoder
    from mmr1_ds.rollout.base import Enough, RolloutEngine

# What a seed is for; each purpose draws from a stream of its own.
TRAINING, REFRESH, VALIDATION, PROBE, BASELINE = range(5)

MOST_FAILED, MIN_CHECKED = 0.75, 4  # share of failed rewards that ends a run, in calls of so many responses
SHOWN_REASONS = 3


class Prompts(Protocol):
    """What requests take their prompts from."""

    def prompts(self, indices: Sequence[int] | np.ndarray) -> list[Prompt]:
        """The prompts at these places."""
        ...


@dataclass(frozen=True)
class RequestMaker:
    """Makes the requests of a run; their seeds are a pure function, so that a resumed run samples the same."""

    seed: int

    def __call__(
        self,
        data: Prompts,
        indices: Sequence[int] | np.ndarray,
        num_responses: int | np.ndarray,
        purpose: int,
        step: int,
        slots: Sequence[int] | np.ndarray,
        expected_tokens: int | np.ndarray = 0,
    ) -> list[RolloutRequest]:
        """Make a request for each prompt of `data` at `indices`; its seed follows from (seed, purpose, step, slot).

        Args: num_responses, expected_tokens: of all of them, or (K,) of each.
        """
        counts = np.broadcast_to(num_responses, len(indices)).tolist()
        expected = np.broadcast_to(expected_tokens, len(indices)).tolist()
        return [
            RolloutRequest(
                prompt,
                count,
                int(np.random.SeedSequence((self.seed, purpose, step, int(slot))).generate_state(1)[0]),
                can_wait=purpose == PROBE,
                expected_tokens=tokens,
            )
            for prompt, slot, count, tokens in zip(data.prompts(indices), slots, counts, expected, strict=True)
        ]


class Collector:
    """Samples responses to prompts and scores them."""

    def __init__(
        self,
        rollout: RolloutEngine,
        rewards: RewardPool,
        reward_name: str,
        encoder: PromptEncoder,
        ranks: Ranks,
        penalty: OverlongPenalty | None = None,
    ) -> None:
        """reward_name: for messages; penalty: of long responses, on top of any reward."""
        self._penalty = penalty
        self._rollout, self._rewards, self._encoder, self._ranks = rollout, rewards, encoder, ranks
        self._reward_name = reward_name
        self._rewards_work = False  # whether any reward has come back yet
        self._early: dict[int, ScoredGroup] = {}  # scored while others were sampled, by the identity of their groups
        self._early_counts = RewardCounts()
        self._beside: _Beside | None = None  # of the batch that is sampled

    def collect(
        self,
        requests: Sequence[RolloutRequest],
        settings: SamplingSettings,
        clock: StageClock,
        advance: Callable[[int], None] = ignore,
        shared: SharedQueue | None = None,
    ) -> tuple[list[ScoredGroup], RewardCounts]:
        """Generate and score the groups of this rank's requests. Returns: them in order, and the failed rewards.

        Collective: all ranks, each with its own requests (any number of them).
        Args: advance: takes how many more responses are sampled; shared: from which whoever is idle takes the next
        request, the counts then being of what this rank sampled; see `SharedQueue.bring_home` for the prompts.
        Raises: UserError when no reward has worked yet: training on zeros would teach nothing.
        """
        with clock("gen"), self._scoring_beside():
            if shared is None:
                groups = generate(self._rollout, requests, settings, advance, self.score_beside)
            else:
                by_slot = shared.sample_shares(requests, settings, self.score_beside, advance)
                groups = [*by_slot.values()]
        scored, counts = self.score(groups, clock)
        return scored if shared is None else shared.bring_home(dict(zip(by_slot, scored, strict=True))), counts

    def begin(self, in_flight: InFlight, settings: SamplingSettings) -> None:
        """Ask for the groups of a batch that are not there. Not a collective."""
        in_flight.begin(self._rollout, settings)
        # Beside the sampling; a probe is not trained on.
        self._encoder.expand_ahead(request.prompt for request in in_flight.requests if not request.can_wait)

    def wait(self, in_flight: InFlight, enough: Enough = never) -> None:
        """Wait until the groups of a batch are there, given up where they can wait, or enough of them. Collective.

        enough: is called as groups end: `score_beside`, for one.
        """
        with self._scoring_beside():
            in_flight.wait(self._rollout, enough)

    def share(self, in_flight: InFlight, queue: SharedQueue, settings: SamplingSettings) -> InFlight:
        """Sample the groups of a batch that are not there, whichever rank takes them. Collective.

        Returns: this rank's part of the batch. Raises: SamplingAbandoned, on every rank, the batch as it was.
        """
        with self._scoring_beside():
            return queue.sample(in_flight, settings, self.score_beside)

    @contextmanager
    def _scoring_beside(self) -> Iterator[None]:
        """While it samples, `score_beside` may be called. What it scores is there for the next `score`."""
        try:
            yield
        except BaseException:
            if self._beside is not None:
                self._beside.give_up()
                self._beside = None
            self._early, self._early_counts = {}, RewardCounts()
            raise

    @property
    def scores_groups_alone(self) -> bool:
        """Whether the reward of a group depends on no other group."""
        return self._rewards.together != "batch"

    def score_beside(self, groups: Mapping[int, RolloutGroup]) -> bool:
        """Score groups in a thread while others are sampled, if each can be scored alone. Returns: False, as Enough."""
        if self.scores_groups_alone:
            if self._beside is None:
                self._beside = _Beside(self.score_early)
            self._beside.add(groups)
        return False

    def score_early(self, groups: Sequence[RolloutGroup]) -> list[ScoredGroup]:
        """Score groups while others are sampled; `score` finds what became of them. Not a collective."""
        scored, counts = score_groups(self._rewards, groups, self._encoder.decode)
        self._early |= {id(item.group): item for item in scored}
        self._early_counts += counts
        return scored if self._penalty is None else [self._penalty(item) for item in scored]

    def score(self, groups: Sequence[RolloutGroup], clock: StageClock) -> tuple[list[ScoredGroup], RewardCounts]:
        """Score groups. Returns: them in order with their rewards, and the count of those that failed. Collective.

        Raises: UserError as `collect`.
        """
        with clock("reward"):
            if self._beside is not None:
                beside, self._beside = self._beside, None
                beside.join()  # over several calls that sampled, where a batch took them
            rest = [group for group in groups if id(group) not in self._early]
            late, counts = score_groups(self._rewards, rest, self._encoder.decode)
            by_group = self._early | {id(item.group): item for item in late}
            scored, counts = [by_group[id(group)] for group in groups], counts + self._early_counts
            for group in groups:  # others wait for a later step
                self._early.pop(id(group), None)
            self._early_counts = RewardCounts()
        if not self._rewards_work:
            own = {"failed": counts[FAILED], "responses": counts[RESPONSES]}
            totals = self._ranks.sum(own, "check the first rewards")
            self._rewards_work = totals["failed"] < totals["responses"]
            if not self._rewards_work:
                raise UserError(
                    f"worker.reward.reward_function={self._reward_name} failed for all "
                    f"{totals['responses']:.0f} responses of its first call; the first reasons are logged above"
                )
        self._check_failures(counts)
        if self._penalty is not None:
            scored = [self._penalty(group) for group in scored]
        return scored, counts

    def _check_failures(self, counts: RewardCounts) -> None:
        """End the run where three rewards in four fail: what is left is no sample of the policy. Collective."""
        own = {"failed": counts[FAILED] - counts[UNSCORED], "responses": counts[RESPONSES]}
        totals = self._ranks.sum(own, "check the rewards")
        if totals["responses"] < MIN_CHECKED or totals["failed"] < MOST_FAILED * totals["responses"]:
            return
        everyone = self._ranks.all_gather_objects(self._rewards.first_reasons, "reasons")
        reasons = [*dict.fromkeys(reason for of_rank in everyone for reason in of_rank)]
        raise UserError(
            f"worker.reward.reward_function={self._reward_name} failed for {totals['failed']:.0f} of "
            f"{totals['responses']:.0f} responses of one call; the first reasons: {'; '.join(reasons[:SHOWN_REASONS])}"
        )


class _Beside:
    """A thread that scores groups while others are sampled."""

    def __init__(self, score: Callable[[Sequence[RolloutGroup]], object]) -> None:
        """Start it. score: is called with the groups that have come meanwhile."""
        self._score = score
        self._known: set[int] = set()
        self._is_given_up = False
        self._new: queue.SimpleQueue[RolloutGroup | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="rewards beside the sampling", daemon=True)
        self._thread.start()

    def add(self, groups: Mapping[int, RolloutGroup]) -> None:
        """Have those scored that are new, by their positions."""
        for position, group in groups.items():
            if position not in self._known:
                self._known.add(position)
                self._new.put(group)

    def give_up(self) -> None:
        """Score no more: a run that is told to end has no time for rewards."""
        self._is_given_up = True
        self._new.put(None)

    def join(self) -> None:
        """Wait until all are scored; none comes any more. Raises: what scoring raised."""
        self._new.put(None)
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            is_over = False
            while not is_over:
                part = [self._new.get()]
                while not self._new.empty():
                    part.append(self._new.get())
                is_over = None in part
                if self._is_given_up:
                    return
                if groups := [group for group in part if group is not None]:
                    self._score(groups)
        except BaseException as error:
            self._error = error
