"""One queue for the requests of all ranks, `worker.rollout.shared_queue`: a rank whose engine has room takes the next.

Otherwise every rank has its prompts before anything is sampled, and one that is done waits for the longest responses of
the others. Seeds follow from the prompts' slots, not from the ranks; yet a response depends in its rounding on what it
is computed together with, which the queue leaves to the engines' speed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.loop.group_arrays import groups_from_arrays, groups_to_arrays
from mmr1_ds.loop.in_flight import InFlight
from mmr1_ds.records import Prompt, RolloutGroup, RolloutRequest, SamplingSettings, ScoredGroup
from mmr1_ds.rollout.base import ignore

if TYPE_CHECKING:
    from mmr1_ds.cluster.ranks import Counter, Ranks
    from mmr1_ds.data.dataset import PromptDataset
    from mmr1_ds.rollout.base import Enough, SharingEngine

Advance = Callable[[int], None]  # takes how many more responses are there

_NO_SLOT = -1  # of a probe


class Unread:
    """Prompts of which the index alone is known."""

    def prompts(self, indices: Sequence[int] | np.ndarray) -> list[Prompt]:
        """A prompt for each index, empty but for it."""
        return [Prompt(int(index), "", (), (), "") for index in indices]


def unread(data: PromptDataset, queue: SharedQueue | None) -> PromptDataset | Unread:
    """What requests take their prompts from: those of a queue are read where they are taken."""
    return data if queue is None else Unread()


class SharedQueue:
    """Shares the requests for prompts of one data set out among the ranks while they are sampled."""

    def __init__(
        self,
        engine: SharingEngine,
        data: PromptDataset,
        expand_ahead: Callable[[Sequence[Prompt]], None],
        ranks: Ranks,
        counter: Counter,
    ) -> None:
        """
        Args:
            expand_ahead: begins to process the images of prompts that will be trained on.
            counter: of the ranks, which nothing but such queues counts with.
        """
        self._engine, self._data, self._expand_ahead = engine, data, expand_ahead
        self._ranks, self._counter = ranks, counter

    def of(self, data: PromptDataset) -> SharedQueue:
        """The queue for prompts of another data set, between whose calls and those of this one no rank samples."""
        return SharedQueue(self._engine, data, self._expand_ahead, self._ranks, self._counter)

    def sample(self, in_flight: InFlight, settings: SamplingSettings, enough: Enough) -> InFlight:
        """Sample the groups of a batch that no rank has. Collective.

        Args: in_flight: this rank's share before anything is sampled, of which prompts need not be read.
        Returns: the groups that are on this rank now; those of all ranks are the batch. Raises: SamplingAbandoned.
        """
        all_slots = in_flight.slots + [_NO_SLOT] * (len(in_flight.requests) - len(in_flight.slots))
        asked = enumerate(zip(all_slots, in_flight.requests, strict=True))
        rows = [_row(slot, request) for at, (slot, request) in asked if at not in in_flight.groups]
        table, found = self._sampled(rows, settings, enough, ignore, self._expand_ahead)
        had = sorted(in_flight.groups)
        slots = [all_slots[at] for at in had]
        requests, groups = [in_flight.requests[at] for at in had], [in_flight.groups[at] for at in had]
        for number, group in sorted(found.items()):
            slots.append(int(table[number, 0]))
            requests.append(_request(table[number], group.prompt))
            groups.append(group)
        order = sorted(range(len(slots)), key=lambda at: (slots[at] == _NO_SLOT, slots[at]))
        return InFlight(
            in_flight.step,
            [requests[at] for at in order],
            [slots[at] for at in order if slots[at] != _NO_SLOT],
            {position: groups[at] for position, at in enumerate(order)},
        )

    def sample_shares(
        self, requests: Sequence[RolloutRequest], settings: SamplingSettings, enough: Enough, advance: Advance
    ) -> dict[int, RolloutGroup]:
        """Sample what no batch is made of: each group comes back to the rank that asked, by `bring_home`. Collective.

        Args: requests: this rank's, of which prompts need not be read. Returns: groups that are on this rank now, by
        their slots for `bring_home`. Raises: SamplingAbandoned.
        """
        rank, size = self._ranks.rank, self._ranks.size
        rows = [_row(position * size + rank, request) for position, request in enumerate(requests)]
        table, found = self._sampled(rows, settings, enough, advance, expand_ahead=lambda prompts: None)
        return {int(table[number, 0]): group for number, group in found.items()}

    def bring_home(self, scored: Mapping[int, ScoredGroup]) -> list[ScoredGroup]:
        """Return the groups of this rank's own requests, in their order. Collective.

        Of groups that another rank sampled the prompts are empty but for the index. Args: scored: by slots.
        """
        parts: list[dict[int, ScoredGroup]] = [{} for _ in range(self._ranks.size)]
        for slot, item in scored.items():
            position, asker = divmod(slot, self._ranks.size)
            parts[asker][position] = item
        own, parts[self._ranks.rank] = parts[self._ranks.rank], {}
        for arrays in self._ranks.exchange_arrays([groups_to_arrays(part) for part in parts], "bring groups home"):
            own |= groups_from_arrays(arrays)
        return [own[position] for position in sorted(own)]

    def _sampled(
        self,
        rows: Sequence[tuple[int, ...]],
        settings: SamplingSettings,
        enough: Enough,
        advance: Advance,
        expand_ahead: Callable[[Sequence[Prompt]], None],
    ) -> tuple[np.ndarray, dict[int, RolloutGroup]]:
        """Sample what this rank's rows and those of the others ask for. Collective.

        Returns: the table of all, and the groups of this rank by their rows in it.
        """
        if self._ranks.rank == 0:
            self._counter.reset()  # before the others come out of the next collective, and after the last sampling
        own = np.array(rows, dtype=np.int64).reshape(-1, 5)
        table = np.concatenate(self._ranks.all_gather_array(own, "share requests"))
        slots, tokens = table[:, 0], table[:, 4]
        # The longest first, before them those of which nothing is known; else as drawn, whichever rank had them, and
        # probes last, which fill the tail.
        table = table[np.lexsort((slots, slots == _NO_SLOT, np.where(tokens == 0, -np.inf, -tokens)))]
        queue = _Queue(table, self._data, expand_ahead, self._counter)
        return table, self._engine.collect_shared(queue, settings, enough, advance)


def _row(slot: int, request: RolloutRequest) -> tuple[int, ...]:
    return slot, request.prompt.index, request.num_responses, request.seed, request.expected_tokens


def _request(row: np.ndarray, prompt: Prompt) -> RolloutRequest:
    slot, _, num_responses, seed, expected_tokens = row.tolist()
    return RolloutRequest(prompt, num_responses, seed, can_wait=slot == _NO_SLOT, expected_tokens=expected_tokens)


class _Queue:
    """A table of requests, (R, 5) int64: slot, index, responses, seed, expected tokens; the same on every rank."""

    def __init__(
        self,
        table: np.ndarray,
        data: PromptDataset,
        expand_ahead: Callable[[Sequence[Prompt]], None],
        counter: Counter,
    ) -> None:
        self._table, self._data, self._expand_ahead, self._counter = table, data, expand_ahead, counter
        self.num_responses = int(table[:, 2].sum())

    def take(self) -> int | None:
        """See RequestQueue."""
        number = self._counter.next()
        return number if number < len(self._table) else None

    def request(self, number: int) -> RolloutRequest:
        """See RequestQueue."""
        prompt = self._data[int(self._table[number, 1])]
        request = _request(self._table[number], prompt)
        if not request.can_wait:  # a probe is not trained on
            self._expand_ahead([prompt])
        return request
