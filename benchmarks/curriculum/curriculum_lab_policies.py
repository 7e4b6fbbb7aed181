"""The samplers that the laboratory compares: what each believes, and what it rolls out to know it.

A policy sees responses only. Full refreshes, ours and the draws themselves are the shipped code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmr1_ds.curriculum.estimator import PROBE_RESPONSES, FilterSettings, LogitFilter, probe_budget
from mmr1_ds.curriculum.table import min_max_normalise

RESPONSES = 8  # a training group
Roll = Callable[[np.ndarray, int], np.ndarray]  # (indices (K,), responses each) -> number right (K,)


@dataclass(frozen=True)
class Run:
    """What a policy may know of the run beforehand."""

    num_prompts: int
    categories: np.ndarray
    clusters: np.ndarray  # of similar prompts, finer than the categories and closer to difficulty
    batch_size: int
    num_steps: int
    seed: int


class Uniform:
    """Knows nothing and asks nothing."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._weights = np.ones(run.num_prompts, dtype=np.float32)
        self._weights.flags.writeable = False

    def refresh(self, step: int, roll: Roll) -> int:
        """Roll out before the draw. Returns: rollouts spent."""
        return 0

    def weights(self) -> np.ndarray:
        """(P,) what the weighted half is drawn by; also the ranking that is judged."""
        return self._weights

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        """Take in the training groups, perhaps with probes of the same policy. Returns: extra rollouts spent."""
        return 0


class DynamicSampling(Uniform):
    """DAPO: draw uniformly until the batch is full of groups that are neither all right nor all wrong."""


class FullRefresh(Uniform):
    """The paper's Algorithm 1: every T steps, N responses to every prompt."""

    def __init__(self, run: Run, num_responses: int, interval: int) -> None:
        super().__init__(run)
        self.num_responses, self.interval = num_responses, interval

    def refresh(self, step: int, roll: Roll) -> int:
        if (step - 1) % self.interval:
            return 0
        rates = roll(np.arange(self.run.num_prompts), self.num_responses) / self.num_responses
        self._weights = min_max_normalise(rates * (1.0 - rates)).astype(np.float32)
        self._weights.flags.writeable = False
        return self.num_responses * self.run.num_prompts


class ThompsonBeta(Uniform):
    """A Beta per prompt, discounted, and a Thompson draw of its p(1-p): our approximation of MoPPS and VADE.

    As in MoPPS (arXiv 2507.04632) the discount pulls a posterior back to its prior when the prompt is visited; with
    `every_step` all are pulled back every step, as in VADE (arXiv 2511.18902). Both are given the shared draw, half by
    weight.
    """

    def __init__(self, run: Run, discount: float, every_step: bool) -> None:
        super().__init__(run)
        self.discount, self.every_step = discount, every_step
        self._right = np.zeros(run.num_prompts)
        self._wrong = np.zeros(run.num_prompts)
        self._random = np.random.default_rng([run.seed, 3])

    def weights(self) -> np.ndarray:
        rates = self._random.beta(1.0 + self._right, 1.0 + self._wrong)
        return (rates * (1.0 - rates)).astype(np.float32)

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        discounted = slice(None) if self.every_step else np.unique(batch)
        self._right[discounted] *= self.discount
        self._wrong[discounted] *= self.discount
        np.add.at(self._right, batch, num_right)
        np.add.at(self._wrong, batch, RESPONSES - num_right)
        return 0


class Online(Uniform):
    """Ours: the logit filter, with probes for `probe_fraction` of the training rollouts."""

    def __init__(
        self,
        run: Run,
        probe_fraction: float,
        settings: FilterSettings | None = None,
        categories: np.ndarray | None = None,
    ) -> None:
        super().__init__(run)
        self.probe_fraction = probe_fraction
        self.filter = LogitFilter(
            run.num_prompts, run.categories if categories is None else categories, RESPONSES, settings
        )
        self._spent = 0
        self._step = 0

    def weights(self) -> np.ndarray:
        return self.filter.weights("learnability")

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        self._step += 1
        run = self.run
        allowed = probe_budget(
            self._step, run.num_steps, run.num_prompts, run.batch_size, RESPONSES, self.probe_fraction
        )
        probes = self.filter.probes(int(allowed - self._spent) // PROBE_RESPONSES, exclude=batch)
        probed_right = roll(probes, PROBE_RESPONSES)
        responses = np.repeat([RESPONSES, PROBE_RESPONSES], [len(batch), len(probes)])
        self.filter.observe(np.concatenate([batch, probes]), np.concatenate([num_right, probed_right]), responses)
        self.filter.predict_step(batch)
        self._spent += PROBE_RESPONSES * len(probes)
        return PROBE_RESPONSES * len(probes)


def _without_categories(run: Run) -> Online:
    return Online(run, probe_fraction=0.1, categories=np.zeros(run.num_prompts, dtype=np.int64))


POLICIES: dict[str, Callable[[Run], Uniform]] = {
    "uniform": Uniform,
    "dapo": DynamicSampling,
    "full_n32_t35": lambda run: FullRefresh(run, 32, 35),
    "full_n16_t56": lambda run: FullRefresh(run, 16, 56),
    "full_n8_t4": lambda run: FullRefresh(run, 8, 4),
    "mopps": lambda run: ThompsonBeta(run, discount=0.7, every_step=False),
    "vade": lambda run: ThompsonBeta(run, discount=0.98, every_step=True),
    "online_free": lambda run: Online(run, probe_fraction=0.0),
    "online": lambda run: Online(run, probe_fraction=0.1),
    "online_no_categories": _without_categories,
    "online_clusters": lambda run: Online(run, probe_fraction=0.1, categories=run.clusters),
}
DEFAULT_POLICIES = tuple(name for name in POLICIES if name not in ("online_no_categories", "online_clusters"))
