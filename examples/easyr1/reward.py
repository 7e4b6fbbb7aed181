"""A reward file in EasyR1's interface: one call for a batch, its name and type stated in the file."""

from typing import Any

REWARD_NAME = "math_words"
REWARD_TYPE = "batch"


def compute_score(reward_inputs: list[dict[str, Any]], format_weight: float = 0.1) -> list[dict[str, float]]:
    if not isinstance(reward_inputs, list):
        raise ValueError("this reward is called with a batch")
    scores = []
    for item in reward_inputs:
        _, found, rest = item["response"].rpartition(r"\boxed{")
        answer = rest.partition("}")[0].strip()
        accuracy = 1.0 if found and answer == item["ground_truth"].strip() else 0.0
        in_format = 1.0 if found else 0.0
        overall = (1 - format_weight) * accuracy + format_weight * in_format
        scores.append({"overall": overall, "format": in_format, "accuracy": accuracy})
    return scores
