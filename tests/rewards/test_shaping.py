"""The parts and sums of r1v and the openr1 rewards against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmr1_ds.rewards import r1v
from mmr1_ds.rewards.openr1 import OpenR1Reward
from mmr1_ds.rewards.shaping import cosine_length, repetition_penalty
from mmr1_ds.rewards.tagged import tag_format, tagged_answer

VALUES = {"min_value_wrong": -1.0, "max_value_wrong": -0.5, "min_value_correct": 0.5, "max_value_correct": 1.0}
GOOD = "<think>a</think>\n<answer>so \\boxed{7}</answer>"


# --- length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("is_correct", "length", "expected"),
    [
        (True, 0, 1.0), (True, 100, 0.75), (True, 200, 0.5), (True, 300, 0.5), (True, 10**9, 0.5),
        (True, 50, 0.5 + 0.5 * (1 + math.sqrt(0.5)) / 2),
        (False, 0, -1.0), (False, 100, -0.75), (False, 200, -0.5), (False, 401, -0.5), (False, 10**9, -0.5),
    ],
)  # fmt: skip
def test_cosine_length(is_correct, length, expected):
    assert cosine_length(is_correct, length, VALUES, 200) == pytest.approx(expected, abs=1e-12)


@given(st.booleans(), st.integers(0, 10**6), st.integers(0, 10**6), st.integers(1, 10**5))
def test_cosine_length_is_monotonic_and_bounded(is_correct, length, other, max_length):
    short, long = (cosine_length(is_correct, n, VALUES, max_length) for n in sorted((length, other)))
    low, high = (0.5, 1.0) if is_correct else (-1.0, -0.5)
    assert low <= min(short, long) and max(short, long) <= high
    assert short >= long if is_correct else short <= long


# --- repetition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("", 0.0),
        ("word " * 39, 0.0),
        ("word " * 40, 0.0),  # one n-gram, once
        ("word " * 41, -0.5 * 1 / 2),
        ("Word word " * 50, -0.5 * 60 / 61),  # capitals do not count
        (" ".join(map(str, range(401))), 0.0),
        (" ".join(map(str, [*range(40), *range(40)])), -0.5 * 1 / 41),  # the first 40 come twice
    ],
)
def test_repetition_penalty(response, expected):
    assert repetition_penalty(response) == pytest.approx(expected, abs=1e-12)


def test_repetition_penalty_with_short_n_grams():
    assert repetition_penalty("a b a b a", ngram_size=2, max_penalty=-1.0) == pytest.approx(-0.5)  # ab ba ab ba


# --- tags ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, 1),
        ("\n< think >a\nb</ think ><answer>7</answer>\n", 1),
        ("<think></think><answer></answer>", 1),
        ("<think>a</think>so<answer>7</answer>", 0),
        ("hm <think>a</think><answer>7</answer>", 0),
        ("<think>a</think><answer>7</answer>.", 0),
        ("<think>a</think><answer>7</answer><answer>8</answer>", 0),
        ("<think>a<think>b</think><answer>7</answer>", 0),
        ("<answer>7</answer><think>a</think>", 0),
        ("<think>a<answer>7</answer></think>", 0),
        ("<think>a</think>\\boxed{7}", 0),
        ("", 0),
    ],
)
def test_tag_format(response, expected):
    assert tag_format(response) == expected


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (GOOD, "7"),
        ("<think>a</think><answer> 7 </answer>", "7"),
        ("<answer>7</answer>", "7"),
        ("<think>a</think><answer>\\boxed{7} or \\boxed{8}</answer>", "8"),
        ("<think><answer>7</answer></think>", None),  # inside the reasoning
        ("<think><answer>7</answer>", None),  # cut off
        ("<think>a</think><answer>7", None),
        ("<think>a</think><answer>7</answer><answer>8</answer>", None),
        ("<think>a</think><answer>\\boxed{7</answer>", None),
        ("<think>a</think><answer> </answer>", None),
        ("<think>a</think>\\boxed{7}", None),
        ("", None),
    ],
)
def test_tagged_answer(response, expected):
    assert tagged_answer(response) == expected


# --- sums ---------------------------------------------------------------------------------------------------------


def item(response, length=100, truth="7"):
    return {"response": response, "response_length": length, "ground_truth": truth, "prompt": ""}


def test_r1v_is_half_accuracy_and_half_format():
    right, wrong, bare = r1v.compute_score([item(GOOD), item(GOOD, truth="8"), item("<answer>7</answer>")])
    assert right == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
    assert wrong == {"overall": 0.5, "format": 1.0, "accuracy": 0.0}  # upstream gives 0.1 for a wrong answer
    assert bare == {"overall": 0.5, "format": 0.0, "accuracy": 1.0}


def test_openr1_adds_its_four_parts():
    reward = OpenR1Reward(VALUES, 200, None)
    looping = (
        f"<think>{'so ' * 99}so</think><answer>\\boxed{{8}}</answer>"  # "<think>so", 98 times "so", "so</think>..."
    )
    right, wrong = reward.compute_score([item(GOOD), item(looping, length=200)])
    assert right == {
        "overall": 2.75,
        "accuracy": 1,
        "format": 1,
        "cosine_len": pytest.approx(0.75),
        "repetition_penalty": 0,
    }
    num_words, num_distinct = 100, 3
    penalty = -0.5 * (1 - num_distinct / (num_words - 39))
    assert wrong["repetition_penalty"] == pytest.approx(penalty)
    assert wrong["overall"] == pytest.approx(0 + 1 - 0.5 + penalty)
