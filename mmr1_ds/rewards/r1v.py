"""The built-in reward `r1v`: half the answer in its `<answer>` block, strictly compared, half the format."""

from __future__ import annotations

from typing import Any

from mmr1_ds.rewards.answers import answers_equal
from mmr1_ds.rewards.tagged import tag_format, tagged_answer, with_opening


def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.5) -> list[dict[str, float]]:
    """Score responses: accuracy and format are each 0 or 1.

    Args: reward_inputs: dictionaries with `response` and `ground_truth`; format_weight: in [0, 1].
    """
    return [
        _score(with_opening(item["response"], item.get("prompt", "")), item["ground_truth"], format_weight)
        for item in reward_inputs
    ]


def _score(response: str, ground_truth: str, format_weight: float) -> dict[str, float]:
    accuracy, format_score = accuracy_reward(response, ground_truth), tag_format(response)
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "format": format_score, "accuracy": accuracy}


def accuracy_reward(response: str, ground_truth: str) -> float:
    """Return 1 when the committed answer is the ground truth. Upstream gives 0.1 to wrong ones that it can read."""
    answer = tagged_answer(response)
    return 1.0 if answer is not None and answers_equal(answer, ground_truth) else 0.0
