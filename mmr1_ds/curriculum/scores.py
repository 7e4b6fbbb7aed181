"""Metric names, and the score that draws a prompt: VPS = sum_k w_k * metric_k (arXiv 2509.21268, section 3).

Every metric points up: higher means that the responses to the prompt vary more, so sample it more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmr1_ds.errors import UserError

if TYPE_CHECKING:
    from mmr1_ds.curriculum.statistics import PromptStatistics

LEARNABILITY = "learnability"
LEARNABILITY_SQUARED = "learnability-squared"
GRADIENT_PROBABILITY = "gradient-probability"
SELF_BLEU = "self-bleu"
DISTINCT = "distinct-n"
EDIT_DISTANCE = "edit-distance"
OUTCOME_METRICS = (LEARNABILITY, LEARNABILITY_SQUARED, GRADIENT_PROBABILITY)  # of the pass rate alone
METRICS = (*OUTCOME_METRICS, SELF_BLEU, DISTINCT, EDIT_DISTANCE)
_ALIASES = {"self_bleu_123": SELF_BLEU, "distinct_3": DISTINCT, "edit_distance": EDIT_DISTANCE}  # upstream's spellings


def canonical_metric(name: str) -> str:
    """The guide's spelling of a metric name. Raises: UserError that lists the known names."""
    if name in METRICS:
        return name
    if name in _ALIASES:
        return _ALIASES[name]
    known = ", ".join(METRICS)
    aliases = ", ".join(_ALIASES)
    raise UserError(f"data.curriculum_metrics: unknown metric {name!r}; known: {known} (also {aliases})")


def check_metrics(metrics: Sequence[str], weights: Sequence[float]) -> None:
    """Check the names and that each has one finite weight. Raises: UserError."""
    for name in metrics:
        canonical_metric(name)
    if not metrics:
        raise UserError(f"data.curriculum_metrics is empty; name at least one of {', '.join(METRICS)}")
    if len(metrics) != len(weights):
        raise UserError(
            f"data.curriculum_metric_weights must have one weight a metric, "
            f"{len(metrics)} for {list(metrics)}, got {len(weights)}: {list(weights)}"
        )
    for weight in weights:
        if not math.isfinite(weight):
            raise UserError(f"data.curriculum_metric_weights must be finite numbers, got {weight}")


def needs_edit_distance(metrics: Sequence[str]) -> bool:
    """Whether the costly metric was asked for."""
    return any(canonical_metric(name) == EDIT_DISTANCE for name in metrics)


def metric_value(statistics: PromptStatistics, name: str) -> float:
    """One metric of one prompt. NaN where it is unknown: no known accuracy, or an edit distance never computed.

    For gradient-probability a group has as many responses as were rolled out. A group of one response has no
    diversity to speak of: every diversity metric is 0, not 1 - self-BLEU = 1.
    """
    metric = canonical_metric(name)
    if metric in OUTCOME_METRICS:
        import numpy as np  # the names alone do without

        from mmr1_ds.curriculum.utilities import utility_function

        return float(utility_function(metric)(np.asarray(statistics.pass_rate), statistics.num_responses))
    if statistics.num_responses < 2:
        return 0.0
    if metric == SELF_BLEU:
        return 1.0 - statistics.self_bleu
    return statistics.distinct_3 if metric == DISTINCT else statistics.edit_distance


def variance_promotion_score(statistics: PromptStatistics, metrics: Sequence[str], weights: Sequence[float]) -> float:
    """VPS of one prompt; NaN if any of its metrics is unknown."""
    return math.fsum(weight * metric_value(statistics, name) for name, weight in zip(metrics, weights, strict=True))
