"""Truths in wrappers, and chat templates that open the reasoning."""

from __future__ import annotations

import pytest

from mmr1_ds.commands.data.figures import check_reward
from mmr1_ds.config import RewardConfig
from mmr1_ds.rewards import math, r1v
from mmr1_ds.rewards.truths import is_unclear, read_truth

TRUTHS = [
    ("2", "2"), (" 2 ", "2"), ("<answer> 2 </answer>", "2"), ("48 / 2 = 24\n48 + 24 = 72\n#### 72", "72"),
    ("#### 1,234", "1,234"), ("So $x = \\boxed{\\frac{1}{2}}$.", "\\frac{1}{2}"), ("\\boxed{3}", "3"),
    ("<think>a</think><answer>\\boxed{5}</answer>", "5"), ("First \\boxed{1}, then \\boxed{2}", "2"),
    ("The answer is 42.", "42"), ("Final answer: 42", "42"), ("Answer: C", "C"), ("So 6 + 6.\nANSWER: 12", "12"),
    ("2 + 2, so the answer is: $4$.", "$4$"), ("**Answer:** 7", "7"), ("no answer", "no answer"),
    ("the answer to life", "the answer to life"), ("(A) 12", "(A) 12"), ("\\boxed{", "\\boxed{"),
    ("<answer>2", "<answer>2"), ("<answer>5</answer><answer>5</answer>", "5"), ("<solution>5</solution>", "5"),
    ("<final_answer>5</final_answer>", "5"), ("<|begin_of_box|>5<|end_of_box|>", "5"), ("[ANSWER] 5 [/ANSWER]", "5"),
    ("So \\(x\\). <|begin_of_box|>B<|end_of_box|>", "B"), ("Ans: 5", "5"),
    ("ans = 5", "5"), ("答案\N{FULLWIDTH COLON}5", "5"),
    ("故答案为\N{FULLWIDTH COLON}5", "5"), ("答案是否定的", "答案是否定的"), ("### 5", "5"), ("=5", "5"),
    ("5<|im_end|>", "5"),
    ("The correct option is B", "B"), ("The correct option is (B).", "(B)"),
    ("<answer>5</answer><answer>6</answer>", "<answer>5</answer><answer>6</answer>"),
    ("The final answer is $\\frac{1}{2}$. I hope it is correct.", "$\\frac{1}{2}$"),
    ("Final Answer: The final answer is $7$. I hope it is correct.", "$7$"),
    (r"\boxed{5}, \boxed{6}", "5, 6"), (r"So the answer is: $\boxed{5}$ or $\boxed{6}$.", "5 or 6"),
    (r"$x = \boxed{5}$ and $y=\boxed{6}$", "x = 5 and y=6"), (r"\boxed{5} \boxed{5}", "5"), (r"x = \boxed{5}", "5"),
]  # fmt: skip


@pytest.mark.parametrize(("truth", "inside"), TRUTHS)
def test_a_truth_is_read_by_what_is_inside(truth, inside):
    assert read_truth(truth) == inside
    response = f"<think>a</think><answer>\\boxed{{{inside}}}</answer>"
    if not inside.startswith(("\\boxed{", "<answer>")):  # no response can box those
        for reward in (math, r1v):
            assert reward.compute_score([{"response": response, "ground_truth": truth}])[0]["accuracy"] == 1.0


def test_the_survey_says_how_truths_are_read():
    answers = ["7", "<answer> 2 </answer>", "so #### 72", "42\nfor 6 x 7 is 42"]
    check = check_reward(answers, RewardConfig("math"), 1)
    assert (check.num_answers, check.num_refused) == (4, 0)
    assert check.wrapped == [("<answer> 2 </answer>", "2"), ("so #### 72", "72")]
    assert check.num_prose == 1


UNCLEAR = [
    "It is 5.", "so 5", "Therefore x = 5", "Solution: 5", "<b>5</b>", "<answer>5</answer><answer>6</answer>", '["5"]',
    "Thus the result is 7, as desired.", "5 (approx)", "x=5 is the answer", "1. 5", "2) 7", "1\x00", "nan", "None",
    "null", "\\text{Answer: }5", "5 # by hand",
]  # fmt: skip
CLEAR = [
    "7", "May 5, 2020", "x = 5", "5 cm", "[0, 1]", "a<c", "USD 5", "No solution", "\\sin 5", "\\text{Team 5}", "1.5",
    "(1) 5 (2) 7", "\\approx 5", "1,200", "\\emptyset", "none", "Paris is required",
]  # fmt: skip


def test_the_survey_says_which_truths_have_more_than_the_answer():
    assert all(map(is_unclear, UNCLEAR)) and not any(map(is_unclear, CLEAR))
    check = check_reward([*CLEAR, *UNCLEAR], RewardConfig("math"), 1)
    assert check.num_unclear == len(UNCLEAR) and check.unclear == UNCLEAR[: len(check.unclear)]


def test_a_lone_letter_may_mean_the_answer():
    """Truths of `A: 5` are options where there are others."""
    assert check_reward(["A: 5", "A: 6"], RewardConfig("math"), 1).unclear == ["A: 5", "A: 6"]
    assert check_reward(["A: 5", "B: 6"], RewardConfig("math"), 1).unclear == []


OPENINGS = [
    "<|im_start|>assistant\n<think>\n", "assistant\n<think>", "assistant\n<think>\n\n</think>\n\n",
    "\nassistant\n<think>\nLet me look. ", "<|im_start|>assistant\n<think>Let me",
    "<\uff5cAssistant\uff5c><think>\nFirst, ",
]  # fmt: skip


@pytest.mark.parametrize("opening", OPENINGS)
@pytest.mark.parametrize("reward", [math, r1v])
def test_a_template_may_open_the_reasoning(reward, opening):
    closing = "" if "</think>" in opening else "so</think>"
    item = {"response": closing + "<answer>\\boxed{7}</answer>", "ground_truth": "7", "prompt": "7?" + opening}
    assert reward.compute_score([item])[0] == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}
    assert reward.compute_score([item | {"prompt": "7?assistant\n"}])[0]["format"] == 0.0
    if closing:
        unclosed = item | {"response": "so \\boxed{7}"}
        assert reward.compute_score([unclosed])[0]["overall"] == 0.0


@pytest.mark.parametrize("reward", [math, r1v])
def test_a_template_may_open_the_answer_alone(reward):
    item = {"response": "\\boxed{7}</answer>", "ground_truth": "7", "prompt": "7?\nassistant\n<answer>"}
    assert reward.compute_score([item])[0] == {"overall": 1.0, "format": 1.0, "accuracy": 1.0}


@pytest.mark.parametrize("prompt", ["Use <think> tags.\nassistant\n", "a\nassistant\n<think>b\nuser\nc\nassistant\n"])
def test_tags_of_another_turn_open_nothing(prompt):
    item = {"response": "<think>a</think>\\boxed{7}", "ground_truth": "7", "prompt": prompt}
    assert math.compute_score([item])[0]["format"] == 1.0
