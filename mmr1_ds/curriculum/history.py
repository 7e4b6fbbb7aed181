"""The records of the curriculum over a run, for its readers: histograms, transitions, predictions tested.

P = prompts in the data set. All of it belongs to rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmr1_ds.curriculum.statistics import PromptStatistics

NUM_BINS = 10  # equal ones over [0, 1], the last one closed
_UNKNOWN = NUM_BINS  # bin of a prompt without a known value


class TableHistory:
    """Puts every prompt into a bin by its weight and by its pass rate, and counts who has moved since the last time."""

    def __init__(self) -> None:
        self._bins: dict[str, np.ndarray] = {}  # (P,) uint8 by what was binned; empty before the first look

    def look(self, weights: np.ndarray, pass_rates: np.ndarray) -> dict[str, Any]:
        """A line of `curriculum.jsonl` about the table as it is now.

        Args: weights, pass_rates: (P,); weights are scaled so that the largest is 1, a pass rate of NaN is unknown.
        """
        line: dict[str, Any] = {}
        for name, values in (("weight", weights / weights.max()), ("pass_rate", pass_rates)):
            now, before = _bins(values), self._bins.get(name)
            line[f"{name}_counts"] = np.bincount(now, minlength=NUM_BINS + 1)[:NUM_BINS].tolist()
            line[f"{name}_transitions"] = None if before is None else _transitions(before, now).tolist()
            self._bins[name] = now
        return line | {"num_unknown": int(np.count_nonzero(np.isnan(pass_rates)))}

    def arrays(self) -> dict[str, np.ndarray]:
        """The arrays that `load` needs, no copies; empty before the first look."""
        return dict(self._bins)

    def load(self, arrays: Mapping[str, np.ndarray], positions: np.ndarray) -> None:
        """Resume from a saved state. Args: positions: (P,) int64, the saved position of each of our prompts."""
        self._bins = {name: bins[positions] for name, bins in arrays.items()}


def _bins(values: np.ndarray) -> np.ndarray:
    """The bin of each value, (P,) uint8."""
    known = ~np.isnan(values)
    places = np.clip(np.where(known, values, 0.0) * NUM_BINS, 0, NUM_BINS - 1)
    return np.where(known, places, _UNKNOWN).astype(np.uint8)


def _transitions(before: np.ndarray, now: np.ndarray) -> np.ndarray:
    """How many prompts were in bin i and are in bin j, (10, 10) int64."""
    size = NUM_BINS + 1
    pairs = np.bincount(before.astype(np.int64) * size + now, minlength=size * size)
    return pairs.reshape(size, size)[:NUM_BINS, :NUM_BINS]


def observations(observed: Sequence[PromptStatistics], predicted: np.ndarray) -> dict[str, Any]:
    """A line of `observations.jsonl`: the groups of a step, probes last.

    Args: predicted: pass rates before the step, in the order of `observed`; NaN unknown.
    """
    # By prompt: the order in which the ranks gave them would differ with their number.
    order = sorted(range(len(observed)), key=lambda k: (observed[k].is_probe, observed[k].index))
    groups = [observed[k] for k in order]
    return {
        "prompts": [prompt.index for prompt in groups],
        "predicted": [_rounded(predicted[k]) for k in order],
        "pass_rates": [_rounded(prompt.pass_rate) for prompt in groups],
        "num_responses": [prompt.num_responses for prompt in groups],
        "num_probes": sum(prompt.is_probe for prompt in groups),
    }


def batch_metrics(observed: Sequence[PromptStatistics], predicted: np.ndarray) -> dict[str, float]:
    """Compute `curriculum/effective_group_fraction`, and `log_loss` in nats a rollout, of a step's training groups.

    Args: predicted: as in `observations`.
    """
    training = [(prompt, rate) for prompt, rate in zip(observed, predicted, strict=True) if not prompt.is_probe]
    if not training:
        return {}
    metrics = {"curriculum/effective_group_fraction": sum(p.is_effective for p, _ in training) / len(training)}
    pass_rates = np.array([prompt.pass_rate for prompt, _ in training])
    rates = np.array([rate for _, rate in training])
    num_scored = np.array([prompt.num_responses - prompt.num_unscored for prompt, _ in training], dtype=np.float64)
    tested = ~np.isnan(rates) & ~np.isnan(pass_rates)
    if tested.any():
        p, q = pass_rates[tested], rates[tested]
        losses = -(p * np.log(q) + (1.0 - p) * np.log1p(-q))
        metrics["curriculum/log_loss"] = float(np.average(losses, weights=num_scored[tested]))
    return metrics


def size_metrics(observed: Sequence[PromptStatistics]) -> dict[str, float]:
    """Compute the extremes of the training groups' sizes, and the share of their responses in groups that teach."""
    training = [prompt for prompt in observed if not prompt.is_probe]
    if not training:
        return {}
    sizes = [prompt.num_responses for prompt in training]
    teaching = sum(prompt.num_responses for prompt in training if prompt.is_effective)
    return {
        "curriculum/group_size_min": float(min(sizes)),
        "curriculum/group_size_max": float(max(sizes)),
        "curriculum/effective_response_fraction": teaching / sum(sizes),
    }


def _rounded(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)
