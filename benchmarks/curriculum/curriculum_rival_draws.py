"""The laboratory's rivals in a real training: they draw by their own rules in the coordinator's place."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from curriculum_lab_policies import RESPONSES, Run, Uniform
from curriculum_lab_rivals import RIVALS

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.coordinator import Coordinator


def rival_policy(name: str, num_prompts: int, num_steps: int, data: DataConfig) -> Uniform:
    """A rival of the laboratory, for a training. Args: name: of RIVALS."""
    same = np.zeros(num_prompts, dtype=np.int64)  # they make no use of categories
    return RIVALS[name](Run(num_prompts, same, same, data.rollout_batch_size, num_steps, data.seed))


class RivalDraws(Coordinator):
    """Draws by a rival's rule and shows it the groups that were sampled, once a step. A run cannot be resumed.

    For rivals that draw a batch and learn from it; those that sample more have a loop of their own.
    """

    rival: str  # of RIVALS; set in a subclass or before the first draw

    @cached_property
    def _policy(self) -> Uniform:
        assert self.num_responses == RESPONSES, "the rivals count groups of the laboratory's size"
        policy = rival_policy(self.rival, self.num_prompts, self.num_steps, self.data)
        assert type(policy).batch is Uniform.batch, f"{self.rival} samples more than it draws"
        return policy

    def _draw(self) -> np.ndarray:
        return self._policy.draw(self._num_draws)

    def finish_step(self, step: int, trained: np.ndarray) -> None:
        """See Coordinator."""
        observed = self._observed
        super().finish_step(step, trained)
        if self._is_rank_0:
            indices = np.array([prompt.index for prompt in observed], dtype=np.int64)
            num_right = np.array([np.rint(prompt.pass_rate * prompt.num_responses) for prompt in observed])
            self._policy.learn(indices, num_right, _no_more)


def _no_more(indices: np.ndarray, num_responses: object) -> np.ndarray:
    raise AssertionError("these rivals ask for no responses beside the batch")
