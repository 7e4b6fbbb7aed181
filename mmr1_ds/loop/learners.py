"""What a step does with its batch: log-probabilities and values, advantages, updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmr1_ds.algorithm.experience import Experience, experts_of, kl_off_reward, make_experience, pairs_of
from mmr1_ds.cluster.ranks import Ranks
from mmr1_ds.config import AlgorithmConfig
from mmr1_ds.loop.batches import Batch
from mmr1_ds.monitoring.clock import StageClock

if TYPE_CHECKING:
    from mmr1_ds.engine.actor import Actor
    from mmr1_ds.engine.critic import Critic
    from mmr1_ds.engine.reference import AdapterlessReference, Reference


@dataclass(frozen=True)
class Judged:
    """What the models say of a batch's responses, one array (T,) a response; None for what the step does not need."""

    old: list[np.ndarray] | None
    entropies: list[np.ndarray] | None
    reference: list[np.ndarray] | None
    values: list[np.ndarray] | None
    experts: Sequence[np.ndarray] | None = None  # where the update sends the tokens of a mixture, see Trajectory


@dataclass(kw_only=True, eq=False)
class Learners:
    """The actor, and beside it the reference and the critic where the run has them."""

    algorithm: AlgorithmConfig
    critic_warmup: int  # steps at first in which only the critic learns
    reference_update_freq: int  # steps after which the reference follows the actor; 0 = never
    reward_weights: Mapping[str, float]  # gdpo: of each part of the reward, by its name
    actor: Actor
    reference: Reference | AdapterlessReference | None
    critic: Critic | None
    ranks: Ranks
    num_steps_done: int = field(init=False, default=0)  # steps whose update is done

    def save_reference(self, folder: Path) -> None:
        """Write this rank's part of a reference that has moved. Not a collective. Raises: OSError."""
        if self.reference is not None:
            self.reference.save(folder)

    def load_reference(self, folder: Path) -> None:
        """Read what `save_reference` wrote, if anything. Collective."""
        if self.reference is not None:
            self.reference.load(folder)

    def judge(self, step: int, batch: Batch, clock: StageClock) -> Judged:
        """Compute the log-probabilities and values that the update of `step` needs. Collective."""
        pairs = pairs_of(batch.groups)
        old = entropies = reference = values = None
        experts: Sequence[np.ndarray] | None = experts_of(batch.groups)
        learns = step > self.critic_warmup
        penalises = self.reference is not None and kl_off_reward(self.algorithm)
        if penalises or (learns and self.actor.needs_old_log_probs(len(batch.groups))):
            with clock("old"):
                old, entropies, experts = self.actor.old_policy(pairs, experts)
        if self.reference is not None and (penalises or learns):
            with clock("ref"):
                reference = self.reference.log_probs(pairs)
        if self.critic is not None:
            with clock("values"):
                values = self.critic.values(pairs)
        return Judged(old, entropies, reference, values, experts)

    def experience(self, batch: Batch, judged: Judged, clock: StageClock) -> Experience:
        """Compute the rewards less the KL, and the advantages. Collective."""
        with clock("adv"):
            return make_experience(
                batch.groups,
                self.algorithm,
                self.actor.kl,
                self.ranks,
                old=judged.old,
                ref=judged.reference,
                entropies=judged.entropies,
                values=judged.values,
                experts=judged.experts,
                baselines=batch.baselines,
                reward_weights=self.reward_weights,
            )

    def update(self, step: int, experience: Experience, clock: StageClock) -> dict[str, float]:
        """Train the critic, if there is one, and the actor. Collective. Returns: metrics."""
        metrics = dict(experience.metrics)
        if self.critic is not None:
            with clock("update_critic"):
                metrics |= self.critic.update(experience.trajectories, experience.group_sizes)
        if step > self.critic_warmup:
            with clock("update_actor"):
                metrics |= self.actor.update(experience.trajectories, experience.group_sizes)
        if self.reference is not None and self.reference_update_freq and step % self.reference_update_freq == 0:
            with clock("ref"):
                self.reference.follow(self.actor)
        self.num_steps_done = step
        return metrics
