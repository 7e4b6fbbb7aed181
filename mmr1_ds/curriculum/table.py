"""The curriculum table: what rank 0 remembers of every prompt. P = prompts in the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmr1_ds.curriculum.prompt_ids import saved_positions
from mmr1_ds.curriculum.statistics import PromptStatistics

_COLUMNS: dict[str, tuple[type[np.generic], float]] = {  # name -> type and the value of a prompt never seen
    "weight": (np.float32, np.nan),  # normalised over the data set, with momentum, [0, 1]
    "pass_rate": (np.float32, np.nan),  # of the last refresh: what the weights believe
    "num_responses": (np.int32, 0),  # behind that pass rate
}


class CurriculumTable:
    """Per-prompt scores, and the weights to draw by."""

    def __init__(
        self, prompt_ids: Sequence[str], fingerprint: str, weight_floor: float = 0.0, momentum: float = 0.0
    ) -> None:
        """Nothing known: uniform weights.

        Args:
            prompt_ids: (P,) stable across runs; unique if the data set's order is to change between them.
            fingerprint: of the data set; a saved table of another one is refused.
            weight_floor: share of the largest weight that every prompt keeps, [0, 1].
            momentum: m in w <- m * w_old + (1 - m) * w_new, [0, 1).
        """
        assert len(prompt_ids) > 0, "the data set has no prompts"
        self.prompt_ids = prompt_ids
        self.fingerprint = fingerprint
        self.weight_floor = weight_floor
        self.momentum = momentum
        self._columns = {
            name: np.full(len(prompt_ids), unseen, dtype=dtype) for name, (dtype, unseen) in _COLUMNS.items()
        }
        self._sampling_weights = self._make_sampling_weights()

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def column(self, name: str) -> np.ndarray:
        """One column (P,), read only: weight, pass_rate or num_responses."""
        view = self._columns[name].view()
        view.flags.writeable = False
        return view

    @property
    def sampling_weights(self) -> np.ndarray:
        """(P,) float32, floor <= w <= 1, read only; a new array whenever it changes, so its identity is its version."""
        return self._sampling_weights

    def replace_scores(self, scores: np.ndarray, pass_rates: np.ndarray, num_responses: np.ndarray) -> None:
        """Take the scores of a refresh of the whole data set: normalise, then blend with the old weights.

        As upstream, scores are min-max normalised over the data set before the momentum. A prompt whose score is
        NaN keeps its old row; without one it gets the mean weight.

        Args: scores, pass_rates: (P,) float; num_responses: (P,) int.
        """
        new = min_max_normalise(scores)
        old = self._columns["weight"]
        blended = np.where(np.isnan(old), new, self.momentum * old + (1.0 - self.momentum) * new)
        known_rate = ~np.isnan(pass_rates)
        for name, values, known in (
            ("weight", blended, ~np.isnan(scores)),
            ("pass_rate", pass_rates, known_rate),
            ("num_responses", num_responses, known_rate),
        ):
            self._columns[name] = np.where(known, values, self._columns[name]).astype(_COLUMNS[name][0])
        self._sampling_weights = self._make_sampling_weights()

    def finish_step(self, step: int, observed: Sequence[PromptStatistics], trained: np.ndarray) -> None:
        """Learn nothing: only a refresh changes the weights."""

    def probes(self, num_probes: int, exclude: np.ndarray) -> np.ndarray:
        """No probes, (0,) int64: a full refresh rolls out every prompt anyway."""
        return np.empty(0, dtype=np.int64)

    def metrics(self) -> dict[str, float]:
        """No metrics beyond those of the weights."""
        return {}

    def known_pass_rates(self) -> np.ndarray:
        """The pass rates of the last refresh, (P,); NaN where there is none."""
        return self.column("pass_rate")

    def predicted_pass_rates(self, indices: np.ndarray) -> np.ndarray:
        """Estimate the next: (p N + 1/2) / (N + 1) by the last refresh, (K,) in (0, 1); NaN where there is none."""
        num_responses = self._columns["num_responses"][indices].astype(np.float64)
        return (self._columns["pass_rate"][indices] * num_responses + 0.5) / (num_responses + 1.0)

    def _make_sampling_weights(self) -> np.ndarray:
        weights = self._columns["weight"].astype(np.float64)
        known = ~np.isnan(weights)
        weights[~known] = weights[known].mean() if known.any() else 1.0
        floored = (self.weight_floor + (1.0 - self.weight_floor) * weights).astype(np.float32)
        floored.flags.writeable = False
        return floored

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that `load` needs beside the prompt ids, no copies."""
        return dict(self._columns)

    def numbers(self) -> dict[str, Any]:
        """No numbers: the columns are all there is."""
        return {}

    def load(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any], fingerprint: str) -> np.ndarray:
        """Take over the columns of a saved table, each value with its prompt id; others of earlier versions are left.

        Returns: (P,) int64, the saved position of each of our prompts, to reorder whatever was saved beside it.
        Raises: UserError when the table belongs to another data set, by fingerprint or by ids.
        """
        positions = saved_positions(arrays, fingerprint, self.prompt_ids, self.fingerprint)
        self._columns = {name: arrays[name][positions].astype(_COLUMNS[name][0]) for name in _COLUMNS}
        self._sampling_weights = self._make_sampling_weights()
        return positions


def min_max_normalise(scores: np.ndarray) -> np.ndarray:
    """(s - min) / (max - min) over the known scores, float64 (P,); NaN stays. All equal: all 1, which is uniform."""
    scores = scores.astype(np.float64)
    known = scores[~np.isnan(scores)]
    if len(known) == 0:
        return scores
    low, high = known.min(), known.max()
    if low == high:
        return np.where(np.isnan(scores), np.nan, 1.0)
    return (scores - low) / (high - low)
