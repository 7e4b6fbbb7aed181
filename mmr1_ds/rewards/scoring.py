"""Rewards of rollout groups."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from mmr1_ds.records import GroupRewards, RolloutGroup, ScoredGroup
from mmr1_ds.rewards.pool import RewardItem, RewardPool, RewardResult

RESPONSES, FAILED, UNSCORED = "reward/num_responses", "reward/num_failed", "reward/num_unscored"
_BY_KIND = {
    "timeout": "reward/num_timeouts",
    "crash": "reward/num_crashes",
    "invalid": "reward/num_invalid",
    "error": "reward/num_errors",
    "unscored": UNSCORED,
}
COUNTED = (RESPONSES, FAILED, *_BY_KIND.values())
RewardCounts = Counter[str]  # of one call's responses, by these names: all, those that failed, and these by kind


def score_groups(
    pool: RewardPool, groups: Sequence[RolloutGroup], decode: Callable[[Sequence[int]], str]
) -> tuple[list[ScoredGroup], RewardCounts]:
    """Score every response of this rank's groups in one round of the pool.

    Args: groups: G groups of N responses, N may differ; decode: token ids to the text the reward reads.
    Returns: the groups in order with their rewards, and how many responses failed. Unknown ones have accuracy NaN.
    """
    items = []
    for number, group in enumerate(groups):
        prompt, truth = decode(group.prompt.token_ids), group.prompt.ground_truth
        columns, prompt_ids = group.prompt.columns(), group.prompt.token_ids
        messages = group.prompt.messages() if pool.takes_messages else ()
        for response in group.responses:
            ids = response.token_ids.tolist()
            items.append(RewardItem(decode(ids), len(ids), truth, prompt, number, columns, prompt_ids, ids, messages))
    results = pool.score(items)
    scored, start = [], 0
    for group in groups:
        stop = start + len(group.responses)
        scored.append(ScoredGroup(group, _group_rewards(results[start:stop])))
        start = stop
    return scored, _count(results)


def _group_rewards(results: list[RewardResult]) -> GroupRewards:
    """Put the results of one group together; a part that a response lacks counts 0 there, and NaN where it is unknown
    or does not apply.

    An unknown response (unscored, or failed and masked) takes the mean reward of the others: it teaches neither way.
    """
    names = sorted({name for result in results for name in result.parts})
    overall = np.array([result.overall for result in results], dtype=np.float32)
    accuracy = np.array([result.accuracy for result in results], dtype=np.float32)
    is_unknown = np.isnan(accuracy)
    if is_unknown.any() and not is_unknown.all():
        overall[is_unknown] = _mean(overall[~is_unknown])
    parts = {name: np.array([result.parts.get(name, 0.0) for result in results], dtype=np.float32) for name in names}
    for values in parts.values():
        values[is_unknown] = np.nan
    return GroupRewards(
        overall=overall,
        accuracy=accuracy,
        failed=np.array([result.failure is not None for result in results], dtype=bool),
        parts=parts,
    )


def _mean(values: np.ndarray) -> np.float32:
    """The mean, exactly their value where all are equal: a rounded mean would make a constant group vary."""
    return np.float32(values[0] if (values == values[0]).all() else values.mean(dtype=np.float64))


def _count(results: list[RewardResult]) -> RewardCounts:
    counts = Counter(_BY_KIND[result.failure] for result in results if result.failure)
    return counts + Counter({RESPONSES: len(results), FAILED: counts.total()})
