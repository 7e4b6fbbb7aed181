"""A refresh of the whole data set while it is underway: which prompts are done, and what they scored."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from mmr1_ds.io import whole_file

logger = logging.getLogger(__name__)


class Refresh:
    """Raw scores gathered chunk by chunk, until all P prompts are done and the table takes them over.

    Every rank keeps `done`, to know the next chunk; rank 0 alone uses the scores.
    """

    def __init__(self, num_prompts: int, keeps_scores: bool) -> None:
        """Begin a refresh. keeps_scores: false on ranks other than 0, which are spared the memory."""
        self.done = np.zeros(num_prompts, dtype=bool)
        num_prompts = num_prompts if keeps_scores else 0
        self.scores = np.full(num_prompts, np.nan, dtype=np.float32)
        self.pass_rates = np.full(num_prompts, np.nan, dtype=np.float32)
        self.num_responses = np.zeros(num_prompts, dtype=np.int32)
        self.num_tokens = np.zeros(num_prompts, dtype=np.int32)  # of all responses

    def chunks(self, chunk_size: int) -> Iterator[np.ndarray]:
        """Yield the prompts still to do, in the data set's order, at most `chunk_size` at a time, int64."""
        left = np.flatnonzero(~self.done)
        return (left[start : start + chunk_size] for start in range(0, len(left), chunk_size))

    def save(self, path: Path, key: str) -> None:
        """Write the columns, whole or not at all, under a key that identifies the refresh."""
        from safetensors.numpy import save_file

        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as temporary:
            save_file(self.state_dict(), temporary, metadata={"key": key})

    def save_if_possible(self, path: Path, key: str) -> None:
        """Save as `save` does, but only log a warning if the disk fails."""
        from safetensors import SafetensorError

        try:
            self.save(path, key)
        except (OSError, SafetensorError) as error:
            logger.warning("%s is not written (%s): a kill now would lose what the refresh has found", path, error)

    def resume(self, path: Path, key: str) -> bool:
        """Resume from what `save` wrote under the same key. Returns: whether there was such a file, undamaged."""
        from safetensors import SafetensorError, safe_open

        if not path.is_file():
            return False
        try:
            with safe_open(path, framework="numpy") as file:
                if (file.metadata() or {}).get("key") != key:
                    return False
                columns = {name: file.get_tensor(name) for name in file.keys()}
        except SafetensorError as error:
            logger.warning("%s is damaged (%s); the refresh starts over", path, error)
            return False
        self.load_state_dict(columns, np.arange(len(self.done)))
        return True

    def state_dict(self) -> dict[str, np.ndarray]:
        """The five columns, (P,) each, no copies."""
        return {
            "done": self.done,
            "scores": self.scores,
            "pass_rates": self.pass_rates,
            "num_responses": self.num_responses,
            "num_tokens": self.num_tokens,
        }

    def load_state_dict(self, state: Mapping[str, np.ndarray], positions: np.ndarray) -> None:
        """Take over saved columns; `positions` (P,) says where each of our prompts stands in them."""
        self.done = state["done"][positions]
        self.scores = state["scores"][positions]
        self.pass_rates = state["pass_rates"][positions]
        self.num_responses = state["num_responses"][positions]
        if "num_tokens" in state:  # earlier versions did not count them
            self.num_tokens = state["num_tokens"][positions]
