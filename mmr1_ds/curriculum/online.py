"""The curriculum table of the online refresh: beliefs that the training's own responses keep up to date.

P = prompts in the data set. See `estimator` for the beliefs; here are diversity, the score, and the bookkeeping.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mmr1_ds.config import DataConfig
from mmr1_ds.curriculum.estimator import FilterSettings, LogitFilter
from mmr1_ds.curriculum.group_sizes import SizeRange, group_sizes
from mmr1_ds.curriculum.metric_names import OUTCOME_METRICS, canonical_metric
from mmr1_ds.curriculum.prompt_ids import saved_positions
from mmr1_ds.curriculum.scores import metric_value
from mmr1_ds.curriculum.statistics import PromptStatistics
from mmr1_ds.errors import UserError

_MAX_CATEGORIES = 65_535
_PARTS = 8  # of known rates


class OnlineTable:
    """Scores of all prompts, learned from every group that is rolled out."""

    def __init__(
        self,
        prompt_ids: Sequence[str],
        fingerprint: str,
        categories: Sequence[str],
        data: DataConfig,
        num_responses: int,
        features: np.ndarray | None = None,
    ) -> None:
        """
        Args:
            prompt_ids, categories: (P,), stable across runs.
            fingerprint: of the data set; a saved table of another one is refused.
            num_responses: N of a training group.
            features: (P, D) int8 of the prompts; None: categories alone say what prompts have in common.
        Raises: UserError for more categories than the table can hold.
        """
        self.prompt_ids, self.fingerprint = prompt_ids, fingerprint
        metrics = [canonical_metric(name) for name in data.curriculum_metrics]
        weighted = list(zip(metrics, data.curriculum_metric_weights, strict=True))
        self._outcome_metrics = [(name, weight) for name, weight in weighted if name in OUTCOME_METRICS]
        self._diversity_metrics = [(name, weight) for name, weight in weighted if name not in OUTCOME_METRICS]
        settings = FilterSettings(score_floor=data.curriculum_weight_floor)
        numbers, names = _numbered(categories, data.category_key)
        self._category_key = data.category_key
        self._category_digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
        self._filter = LogitFilter(len(prompt_ids), numbers, num_responses, settings, features)
        self._diversity = np.full(len(prompt_ids), np.nan, dtype=np.float32)  # of the last training group
        self._weights: np.ndarray | None = None
        self._floor = data.curriculum_weight_floor

    def __len__(self) -> int:
        return len(self.prompt_ids)

    @property
    def sampling_weights(self) -> np.ndarray:
        """(P,) float32 in (0, 1], read only; a new array whenever it changes."""
        if self._weights is None:
            self._weights = self._score()
            self._weights.flags.writeable = False
        return self._weights

    def _score(self) -> np.ndarray:
        """Compute the expected VPS: outcome metrics from the beliefs, diversity as last measured, else its mean."""
        if not self._diversity_metrics and len(self._outcome_metrics) == 1 and self._outcome_metrics[0][1] > 0.0:
            return self._filter.weights(self._outcome_metrics[0][0])
        score = np.zeros(len(self), dtype=np.float32)
        for name, weight in self._outcome_metrics:
            # Sharpened weights reach 1; back to the metric's own scale, or the metrics would not add up as asked.
            score += np.float32(weight * self._filter.utility(name).max()) * self._filter.weights(name)
        if self._diversity_metrics:
            score += self._diversity_scores()
        low, high = score.min(), score.max()
        if low == high:
            return np.ones(len(self), dtype=np.float32)
        # As with a full refresh: what all prompts have in common must not flatten the weights.
        return np.float32(self._floor) + np.float32(1.0 - self._floor) * (score - low) / (high - low)

    def sampled_scores(self, noise: np.ndarray) -> np.ndarray:
        """Draw a VPS for each prompt from what is believed of it, (P,) float32. Args: noise: (P,), standard normal."""
        score = np.zeros(len(self), dtype=np.float32)
        for name, weight in self._outcome_metrics:
            score += np.float32(weight) * self._filter.sampled_utility(name, noise)
        return score + self._diversity_scores() if self._diversity_metrics else score

    def group_sizes(self, indices: np.ndarray, num_responses: int, sizes: SizeRange) -> np.ndarray:
        """The responses that each prompt of a batch gets, (B,) int64; see `group_sizes`. Args: indices: (B,)."""
        return group_sizes(*self._filter.belief(indices), num_responses, sizes)

    def unseen_steps(self) -> np.ndarray:
        """Steps since each prompt was last observed, (P,) int32; see `LogitFilter.unseen_steps`."""
        return self._filter.unseen_steps()

    def _diversity_scores(self) -> np.ndarray:
        """The weighted diversity as last measured, else its mean, (P,) float32."""
        known = ~np.isnan(self._diversity)
        mean = self._diversity[known].mean() if known.any() else 0.0
        return np.where(known, self._diversity, np.float32(mean))

    def probes(self, num_probes: int, exclude: np.ndarray) -> np.ndarray:
        """The stalest prompts outside `exclude`, (K,) int64, K <= num_probes."""
        return self._filter.probes(num_probes, exclude)

    def known_pass_rates(self) -> np.ndarray:
        """E[p] of the prompts that were observed, (P,); NaN for the others, for which there is the prior alone."""
        seen = self._filter.last_seen_step >= 0
        rates = np.full(len(self), np.nan)
        rates[seen] = self._filter.predicted_pass_rates(np.flatnonzero(seen))
        return rates

    def predicted_pass_rates(self, indices: np.ndarray) -> np.ndarray:
        """E[p] of the next response, (K,) in (0, 1)."""
        return self._filter.predicted_pass_rates(indices)

    def finish_step(self, step: int, observed: Sequence[PromptStatistics], trained: np.ndarray) -> None:
        """Learn from all groups of a step, and move on by one. Args: trained: (K,) prompts of the training groups."""
        indices = np.array([prompt.index for prompt in observed], dtype=np.int64)
        num_responses = np.array([prompt.num_responses for prompt in observed], dtype=np.int64)
        num_scored = num_responses - np.array([prompt.num_unscored for prompt in observed], dtype=np.int64)
        # Successes are whole numbers mostly; as such their sum does not depend on the order of the ranks.
        num_right = np.round(np.array([prompt.pass_rate for prompt in observed]) * num_scored, 6)
        self._filter.observe(indices, num_right, num_scored)
        self._filter.predict_step(trained)
        if self._diversity_metrics:
            self._remember_diversity(observed)
        self._weights = None

    def begin_from(self, indices: np.ndarray, num_right: np.ndarray, num_answers: np.ndarray) -> None:
        """Take in what was measured before the first step, as if all had been asked in step 0. Args: (K,) each."""
        # In parts where there are features: how far these are trusted follows from how they predict what comes after.
        parts = _PARTS if self.knows_features else 1
        for part in range(parts):
            self._filter.observe(indices[part::parts], num_right[part::parts], num_answers[part::parts])
        self._weights = None

    @property
    def knows_features(self) -> bool:
        """Whether there are features that tell any prompts apart."""
        return self._filter.knows_features

    def take_features(self, features: np.ndarray) -> None:
        """Put features, (P, D) int8, in the place of those that say nothing; see `LogitFilter.take_features`."""
        self._filter.take_features(features)
        self._weights = None

    def _remember_diversity(self, observed: Sequence[PromptStatistics]) -> None:
        """Keep the diversity of training groups, not of probes: their few responses resemble each other less."""
        values = defaultdict(list)
        for prompt in observed:
            if not prompt.is_probe:
                found = [weight * metric_value(prompt, name) for name, weight in self._diversity_metrics]
                values[prompt.index].append(math.fsum(found))
        for index, of_groups in values.items():  # a prompt drawn twice has two; fsum's result has no order
            self._diversity[index] = math.fsum(of_groups) / len(of_groups)

    def metrics(self) -> dict[str, float]:
        """The estimator's learned parameters, as `curriculum/estimator_*` and `curriculum/feature_*`."""
        return self._filter.metrics()

    def columns(self) -> dict[str, np.ndarray]:
        """The arrays that `load` needs beside the prompt ids, no copies."""
        return {"diversity": self._diversity} | self._filter.arrays()

    def numbers(self) -> dict[str, Any]:
        """The numbers that `load` needs, for JSON."""
        return self._filter.state_dict()["numbers"] | {
            "categories": self._category_digest,
            "diversity_metrics": [list(pair) for pair in self._diversity_metrics],
        }

    def load(self, arrays: Mapping[str, np.ndarray], numbers: Mapping[str, Any], fingerprint: str) -> np.ndarray:
        """Take over a saved table. Returns and raises as `saved_positions`; UserError for other categories too."""
        positions = saved_positions(arrays, fingerprint, self.prompt_ids, self.fingerprint)
        if numbers["categories"] != self._category_digest:
            raise UserError(
                f"data.category_key={self._category_key} gives other categories than the checkpoint's curriculum has; "
                "keep it, or set trainer.resume=false"
            )
        self._filter.load_state_dict({"arrays": arrays, "numbers": numbers}, positions)
        self._diversity = arrays["diversity"][positions]
        if numbers["diversity_metrics"] != [list(pair) for pair in self._diversity_metrics]:
            self._diversity[:] = np.nan  # weighed otherwise: not comparable with what comes
        self._weights = None
        return positions


def _numbered(categories: Sequence[str], category_key: str | None) -> tuple[np.ndarray, list[str]]:
    """Each category's number in the sorted list of their names, (P,) uint16: the same in every run; and that list."""
    names: set[str] = set()
    for name in categories:
        names.add(name)
        if len(names) > _MAX_CATEGORIES:
            raise UserError(
                f"data.category_key={category_key} has more than {_MAX_CATEGORIES} values; "
                "name a column that groups prompts, or null"
            )
    ordered = sorted(names)
    numbers = {name: number for number, name in enumerate(ordered)}
    return np.fromiter((numbers[name] for name in categories), dtype=np.uint16, count=len(categories)), ordered
