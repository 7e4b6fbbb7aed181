"""What every rollout engine offers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from mmr1_ds.engine.actor import Actor
from mmr1_ds.records import RolloutGroup, RolloutRequest, SamplingSettings


class RolloutEngine(Protocol):
    """Samples responses from the actor's current policy."""

    def generate(self, requests: Sequence[RolloutRequest], settings: SamplingSettings) -> list[RolloutGroup]:
        """The responses that each request asks for, in the order of the requests.

        Collective: all ranks, each with its own requests (any number of them, also none).
        """
        ...

    def sync_weights(self, actor: Actor) -> None:
        """Take over the actor's weights. Collective. On return the next generation samples from them."""
        ...

    def close(self) -> None:
        """Free the engine. Not a collective."""
        ...
