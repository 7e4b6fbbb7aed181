"""What every rollout engine offers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from mmr1_ds.errors import UserError
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings, WeightInfo

if TYPE_CHECKING:
    from torch import Tensor


# Takes the groups that are there, by the positions of their requests. Returns: whether the others may be given up.
Enough = Callable[[Mapping[int, RolloutGroup]], bool]


def never(groups: Mapping[int, RolloutGroup]) -> bool:
    """Let all be sampled."""
    return False


def ignore(count: int) -> None:
    """Take how many more responses are sampled, where nobody asked."""


class ServersGone(UserError):
    """No rollout server has answered for too long. Raised on every rank at the same call."""


class Policy(Protocol):
    """What a rollout engine needs of the policy that is trained: the engine's actor has all of it."""

    num_updates_done: int  # optimiser steps so far: the version of its weights

    @property
    def model(self) -> Any:
        """The transformers model inside, partitioned. Only `engine=hf` looks at it."""
        ...

    def weights(self, as_held: bool = False) -> Iterator[tuple[str, Tensor]]:
        """The current weights, whole, under transformers' names. Collective: all ranks exhaust it.

        as_held: in the shapes of the model's own parameters, not in those of published checkpoints.
        """
        ...

    def adapter_weights(self) -> Iterator[tuple[str, Tensor]]:
        """The factors of LoRA's adapters, whole, as `LAYER.lora_A.weight` (rank, in) and `LAYER.lora_B.weight`.

        LAYER is the layer's name in transformers' model; B (out, rank) comes times the scale. Collective: as `weights`.
        """
        ...

    def weight_buckets(self) -> list[list[WeightInfo]]:
        """What `weights` will yield, by the buckets that are gathered together. Not a collective."""
        ...


class CountedWeights:
    """Weights that pass by on their way to a rollout engine, counted."""

    def __init__(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        self._weights = weights
        self.num_bytes = 0  # of those that came by

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, weight in self._weights:
            self.num_bytes += weight.numel() * weight.element_size()
            yield name, weight


class RolloutEngine(Protocol):
    """Samples responses from the actor's current policy."""

    def submit(self, requests: Sequence[RolloutRequest], settings: SamplingSettings) -> Any:
        """Ask for responses that `collect` will give. An engine beside the trainer starts now. Not a collective.

        Returns: what `collect` takes.
        """
        ...

    def collect(
        self, submitted: Any, enough: Enough = never, advance: Callable[[int], None] = ignore
    ) -> list[RolloutGroup | None]:
        """The groups of one `submit`, once, in the order of its requests; None for one that was given up.

        Given up are those that can wait, and all that are still sampled when `enough` says so: an engine that cannot
        stop them samples them all.
        Collective: all ranks, in the same order, each with its own requests (any number of them, also none).
        Args: advance: takes how many more of this rank's responses are there, while the others are sampled.
        Raises: ServersGone, SamplingAbandoned, on every rank.
        """
        ...

    def sync_weights(self, policy: Policy) -> int:
        """Take over the policy's weights. Collective. On return the next generation samples from them.

        Returns: the bytes that it was given; 0 for an engine that reads the policy's own weights.
        """
        ...

    def sleep(self, keep_weights: bool) -> None:
        """Sampling is over for now: give memory back to the actor. Every rank calls it. Not a collective.

        keep_weights: sampling goes on without a sync before it; else a sync comes first.
        """
        ...

    def metrics(self) -> dict[str, float]:
        """What there is to count since the last call, `rollout/*`. Collective."""
        ...

    def close(self) -> None:
        """Free the engine. Not a collective."""
        ...


class RequestQueue(Protocol):
    """Requests of all ranks, each of which the engine that takes it samples."""

    num_responses: int  # of all requests

    def take(self) -> int | None:
        """The number of the next request, which no other engine gets; None = none is left. Not a collective."""
        ...

    def request(self, number: int) -> RolloutRequest:
        """The request with its prompt, which is read now. Not a collective."""
        ...


class SharingEngine(Protocol):
    """A rollout engine that samples from a queue."""

    def collect_shared(
        self,
        queue: RequestQueue,
        settings: SamplingSettings,
        enough: Enough = never,
        advance: Callable[[int], None] = ignore,
    ) -> dict[int, RolloutGroup]:
        """Take requests as there is room for them, until none is left. Collective.

        Returns: this rank's groups by the numbers of their requests; each request is on one rank, whichever.
        Args: as of `RolloutEngine.collect`. Raises: SamplingAbandoned, on every rank.
        """
        ...


def generate(
    engine: RolloutEngine,
    requests: Sequence[RolloutRequest],
    settings: SamplingSettings,
    advance: Callable[[int], None] = ignore,
    watch: Enough = never,
) -> list[RolloutGroup]:
    """Sample all that the requests ask for, none of which can wait, in their order. Collective.

    Args: watch: as `enough` of `collect`, and never says so. Raises: as `collect`.
    """
    groups = [group for group in engine.collect(engine.submit(requests, settings), watch, advance) if group is not None]
    assert len(groups) == len(requests), "generate is for requests that cannot wait"
    return groups


def longest_first(requests: Sequence[RolloutRequest], num_at_once: int) -> list[int]:
    """The positions of requests in the order to begin them in: the longest expected responses first.

    What begins last then ends soon, and no long response is left when the others are done. Requests of which nothing
    is known come first of all; where all fit at once, and among equals, the order stays.
    Args: num_at_once: responses that the engine samples at once.
    """
    positions = range(len(requests))
    if sum(request.num_responses for request in requests) <= num_at_once:
        return [*positions]
    return sorted(positions, key=lambda place: -(requests[place].expected_tokens or math.inf))


@dataclass(frozen=True)
class Submitted:
    """Requests that wait for `collect`."""

    requests: Sequence[RolloutRequest]
    settings: SamplingSettings


class InTurn:
    """For engines that share the trainer's devices: they sample when `collect` is called."""

    def submit(self, requests: Sequence[RolloutRequest], settings: SamplingSettings) -> Submitted:
        """See RolloutEngine."""
        return Submitted(requests, settings)

    def sleep(self, keep_weights: bool) -> None:
        """See RolloutEngine. For engines without memory of their own that could be given back."""

    def metrics(self) -> dict[str, float]:
        """See RolloutEngine."""
        return {}
