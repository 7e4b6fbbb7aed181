"""The samplers that the laboratory compares: what each believes, and what it rolls out to know it.

A policy sees responses only. Full refreshes, ours and the draws themselves are the shipped code; the samplers of others
are in `curriculum_lab_rivals`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmr1_ds.curriculum.estimator import PROBE_RESPONSES, FilterSettings, LogitFilter, probe_budget
from mmr1_ds.curriculum.group_sizes import SizeRange, group_sizes
from mmr1_ds.curriculum.sampler import PromptSampler
from mmr1_ds.curriculum.table import min_max_normalise

RESPONSES = 8  # a training group, or on average
SIZES = SizeRange(2, 16)  # where groups differ
Roll = Callable[[np.ndarray, Any], np.ndarray]  # (indices (K,), responses to all or to each) -> number right (K,)


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
        self.sizes = np.empty(0, dtype=np.int64)  # responses to each prompt of the last batch
        self.random = np.random.default_rng([run.seed, 3])
        self._walk = PromptSampler(run.num_prompts, run.batch_size, run.seed)

    def refresh(self, step: int, roll: Roll) -> int:
        """Roll out before the draw. Returns: rollouts spent."""
        return 0

    def batch(self, step: int, roll: Roll) -> tuple[np.ndarray, np.ndarray, int]:
        """Sample the groups to train on. Returns: their prompts, how many responses are right, rollouts spent."""
        indices = self.draw(step)
        self.sizes = self.group_sizes(indices)
        return indices, roll(indices, self.sizes), int(self.sizes.sum())

    def group_sizes(self, indices: np.ndarray) -> np.ndarray:
        """Responses to each prompt of the batch."""
        return np.full(len(indices), RESPONSES)

    def draw(self, step: int) -> np.ndarray:
        """The prompts of the batch."""
        return self._walk.draw(step, np.empty(0))

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        """Take in the training groups, perhaps with probes of the same policy. Returns: extra rollouts spent."""
        return 0

    def pass_rates(self) -> np.ndarray | None:
        """The mean of the belief about each pass rate, (P,); None: it believes nothing."""
        return None

    def scores(self) -> np.ndarray | None:
        """The belief about each p(1-p), (P,); None: it believes nothing."""
        return None


class FullRefresh(Uniform):
    """The paper's Algorithm 1: every T steps, N responses to every prompt; `ratio` of a batch is drawn by weight."""

    def __init__(self, run: Run, num_responses: int, interval: int, ratio: float = 0.5) -> None:
        super().__init__(run)
        self.num_responses, self.interval = num_responses, interval
        self._sampler = PromptSampler(run.num_prompts, run.batch_size, run.seed, "curriculum", ratio)

    def refresh(self, step: int, roll: Roll) -> int:
        if (step - 1) % self.interval:
            return 0
        self._rates = roll(np.arange(self.run.num_prompts), self.num_responses) / self.num_responses
        self._weights = min_max_normalise(self._rates * (1.0 - self._rates)).astype(np.float32)
        self._weights.flags.writeable = False
        return self.num_responses * self.run.num_prompts

    def draw(self, step: int) -> np.ndarray:
        return self._sampler.draw(step, self._weights)

    def pass_rates(self) -> np.ndarray:
        return self._rates

    def scores(self) -> np.ndarray:
        return self._weights


class Online(Uniform):
    """Ours, as data.curriculum_refresh=online ships: the logit filter, and a draw from its beliefs."""

    def __init__(
        self,
        run: Run,
        rule: str = "proportional",
        ratio: float = 0.8,
        probe_fraction: float = 0.0,
        settings: FilterSettings | None = None,
        categories: np.ndarray | None = None,
    ) -> None:
        super().__init__(run)
        self.rule, self.probe_fraction = rule, probe_fraction
        numbers = run.categories if categories is None else categories
        self.filter = LogitFilter(run.num_prompts, numbers, RESPONSES, settings)
        self._sampler = PromptSampler(
            run.num_prompts, run.batch_size, run.seed, "curriculum", ratio, replacement=probe_fraction > 0.0, rule=rule
        )
        self._spent = 0
        self._step = 0

    def draw(self, step: int) -> np.ndarray:
        if self.rule != "posterior":
            return self._sampler.draw(step, self.scores())
        scores = self.filter.sampled_utility("learnability", self._sampler.noise(step))
        return self._sampler.draw(step, scores, self.filter.unseen_steps())

    def learn(self, batch: np.ndarray, num_right: np.ndarray, roll: Roll) -> int:
        self._step += 1
        run = self.run
        allowed = probe_budget(
            self._step, run.num_steps, run.num_prompts, run.batch_size, RESPONSES, self.probe_fraction
        )
        probes = self.filter.probes(int(allowed - self._spent) // PROBE_RESPONSES, exclude=batch)
        probed_right = roll(probes, PROBE_RESPONSES)
        sizes = self.sizes if len(self.sizes) == len(batch) else np.full(len(batch), RESPONSES)
        responses = np.concatenate([sizes, np.full(len(probes), PROBE_RESPONSES)])
        self.filter.observe(np.concatenate([batch, probes]), np.concatenate([num_right, probed_right]), responses)
        self.filter.predict_step(batch)
        self._spent += PROBE_RESPONSES * len(probes)
        return PROBE_RESPONSES * len(probes)

    def pass_rates(self) -> np.ndarray:
        return self.filter.predicted_pass_rates(np.arange(self.run.num_prompts))

    def scores(self) -> np.ndarray:
        return self.filter.weights("learnability")


class SizedOnline(Online):
    """Online whose groups differ in size, as with worker.rollout.n_min and n_max."""

    def group_sizes(self, indices: np.ndarray) -> np.ndarray:
        return group_sizes(*self.filter.belief(indices), RESPONSES, SIZES)


class KnownOnline(Online):
    """Online that begins from N measured answers to every prompt, as with data.curriculum_prior."""

    def __init__(self, run: Run, num_responses: int) -> None:
        super().__init__(run)
        self.num_responses = num_responses

    def refresh(self, step: int, roll: Roll) -> int:
        if step > 1:
            return 0
        everyone = np.arange(self.run.num_prompts)
        self.filter.observe(everyone, roll(everyone, self.num_responses), np.full(len(everyone), self.num_responses))
        return self.num_responses * len(everyone)


def _without_categories(run: Run) -> Online:
    return Online(run, categories=np.zeros(run.num_prompts, dtype=np.int64))


OURS: dict[str, Callable[[Run], Uniform]] = {
    "uniform": Uniform,
    "full_n32_t35": lambda run: FullRefresh(run, 32, 35),
    "full_n16_t56": lambda run: FullRefresh(run, 16, 56),
    "full_n8_t4": lambda run: FullRefresh(run, 8, 4),
    "online_half": lambda run: Online(run, ratio=0.5, probe_fraction=0.1),
    "online_candidates": lambda run: Online(run, "candidates"),
    "online_posterior": lambda run: Online(run, "posterior"),
    "online": Online,
    "online_sizes": SizedOnline,
    "online_posterior_sizes": lambda run: SizedOnline(run, "posterior"),
    "online_half_sizes": lambda run: SizedOnline(run, ratio=0.5, probe_fraction=0.1),
    "online_known_n4": lambda run: KnownOnline(run, 4),
    "online_known_n16": lambda run: KnownOnline(run, 16),
    "online_no_categories": _without_categories,
    "online_clusters": lambda run: Online(run, categories=run.clusters),
}
