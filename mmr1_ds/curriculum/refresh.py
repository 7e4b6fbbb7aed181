"""A refresh of the whole data set, underway: which prompts are done, and what they scored."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np


class Refresh:
    """Raw scores gathered chunk by chunk, until all P prompts are done and the table takes them over.

    Every rank keeps `done`, to know the next chunk; rank 0 alone uses the scores.
    """

    def __init__(self, num_prompts: int) -> None:
        self.done = np.zeros(num_prompts, dtype=bool)
        self.scores = np.full(num_prompts, np.nan, dtype=np.float32)
        self.pass_rates = np.full(num_prompts, np.nan, dtype=np.float32)
        self.num_responses = np.zeros(num_prompts, dtype=np.int32)

    def chunks(self, chunk_size: int) -> Iterator[np.ndarray]:
        """The prompts still to do, in the data set's order, at most `chunk_size` at a time, int64."""
        left = np.flatnonzero(~self.done)
        return (left[start : start + chunk_size] for start in range(0, len(left), chunk_size))

    def state_dict(self) -> dict[str, np.ndarray]:
        """The four columns, (P,) each."""
        return {
            "done": self.done.copy(),
            "scores": self.scores.copy(),
            "pass_rates": self.pass_rates.copy(),
            "num_responses": self.num_responses.copy(),
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray], positions: np.ndarray) -> None:
        """Take over saved columns; `positions` (P,) says where each of our prompts stands in them."""
        self.done = state["done"][positions]
        self.scores = state["scores"][positions]
        self.pass_rates = state["pass_rates"][positions]
        self.num_responses = state["num_responses"][positions]
