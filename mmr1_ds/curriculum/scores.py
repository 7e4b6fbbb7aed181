"""The score that draws a prompt: VPS = sum_k w_k * metric_k (arXiv 2509.21268, section 3).

Every metric points up: higher means that the responses to the prompt vary more, so sample it more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mmr1_ds.curriculum.metric_names import DISTINCT, EDIT_DISTANCE, OUTCOME_METRICS, SELF_BLEU, canonical_metric

if TYPE_CHECKING:
    from mmr1_ds.curriculum.statistics import PromptStatistics


def metric_value(statistics: PromptStatistics, name: str) -> float:
    """One metric of one prompt. NaN where it is unknown: no known accuracy, or an edit distance never computed.

    For gradient-probability a group has as many responses as were rolled out. A group of one response has no
    diversity: every diversity metric is 0, not 1 - self-BLEU = 1.
    """
    metric = canonical_metric(name)
    if metric in OUTCOME_METRICS:
        import numpy as np  # the diversity metrics do without

        from mmr1_ds.curriculum.utilities import utility_function

        return float(utility_function(metric)(np.asarray(statistics.pass_rate), statistics.num_responses))
    if statistics.num_responses < 2:
        return 0.0
    if metric == SELF_BLEU:
        return 1.0 - statistics.self_bleu
    if metric == DISTINCT:
        return statistics.distinct_3
    assert metric == EDIT_DISTANCE, metric
    return statistics.edit_distance


def variance_promotion_score(statistics: PromptStatistics, metrics: Sequence[str], weights: Sequence[float]) -> float:
    """VPS of one prompt; NaN if any of its metrics is unknown."""
    return math.fsum(weight * metric_value(statistics, name) for name, weight in zip(metrics, weights, strict=True))
