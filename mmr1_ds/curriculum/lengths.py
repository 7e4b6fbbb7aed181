"""How long responses to each prompt are expected to be, so that engines begin with the longest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmr1_ds.curriculum.statistics import PromptStatistics

_NEW = 0.5  # share of what was seen last in what is expected next: lengths drift as the policy learns
_COLUMN, _MEAN = "response_tokens", "mean_response_tokens"  # among the table's arrays, and among the numbers


class ResponseLengths:
    """An exponentially weighted mean of the tokens of each prompt's responses: 4 bytes a prompt. Rank 0's."""

    def __init__(self, num_prompts: int) -> None:
        """Nothing is known of any of the P prompts."""
        self._tokens = np.full(num_prompts, np.nan, dtype=np.float32)  # (P,) a response; NaN = never seen
        self._mean = 0.0  # of all prompts, weighted likewise by steps; 0 = none was seen

    def expected(self, indices: np.ndarray) -> np.ndarray:
        """Whole tokens of a response to each prompt, (K,) int64: the mean of all for one never seen, 0 before any."""
        tokens = self._tokens[indices].astype(np.float64)
        return np.rint(np.where(np.isnan(tokens), self._mean, tokens)).astype(np.int64)

    def observe(self, observed: Sequence[PromptStatistics]) -> None:
        """Take in the groups of a step, probes included: those of one prompt as one."""
        rows = [(prompt.index, prompt.num_tokens, prompt.num_responses) for prompt in observed]
        self.observe_counts(*np.array(rows, dtype=np.int64).reshape(-1, 3).T)

    def observe_counts(self, indices: np.ndarray, num_tokens: np.ndarray, num_responses: np.ndarray) -> None:
        """Take in counts, (K,) each. A prompt without tokens was not counted: what is known of it stays.

        They are summed as whole numbers first: the result does not depend on their order, which the ranks decide.
        """
        counted = num_tokens > 0
        if not counted.any():
            return
        seen, places = np.unique(indices[counted], return_inverse=True)
        totals, counts = (np.bincount(places, column[counted]) for column in (num_tokens, num_responses))
        old, new = self._tokens[seen].astype(np.float64), totals / counts
        self._tokens[seen] = np.where(np.isnan(old), new, old + _NEW * (new - old))
        mean = float(totals.sum() / counts.sum())
        self._mean = self._mean + _NEW * (mean - self._mean) if self._mean else mean

    def arrays(self) -> dict[str, np.ndarray]:
        """What `load` needs, beside the table's arrays; no copy."""
        return {_COLUMN: self._tokens}

    def numbers(self) -> dict[str, Any]:
        """What `load` needs, for JSON."""
        return {_MEAN: self._mean}

    def load(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any], positions: np.ndarray) -> None:
        """Resume. Earlier versions kept no lengths: then none was seen. Args: positions: (P,) as `Refresh` takes it."""
        if _COLUMN in arrays:
            self._tokens = arrays[_COLUMN][positions]
        self._mean = float(numbers.get(_MEAN, 0.0))
