"""What a step does with its batch: log-probabilities and values, advantages, updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmr1_ds.algorithm.experience import Experience, make_experience
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.loop.batches import Batch
from mmr1_ds.monitoring.clock import StageClock

if TYPE_CHECKING:
    from torch import Tensor

    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.critic import Critic
    from mmr1_ds.engine.reference import AdapterlessReference, Reference
    from mmr1_ds.engine.zero_engine import Pair


@dataclass(frozen=True)
class Judged:
    """What the models say of a batch's responses, one tensor (T,) a response; None for what the step does not need."""

    pairs: list[Pair]
    old: list[Tensor] | None
    reference: list[Tensor] | None
    values: list[Tensor] | None


class Learners:
    """The actor, and beside it the reference and the critic where the run has them."""

    def __init__(
        self,
        algorithm: AlgorithmConfig,
        critic_warmup: int,
        *,
        actor: Actor,
        reference: Reference | AdapterlessReference | None,
        critic: Critic | None,
        ranks: Ranks,
    ) -> None:
        """critic_warmup: steps at first in which only the critic learns."""
        self._algorithm, self._critic_warmup = algorithm, critic_warmup
        self._actor, self._reference, self._critic, self._ranks = actor, reference, critic, ranks
        self._penalises = reference is not None and not algorithm.use_kl_loss  # the KL is taken off the reward
        self.num_steps_done = 0  # steps whose update is done

    def judge(self, step: int, batch: Batch, clock: StageClock) -> Judged:
        """Compute the log-probabilities and values that the update of `step` needs. Collective."""
        groups = [item.scored.group for item in batch.groups]
        pairs = [(group.prompt, response.token_ids) for group in groups for response in group.responses]
        old = reference = values = None
        learns = step > self._critic_warmup
        if self._penalises or (learns and self._actor.needs_old_log_probs(len(pairs))):
            with clock("old"):
                old = self._actor.log_probs(pairs)
        if self._reference is not None and (self._penalises or learns):
            with clock("ref"):
                reference = self._reference.log_probs(pairs)
        if self._critic is not None:
            with clock("values"):
                values = self._critic.values(pairs)
        return Judged(pairs, old, reference, values)

    def experience(self, batch: Batch, judged: Judged, clock: StageClock) -> Experience:
        """Advantages of every response. Collective."""
        with clock("adv"):
            both = (judged.old, judged.reference) if self._penalises else None
            return make_experience(
                batch.groups, self._algorithm, both, self._actor.kl, self._ranks, judged.values  # type: ignore[arg-type]
            )

    def update(self, step: int, experience: Experience, judged: Judged, clock: StageClock) -> dict[str, float]:
        """Train the critic, if there is one, and the actor. Collective. Returns: metrics."""
        metrics = dict(experience.metrics)
        if self._critic is not None and judged.values is not None and experience.returns is not None:
            with clock("update_critic"):
                metrics |= self._critic.update(judged.pairs, judged.values, experience.returns)
        if step > self._critic_warmup:
            reference = None if self._penalises else judged.reference
            with clock("update_actor"):
                metrics |= self._actor.update(experience.trajectories, judged.old, reference)
        self.num_steps_done = step
        return metrics
