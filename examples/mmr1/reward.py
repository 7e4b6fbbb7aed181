"""The paper's reward: a tenth for the format, the rest for the answer, as the built-in `math` computes it."""

from mmr1_ds.rewards.math import compute_score


def score(items):
    """Change this function for a reward of your own; `worker.reward.reward_function: math` is the same as it is."""
    return compute_score(items, format_weight=0.1)
