"""The names of the curriculum's metrics, and the check of those that a run asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mmr1_ds.errors import UserError

LEARNABILITY = "learnability"
LEARNABILITY_SQUARED = "learnability-squared"
GRADIENT_PROBABILITY = "gradient-probability"
SELF_BLEU = "self-bleu"
DISTINCT = "distinct-n"
EDIT_DISTANCE = "edit-distance"
OUTCOME_METRICS = (LEARNABILITY, LEARNABILITY_SQUARED, GRADIENT_PROBABILITY)  # of the pass rate alone
METRICS = (*OUTCOME_METRICS, SELF_BLEU, DISTINCT, EDIT_DISTANCE)
FEATURE_WEIGHT = "curriculum/feature_weight"  # how far the features' regression is trusted, [0, 1]
# Of the variance of the logits of prompts never seen, the categories' aside, what the features explain, [0, 1).
FEATURE_EXPLAINED_FRACTION = "curriculum/feature_explained_fraction"
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
    """Say whether the costly metric was asked for."""
    return any(canonical_metric(name) == EDIT_DISTANCE for name in metrics)
