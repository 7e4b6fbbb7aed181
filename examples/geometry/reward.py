"""Reward of geometry answers: the result in the last box, compared as numbers, lengths, angles and formulas."""

from mmr1_ds.rewards.answers import answers_equal
from mmr1_ds.rewards.boxes import last_boxed


def score(items):
    """Return nine tenths for the right result and a tenth for giving one in a box."""
    rewards = []
    for item in items:
        boxed = last_boxed(item["response"])
        accuracy = float(boxed is not None and answers_equal(boxed, item["ground_truth"]))
        in_box = float(boxed is not None)
        rewards.append({"overall": 0.9 * accuracy + 0.1 * in_box, "accuracy": accuracy, "format": in_box})
    return rewards
