"""One queue for the requests of all ranks, `worker.rollout.shared_queue`: a rank whose engine has room takes the next.

Otherwise every rank has its prompts before anything is sampled, and one that is done waits for the longest responses of
the others. Seeds follow from the prompts' slots, not from the ranks; yet a response depends in its rounding on what it
is computed together with, which the queue leaves to the engines' speed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.loop.in_flight import InFlight
from mmr1_ds.records import Prompt, RolloutRequest, SamplingSettings

if TYPE_CHECKING:
    from mmr1_ds.cluster.ranks import Counter, Ranks
    from mmr1_ds.data.dataset import PromptDataset
    from mmr1_ds.rollout.base import Enough, SharingEngine

_NO_SLOT = -1  # of a probe


class Unread:
    """Prompts of which the index alone is known."""

    def prompts(self, indices: Sequence[int] | np.ndarray) -> list[Prompt]:
        """A prompt for each index, empty but for it."""
        return [Prompt(int(index), "", (), (), "") for index in indices]


class SharedQueue:
    """Shares the requests of a batch out among the ranks while they are sampled."""

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
            counter: of the ranks, which nothing else counts with.
        """
        self._engine, self._data, self._expand_ahead = engine, data, expand_ahead
        self._ranks, self._counter = ranks, counter

    def sample(self, in_flight: InFlight, settings: SamplingSettings, enough: Enough) -> InFlight:
        """Sample the groups that no rank has. Collective.

        Args: in_flight: this rank's share before anything is sampled, of which prompts need not be read.
        Returns: the groups that are on this rank now; those of all ranks are the batch. Raises: SamplingAbandoned.
        """
        if self._ranks.rank == 0:
            self._counter.reset()  # before the others come out of the next collective, and after the last sampling
        missing = [at for at in range(len(in_flight.requests)) if at not in in_flight.groups]
        rows = np.array([_row(in_flight, at) for at in missing], dtype=np.int64).reshape(-1, 5)
        table = np.concatenate(self._ranks.all_gather_array(rows, "share requests"))
        slots, tokens = table[:, 0], table[:, 4]
        # The longest first, before them those of which nothing is known; else as drawn, whichever rank had them, and
        # probes last, which fill the tail.
        table = table[np.lexsort((slots, slots == _NO_SLOT, np.where(tokens == 0, -np.inf, -tokens)))]
        found = self._engine.collect_shared(
            _Queue(table, self._data, self._expand_ahead, self._counter), settings, enough
        )
        had = sorted(in_flight.groups)
        slots = [in_flight.slots[at] if at < len(in_flight.slots) else _NO_SLOT for at in had]
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


def _row(in_flight: InFlight, position: int) -> tuple[int, ...]:
    request = in_flight.requests[position]
    slot = in_flight.slots[position] if position < len(in_flight.slots) else _NO_SLOT
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
