"""Which prompts a step draws: a pure function of (seed, number of the draw, weights).

P = prompts in the data set, B = a batch.

Every random number comes from a counter-based generator keyed by (seed, draw or epoch, stream), so a resumed run,
or one on another number of ranks, draws the same indices and nothing but the number of the draw need be saved.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

# What a generator is for; each stream is independent of the others.
_WALK, _WEIGHTED, _MIX, _NOISE = range(4)
_MAX_ROUNDS = 4  # of drawing without replacement by passing over repeats


class PromptSampler:
    """Draws batches of prompt indices. Draws are counted from 1: one a step, unless online filtering needs more."""

    def __init__(
        self,
        num_prompts: int,
        batch_size: int,
        seed: int,
        strategy: str = "shuffle",
        mixture_ratio: float = 0.0,
        replacement: bool = True,
        rule: str = "proportional",
        num_candidates: int = 8,
    ) -> None:
        """
        Args:
            strategy: sequential (in the data set's order), shuffle (a seeded permutation an epoch), or curriculum
                (floor(mixture_ratio * B) drawn by weight, the rest as in shuffle).
            mixture_ratio: lambda, [0, 1]; used by curriculum alone.
            replacement: whether the part drawn by weight may hold a prompt twice, as in the paper; proportional only.
            rule: how the curriculum's part is drawn. proportional: each prompt by its weight. candidates: those of
                highest weight among `num_candidates` times as many, which are drawn uniformly. posterior: those of
                highest weight of all, where the weights are a fresh draw from what is believed of each prompt; and the
                walk passes over prompts seen since it last came to them, whose places the best take.
        """
        assert num_prompts > 0 and batch_size > 0, (num_prompts, batch_size)
        self.num_prompts, self.batch_size, self.seed = num_prompts, batch_size, seed
        self.sequential = strategy == "sequential"
        self.replacement, self.rule, self.num_candidates = replacement, rule, num_candidates
        # Through the decimal form: 0.29 * 100 is 28.999... in floating point, and floor would lose one.
        share = Fraction(repr(float(mixture_ratio))) if strategy == "curriculum" else Fraction(0)
        self.num_weighted = int(share * batch_size)
        self.num_walked = batch_size - self.num_weighted
        self._permutation: tuple[int, np.ndarray] | None = None  # of one epoch: (epoch, (P,) int)
        self._sums: np.ndarray | None = None
        self._cumulative: tuple[np.ndarray, np.ndarray] | None = None  # of one version: (weights, (P,) float64)

    def draw(self, number: int, weights: np.ndarray, unseen_steps: np.ndarray | None = None) -> np.ndarray:
        """The prompts of one draw, (B,) int64.

        Weighted and walked prompts are shuffled together, so that every rank and mini-batch gets of both.

        Args:
            number: of the draw, from 1 on.
            weights: (P,) float, not negative; all zero means uniform. A read-only array is taken never to change,
                and what is computed from it is kept. By the rules candidates and posterior any order will do.
            unseen_steps: (P,) int, steps since each prompt was last seen; the rule posterior needs it.
        """
        if number < 1:
            raise ValueError(f"draws are counted from 1, got {number}")
        walked = self.walk((number - 1) * self.num_walked, self.num_walked)
        if self.num_weighted == 0:
            return walked
        assert len(weights) == self.num_prompts, (len(weights), self.num_prompts)
        random = self._generator(number, _WEIGHTED)
        if self.rule == "candidates":
            picked = self._best_of_candidates(weights, walked, random)
        elif self.rule == "posterior":
            assert unseen_steps is not None and len(unseen_steps) == self.num_prompts
            # P / num_walked draws make an epoch of the walk, after which a prompt's turn comes again.
            walked = walked[unseen_steps[walked].astype(np.int64) * self.num_walked >= self.num_prompts]
            picked = self._best(weights, self.batch_size - len(walked), walked, random)
        elif self.replacement:
            picked = self._draw_with_replacement(weights, random)
        else:
            picked = self._draw_without_replacement(weights, random)
        return self._generator(number, _MIX).permutation(np.concatenate([picked, walked]))

    def noise(self, number: int) -> np.ndarray:
        """Standard normals, (P,) float32, for the draw from the beliefs that the rule posterior takes as weights."""
        return self._generator(number, _NOISE).standard_normal(self.num_prompts, dtype=np.float32)

    def random_position(self, number: int) -> int:
        """Prompts of the current epoch of the walk that are used up after draw `number`, [0, P)."""
        return number * self.num_walked % self.num_prompts

    def walk(self, start: int, count: int) -> np.ndarray:
        """`count` prompts of the endless walk from position `start`: one whole epoch after the other."""
        end = start + count
        if self.sequential:
            return np.arange(start, end) % self.num_prompts
        parts = []
        while start < end:
            epoch, offset = divmod(start, self.num_prompts)
            taken = min(end - start, self.num_prompts - offset)
            parts.append(self._in_epoch(epoch, offset, taken))
            start += taken
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, dtype=np.int64)

    def _in_epoch(self, epoch: int, offset: int, count: int) -> np.ndarray:
        """Places `offset` to `offset + count` of an epoch's order, int32; 4 bytes a prompt are kept."""
        if self._permutation is None or self._permutation[0] != epoch:
            order = np.arange(self.num_prompts, dtype=np.int32)
            self._generator(epoch, _WALK).shuffle(order)
            self._permutation = (epoch, order)
        return self._permutation[1][offset : offset + count]

    def _best_of_candidates(self, weights: np.ndarray, walked: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The best of the candidates, none of which is walked if enough others are left; ties fall at random."""
        rounds, remainder = divmod(self.num_weighted, self.num_prompts)
        wanted = self.num_candidates * remainder
        drawn = random.choice(self.num_prompts, min(self.num_prompts, wanted + len(walked)), replace=False)
        others = drawn[~np.isin(drawn, walked)][:wanted]
        candidates = others if len(others) >= remainder else drawn
        best = candidates[np.argsort(-weights[candidates], kind="stable")[:remainder]]
        return np.concatenate([np.tile(np.arange(self.num_prompts), rounds), best])

    def _best(self, scores: np.ndarray, count: int, walked: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """The `count` prompts of highest score, those walked only after all others; ties fall at random.

        When more are asked than there are prompts, every prompt comes once (or as often as it takes) beside the best.
        """
        rounds, remainder = divmod(count, self.num_prompts)
        everyone = np.tile(np.arange(self.num_prompts), rounds)
        if remainder == 0:
            return everyone
        scores = scores.copy()
        scores[walked] = -np.inf
        threshold = np.partition(scores, self.num_prompts - remainder)[self.num_prompts - remainder]
        above, tied = np.flatnonzero(scores > threshold), np.flatnonzero(scores == threshold)
        if len(tied) > 1:
            tied = random.permutation(tied)
        return np.concatenate([everyone, above, tied[: remainder - len(above)]])

    def _draw_with_replacement(self, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
        return self._pick(self._cumulate(weights), random.random(self.num_weighted))

    @staticmethod
    def _pick(cumulative: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
        """Inverse of the cumulative weights; a weight of 0 is never picked."""
        picked = np.searchsorted(cumulative, uniforms * cumulative[-1], side="right")
        # Rounding may lift a threshold to the total itself: that belongs to the last prompt with any weight.
        return np.minimum(picked, np.searchsorted(cumulative, cumulative[-1], side="left"))

    def _cumulate(self, weights: np.ndarray) -> np.ndarray:
        if self._cumulative is not None and self._cumulative[0] is weights:
            return self._cumulative[1]
        if self._sums is None:
            self._sums = np.empty(self.num_prompts)  # kept: fresh pages for 100 million prompts cost seconds
        cumulative = np.cumsum(weights, dtype=np.float64, out=self._sums)
        assert np.isfinite(cumulative[-1]) and weights.min() >= 0, "weights must be finite and not negative"
        if cumulative[-1] == 0.0:
            cumulative[:] = np.arange(1.0, self.num_prompts + 1.0)
        self._cumulative = None if weights.flags.writeable else (weights, cumulative)
        return cumulative

    def _draw_without_replacement(self, weights: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """One after the other, each by weight among those left.

        That is drawing with replacement and passing over repeats, which costs no more while repeats are rare. After
        a few rounds of them, the rest comes as the smallest of Exp(1) / weight (Efraimidis and Spirakis, 2006),
        the same distribution for any pool. Prompts of weight 0 come only after all others are drawn, uniformly.
        When more are asked than there are prompts, every prompt is drawn once (or as often as it takes) and only the
        remainder is by weight.
        """
        rounds, remainder = divmod(self.num_weighted, self.num_prompts)
        everyone = np.tile(np.arange(self.num_prompts), rounds)
        cumulative = self._cumulate(weights)
        drawn = np.empty(0, dtype=np.int64)
        for _ in range(_MAX_ROUNDS if remainder else 0):
            both = np.concatenate([drawn, self._pick(cumulative, random.random(remainder))])
            drawn = both[np.sort(np.unique(both, return_index=True)[1])][:remainder]
            if len(drawn) == remainder:
                return np.concatenate([everyone, drawn])
        return np.concatenate([everyone, drawn, self._smallest_keys(weights, drawn, remainder - len(drawn), random)])

    def _smallest_keys(
        self, weights: np.ndarray, drawn: np.ndarray, count: int, random: np.random.Generator
    ) -> np.ndarray:
        if count == 0:
            return np.empty(0, dtype=np.int64)
        exponentials = random.standard_exponential(self.num_prompts)
        positive = weights > 0
        keys = np.divide(exponentials, weights, out=np.full(self.num_prompts, np.inf), where=positive)
        keys[~positive] = 1e300 * exponentials[~positive]  # behind every key of a positive float32 weight
        keys[drawn] = np.inf
        return np.sort(np.argpartition(keys, count - 1)[:count])  # its own order may depend on the machine

    def _generator(self, counter: int, stream: int) -> np.random.Generator:
        key = np.array([self.seed % 2**64, counter * 8 + stream], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key))
