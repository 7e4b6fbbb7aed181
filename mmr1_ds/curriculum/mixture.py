"""Batches with a fixed share of each source: `data.train_weights`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from mmr1_ds.curriculum.sampler import PromptSampler
from mmr1_ds.curriculum.statistics import PromptStatistics

_NOISE, _MIX = 6, 7  # its streams of random numbers, beside the sampler's


def quotas(weights: Sequence[float], batch_size: int) -> list[int]:
    """Return how many of a batch's prompts each source gives: its exact share, the largest remainders rounded up."""
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight * batch_size / sum(exact) for weight in exact]
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: (counts[k] - shares[k], k))
    for k in by_remainder[: batch_size - sum(counts)]:
        counts[k] += 1
    return counts


class MixedSampler:
    """Draws as `PromptSampler` does, from each source its quota: of each quota lambda by weight, the rest in turn."""

    def __init__(
        self,
        sources: np.ndarray,
        source_weights: Sequence[float],
        batch_size: int,
        seed: int,
        strategy: str,
        mixture_ratio: float,
        replacement: bool,
        rule: str = "proportional",
        num_candidates: int = 8,
    ) -> None:
        """Args: sources: (P,) int, of each prompt; source_weights: one a source; the others as of `PromptSampler`."""
        self._seed, self._num_prompts = seed, len(sources)
        self._prompts = [np.flatnonzero(sources == k) for k in range(len(source_weights))]
        settings = (strategy, mixture_ratio, replacement, rule, num_candidates)
        self._samplers = [
            PromptSampler(len(prompts), quota, seed + (k << 32), *settings)
            for k, (prompts, quota) in enumerate(zip(self._prompts, quotas(source_weights, batch_size), strict=True))
        ]

    def draw(self, number: int, weights: np.ndarray, unseen_steps: np.ndarray | None = None) -> np.ndarray:
        """See `PromptSampler.draw`; the sources are shuffled together."""
        drawn = [
            prompts[sampler.draw(number, weights[prompts], None if unseen_steps is None else unseen_steps[prompts])]
            for prompts, sampler in zip(self._prompts, self._samplers, strict=True)
        ]
        return self._generator(number, _MIX).permutation(np.concatenate(drawn))

    def noise(self, number: int) -> np.ndarray:
        """See `PromptSampler.noise`; over all sources together."""
        return self._generator(number, _NOISE).standard_normal(self._num_prompts, dtype=np.float32)

    def _generator(self, number: int, stream: int) -> np.random.Generator:
        key = np.array([self._seed % 2**64, number * 8 + stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def random_position(self, number: int) -> int:
        """See `PromptSampler.random_position`; over all sources together."""
        return number * sum(sampler.num_walked for sampler in self._samplers) % self._num_prompts


def source_metrics(observed: Sequence[PromptStatistics], sources: np.ndarray, names: Sequence[str]) -> dict[str, float]:
    """Return share, accuracy and reward of a step's training groups by source, `source/<name>/*`."""
    groups = [prompt for prompt in observed if not prompt.is_probe]
    metrics = {}
    for k, name in enumerate(names):
        own = [prompt for prompt in groups if sources[prompt.index] == k]
        metrics[f"source/{name}/share"] = len(own) / max(1, len(groups))
        own = [prompt for prompt in own if not math.isnan(prompt.pass_rate)]  # all of its rewards are unknown
        if own:
            metrics[f"source/{name}/accuracy"] = float(np.mean([prompt.pass_rate for prompt in own]))
            metrics[f"source/{name}/reward"] = float(np.mean([prompt.reward_mean for prompt in own]))
    return metrics
