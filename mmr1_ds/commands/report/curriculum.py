"""What the observations show of the curriculum: whether its predictions were right, and which prompts moved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmr1_ds.commands.report.files import Observations, TableLook

NUM_BINS = 10
_NORMAL_95 = 1.96


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed pass rates in ten equal bins of the prediction; bins without a group are left out."""

    bins: np.ndarray  # (K,) int64, 0 to 9
    predicted: np.ndarray  # (K,) mean prediction, weighed by responses
    observed: np.ndarray  # (K,) share of right responses
    half_band: np.ndarray  # (K,) 95 % of what chance gives when the predictions are right
    num_groups: np.ndarray  # (K,) int64
    mean_distance: float  # of observed from predicted, weighed by responses


def calibrate(observations: Sequence[Observations]) -> Calibration | None:
    """Compare predictions with observations over all given runs. None when no group has both.

    The band is that of independent responses, each right with the predicted probability:
    1.96 sqrt(sum n p (1 - p)) / sum n.
    """
    predicted, observed, weights = (
        np.concatenate([getattr(found, name) for found in observations] or [np.empty(0)])
        for name in ("predicted", "pass_rates", "num_responses")
    )
    known = np.isfinite(predicted) & np.isfinite(observed) & (weights > 0)
    if not known.any():
        return None
    predicted, observed, weights = predicted[known], observed[known], weights[known].astype(np.float64)
    places = np.clip((predicted * NUM_BINS).astype(np.int64), 0, NUM_BINS - 1)

    def summed(values: np.ndarray) -> np.ndarray:
        return np.bincount(places, weights=values, minlength=NUM_BINS)

    num_groups = np.bincount(places, minlength=NUM_BINS)
    bins = np.flatnonzero(num_groups)
    total = summed(weights)[bins]
    mean, right = summed(weights * predicted)[bins] / total, summed(weights * observed)[bins] / total
    chance = np.sqrt(summed(weights * predicted * (1 - predicted))[bins])
    distance = float((total * np.abs(right - mean)).sum() / total.sum())
    return Calibration(bins, mean, right, _NORMAL_95 * chance / total, num_groups[bins], distance)


@dataclass(frozen=True)
class Mover:
    """A prompt and the pass rates observed for it."""

    prompt: int  # index in the data set
    steps: np.ndarray  # (K,) int64
    pass_rates: np.ndarray  # (K,) float64

    @property
    def change(self) -> float:
        """The change of the pass rate from the first to the last observation."""
        return float(self.pass_rates[-1] - self.pass_rates[0])


def movers(observations: Observations, sampled: set[int], most: int) -> list[Mover]:
    """Return the prompts in `sampled` whose pass rate moved most from the first to the last observation.

    Of equal ones the prompt observed more often comes first, as it is surer, then the lower index.
    """
    known = np.isfinite(observations.pass_rates) & np.isin(observations.prompts, list(sampled))
    prompts, steps, rates = (
        values[known] for values in (observations.prompts, observations.steps, observations.pass_rates)
    )
    order = np.argsort(prompts, kind="stable")
    edges = np.flatnonzero(np.diff(prompts[order])) + 1
    found = [
        Mover(int(prompts[own[0]]), steps[own], rates[own]) for own in np.split(order, edges) if len(own)
    ]
    found = [mover for mover in found if mover.change]
    found.sort(key=lambda mover: (-abs(round(mover.change, 6)), -len(mover.steps), mover.prompt))
    return found[:most]


def transitions(looks: Sequence[TableLook], name: str) -> list[tuple[int, int, np.ndarray]]:
    """Return (step before, step after, (10, 10) counts) of consecutive looks. Args: name: weight or pass_rate."""
    found = []
    for before, after in itertools.pairwise(looks):
        if (counts := after.transitions[name]) is not None:
            found.append((before.step, after.step, counts))
    return found
