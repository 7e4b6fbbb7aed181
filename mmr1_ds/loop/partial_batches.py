"""Batches whose long responses are cut at a budget and continued in the next step (partial rollouts).

The step then lasts as long as `worker.rollout.partial` tokens take, not as long as the longest response. A group is
trained on when its last response is done; the policies that sampled a response are told apart by its versions, and
truncated importance sampling corrects for the older ones. The idea is Kimi k1.5's (arXiv 2501.12599, section 2.6.2).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from mmr1_ds.loop.batches import PARTIAL_STATE, BatchMaker
from mmr1_ds.loop.collector import TRAINING
from mmr1_ds.loop.drawn import Drawn
from mmr1_ds.loop.in_flight import InFlight, read_in_flight, write_in_flight
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.records import Response, RolloutGroup, RolloutRequest, SamplingSettings

_DECAY = 0.9  # of what earlier rounds say about how many groups finish
_STEP = 1 << 32  # an id is step * _STEP + slot, and slots count the prompts of a step: ids sort as they were drawn


@dataclass
class FinishRates:
    """How many groups finish in a round, of those drawn afresh and of those carried over from earlier rounds."""

    launched: dict[str, float] = field(default_factory=lambda: {"fresh": 0.0, "carried": 0.0})
    finished: dict[str, float] = field(default_factory=lambda: {"fresh": 0.0, "carried": 0.0})

    def rate(self, kind: str) -> float:
        """The expected share that finishes, (0, 1]; 1 before anything is known."""
        return (self.finished[kind] + 1.0) / (self.launched[kind] + 1.0)

    def observe(self, kind: str, launched: int, finished: int) -> None:
        """Take in one round."""
        if launched:
            self.launched[kind] = _DECAY * self.launched[kind] + launched
            self.finished[kind] = _DECAY * self.finished[kind] + finished

    def num_fresh(self, needed: int, num_carried: int, most: int) -> int:
        """How many prompts to draw so that `needed` groups finish in the round but for bad luck, at most `most`.

        Two standard deviations above the mean: a second round for a few groups costs as long as the first, a group
        too many is trained on in the next step.
        """
        fresh, carried = self.rate("fresh"), self.rate("carried")
        expected = num_carried * carried
        count = max(0, needed - expected) / fresh
        deviation = math.sqrt(count * fresh * (1.0 - fresh) + num_carried * carried * (1.0 - carried))
        count = max(0.0, needed + 2.0 * deviation - expected) / fresh
        return min(math.ceil(count), max(most, 0))


@dataclass
class _Round:
    """What a rank samples until the budget is used up."""

    in_flight: InFlight
    positions: dict[int, range]  # of each group's requests, by its id; probes come behind
    joined: dict[int, RolloutGroup] = field(default_factory=dict)  # by id, with what all its requests have brought

    @property
    def probes(self) -> range:
        """The positions of the probes."""
        return range(sum(map(len, self.positions.values())), len(self.in_flight.requests))


class PartialBatchMaker(BatchMaker):
    """Makes the batch of each step from the groups that finish first."""

    def __init__(self, *arguments: Any) -> None:
        """Take what BatchMaker takes."""
        super().__init__(*arguments)
        budget, longest = self._rollout.partial, self._data.max_response_length
        assert budget is not None
        self._budget, self._longest = budget, longest
        self._most = math.ceil(longest / budget) * self._batch_size  # groups at once: every batch finishes by then
        self._begun: dict[int, tuple[RolloutRequest, RolloutGroup | None]] = {}  # this rank's, by id
        self._queue: list[int] = []  # indices drawn, not begun: they come in batches; the same on every rank
        self._rates = FinishRates()

    def _fill(self, step: int, settings: SamplingSettings, clock: StageClock) -> tuple[Drawn, dict[str, float]]:
        """Sample in rounds of at most the budget until a batch of groups is done."""
        drawn, num_rounds = Drawn(), 0
        probes: list[RolloutGroup] = []
        finished, unfinished = self._count()
        everything = [*finished, *(id for part in unfinished for id in part)]
        # Some are there when the step was cut off before and begins again.
        num_begun = max((id % _STEP + 1 for id in everything if id // _STEP == step), default=0)
        while len(finished) < self._batch_size:
            carried = {id for part in unfinished for id in part}
            most, needed = self._most - len(finished) - len(carried), self._batch_size - len(finished)
            num_fresh = self._rates.num_fresh(needed, len(carried), most)
            with clock("draw"):
                self._draw(step, num_begun, num_fresh, [len(part) for part in unfinished])
                round = self._round(step, with_probes=num_rounds == 0)
                self._collector.begin(round.in_flight, dataclasses.replace(settings, max_tokens=self._budget))
            with clock("gen"):
                self._collector.wait(round.in_flight, partial(self._score_beside, round))
            probes += self._merge(round)
            num_begun, num_rounds = num_begun + num_fresh, num_rounds + 1
            before = len(finished)
            finished, unfinished = self._count()
            of_carried = len(carried & set(finished))
            self._rates.observe("carried", len(carried), of_carried)
            self._rates.observe("fresh", num_fresh, len(finished) - before - of_carried)
        chosen = [id for id in sorted(finished)[: self._batch_size] if id in self._begun]
        groups = [group for id in chosen if (group := self._begun[id][1]) is not None]
        scored, failures = self._score(step, groups + probes, len(groups), clock)
        for id in chosen:
            del self._begun[id]
        drawn.add(chosen, scored, failures, self._batch_size, self._algorithm)
        return drawn, {
            "partial/num_rounds": float(num_rounds),
            "partial/num_waiting": float(len(finished) - self._batch_size),  # done, for the next step
            "partial/num_unfinished": float(sum(len(part) for part in unfinished)),
        }

    def _count(self) -> tuple[list[int], list[list[int]]]:
        """The ids of the groups that are done on any rank, and of the others, rank by rank. Collective."""
        done = [id for id, (_, group) in self._begun.items() if self._is_done(group)]
        own = done, [id for id in self._begun if id not in set(done)]
        everyone = self._ranks.all_gather_objects(own, "count groups that are done")
        return [id for part, _ in everyone for id in part], [part for _, part in everyone]

    def _is_done(self, group: RolloutGroup | None) -> bool:
        return group is not None and not self._open(group)

    def _open(self, group: RolloutGroup) -> list[int]:
        """The responses that are not done."""
        return [
            k
            for k, response in enumerate(group.responses)
            if not response.finished and len(response.token_ids) < self._longest
        ]

    def _draw(self, step: int, num_begun: int, count: int, loads: list[int]) -> None:
        """Begin `count` prompts, each on the rank with the fewest groups to continue. Collective."""
        while len(self._queue) < count:
            self._queue += self._coordinator.next_batch(step).tolist()
        indices, self._queue = self._queue[:count], self._queue[count:]
        own: dict[int, int] = {}  # slot -> index
        for slot, index in enumerate(indices, start=num_begun):
            taker = int(np.argmin(loads))
            loads[taker] += 1
            if taker == self._ranks.rank:
                own[slot] = index
        requests = self._requests(self._prompts, [*own.values()], self._rollout.n, TRAINING, step, [*own])
        self._begun.update({step * _STEP + slot: (item, None) for slot, item in zip(own, requests, strict=True)})

    def _round(self, step: int, with_probes: bool) -> _Round:
        """Requests for all that this rank has begun and not finished, and for probes. Collective with probes."""
        requests: list[RolloutRequest] = []
        positions = {}
        for id, (request, group) in sorted(self._begun.items()):
            first = len(requests)
            if group is None:
                limit = min(self._budget, self._longest)
                requests.append(dataclasses.replace(request, max_tokens=limit))
            else:
                requests += [self._continue(request, k, group.responses[k]) for k in self._open(group)]
            if len(requests) > first:
                positions[id] = range(first, len(requests))
        if with_probes:
            requests += self._probes(step)
        return _Round(InFlight(step, requests, []), positions)

    def _continue(self, request: RolloutRequest, k: int, begun: Response) -> RolloutRequest:
        """The request to sample on after what response `k` has."""
        num_tokens = len(begun.token_ids)
        token_ids = (*request.prompt.token_ids, *begun.token_ids.tolist())
        seed = int(np.random.SeedSequence((request.seed, k, num_tokens)).generate_state(1)[0])
        limit = min(self._budget, self._longest - num_tokens)
        return RolloutRequest(dataclasses.replace(request.prompt, token_ids=token_ids), 1, seed, max_tokens=limit)

    def _score_beside(self, round: _Round, groups: Mapping[int, RolloutGroup]) -> bool:
        """Have what is done scored while the rest is sampled, as Enough; what was begun stays until the round ends."""
        self._join(round, groups)
        done = {id: group for id, group in round.joined.items() if self._is_done(group)}
        # Ids are not negative. A probe that is cut is never scored.
        probes = {~at: groups[at] for at in round.probes if at in groups and _is_whole(groups[at])}
        return self._collector.score_beside(done | probes)

    def _join(self, round: _Round, groups: Mapping[int, RolloutGroup | None]) -> None:
        """Add to the groups of the round what their requests have brought, where all of them have."""
        for id, positions in round.positions.items():
            parts = [part for at in positions if (part := groups.get(at)) is not None]
            if id not in round.joined and len(parts) == len(positions):
                begun = self._begun[id][1]
                round.joined[id] = parts[0] if begun is None else self._joined(begun, parts)

    def _merge(self, round: _Round) -> list[RolloutGroup]:
        """Add what a round sampled to what there was. Returns: the groups of probes, but for those that were cut."""
        groups = round.in_flight.groups
        self._join(round, groups)
        assert len(round.joined) == len(round.positions), "only probes may be given up"
        for id, joined in round.joined.items():
            self._begun[id] = self._begun[id][0], joined
        return [group for at in round.probes if (group := groups[at]) is not None and _is_whole(group)]

    def _joined(self, group: RolloutGroup, parts: Sequence[RolloutGroup]) -> RolloutGroup:
        responses = list(group.responses)
        for k, part in zip(self._open(group), parts, strict=True):
            old, (new,) = responses[k], part.responses
            responses[k] = Response(
                np.concatenate([old.token_ids, new.token_ids]),
                np.concatenate([old.logprobs, new.logprobs]),
                new.finished,
                _spans(old, group.policy_version) + _spans(new, part.policy_version),
            )
        oldest = min(group.policy_version, *(part.policy_version for part in parts))
        return dataclasses.replace(group, responses=tuple(responses), policy_version=oldest)

    def save(self, folder: Path) -> None:
        """See BatchMaker."""
        by_step: dict[int, InFlight] = {}
        for id, (request, group) in sorted(self._begun.items()):
            batch = by_step.setdefault(id // _STEP, InFlight(id // _STEP, [], []))
            batch.slots.append(id % _STEP)
            if group is not None:
                batch.groups[len(batch.requests)] = group
            batch.requests.append(request)
        write_in_flight(folder, self._ranks.rank, list(by_step.values()))
        if self._ranks.rank == 0:
            state = {"queue": self._queue, **dataclasses.asdict(self._rates)}
            (folder / PARTIAL_STATE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path, settings: SamplingSettings) -> None:
        """See BatchMaker."""
        if not (folder / PARTIAL_STATE).is_file():  # of a run without a budget
            return
        state = json.loads((folder / PARTIAL_STATE).read_text(encoding="utf-8"))
        self._queue = state["queue"]
        self._rates = FinishRates(state["launched"], state["finished"])
        rank, size = self._ranks.rank, self._ranks.size

        def own_slots(requests: Mapping[int, RolloutRequest]) -> list[int]:
            return [slot for slot in requests if slot % size == rank]

        for batch in read_in_flight(folder, self._prompts.__getitem__, own_slots, rank, size):
            for position, (slot, request) in enumerate(zip(batch.slots, batch.requests, strict=True)):
                self._begun[batch.step * _STEP + slot] = request, batch.groups.get(position)


def _is_whole(group: RolloutGroup) -> bool:
    return all(response.finished for response in group.responses)


def _spans(response: Response, version: int) -> tuple[tuple[int, int], ...]:
    return response.policy_versions or ((version, len(response.token_ids)),)
