"""The ground truths of a data set: how varied they are, and whether the reward can recognise them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmr1_ds.commands.data.numbers import SHOWN
from mmr1_ds.config import RewardConfig
from mmr1_ds.rewards.pool import RewardItem, RewardPool

MOST_FREQUENT = 5
NUM_SCORED = 1000  # at most so many answers are given to the reward
BY_RULE = ("math", "r1v", "openr1_wo_LMM")  # built-in rewards without a judge


@dataclass(frozen=True)
class AnswerSummary:
    """The answers of the rows that a run can use."""

    num_distinct: int  # compared as texts
    most_frequent: list[tuple[str, int]]  # answer, rows
    majority_fraction: float  # share of rows with the most frequent answer: the score of always giving it, [0, 1]
    longest: int  # characters


@dataclass(frozen=True)
class RewardCheck:
    """The reward's verdict on the distinct answers, each boxed as it is and given as a right response."""

    reward_function: str
    num_answers: int
    num_refused: int
    refused: list[str]  # the first few


def summarise_answers(answers: Sequence[str]) -> AnswerSummary | None:
    """Count the answers. Returns: None for no answers."""
    if not answers:
        return None
    counts = Counter(answers)
    most_frequent = counts.most_common(MOST_FREQUENT)
    return AnswerSummary(
        num_distinct=len(counts),
        most_frequent=most_frequent,
        majority_fraction=most_frequent[0][1] / len(answers),
        longest=max(map(len, counts)),
    )


def check_reward(answers: Sequence[str], reward: RewardConfig, seed: int) -> RewardCheck | None:
    """Check that a response which boxes the ground truth itself is right: if it is not, no response can be.

    Of more than NUM_SCORED distinct answers a seeded choice is checked. Returns: None where the form of a right
    response is not known: for a user's own reward, and for those that ask a judge.
    """
    distinct = list(dict.fromkeys(answers))
    if reward.reward_function not in BY_RULE or not distinct:
        return None
    if len(distinct) > NUM_SCORED:
        chosen = np.random.default_rng(seed).choice(len(distinct), NUM_SCORED, replace=False)
        distinct = [distinct[place] for place in sorted(chosen)]
    # In a process of its own with a time limit: comparing absurd formulas may take for ever.
    with RewardPool(dataclasses.replace(reward, num_workers=1)) as pool:
        results = pool.score([RewardItem(right_response(answer), 1, answer) for answer in distinct])
    refused = [answer for answer, result in zip(distinct, results, strict=True) if result.accuracy != 1.0]
    return RewardCheck(reward.reward_function, len(distinct), len(refused), refused[:SHOWN])


def right_response(answer: str) -> str:
    r"""Return a response in the form that all of BY_RULE read: reasoning, then an <answer> with a \boxed{}."""
    return f"<think>\n</think>\n<answer>\\boxed{{{answer}}}</answer>"
