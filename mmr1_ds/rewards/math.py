"""The built-in reward `math`: a boxed answer, strictly compared, and the format it was asked for.

overall = (1 - format_weight) * accuracy + format_weight * format, EasyR1's weights and key names.
"""

from __future__ import annotations

from typing import Any

from mmr1_ds.rewards.answers import answers_equal
from mmr1_ds.rewards.boxes import last_boxed
from mmr1_ds.rewards.tagged import clean_tags, with_opening


def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    """Score responses: accuracy and format are each 0 or 1.

    Args: reward_inputs: dictionaries with `response` and `ground_truth`; format_weight: in [0, 1].
    """
    return [
        _score(with_opening(item["response"], item.get("prompt", "")), item["ground_truth"], format_weight)
        for item in reward_inputs
    ]


def _score(response: str, ground_truth: str, format_weight: float) -> dict[str, float]:
    response = clean_tags(response)
    accuracy = accuracy_reward(response, ground_truth)
    format_score = format_reward(response)
    overall = (1 - format_weight) * accuracy + format_weight * format_score
    return {"overall": overall, "format": format_score, "accuracy": accuracy}


def format_reward(response: str) -> float:
    r"""Return 1 for `<think>...</think>` and then a non-empty `\boxed{...}`, with or without `<answer>` around it.

    Each tag occurs once, nothing but space stands before the first, between the two parts or after the last:
    nested or repeated tags are how a policy games the format.
    """
    if response.count("<think>") != 1 or response.count("</think>") != 1:
        return 0.0
    before, _, rest = response.partition("<think>")
    reasoning, closed, final = rest.partition("</think>")
    if before.strip() or not closed or "answer>" in reasoning:
        return 0.0
    num_opened, num_closed = final.count("<answer>"), final.count("</answer>")
    if (num_opened, num_closed) == (1, 1):
        before, _, rest = final.partition("<answer>")
        final, closed, after = rest.partition("</answer>")
        if before.strip() or not closed or after.strip():
            return 0.0
    elif num_opened or num_closed:
        return 0.0
    boxed = last_boxed(final)
    return 1.0 if boxed is not None and boxed.strip() else 0.0


def accuracy_reward(response: str, ground_truth: str) -> float:
    r"""Return 1 when the last balanced `\boxed{...}` after the reasoning equals the ground truth.

    Boxes inside the reasoning do not count, nor does anything when the reasoning was never closed: a response cut
    off half way has no final answer.
    """
    _, closed, final = response.rpartition("</think>")
    if not closed and "<think>" in response:
        return 0.0
    answer = last_boxed(final)
    return 1.0 if answer is not None and answers_equal(answer, ground_truth) else 0.0
