"""Whose turn the devices are: the rollout's while responses are sampled, the learners' while they learn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

from mmr1_ds.cluster.preemption import SamplingAbandoned
from mmr1_ds.monitoring.clock import StageClock
from mmr1_ds.rollout.base import RolloutEngine, ServersGone

if TYPE_CHECKING:
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.critic import Critic


class Turns:
    """Hands the devices over between rollout engine and learners; with `worker.actor.offload_states` memory too."""

    def __init__(self, rollout: RolloutEngine, actor: Actor, critic: Critic | None) -> None:
        self._rollout, self._actor, self._critic = rollout, actor, critic

    @contextmanager
    def rollout(self, then_learns: bool = False) -> Iterator[None]:
        """Inside, the devices are the rollout's, where the run asks for it; after, the learners'.

        then_learns: the actor's weights change before anything more is sampled.
        """
        with self._offloaded():
            try:
                yield
            except (ServersGone, SamplingAbandoned):
                self._rollout.sleep(keep_weights=False)  # nothing more is sampled
                raise
            self._rollout.sleep(keep_weights=not then_learns)  # before the learners' states come back

    def sync_weights(self, clock: StageClock | None = None) -> None:
        """Give the rollout the actor's weights. Collective."""
        with nullcontext() if clock is None else clock("sync"), self._offloaded(with_weights=False):
            num_bytes = self._rollout.sync_weights(self._actor)  # its weights need room beside the actor's
        if clock is not None:
            clock.counts["perf/sync_bytes"] = float(num_bytes)

    @contextmanager
    def _offloaded(self, with_weights: bool = True) -> Iterator[None]:
        """The states of what learns in host memory. with_weights: False = the actor's weights stay, to be read."""
        critic = self._critic
        with self._actor.offloaded(with_weights), nullcontext() if critic is None else critic.offloaded():
            yield
