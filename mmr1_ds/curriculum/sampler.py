"""Which prompts a step draws: a pure function of (seed, step, weights). P = prompts in the data set, B = a batch.

Every random number comes from a counter-based generator keyed by (seed, step or epoch, stream), so a resumed run,
or one on another number of ranks, draws the same indices and nothing but the step need be saved.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# What a generator is for; each stream is independent of the others.
_WALK, _WEIGHTED, _MIX = range(3)


class PromptSampler:
    """Draws batches of prompt indices. Steps are counted from 1, the first step."""

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        seed: int,
        strategy: str = "shuffle",
        mixture_ratio: float = 0.0,
        replacement: bool = True,
    ) -> None:
        """
        Args:
            strategy: sequential (in the data set's order), shuffle (a seeded permutation an epoch), or curriculum
                (floor(mixture_ratio * B) drawn by weight, the rest as in shuffle).
            mixture_ratio: lambda, [0, 1]; used by curriculum alone.
            replacement: whether the part drawn by weight may hold a prompt twice, as in the paper.
        """
        assert num_prompts > 0 and batch_size > 0, (num_prompts, batch_size)
        self.num_prompts, self.batch_size, self.seed = num_prompts, batch_size, seed
        self.sequential = strategy == "sequential"
        self.replacement = replacement
        # Through the decimal form: 0.29 * 100 is 28.999... in floating point, and floor would lose one.
        share = Fraction(repr(float(mixture_ratio))) if strategy == "curriculum" else Fraction(0)
        self.num_weighted = int(share * batch_size)
        self.num_walked = batch_size - self.num_weighted
        self._permutation: tuple[int, np.ndarray] | None = None  # of one epoch: (epoch, (P,) int)
        self._cumulative: tuple[np.ndarray, np.ndarray] | None = None  # of one version: (weights, (P,) float64)

    def draw(self, step: int, weights: np.ndarray) -> np.ndarray:
        """The prompts of one step, (B,) int64.

        Weighted and walked prompts are shuffled together, so that every rank and mini-batch gets of both.

        Args:
            step: from 1 on.
            weights: (P,) float, not negative; all zero means uniform. A read-only array is taken never to change,
                and what is computed from it is kept.
        """
        if step < 1:
            raise ValueError(f"steps are counted from 1, got {step}")
        walked = self._walk((step - 1) * self.num_walked, self.num_walked)
        if self.num_weighted == 0:
            return walked
        assert len(weights) == self.num_prompts, (len(weights), self.num_prompts)
        random = self._generator(step, _WEIGHTED)
        draw_weighted = self._draw_with_replacement if self.replacement else self._draw_without_replacement
        batch = np.concatenate([draw_weighted(weights, random), walked])
        return self._generator(step, _MIX).permutation(batch)

    def random_position(self, step: int) -> int:
        """Prompts of the current epoch of the walk that are used up after `step`, [0, P)."""
        return step * self.num_walked % self.num_prompts

    def _walk(self, start: int, count: int) -> np.ndarray:
        """`count` prompts of the endless walk from position `start`: one whole epoch after the other."""
        end = start + count
        if self.sequential:
            return np.arange(start, end) % self.num_prompts
        parts = []
        while start < end:
            epoch, offset = divmod(start, self.num_prompts)
            taken = min(end - start, self.num_prompts - offset)
            parts.append(self._epoch_order(epoch)[offset : offset + taken])
            start += taken
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._permutation is None or self._permutation[0] != epoch:
            # int32 halves the memory of a large data set's permutation; more prompts than that do not fit anyway.
            order = np.arange(self.num_prompts, dtype=np.int32 if self.num_prompts < 2**31 else np.int64)
            self._generator(epoch, _WALK).shuffle(order)
            self._permutation = (epoch, order)
        return self._permutation[1]

    def _draw_with_replacement(self, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """Inverse of the cumulative weights; a weight of 0 is never drawn."""
        cumulative = self._cumulate(weights)
        thresholds = random.random(self.num_weighted) * cumulative[-1]
        drawn = np.searchsorted(cumulative, thresholds, side="right")
        # Rounding may lift a threshold to the total itself: that belongs to the last prompt with any weight.
        return np.minimum(drawn, np.searchsorted(cumulative, cumulative[-1], side="left"))

    def _cumulate(self, weights: np.ndarray) -> np.ndarray:
        if self._cumulative is not None and self._cumulative[0] is weights:
            return self._cumulative[1]
        cumulative: np.ndarray = np.cumsum(weights, dtype=np.float64)
        assert np.isfinite(cumulative[-1]) and weights.min() >= 0, "weights must be finite and not negative"
        if cumulative[-1] == 0.0:
            cumulative = np.arange(1.0, self.num_prompts + 1.0)
        self._cumulative = None if weights.flags.writeable else (weights, cumulative)
        return cumulative

    def _draw_without_replacement(self, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The smallest of Exp(1) / weight: exact sampling without replacement (Efraimidis and Spirakis, 2006).

        Prompts of weight 0 come only after all others are drawn, uniformly. When more are asked than there are
        prompts, every prompt is drawn once (or as often as it takes) and only the remainder is by weight.
        """
        rounds, remainder = divmod(self.num_weighted, self.num_prompts)
        everyone = np.tile(np.arange(self.num_prompts), rounds)
        if remainder == 0:
            return everyone
        exponentials = random.standard_exponential(self.num_prompts)
        positive = weights > 0
        keys = np.divide(exponentials, weights, out=np.full(self.num_prompts, np.inf), where=positive)
        if np.count_nonzero(positive) < remainder:
            keys[~positive] = 1e300 * exponentials[~positive]  # behind every key of a positive float32 weight
        return np.concatenate([everyone, np.argpartition(keys, remainder - 1)[:remainder]])

    def _generator(self, counter: int, stream: int) -> np.random.Generator:
        key = np.array([self.seed % 2**64, counter * 8 + stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))
