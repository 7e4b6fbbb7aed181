"""A batch whose responses are being sampled, and how a checkpoint keeps one that was begun ahead of its step.

An *index* is a place in the data set, a *slot* a place in the batch, a *position* a place among a rank's requests.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.records import Prompt, Response, RolloutGroup, RolloutRequest

if TYPE_CHECKING:
    from mmr1_ds.rollout.base import Enough, RolloutEngine

_OPEN, _SAMPLED, _GIVEN_UP = range(3)
_NO_SLOT = -1


@dataclass
class InFlight:
    """This rank's requests of one batch and the groups that have come back."""

    step: int
    requests: list[RolloutRequest]
    slots: list[int]  # of the training groups, which come first; the other requests are probes
    groups: dict[int, RolloutGroup | None] = field(default_factory=dict)  # by position; None was given up
    submitted: Any = None
    asked: list[int] = field(default_factory=list)  # positions that were submitted

    def begin(self, engine: RolloutEngine, settings: Any) -> None:
        """Ask for every group that is not there. Not a collective."""
        self.asked = [position for position in range(len(self.requests)) if position not in self.groups]
        self.submitted = engine.submit([self.requests[position] for position in self.asked], settings)

    def wait(self, engine: RolloutEngine, enough: Enough) -> None:
        """Wait for what was submitted, or for enough of it; a second call does nothing. Collective."""
        if self.submitted is not None:
            asked, of_before = self.asked, {at: group for at, group in self.groups.items() if group is not None}

            def is_enough(groups: Mapping[int, RolloutGroup]) -> bool:
                return enough(of_before | {asked[place]: group for place, group in groups.items()})

            found = engine.collect(self.submitted, is_enough)
            self.groups.update(zip(asked, found, strict=True))
            self.submitted = None


def write_in_flight(folder: Path, rank: int, batches: Sequence[InFlight]) -> None:
    """Write this rank's part as one safetensors file. Groups that have not come back are asked for again later."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    for batch in batches:
        arrays |= {f"{batch.step}.{name}": array for name, array in _to_arrays(batch).items()}
    save_file(arrays, str(folder / f"rank_{rank}.safetensors"))


def read_in_flight(
    folder: Path,
    prompt: Callable[[int], Prompt],
    own_slots: Callable[[Mapping[int, RolloutRequest]], Collection[int]],
    rank: int,
    size: int,
) -> list[InFlight]:
    """Read what all ranks wrote, shared out over the ranks of this run: training groups by slot, probes in turn.

    Args: prompt: of an index; own_slots: this rank's among a batch's slots, of which it is told the requests.
    """
    from safetensors.numpy import load_file

    found: dict[int, tuple[list[tuple[int, RolloutRequest, Any]], list[tuple[RolloutRequest, Any]]]] = {}
    for path in sorted(folder.glob("rank_*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank_"))):
        arrays = load_file(str(path))
        for step in sorted({int(name.partition(".")[0]) for name in arrays}):
            training, probes = found.setdefault(step, ([], []))
            part = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{step}.")}
            for slot, request, group in _rows(part):
                if slot == _NO_SLOT:
                    probes.append((request, group))
                else:
                    training.append((slot, request, group))
    batches = []
    for step, (training, probes) in sorted(found.items()):
        own = own_slots({slot: request for slot, request, _ in training})
        training = sorted((row for row in training if row[0] in own), key=lambda row: row[0])
        rows = [(request, group) for _, request, group in training] + probes[rank::size]
        requests = [dataclasses.replace(request, prompt=prompt(request.prompt.index)) for request, _ in rows]
        batch = InFlight(step, requests, [slot for slot, *_ in training])
        for position, (request, (_, group)) in enumerate(zip(requests, rows, strict=True)):
            if group is not _OPEN:
                batch.groups[position] = group and dataclasses.replace(group, prompt=request.prompt)
        batches.append(batch)
    return batches


def pack_responses(responses: Sequence[Response]) -> dict[str, np.ndarray]:
    """Lay B responses of T tokens in all end to end, for a file or another rank. Inverse: `unpack_responses`."""
    spans = [response.policy_versions for response in responses]
    experts = [response.experts for response in responses if response.experts is not None]
    routed = {}
    if experts:
        assert len(experts) == len(responses), "experts of some responses alone"
        routed = {
            "num_routed": np.array([len(rows) for rows in experts], dtype=np.int64),  # (B,)
            "experts": np.concatenate(experts),
        }
    return {
        "length": np.array([len(response.token_ids) for response in responses], dtype=np.int64),  # (B,)
        "finished": np.array([response.finished for response in responses], dtype=np.bool_),
        "num_spans": np.array([len(span) for span in spans], dtype=np.int64),
        "spans": np.array([pair for span in spans for pair in span], dtype=np.int64).reshape(-1, 2),
        "token_ids": np.concatenate([np.empty(0, dtype=np.int32), *(r.token_ids for r in responses)]),  # (T,)
        "logprobs": np.concatenate([np.empty(0, dtype=np.float32), *(r.logprobs for r in responses)]),
        **routed,
    }


def unpack_responses(arrays: Mapping[str, np.ndarray]) -> list[Response]:
    """Cut the arrays of `pack_responses` up again. Files of earlier versions have wider types, which are cast."""
    token_ids, logprobs = arrays["token_ids"].astype(np.int32), arrays["logprobs"].astype(np.float32)
    spans = [tuple(pair) for pair in arrays["spans"].tolist()]
    experts: list[np.ndarray | None] = [None] * len(arrays["length"])
    if "experts" in arrays:
        experts = [arrays["experts"][part].copy() for part in _slices(arrays["num_routed"])]
    return [
        # Copies: a view of one response would keep the arrays of all.
        Response(token_ids[part].copy(), logprobs[part].copy(), finished, tuple(spans[own]), routed)
        for part, own, finished, routed in zip(
            _slices(arrays["length"]), _slices(arrays["num_spans"]), arrays["finished"].tolist(), experts, strict=True
        )
    ]


def _slices(lengths: np.ndarray) -> Iterator[slice]:
    """Where each of some parts that lie end to end is."""
    ends = np.cumsum(lengths)
    return map(slice, (ends - lengths).tolist(), ends.tolist())


def _to_arrays(batch: InFlight) -> dict[str, np.ndarray]:
    """R requests, G of them sampled with N responses each."""
    slots = batch.slots + [_NO_SLOT] * (len(batch.requests) - len(batch.slots))
    found = [batch.groups.get(position, _OPEN) for position in range(len(batch.requests))]
    states = [_OPEN if group is _OPEN else _GIVEN_UP if group is None else _SAMPLED for group in found]
    groups = [group for group in found if isinstance(group, RolloutGroup)]
    return {
        "place": np.array(slots, dtype=np.int64),  # (R,); under the name that earlier checkpoints have it by
        "index": np.array([request.prompt.index for request in batch.requests], dtype=np.int64),
        "num_responses": np.array([request.num_responses for request in batch.requests], dtype=np.int64),
        "seed": np.array([request.seed for request in batch.requests], dtype=np.int64),
        "can_wait": np.array([request.can_wait for request in batch.requests], dtype=np.bool_),
        "expected_tokens": np.array([request.expected_tokens for request in batch.requests], dtype=np.int64),
        "state": np.array(states, dtype=np.int64),
        "version": np.array([group.policy_version for group in groups], dtype=np.int64),  # (G,)
        **pack_responses([response for group in groups for response in group.responses]),
    }


def _rows(arrays: dict[str, np.ndarray]) -> list[tuple[int, RolloutRequest, Any]]:
    """(slot, request, group, or None for one given up, or _OPEN), the prompts empty but for their index."""
    responses, versions = iter(unpack_responses(arrays)), iter(arrays["version"].tolist())
    rows = []
    names = "place", "index", "num_responses", "seed", "can_wait", "expected_tokens", "state"
    arrays = {"expected_tokens": np.zeros(len(arrays["place"]), dtype=np.int64)} | arrays  # of earlier versions
    columns = (arrays[name].tolist() for name in names)
    for slot, index, num_responses, seed, can_wait, expected, state in zip(*columns, strict=True):
        bare = Prompt(index, "", (), (), "")
        group: Any = _OPEN if state == _OPEN else None
        if state == _SAMPLED:
            group = RolloutGroup(bare, tuple(islice(responses, num_responses)), next(versions))
        request = RolloutRequest(bare, num_responses, seed, can_wait=can_wait, expected_tokens=expected)
        rows.append((slot, request, group))
    return rows
