"""One training of the experiment: the program's own loop, with MoPPS's draws where asked for, until a budget is spent.

    python benchmarks/real_model/trial.py mopps|own BUDGET VALIDATE_EVERY config=FILE [key=value ...]

own: the draws are those that the config asks for. BUDGET counts every sampled response but those of validations, which
happen every VALIDATE_EVERY steps. Other settings as for `mmr1-ds train`. One rank.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np

from mmr1_ds import train
from mmr1_ds.curriculum.coordinator import Coordinator
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.loop import composition
from mmr1_ds.loop.trainer import Metrics, Trainer


class Mopps(Coordinator):
    """MoPPS (arXiv 2507.04632; github.com/thu-rllab/MoPPS) in the place of the coordinator's own draws.

    A Beta(1, 1) a prompt; of CANDIDATES times a batch of prompts, whose turn it is in a shuffled walk, those whose
    Thompson draws are nearest to 1/2; evidence of a prompt that was visited decays by DECAY. The constants are those
    of its Geo3K scripts; the laboratory's table says what those of its MATH scripts do.
    """

    CANDIDATES, DECAY = 8, 0.5

    def _draw(self) -> np.ndarray:
        if self._num_draws == 1:
            self.right, self.wrong = np.ones(self.num_prompts), np.ones(self.num_prompts)
        size = self.data.rollout_batch_size
        random = np.random.default_rng([self.data.seed, 7, self._num_draws])
        first = (self._num_draws - 1) * self.CANDIDATES * size
        turn = np.unique(self._sampler.walk(first, self.CANDIDATES * size))
        distance = np.abs(random.beta(self.right[turn], self.wrong[turn]) - 0.5)
        return random.permutation(turn[np.argsort(distance)[:size]])

    def observe(self, step: int, statistics: Sequence[PromptStatistics]) -> None:
        """See Coordinator."""
        for prompt in statistics:
            num_right = prompt.pass_rate * prompt.num_responses
            for evidence, new in ((self.right, num_right), (self.wrong, prompt.num_responses - num_right)):
                evidence[prompt.index] = self.DECAY * evidence[prompt.index] + (1.0 - self.DECAY) + new
        super().observe(step, statistics)


class Budgeted(Trainer):
    """Ends with the first validation at or after the end of its budget."""

    budget = validate_every = 0

    def train_step(self) -> Metrics:
        """See Trainer."""
        metrics = super().train_step()
        if metrics["perf/num_rollouts"] >= self.budget and self.step % self.validate_every == 0:
            self.num_steps = self.step
        return metrics


if __name__ == "__main__":
    if sys.argv[1] == "mopps":
        composition.Coordinator = Mopps  # type: ignore[misc]
    Budgeted.budget, Budgeted.validate_every = int(sys.argv[2]), int(sys.argv[3])
    composition.Trainer = Budgeted  # type: ignore[misc]
    raise SystemExit(train.main([*sys.argv[4:], f"trainer.val_freq={sys.argv[3]}"]))
