"""A batch while its responses are sampled, and how a checkpoint keeps those that were begun ahead of their step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmr1_ds.records import Prompt, Response, RolloutGroup, RolloutRequest

if TYPE_CHECKING:
    from mmr1_ds.rollout.base import RolloutEngine

_OPEN, _SAMPLED, _GIVEN_UP = range(3)
_NO_PLACE = -1


@dataclass
class Sampling:
    """This rank's requests of one batch and the groups that have come back."""

    step: int
    requests: list[RolloutRequest]
    places: list[int]  # of the training groups in the batch, which come first; the other requests are probes
    groups: dict[int, RolloutGroup | None] = field(default_factory=dict)  # by position; None was given up
    submitted: Any = None
    asked: list[int] = field(default_factory=list)  # positions that were submitted

    def submit(self, engine: RolloutEngine, settings: Any) -> None:
        """Ask for every group that is not there. Not a collective."""
        self.asked = [position for position in range(len(self.requests)) if position not in self.groups]
        self.submitted = engine.submit([self.requests[position] for position in self.asked], settings)

    def collect(self, engine: RolloutEngine) -> None:
        """Wait for what was submitted; a second call does nothing. Collective."""
        if self.submitted is not None:
            self.groups.update(zip(self.asked, engine.collect(self.submitted), strict=True))
            self.submitted = None


def write_samplings(folder: Path, rank: int, samplings: Sequence[Sampling]) -> None:
    """Write this rank's part, one safetensors file. Groups that have not been collected are asked for again later."""
    from safetensors.numpy import save_file

    arrays: dict[str, np.ndarray] = {}
    for item in samplings:
        arrays |= {f"{item.step}.{name}": array for name, array in _arrays(item).items()}
    save_file(arrays, str(folder / f"rank_{rank}.safetensors"))


def read_samplings(
    folder: Path, prompt: Callable[[int], Prompt], is_own: Callable[[int], bool], rank: int, size: int
) -> list[Sampling]:
    """What all ranks wrote, shared out over the ranks of this run: training groups by their place, probes in turn.

    Args: prompt: of a position in the data set; is_own: whether a place of a batch is this rank's.
    """
    from safetensors.numpy import load_file

    found: dict[int, tuple[list[tuple[int, RolloutRequest, Any]], list[tuple[RolloutRequest, Any]]]] = {}
    for path in sorted(folder.glob("rank_*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank_"))):
        arrays = load_file(str(path))
        for step in sorted({int(name.partition(".")[0]) for name in arrays}):
            training, probes = found.setdefault(step, ([], []))
            part = {name.partition(".")[2]: array for name, array in arrays.items() if name.startswith(f"{step}.")}
            for place, request, group in _rows(part):
                if place == _NO_PLACE:
                    probes.append((request, group))
                elif is_own(place):
                    training.append((place, request, group))
    samplings = []
    for step, (training, probes) in sorted(found.items()):
        training.sort(key=lambda row: row[0])
        rows = [(request, group) for _, request, group in training] + probes[rank::size]
        requests = [dataclasses.replace(request, prompt=prompt(request.prompt.index)) for request, _ in rows]
        item = Sampling(step, requests, [place for place, *_ in training])
        for position, (request, (_, group)) in enumerate(zip(requests, rows, strict=True)):
            if group is not _OPEN:
                item.groups[position] = group and dataclasses.replace(group, prompt=request.prompt)
        samplings.append(item)
    return samplings


def _arrays(item: Sampling) -> dict[str, np.ndarray]:
    """R requests, G of them sampled with N responses each, T tokens in all."""
    places = item.places + [_NO_PLACE] * (len(item.requests) - len(item.places))
    found = [item.groups.get(position, _OPEN) for position in range(len(item.requests))]
    states = [_OPEN if group is _OPEN else _GIVEN_UP if group is None else _SAMPLED for group in found]
    groups = [group for group in found if isinstance(group, RolloutGroup)]
    responses = [response for group in groups for response in group.responses]
    spans = [response.policy_versions for response in responses]
    return {
        "place": np.array(places, dtype=np.int64),  # (R,)
        "index": np.array([request.prompt.index for request in item.requests], dtype=np.int64),
        "num_responses": np.array([request.num_responses for request in item.requests], dtype=np.int64),
        "seed": np.array([request.seed for request in item.requests], dtype=np.int64),
        "can_wait": np.array([request.can_wait for request in item.requests], dtype=np.bool_),
        "state": np.array(states, dtype=np.int64),
        "version": np.array([group.policy_version for group in groups], dtype=np.int64),  # (G,)
        "length": np.array([len(response.token_ids) for response in responses], dtype=np.int64),  # (G * N,)
        "finished": np.array([response.finished for response in responses], dtype=np.bool_),
        "num_spans": np.array([len(span) for span in spans], dtype=np.int64),
        "spans": np.array([pair for span in spans for pair in span], dtype=np.int64).reshape(-1, 2),
        "token_ids": np.array([token for r in responses for token in r.token_ids], dtype=np.int64),  # (T,)
        "logprobs": np.array([value for r in responses for value in r.logprobs], dtype=np.float64),
    }


def _rows(arrays: dict[str, np.ndarray]) -> list[tuple[int, RolloutRequest, Any]]:
    """(place, request, group, or None for one given up, or _OPEN), the prompts empty but for their index."""
    cuts, span_cuts = np.cumsum(arrays["length"])[:-1], np.cumsum(arrays["num_spans"])[:-1]
    responses = [
        Response(
            tuple(tokens.tolist()), tuple(logprobs.tolist()), bool(finished), tuple((a, b) for a, b in spans.tolist())
        )
        for tokens, logprobs, finished, spans in zip(
            np.split(arrays["token_ids"], cuts),
            np.split(arrays["logprobs"], cuts),
            arrays["finished"],
            np.split(arrays["spans"], span_cuts),
            strict=False,  # without any response, split still gives one empty part
        )
    ]
    rows, taken, num_groups = [], 0, 0
    columns = (arrays[name].tolist() for name in ("place", "index", "num_responses", "seed", "can_wait", "state"))
    for place, index, num_responses, seed, can_wait, state in zip(*columns, strict=True):
        bare = Prompt(index, "", (), (), "")
        group: Any = _OPEN if state == _OPEN else None
        if state == _SAMPLED:
            part = tuple(responses[taken : taken + num_responses])
            group = RolloutGroup(bare, part, int(arrays["version"][num_groups]))
            taken, num_groups = taken + num_responses, num_groups + 1
        rows.append((place, RolloutRequest(bare, num_responses, seed, can_wait=can_wait), group))
    return rows
